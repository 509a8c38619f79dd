"""Fixed-point activations on the GPU: integers fit their limbs, whatever a block's largest value.

Every block of x has a largest value of its own, at the edges where rounding could carry it past the
largest integer: mantissas around powers of two, and those whose reciprocal rounds up. The rest of a
block is random normal. A limb that wrapped would be off by two times the largest value; the bounds
are half a step of the fixed point, element by element and row by row.
"""

import pytest
import torch
import torch.nn.functional as F

from int4q.kernels.cuda import decode
from int4q.kernels.cuda import experts as cuda_experts
from int4q.kernels.cuda.decode import Config, MatvecConfig
from int4q.kernels.triton import w4a8 as triton_w4a8
from int4q.kernels.weight import Weight

pytestmark = pytest.mark.gpu
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
N, K, GROUP = 96, 4096, 64
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
FLOAT32_SUM = 2.0**-20
SMALLEST_AMAX = 1e-30
"""The decode kernels' blocks are scaled as if they held at least this."""


def edges(top: int, dtype: torch.dtype) -> torch.Tensor:
    """Mantissas in [1, 2) of ``dtype``: next to powers of two, and where the scale rounds most."""
    bits = {BF16: 7, FP16: 10, FP32: 23}[dtype]
    near = torch.arange(0, min(2**bits, 300))
    sample = torch.randint(0, 2**bits, (200_000,)) if bits > 16 else torch.arange(2**bits)
    mantissa = 1 + torch.cat([near, 2**bits - 1 - near, sample]).double() / 2**bits
    exact = top / mantissa
    rounded_up = (top / mantissa.float()).double() / exact  # the kernel's reciprocal over the exact
    worst = rounded_up.argsort(descending=True)[:500]
    return torch.cat([mantissa[: 2 * len(near)], mantissa[worst]])


def activations(M: int, block: int, top: int, dtype: torch.dtype) -> torch.Tensor:
    """Random normal blocks, the first element of each one an edge, of either sign."""
    x = torch.randn(M, K // block, block)
    pick = edges(top, dtype)
    pick = pick[torch.randint(0, len(pick), (M, K // block))]
    largest = pick * 2.0 ** torch.randint(-6, 7, pick.shape)
    x *= largest.unsqueeze(-1) / 6
    x = torch.minimum(x.abs(), largest.unsqueeze(-1)) * x.sign()
    x[..., 0] = largest * torch.randint(0, 2, pick.shape).mul(2).sub(1)
    return x.flatten(1).to(dtype).cuda()


def make_weight():
    """Nibbles of a zero-mean weight, and both ends of the nibble in the blocks' first columns."""
    q = torch.randint(-8, 8, (N, K), device="cuda", dtype=INT8)
    q[::2, ::32], q[1::2, ::32] = -8, 7
    qdata = (q[:, 0::2] & 15) | (q[:, 1::2] << 4)
    scale = (torch.rand(K // GROUP, N, device="cuda") + 0.5) * 0.01
    zero_point = torch.randn(K // GROUP, N, device="cuda") * 0.01
    wide = [t.double().repeat_interleave(GROUP, 0).mT for t in (scale, zero_point)]
    return Weight(qdata, scale, zero_point, GROUP), q.double() * wide[0] + wide[1]


def check(y, x, w, block: int, top: int):
    exact, x = x.double() @ w.mT, x.double()
    amax = x.abs().unflatten(1, (-1, block)).amax(-1).clamp(min=SMALLEST_AMAX)
    step = amax.repeat_interleave(block, 1) / top
    # Half a step an element (and what rounding its scale adds), as if all errors had one sign.
    fixed = 0.501 * step @ w.abs().mT
    allowed = fixed + ROUNDING[y.dtype] * exact.abs() + FLOAT32_SUM * (x.abs() @ w.abs().mT)
    error = (y.double() - exact).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} of the bound"
    # Independent signs: a row's norm has a step / sqrt(12) an element; three times that.
    spread = (step**2 @ (w**2).mT).sum(1).sqrt()
    rounding = ROUNDING[y.dtype] * exact.norm(dim=1)
    assert (error.norm(dim=1) <= 3 / 12**0.5 * spread + rounding + 1e-5 * exact.norm(dim=1)).all()


WAYS = {  # M, how
    "matvec": (1, MatvecConfig(4, 8, 1, 4)),
    "fused": (1, Config(8, 2, 2, 2, fused=True)),
    **{f"ring-{M}": (M, None) for M in (2, 4, 8, 16)},
}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation,block,top", [(BF16, 128, 32639), (INT8, 32, 127)], ids=str)
def test_largest_values_fit_their_limbs(activation, block, top, way, dtype):
    M, config = WAYS[way]
    for _ in range(16 // M + 4):
        x = activations(M, block, top, dtype)
        weight, w = make_weight()
        y = decode.linear(x, weight, activation=activation, config=config)
        check(y, x, w, block, top)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_triton_int8(dtype):
    for M in (1, 4, 8):
        x = activations(M, 32, 127, dtype)
        weight, w = make_weight()
        check(triton_w4a8.linear(x, weight), x, w, 32, 127)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_experts(dtype):
    x = activations(12, 128, 32639, dtype)
    weight, w = make_weight()
    stack = Weight(*(t.expand(3, *t.shape).contiguous() for t in weight[:3]), GROUP)
    offs = torch.tensor([5, 5, 12], dtype=torch.int32, device="cuda")
    check(cuda_experts.int4_grouped_mm(x, stack, offs), x, w, 128, 32639)


@pytest.mark.parametrize("M", [1, 4, 16])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_beside_an_outlier(M, dtype):
    """A column that no weight meets sets the step of its 127 neighbours: 2^-16 of it, no more."""
    (qdata, scale, *_), _ = make_weight()
    qdata[:, 0] &= -16
    q = torch.stack([(qdata << 4) >> 4, qdata >> 4], -1).flatten(1).double()
    w = q * scale.double().repeat_interleave(GROUP, 0).mT
    x = torch.randn(M, K, device="cuda").to(dtype)
    x[:, 0] = 1e4
    weight = Weight(qdata, scale, torch.zeros_like(scale), GROUP)
    check(decode.linear(x, weight), x, w, 128, 32639)


@pytest.mark.parametrize("M", [1, 4, 16])
@pytest.mark.parametrize("size", [2.0**-149, 1e-38, 1e-32, 1e-30, 1e30, 2.0**119])
def test_tiny_and_huge_activations(M, size):
    weight, w = make_weight()
    x = (torch.rand(M, K, device="cuda") * 2 - 1) * size
    y = decode.linear(x, weight)
    assert y.isfinite().all()
    check(y, x, w, 128, 32639)


def test_infinity_is_nan_in_its_row_only():
    weight, w = make_weight()
    x = torch.randn(3, K, device="cuda")
    x[1, 77] = float("inf")
    y = decode.linear(x, weight)
    assert y[1].isnan().all()
    assert F.linear(x, w.float())[1].isinf().all()  # (what torch gives)
    check(y[::2], x[::2], w, 128, 32639)
