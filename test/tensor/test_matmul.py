"""F.linear, bmm, matmul, grouped matmul and their gradients against dequantised plain torch.

Reference: the same product in float64 on the dequantised weight. An output in a 16-bit dtype is
off by its own rounding (2^-8 for bfloat16, 2^-11 for float16, of the largest output); where the
kernel multiplies bfloat16 weights, by their rounding as well, which averages out over K.
"""

import pytest
import torch
import torch.nn.functional as F

from int4q import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor, kernel_preference
from int4q.kernels import registry
from int4q.kernels.cpu import blocked
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight

# Relative to the largest output. bfloat16: one rounding each of weight and result; float32: sums
# of up to 1024 products in another order, and activations in 24-bit fixed point.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 2e-6}
FLOATS = list(TOLERANCE)


# On a GPU up to 16 rows of float32 become 16-bit fixed point in blocks of 128, and more rows go
# through tensor cores as three TF32 products each; 1e-4 is the contract for the first.
GPU_FLOAT32 = 1e-4


def close(got, expected, dtype, factor=1.0):
    assert got.dtype == dtype
    assert got.shape == expected.shape
    tolerance = TOLERANCE[dtype]
    if got.is_cuda and dtype == torch.float32:
        tolerance = GPU_FLOAT32
    bound = tolerance * factor * expected.abs().max().clamp(min=1e-3)
    worst = (got.double() - expected).abs().max()
    assert worst <= bound, f"{worst:.3g} > {bound:.3g}"


def quantised(layout, *shape, group=32, dtype=torch.float32):
    # W4A16 for both layouts here: int8 activations have a test of their own.
    w = torch.randn(shape).to(dtype)
    return layout.from_hp(w, [1] * (len(shape) - 1) + [group], activation_dtype=torch.bfloat16)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("w_dtype", FLOATS)
def test_linear_dtypes_and_groups(layout, device, x_dtype, w_dtype, group):
    t = quantised(layout, 48, 512, group=group, dtype=w_dtype).to(device)
    for M in (1, 3, 40):
        x = torch.randn(M, 512, device=device).to(x_dtype)
        bias = torch.randn(48, device=device).to(x_dtype)
        expected = F.linear(x.double(), t.dequantize(torch.float64), bias.double())
        close(F.linear(x, t, bias), expected, x_dtype)


SHAPES = [  # M, N, K: tails in every dim, N = n_groups, single rows and columns
    (0, 16, 64), (1, 1, 32), (1, 7, 96), (2, 4, 128), (9, 33, 160), (17, 100, 320), (5, 128, 1024),
]  # fmt: skip


@pytest.mark.parametrize("M,N,K", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_shapes(layout, device, M, N, K, dtype):
    t = quantised(layout, N, K, dtype=dtype).to(device)
    x = torch.randn(M, K, device=device).to(dtype)
    expected = x.double() @ t.dequantize(torch.float64).T
    y = F.linear(x, t)
    assert y.shape == (M, N)
    if M:
        close(y, expected, dtype)


@pytest.mark.parametrize("M", [1, 5, 70])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("packing", ["rows", "aten"])
def test_cpu_packed_linear(M, dtype, packing):
    def pack(w):
        return CpuPackedInt4Tensor.from_hp(w, [1, 64], packing=packing)

    t = pack(torch.randn(80, 256).to(dtype))
    x, bias = torch.randn(M, 256).to(dtype), torch.randn(80).to(dtype)
    expected = F.linear(x.double(), t.dequantize(torch.float64), bias.double())
    close(F.linear(x, t, bias), expected, dtype)
    # Scales stay float32 under 16-bit activations: nothing is rounded behind the user's back.
    wide = pack(torch.randn(80, 256))
    close(F.linear(x, wide), x.double() @ wide.dequantize(torch.float64).T, dtype)


def test_every_kernel_of_the_table_agrees():
    t = quantised(Int4Tensor, 64, 256, group=64, dtype=torch.bfloat16)
    weight = Weight(*t._weight_parts(), 64)
    x, bias = torch.randn(4, 256).bfloat16(), torch.randn(64).bfloat16()
    expected = F.linear(x.double(), t.dequantize(torch.float64), bias.double())
    problem = Problem("int4_linear", "cpu", x.dtype, t.dtype, 4, 64, 256, 64)
    runs = [k for k in registry.kernels("int4_linear") if k.unsupported(problem) is None]
    assert {kernel.name for kernel in runs} >= {"cpu_blocked", "reference"}
    for kernel in runs:
        close(kernel.run(x, weight, bias), expected, torch.bfloat16)


def test_blocks_of_rows_put_together_are_the_whole(monkeypatch):
    t = quantised(Int4Tensor, 50, 128, dtype=torch.float32)
    weight = Weight(*t._weight_parts(), 32)
    x, grad = torch.randn(100, 128), torch.randn(3, 50)
    whole, whole_grad = blocked.linear(x, weight), blocked.grad_input(grad, weight)
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 7 * 128)
    # Another order of float32 sums.
    torch.testing.assert_close(blocked.linear(x, weight), whole)
    torch.testing.assert_close(blocked.grad_input(grad, weight), whole_grad)


