"""int4_matmul, int4_matvec and dequant_w4_to_bf16 as a caller tests them, and tightly in float64.

``int4_matmul`` is a GEMM on weights rounded to bfloat16 with float32 sums, whatever M is, so it
agrees with ``F.linear`` on those weights and not with the unrounded ones: the inputs here are such
that unrounded weights fail (asserted below). ``int4_matvec`` is the other way round.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

import int4q  # noqa: F401  (registers the ops)

# A bfloat16 result: half a unit in the last place, relative.
ROUNDING = 2.0**-8
# float32 sums, relative to the sum of magnitudes: tensor cores drop the bits below 2^-23 of their
# accumulator at each of K / 16 steps. Rounding the weights weighs 2^-9 / sqrt(K) and is far above.
FLOAT32_SUM = 2.0**-20
# Half a step of 16-bit fixed point, relative to the largest of 128 activations.
FIXED_POINT = 2.0**-16

ROWS = (1, 4, 7, 16, 17, 64, 300)
SHAPES = [  # N, K, group_size; the last two end in a part of any tile of K
    (256, 256, 32), (512, 512, 32), (2048, 2048, 128), (100, 160, 32), (130, 192, 64),
]  # fmt: skip
CASES = [(M, *shape) for shape in SHAPES for M in ROWS]
CASES += [(M, 12352, 2048, 128) for M in (1, 4)]  # N that no tile divides, and large


@functools.lru_cache(maxsize=2)
def _weight(N: int, K: int, group_size: int):
    """``randn [N, K]``, quantised symmetrically: offset-binary nibbles and bf16 scales."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(N + K)).unflatten(
        1, (-1, group_size)
    )
    w_scale = (w.abs().amax(-1) / 7).bfloat16()
    u = (w / w_scale.unsqueeze(-1)).round().clamp(-8, 7).flatten(1).to(torch.int8) + 8
    return u[:, 0::2] | (u[:, 1::2] << 4), w_scale


def weight(N, K, group_size, device):
    w_packed, w_scale = _weight(N, K, group_size)
    return w_packed.to(device), w_scale.to(device)


def unrounded(w_packed, w_scale, group_size):
    """The weights ``(u - 8) * scale`` in float64, where the product is exact."""
    u = torch.stack([w_packed & 0x0F, (w_packed >> 4) & 0x0F], dim=-1).flatten(-2).double()
    return (u - 8) * w_scale.double().repeat_interleave(group_size, dim=1)


def as_a_caller_tests(y, x, w_bf16):
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), F.linear(x, w_bf16).float(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("M,N,K,group_size", CASES)
def test_matmul_as_a_caller_tests_it(device, M, N, K, group_size):
    w_packed, w_scale = weight(N, K, group_size, device)
    x = torch.randn(M, K).bfloat16().to(device)
    y = torch.ops.int4q.int4_matmul(x, w_packed, w_scale, group_size)
    as_a_caller_tests(y, x, unrounded(w_packed, w_scale, group_size).bfloat16())


@pytest.mark.parametrize("M", [1, 4, 17])
def test_scales_that_rise_from_group_to_group(device, M):
    w_packed, w_scale = weight(64, 256, 32, device)
    w_scale = (0.1 * torch.arange(1, 9)).bfloat16().expand(64, 8).contiguous().to(device)
    x = torch.ones(M, 256).bfloat16().to(device)
    y = torch.ops.int4q.int4_matmul(x, w_packed, w_scale, 32)
    as_a_caller_tests(y, x, unrounded(w_packed, w_scale, 32).bfloat16())


@pytest.mark.parametrize("M", [1, 4, 7, 16, 64])
def test_strided_activations(device, M):
    w_packed, w_scale = weight(256, 256, 32, device)
    w = unrounded(w_packed, w_scale, 32).bfloat16()
    wide, tall = torch.randn(2 * M, 512).bfloat16().to(device), torch.randn(256, M).bfloat16()
    for x in (wide[::2, :256], wide[:M, ::2], wide[:M, 130:386], tall.to(device).T):
        as_a_caller_tests(torch.ops.int4q.int4_matmul(x, w_packed, w_scale, 32), x, w)


DEQUANTISED = [(1, 12352, 2048, 128), (1, 2048, 2048, 128), (1, 100, 160, 32), (1, 130, 192, 64)]
DEQUANTISED += [(4, 100, 160, 32), (16, 130, 192, 64)]


@pytest.mark.parametrize("M,N,K,group_size", DEQUANTISED)
def test_dequant_and_linear_is_matmul(device, M, N, K, group_size):
    w_packed, w_scale = weight(N, K, group_size, device)
    w = torch.ops.int4q.dequant_w4_to_bf16(w_packed, w_scale, group_size)
    assert torch.equal(w, unrounded(w_packed, w_scale, group_size).bfloat16())
    x = torch.randn(M, K).bfloat16().to(device)
    as_a_caller_tests(torch.ops.int4q.int4_matmul(x, w_packed, w_scale, group_size), x, w)


def within(y, x, w, fixed_point=0.0):
    """Element by element: one rounding of the result, and float32 sums (of fixed point)."""
    golden = x.double() @ w.double().T
    allowed = ROUNDING * golden.abs() + FLOAT32_SUM * (x.double().abs() @ w.double().abs().T)
    if fixed_point:
        # Errors of independent sign, uniform over half a step: 4 / sqrt(3) is seven deviations.
        blocks = F.pad(x.double().abs(), (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
        largest = blocks.amax(-1).repeat_interleave(128, dim=1)[:, : x.shape[1]]
        allowed += 4 * fixed_point * (largest**2 @ (w.double() ** 2).T).sqrt()
    return bool(((y.double() - golden).abs() <= allowed).all())


def rows_agree(y, x, w):
    """Row by row: all but 2 % of the results (those next to a tie) are the rounded float64 ones."""
    golden = (x.double() @ w.double().T).bfloat16()
    return bool(((y != golden).double().mean(dim=1) <= 0.02).all())


@pytest.mark.parametrize("M,N,K,group_size", CASES)
def test_matmul_rounds_its_weights_at_every_m(device, M, N, K, group_size):
    w_packed, w_scale = weight(N, K, group_size, device)
    exact = unrounded(w_packed, w_scale, group_size)
    rounded = exact.bfloat16()
    x = torch.randn(M, K).bfloat16().to(device)
    y = torch.ops.int4q.int4_matmul(x, w_packed, w_scale, group_size)
    assert within(y, x, rounded) and rows_agree(y, x, rounded)
    other = (x.double() @ exact.T).bfloat16()
    assert not within(other, x, rounded) and not rows_agree(other, x, rounded)


@pytest.mark.parametrize("N,K,group_size", [*SHAPES, (12352, 2048, 128)])
def test_matvec_keeps_its_weights(device, N, K, group_size):
    w_packed, w_scale = weight(N, K, group_size, device)
    exact = unrounded(w_packed, w_scale, group_size)
    x = torch.randn(1, K).bfloat16().to(device)
    y = torch.ops.int4q.int4_matvec(x, w_packed, w_scale, group_size)
    assert within(y, x, exact, FIXED_POINT)
    other = (x.double() @ exact.bfloat16().double().T).bfloat16()
    assert not within(other, x, exact, FIXED_POINT)
