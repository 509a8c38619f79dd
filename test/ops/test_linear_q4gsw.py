"""linear_q4gsw: values, gradients, strides, routing, packing, bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, kernel_preference, q4gsw
from int4q.kernels import linear_q4gsw
from int4q.kernels.registry import Problem, choose, explain

# Largest error over the root mean square of the outputs: float32 sums of K <= 2048 terms and,
# for few rows on a CPU, activations in 24-bit fixed point.
TOLERANCE = 1e-5


def weight(N, K, group_size, device="cpu", scale_dtype=torch.float32):
    """Random nibbles with both ends in each position, and another scale in every group."""
    weights = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    weights[0, :4] = torch.tensor([0x00, 0xFF, 0x0F, 0xF0], dtype=torch.uint8)
    scales = (1 + torch.arange(N * K // group_size).view(-1, N) % 97) / 1024
    return weights.to(device), scales.to(scale_dtype).to(device), group_size


def dequantized(weights, scales, group_size):
    """float64 ``[N, K]``, by broadcasting over the groups."""
    u = torch.stack([weights & 15, weights >> 4], dim=-1).flatten(1)
    return ((u.double() - 8).unflatten(1, (-1, group_size)) * scales.double().T[..., None]).flatten(
        1
    )


def check(y, x, packed, bias=None):
    golden = x.double() @ dequantized(*packed).T
    golden = golden if bias is None else golden + bias.double()
    assert y.dtype == torch.float32 and y.shape == golden.shape
    if y.numel():
        error = (y.double() - golden).abs().max() / golden.square().mean().sqrt()
        assert error <= TOLERANCE, error


SHAPES = [  # M, N, K
    (0, 16, 512), (1, 33, 256), (3, 7, 512), (8, 48, 2048), (9, 130, 256), (70, 65, 768),
]  # fmt: skip


@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("M,N,K", SHAPES)
def test_values(device, M, N, K, group_size):
    packed = weight(N, K, group_size, device)
    x, bias = torch.randn(M, K, device=device), torch.randn(N, device=device)
    check(linear_q4gsw(x, *packed), x, packed)
    check(linear_q4gsw(x, *packed, bias), x, packed, bias)


@pytest.mark.parametrize("K,group_size", [(72, 8), (160, 32), (6, 3), (2, 2), (320, 64)])
def test_odd_shapes(device, K, group_size):
    packed = weight(5, K, group_size, device) if K > 6 else None
    if packed is None:
        u = torch.arange(5 * K // 2, dtype=torch.uint8, device=device).view(5, -1) * 37
        packed = u, torch.rand(K // group_size, 5, device=device), group_size
    for rows in (1, 4):
        x = torch.randn(rows, K, device=device)
        check(linear_q4gsw(x, *packed), x, packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_in_half_precision(device, dtype):
    packed = weight(24, 256, 64, device, dtype)
    for rows in (1, 12):
        x = torch.randn(rows, 256, device=device)
        check(linear_q4gsw(x, *packed), x, packed)


def test_leading_dims_and_strides(device):
    weights, scales, group_size = weight(24, 256, 32, device)
    x = torch.randn(256, 2, 3, device=device).permute(1, 2, 0)
    y = linear_q4gsw(x, weights, scales, group_size)
    check(y.flatten(0, 1), x.reshape(6, 256), (weights, scales, group_size))
    assert y.shape == (2, 3, 24)
    assert linear_q4gsw(x[0, 0], weights, scales, group_size).shape == (24,)
    # Rows and whole groups cut out of a wider weight; scales by row seen through .mT.
    part, turned = weights[3:17, 32:96], scales[2:6, 3:17].mT.contiguous().mT
    rows = x.reshape(6, 256)[:, 64:192]
    for some in (rows, rows[:1]):
        got = linear_q4gsw(some, part, turned, group_size)
        check(got, some, (part, turned, group_size))
    # Bytes that do not follow each other.
    apart = weights.mT.contiguous().mT
    check(
        linear_q4gsw(rows.repeat(1, 2), apart, scales, 32), rows.repeat(1, 2), (apart, scales, 32)
    )


@pytest.mark.parametrize("group_size", [8, 32])
def test_gradients(device, group_size):
    packed = weight(24, 64, group_size, device)
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)
    seed = torch.randn(2, 3, 24, device=device)
    linear_q4gsw(x, *packed, bias).backward(seed)
    expected = seed.double() @ dequantized(*packed)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, seed.sum((0, 1)))
    again = torch.ops.int4q.linear_q4gsw_backward(seed, *packed)
    assert torch.equal(again, x.grad)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("rows", [1, 5])
def test_opcheck(device, rows):
    packed = weight(16, 64, 32, device)
    x = torch.randn(rows, 64, device=device, requires_grad=True)
    bias = torch.randn(16, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.int4q.linear_q4gsw, (x, *packed, bias))
    torch.library.opcheck(torch.ops.int4q.linear_q4gsw, (x, *packed))
    grad = torch.randn(rows, 16, device=device)
    torch.library.opcheck(torch.ops.int4q.linear_q4gsw_backward, (grad, *packed))


def test_reference_agrees(device):
    packed = weight(40, 512, 64, device)
    x = torch.randn(6, 512, device=device)
    expected = F.linear(x.double(), dequantized(*packed)).float()
    with kernel_preference("torch"):
        torch.testing.assert_close(linear_q4gsw(x, *packed), expected, rtol=1e-5, atol=1e-4)


# --- routing ------------------------------------------------------------------------------------


def problem(op="linear_q4gsw", **changes):
    facts = dict(
        op=op, device="cuda", dtype=torch.float32, scale_dtype=torch.float32, M=1, N=64, K=512,
        group_size=32, capability=(9, 0),
    )  # fmt: skip
    return Problem(**{**facts, **changes})


@pytest.mark.parametrize("op", ["linear_q4gsw", "linear_q4gsw_backward"])
@pytest.mark.parametrize("group_size", [8, 16])
def test_small_groups_are_refused_with_a_reason_and_served_by_the_reference(op, group_size):
    small = problem(op, group_size=group_size)
    assert choose(small).name == "reference"
    for name, _, reason in explain(small):
        if name.startswith("triton"):
            assert f"group_size={group_size}" in reason or "triton is not installed" in reason
    on_cpu = problem(op, group_size=group_size, device="cpu", capability=None)
    assert choose(on_cpu).name == "cpu_blocked"


def test_rows_choose_the_kernel():
    pytest.importorskip("triton")
    assert choose(problem()).name == "triton_matvec"
    assert choose(problem(M=2)).name == "triton_matmul"
    assert choose(problem(device="mps", capability=None)).name == "reference"


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [8, 32, 128])
def test_from_linear_and_back(group_size):
    linear = nn.Linear(256, 24)
    packed = q4gsw.from_linear(linear, group_size)
    back = q4gsw.to_linear(packed)
    w, scales = linear.weight.detach(), packed.weight_scales.T.repeat_interleave(group_size, 1)
    # Half a step of the grid; -8 is not used, so nothing is clipped.
    assert ((back.weight - w).abs() <= 0.5 * scales + 1e-6).all()
    assert torch.equal(back.weight.double(), dequantized(*packed[:3]).float().double())
    assert torch.equal(back.bias, linear.bias)
    x = torch.randn(3, 256)
    torch.testing.assert_close(linear_q4gsw(x, *packed), back(x), rtol=1e-5, atol=1e-5)
    assert packed.weights.dtype == torch.uint8 and packed.weights.shape == (24, 128)
    assert q4gsw.from_linear(nn.Linear(256, 8, bias=False), group_size).bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_tensor_round_trip(dtype):
    w = torch.randn(24, 256, dtype=dtype)
    t = Int4Tensor.from_hp(w, [1, 64], algorithm="symmetric")
    packed = q4gsw.from_int4_tensor(t, torch.ones(24, dtype=dtype))
    assert packed.bias.dtype == torch.float32
    back = q4gsw.to_int4_tensor(packed)
    for name in ("qdata", "scale", "zero_point"):
        assert torch.equal(getattr(back, name), getattr(t, name))
    coalesced = CudaCoalescedInt4Tensor.from_int4_tensor(t)
    assert torch.equal(q4gsw.from_int4_tensor(coalesced).weight_scales, packed.weight_scales)
    assert torch.equal(q4gsw.from_weight(w, 64).weights, packed.weights)


def test_what_cannot_be_packed():
    w = torch.randn(8, 64)
    symmetric = Int4Tensor.from_hp(w, [1, 32], algorithm="symmetric")
    with pytest.raises(ValueError, match="zero points of 0.*algorithm="):
        q4gsw.from_int4_tensor(Int4Tensor.from_hp(w, [1, 32]))
    with pytest.raises(ValueError, match=r"\[N, K\] with groups along K"):
        q4gsw.from_int4_tensor(symmetric.t())
    with pytest.raises(TypeError, match="4-bit weight of int4q, got Tensor"):
        q4gsw.from_int4_tensor(w)
    scaled = Int4Tensor.from_hp(w, [1, 32], algorithm="symmetric")
    scaled.act_pre_scale = torch.ones(64)
    with pytest.raises(ValueError, match="no act_pre_scale"):
        q4gsw.from_int4_tensor(scaled)
    with pytest.raises(ValueError, match="divide K, got 48 for K 64"):
        q4gsw.from_linear(nn.Linear(64, 8), 48)
    quantised = nn.Linear(64, 8)
    quantised.weight = nn.Parameter(symmetric, requires_grad=False)
    with pytest.raises(TypeError, match="Use from_int4_tensor"):
        q4gsw.from_linear(quantised)
    with pytest.raises(ValueError, match="group_size must be one of"):
        q4gsw.to_int4_tensor(q4gsw.from_weight(w, 8))


# --- bad arguments ------------------------------------------------------------------------------

W, S, G = weight(8, 128, 32)
X, B = torch.ones(2, 128), torch.ones(8)
BAD = {
    "x dtype": ((X.bfloat16(), W, S, 32), TypeError, "x must be float32, got torch.bfloat16"),
    "x K": ((X[:, :64], W, S, 32), ValueError, "last dim of x must be 128"),
    "x scalar": ((torch.tensor(1.0), W, S, 32), ValueError, "last dim of x must be 128"),
    "x device": ((X.to("meta"), W, S, 32), ValueError, "weight's device cpu"),
    "w dtype": ((X, W.view(torch.int8), S, 32), TypeError, r"weights must be uint8 \[N, K/2\]"),
    "w rank": ((X, W[0], S, 32), TypeError, r"weights must be uint8 \[N, K/2\]"),
    "group 0": ((X, W, S, 0), ValueError, "group_size must be positive"),
    "group -1": ((X, W, S, -1), ValueError, "group_size must be positive"),
    "group 48": ((X, W, S, 48), ValueError, "divide K, got 48 for K 128"),
    "scale layout": ((X, W, S.mT, 32), ValueError, r"\[4, 8\], got \[8, 4\]\. Scales .* \.mT"),
    "scale count": ((X, W, S[:2], 32), ValueError, r"\[K/group_size, N\] = \[4, 8\], got \[2, 8\]"),
    "scale N": ((X, W, S[:, :7], 32), ValueError, r"= \[4, 8\], got \[4, 7\]"),
    "scale dtype": ((X, W, S.double(), 32), TypeError, "weight_scales must be float32"),
    "scale device": ((X, W, S.to("meta"), 32), ValueError, "weight_scales must be on cpu"),
    "bias N": ((X, W, S, 32, B[:7]), ValueError, r"bias must have shape \[8\], got \[7\]"),
    "bias dtype": ((X, W, S, 32, B.half()), TypeError, "bias must be float32"),
    "bias device": ((X, W, S, 32, B.to("meta")), ValueError, "bias must be on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        linear_q4gsw(*arguments)


def test_bad_gradient():
    with pytest.raises(ValueError, match="last dim of grad_out must be 8"):
        torch.ops.int4q.linear_q4gsw_backward(X, W, S, 32)