def test_leading_dims_strides_and_empty_batches(layout):
    t = quantised(layout, 24, 64)
    w = t.dequantize(torch.float64)
    x = torch.randn(2, 64, 3, 5).permute(0, 2, 3, 1)
    close(F.linear(x, t), x.double() @ w.T, torch.float32)
    close(F.linear(x[0, 0, 0], t), x[0, 0, 0].double() @ w.T, torch.float32)
    assert F.linear(x[:0], t).shape == (0, 3, 5, 24)


def test_a_sliced_weight_multiplies_as_it_is(layout):
    t = quantised(layout, 40, 256)
    part, x = t[3:19, 64:192], torch.randn(3, 128)
    close(F.linear(x, part), x.double() @ part.dequantize(torch.float64).T, torch.float32)


def test_matmul_in_torchs_plain_meaning(layout):
    t = quantised(layout, 32, 64)
    w = t.dequantize(torch.float64)
    x, z = torch.randn(3, 64), torch.randn(3, 32)
    for got in (x @ t.t(), torch.matmul(x, t.mT), torch.mm(x, t.t()), F.linear(x, t)):
        close(got, x.double() @ w.T, torch.float32)
    for got in (z @ t, torch.mm(z, t), F.linear(z, t.t())):
        close(got, z.double() @ w, torch.float32)
    stack = quantised(layout, 2, 32, 64)
    w = stack.dequantize(torch.float64)
    x, z = torch.randn(2, 3, 64), torch.randn(2, 3, 32)
    close(x @ stack.mT, x.double() @ w.mT, torch.float32)
    close(z @ stack, z.double() @ w, torch.float32)
    bias = torch.randn(32)
    addmm = torch.ops.aten.addmm(bias, x[0], t.t())
    close(addmm, bias.double() + x[0].double() @ t.dequantize(torch.float64).T, torch.float32)


@pytest.mark.parametrize("M", [1, 20])
@pytest.mark.parametrize("N", [64, 24])
def test_bmm_takes_both_conventions(layout, device, M, N):
    t = quantised(layout, 3, N, 64, dtype=torch.bfloat16).to(device)  # N = 64: square
    x = torch.randn(3, M, 64, device=device).bfloat16()
    expected = x.double() @ t.dequantize(torch.float64).mT
    close(torch.bmm(x, t), expected, torch.bfloat16)
    close(torch.bmm(x, t.transpose(1, 2)), expected, torch.bfloat16)


@pytest.mark.parametrize("ends", [[4, 4, 11], [0, 0, 0], [11, 11, 11], [2, 5, 9]])
def test_grouped_mm(layout, device, ends):
    t = quantised(layout, 3, 24, 64, dtype=torch.bfloat16).to(device)
    x = torch.randn(11, 64, device=device).bfloat16()
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    w, expected = (
        t.dequantize(torch.float64),
        torch.zeros(11, 24, dtype=torch.float64, device=device),
    )
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        expected[start:end] = x[start:end].double() @ w[e].T
    for fn in (torch._grouped_mm, getattr(F, "grouped_mm", torch._grouped_mm)):
        close(fn(x, t.transpose(-2, -1), offs=offs), expected, torch.bfloat16)


def test_int8_activations_are_those_of_the_definition():
    """W4A8 in exact integers, block by block, in float64 around them."""
    t = CudaCoalescedInt4Tensor.from_hp(torch.randn(24, 128).bfloat16(), [1, 64])
    x = torch.randn(5, 128).bfloat16()
    x[1] = 0
    x[2, 40] = 100.0
    d = x.float().unflatten(1, (-1, 32)).abs().amax(-1) / 127
    inverse = torch.where(d > 0, 1 / d, 0).unsqueeze(-1)
    xq = (x.float().unflatten(1, (-1, 32)) * inverse).round().clamp(-127, 127)
    rebuilt = (xq.double() * d.double().unsqueeze(-1)).flatten(1)
    expected = rebuilt @ t.dequantize(torch.float64).T
    close(F.linear(x, t), expected, torch.bfloat16)
    assert (F.linear(x, t)[1] == 0).all()
    # With a 100x outlier in one block int8 activations cost 1 to 2 % here, and the test can tell them from bfloat16 ones.
    exact = x.double() @ t.dequantize(torch.float64).T
    error = (F.linear(x.float(), t).double() - exact).norm() / exact.norm()
    assert 1e-3 < error < 3e-2
    # More rows than the int8 kernels serve run on the activations as they are.
    many = torch.randn(20, 128).bfloat16()
    close(F.linear(many, t), many.double() @ t.dequantize(torch.float64).T, torch.bfloat16)


def test_act_pre_scale_multiplies_the_activation(layout):
    t = quantised(layout, 16, 64)
    s = torch.rand(64) + 0.5
    t = layout(t.qdata, t.scale, t.zero_point, t.block_size, t.shape, s, torch.bfloat16)
    x = torch.randn(3, 64)
    expected = (x * s).double() @ t.dequantize(torch.float64).T
    close(F.linear(x, t), expected, torch.float32)
    close(torch.bmm(x[None], t[None])[0], expected, torch.float32)
    offs = torch.tensor([3], dtype=torch.int32)
    close(torch._grouped_mm(x, t[None].mT, offs=offs), expected, torch.float32)
    x64 = x.double().requires_grad_()
    ((x64 * s) @ t.dequantize(torch.float64).T).sum().backward()
    x.requires_grad_()
    F.linear(x, t).sum().backward()
    close(x.grad, x64.grad, torch.float32)
    with pytest.raises(ValueError, match="contracts its grouped dim"):
        torch.randn(2, 16) @ t


def test_autocast_casts_the_activation(layout):
    t, x = quantised(layout, 16, 64), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, t)
    assert y.dtype == torch.bfloat16
    close(y, x.bfloat16().double() @ t.dequantize(torch.float64).T, torch.bfloat16)


def test_flops_are_those_of_a_dense_product(layout):
    from torch.utils.flop_counter import FlopCounterMode

    def count(fn):
        with FlopCounterMode(display=False) as counter:
            fn()
        return counter.get_total_flops()

    t = quantised(layout, 2, 16, 64)
    w, x = t.dequantize(), torch.randn(2, 3, 64, requires_grad=True)
    assert count(lambda: F.linear(x, t[0])) == count(lambda: F.linear(x, w[0])) == 2 * 6 * 16 * 64
    assert count(lambda: torch.bmm(x, t)) == count(lambda: torch.bmm(x, w.mT))
    assert count(lambda: F.linear(x, t[0]).sum().backward()) == 2 * 2 * 6 * 16 * 64


# --- gradients ------------------------------------------------------------------------------------


def gradients(fn, x, *rest):
    x = x.clone().requires_grad_()
    y = fn(x, *rest)
    (grad,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))
    return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_linear_passes_the_gradient_to_activation_and_bias(layout, dtype, lead):
    t = quantised(layout, 16, 64, dtype=dtype)
    x = torch.randn(*lead, 64).to(dtype)
    bias = torch.randn(16).to(dtype).requires_grad_()
    F.linear(x.requires_grad_(), t, bias).square().sum().backward()
    y = F.linear(x.detach().double(), t.dequantize(torch.float64), bias.detach().double())
    # The gradient passes through the rounded output as well as its own sums.
    close(x.grad, 2 * y @ t.dequantize(torch.float64), dtype, factor=4)
    close(bias.grad, (2 * y).flatten(0, -2).sum(0), dtype, factor=4)


def test_gradients_of_bmm_matmul_and_grouped_mm(layout):
    t = quantised(layout, 2, 16, 64)
    w = t.dequantize(torch.float64)
    x = torch.randn(2, 3, 64)
    expected = gradients(lambda a: a @ w.mT, x.double())
    close(gradients(torch.bmm, x, t), expected, torch.float32)
    close(gradients(torch.matmul, x, t.mT), expected, torch.float32)
    offs = torch.tensor([3, 6], dtype=torch.int32)
    got = gradients(lambda a: torch._grouped_mm(a, t.mT, offs=offs), x.flatten(0, 1))
    close(got, expected.flatten(0, 1), torch.float32)


def test_gradients_through_act_pre_scale(layout):
    t = quantised(layout, 2, 16, 64)
    w, factor = t.dequantize(torch.float64), torch.rand(64) + 0.5
    t.act_pre_scale = factor
    x = torch.randn(2, 3, 64)
    expected = gradients(lambda a: (a * factor.double()) @ w.mT, x.double())
    close(gradients(torch.bmm, x, t), expected, torch.float32)
    offs = torch.tensor([3, 6], dtype=torch.int32)
    got = gradients(lambda a: torch._grouped_mm(a, t.mT, offs=offs), x.flatten(0, 1))
    close(got, expected.flatten(0, 1), torch.float32)


def test_gradient_of_int8_and_cpu_packed_linear():
    w, x = torch.randn(16, 64), torch.randn(3, 64)
    for t in (
        CudaCoalescedInt4Tensor.from_hp(w, [1, 32]),
        CpuPackedInt4Tensor.from_hp(w, [1, 32], packing="rows"),
        CpuPackedInt4Tensor.from_hp(w, [1, 32], packing="aten"),
    ):
        w64 = t.dequantize(torch.float64)
        expected = gradients(torch.matmul, x.double(), w64.T)
        close(gradients(F.linear, x, t), expected, torch.float32)


def test_gradcheck_in_float64(layout):
    t = quantised(layout, 8, 32)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: F.linear(a, t, b), (x, bias))


def test_the_weight_takes_no_gradient_and_lora_trains(layout):
    t = torch.nn.Parameter(quantised(layout, 16, 64), requires_grad=False)
    a, b = (torch.randn(s, requires_grad=True) for s in ((4, 64), (16, 4)))
    x = torch.randn(8, 64, requires_grad=True)
    (F.linear(x, t) + x @ a.T @ b.T).square().mean().backward()
    assert t.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (a, b, x))


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_first(layout, transposed):
    """Plain meaning: the last dim of the weight is contracted, grouped or (dequantised) not."""
    w, stack = quantised(layout, 64, 64), quantised(layout, 3, 64, 64)
    w, stack = (t.mT if transposed else t for t in (w, stack))
    x, x3 = torch.randn(64, 5), torch.randn(3, 64, 5, requires_grad=True)
    for op, t, activation in (
        (torch.mm, w, x),
        (torch.matmul, w, x),
        (torch.bmm, stack, x3),
        (torch.matmul, stack, x3),
    ):
        expected = op(t.dequantize(), activation)
        torch.testing.assert_close(op(t, activation), expected, rtol=1e-5, atol=1e-4)
    (stack @ x3).sum().backward()
    expected = stack.dequantize().sum(1, keepdim=True).mT.expand(3, 64, 5)
    torch.testing.assert_close(x3.grad, expected, rtol=1e-5, atol=1e-4)


# --- errors ---------------------------------------------------------------------------------------

# ruff: noqa: E501 (one case a line reads better)
BAD = {
    "K": (lambda t: F.linear(torch.randn(2, 32), t), ValueError, "last dim of x must be 64"),
    "dtype": (lambda t: F.linear(torch.ones(2, 64, dtype=torch.int32), t), TypeError, "x must be float32"),
    "device": (lambda t: F.linear(torch.ones(2, 64, device="meta"), t), ValueError, "weight's device"),
    "bias": (lambda t: F.linear(torch.ones(2, 64), t, torch.ones(3)), ValueError, "bias must have shape \\[16\\]"),
    "quantised x": (lambda t: F.linear(t, t), TypeError, "takes a plain activation"),
    "mm rank": (lambda t: torch.mm(torch.ones(2, 3, 64), t.t()), ValueError, "mm takes operands of 2 and 2 dims"),
    "two weights": (lambda t: torch.mm(t, t), TypeError, "plain activation"),
    "bmm rank": (lambda t: torch.bmm(torch.ones(1, 2, 64), t), ValueError, "bmm takes a 3-D weight"),
    "bmm batch": (lambda t: torch.bmm(torch.ones(2, 2, 64), t[None]), ValueError, "3-D with batch 1"),
    "grouped order": (
        lambda t: torch._grouped_mm(torch.ones(2, 16), t[None], offs=torch.tensor([2], dtype=torch.int32)),
        ValueError, "pass w.transpose\\(-2, -1\\)"),
    "offs": (
        lambda t: torch._grouped_mm(torch.ones(2, 64), t[None].mT, offs=torch.tensor([2])),
        ValueError, "offs must be int32"),
    "offs past the end": (
        lambda t: torch._grouped_mm(torch.ones(2, 64), t[None].mT, offs=torch.tensor([3], dtype=torch.int32)),
        ValueError, "offs must rise"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_is_wrong(layout, case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(layout.from_hp(torch.randn(16, 64), [1, 32]))


def test_an_unmet_preference_is_an_error_with_every_reason():
    t, x = quantised(Int4Tensor, 16, 64), torch.randn(2, 64)
    with kernel_preference("fbgemm"), pytest.raises(ValueError, match="preference 'fbgemm'"):
        F.linear(x, t)
    with kernel_preference("torch"):
        F.linear(x, t)
    with pytest.raises(ValueError, match="must be one of"), kernel_preference("fastest"):
        pass
