"""Float8 activations: the definition, the ops, and what asks for them; fbgemm's refusals."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import int4q
from int4q import CudaCoalescedInt4Tensor, Int4Tensor, Int4WeightOnlyConfig, kernel_preference
from int4q.kernels import fbgemm, fp8, reference, registry
from int4q.kernels.registry import KernelPreference, Problem
from int4q.kernels.weight import Weight

FP8 = torch.float8_e4m3fn
# ||y - reference|| / ||reference||: the W4A16 kernel's rounding of its result and the one after
# the row's scale, each uniform in half a unit of bfloat16 (0.0017), and weights rounded to it.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-5}


def fp8_weight(*shape, dtype=torch.bfloat16, group=32):
    w = torch.randn(*shape).to(dtype)
    return Int4Tensor.from_hp(w, [1] * (len(shape) - 1) + [group], FP8)


def parts(t):
    return Weight(t.qdata, t.scale, t.zero_point, t.group_size)


def assert_close(got, expected, dtype):
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[dtype], error


# --- weights --------------------------------------------------------------------------------------


def test_symmetric_weights_are_fbgemms():
    """``int4_row_quantize``: scale = amax / 8, clamped to -8..7; one group at a time."""
    w = torch.randn(5, 96) * torch.logspace(-3, 1, 5)[:, None]
    t = Int4Tensor.from_hp(w, [1, 32], FP8)
    assert t.activation_dtype == FP8 and not t.zero_point.any()
    values = t.dequantize()
    for n in range(5):
        for g in range(3):
            group = w[n, 32 * g : 32 * g + 32]
            scale = group.abs().max().clamp(min=1e-6) / 8
            q = (group / scale).round().clamp(-8, 7)
            assert t.scale[g, n] == scale
            assert torch.equal(values[n, 32 * g : 32 * g + 32], q * scale)


def test_what_asks_for_it():
    m = nn.Sequential(nn.Linear(128, 64))
    quantised = Int4Tensor.from_hp(m[0].weight.detach(), [1, 128], FP8)
    int4q.quantize_(m, Int4WeightOnlyConfig(activation_dtype=FP8, set_inductor_config=False))
    assert m[0].weight.activation_dtype == FP8 and torch.equal(m[0].weight, quantised)
    assert Int4Tensor.from_hp(torch.randn(8, 32), [1, 32], FP8, "symmetric").zero_point.sum() == 0
    with pytest.raises(ValueError, match="weights for float8 activations take an algorithm of"):
        Int4Tensor.from_hp(torch.randn(8, 32), [1, 32], FP8, "tinygemm")
    with pytest.raises(ValueError, match="float8 activations take symmetric weights.*'hqq'"):
        Int4WeightOnlyConfig(activation_dtype=FP8, int4_choose_qparams_algorithm="hqq")
    for packing in ("cuda_coalesced", "cpu_packed", "auto"):
        with pytest.raises(ValueError, match="activation_dtype of"):
            Int4WeightOnlyConfig(activation_dtype=FP8, int4_packing_format=packing)


def test_it_stays_with_the_weight(tmp_path):
    t = fp8_weight(8, 64)
    theirs = t.to_torchao()
    assert (
        theirs.activation_dtype == FP8 and Int4Tensor.from_torchao(theirs).activation_dtype == FP8
    )
    torch.save({"w": t}, tmp_path / "w.pt")
    assert torch.load(tmp_path / "w.pt", weights_only=True)["w"].activation_dtype == FP8
    for op in (torch.clone, lambda t: t[2:4], lambda t: t.mT, lambda t: t.half()):
        assert op(t).activation_dtype == FP8
    with pytest.raises(ValueError, match="one activation_dtype"):
        torch.cat([t, Int4Tensor.from_hp(torch.randn(8, 64).bfloat16(), [1, 32])])
    # Another layout has its own ways; the conversion takes its default.
    assert CudaCoalescedInt4Tensor.from_int4_tensor(t).activation_dtype == torch.int8


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows(dtype):
    x = (torch.randn(7, 160) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    x[3] = 0
    values, rows = torch.ops.int4q.fp8_rows(x)
    narrow = dtype in (torch.float16, torch.bfloat16)
    assert values.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert rows.dtype == torch.float32 and rows.shape == (7, 1)
    assert torch.equal(values.to(FP8).to(values.dtype), values)  # e4m3 values, held exactly
    largest = x.float().abs().amax(1)
    assert torch.equal(rows[:, 0], largest.clamp(min=1e-12) / 448)
    assert (values[largest > 0].abs().amax(1) == 448).all() and not values[3].any()
    # 3 bits of mantissa, and steps of 2^-9 below 2^-6, in units of the row's scale.
    error = (values.double() * rows.double() - x.double()).abs()
    assert (error <= x.double().abs() * 2**-4 + rows.double() * (2**-10 + 1e-6)).all()


def test_rows_that_are_not_finite():
    x = torch.randn(3, 32)
    x[0, 4], x[1, 5] = float("nan"), float("inf")
    values, rows = torch.ops.int4q.fp8_rows(x)
    product = (values * rows).sum(1)
    assert product[:2].isnan().all() and product[2].isfinite()


def test_rows_scale_the_activation_first():
    x, factor = torch.randn(4, 64).bfloat16(), torch.rand(64) + 0.5
    got = torch.ops.int4q.fp8_rows(x, factor)
    expected = torch.ops.int4q.fp8_rows(x * factor.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def strided(kind):
    whole = torch.randn(6, 8, 64)
    return {
        "contiguous": whole,
        "matrix": whole[0],
        "row": whole[0, 0],
        "transposed": torch.randn(64, 5).t(),
        "transposed stack": torch.randn(2, 64, 5).transpose(1, 2),
        "transposed, one batch": torch.randn(1, 64, 5).transpose(1, 2),
        "leading dims swapped": whole.transpose(0, 1),
        "one row": torch.randn(64, 1).t(),
        "every second": whole[..., ::2],
        "cut": whole[:, 2:5, 8:40],
        "expanded rows": whole[:1].expand(6, 8, 64),
        "expanded columns": whole[..., :1].expand(6, 8, 64),
        "no rows": whole[:0].transpose(0, 1),
        "channels last": torch.randn(2, 3, 4, 64).to(memory_format=torch.channels_last),
    }[kind]


@pytest.mark.parametrize("kind", [
    "contiguous", "matrix", "row", "transposed", "transposed stack", "transposed, one batch",
    "leading dims swapped", "one row", "every second", "cut", "expanded rows", "expanded columns",
    "no rows", "channels last",
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_rows_have_the_strides_of_real_ones(kind, dtype):
    x = strided(kind).to(dtype)
    real = torch.ops.int4q.fp8_rows(x)
    with FakeTensorMode() as mode:
        fake = torch.ops.int4q.fp8_rows(mode.from_tensor(x))
    for got, expected in zip(fake, real, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert got.stride() == expected.stride()
    expected = torch.ops.int4q.fp8_rows(x.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(real, expected, strict=True))


def test_op_errors():
    with pytest.raises(TypeError, match="x must be float32"):
        torch.ops.int4q.fp8_rows(torch.ones(2, 32, dtype=torch.int8))
    with pytest.raises(ValueError, match="last dim of x must not be empty"):
        torch.ops.int4q.fp8_rows(torch.ones(2, 0))
    with pytest.raises(ValueError, match="act_pre_scale must have 32 entries"):
        torch.ops.int4q.fp8_rows(torch.ones(2, 32), torch.ones(31))
    with pytest.raises(ValueError, match="last dim of x must be 64"):
        F.linear(torch.ones(2, 32), fp8_weight(8, 64))


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("M", [0, 1, 5, 33])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("extras", [False, True])
def test_linear(dtype, M, group, extras):
    x = (torch.randn(M, 256) * 3).to(dtype)
    t = fp8_weight(40, 256, dtype=torch.bfloat16 if dtype == torch.float64 else dtype, group=group)
    bias = torch.randn(40).to(dtype) if extras else None
    t.act_pre_scale = (torch.rand(256) + 0.5).to(t.dtype) if extras else None
    got = F.linear(x, t, bias)
    assert got.dtype == dtype and got.shape == (M, 40)
    if M:
        assert_close(got, reference.linear_fp8(x, parts(t), bias, t.act_pre_scale), dtype)


def test_linear_is_close_to_the_unquantised_activation():
    """e4m3 rounds by up to 1/16: some 2.6 % of the result for normal activations."""
    x, t = torch.randn(9, 512), fp8_weight(64, 512, dtype=torch.float32)
    expected = F.linear(x, t.dequantize())
    error = (F.linear(x, t) - expected).norm() / expected.norm()
    assert 0.01 < error < 0.04, error


def test_linear_takes_zero_points_too():
    """Weights are made symmetric; the arithmetic does not depend on it."""
    t = Int4Tensor.from_hp(torch.randn(16, 128), [1, 32])
    t = Int4Tensor(*parts(t)[:3], t.block_size, t.shape, activation_dtype=FP8)
    x = torch.randn(4, 128)
    assert_close(F.linear(x, t), reference.linear_fp8(x, parts(t)), torch.float32)


def test_leading_dims_and_views():
    t = fp8_weight(24, 64, dtype=torch.float32)
    x = torch.randn(2, 64, 3).transpose(1, 2)
    assert torch.equal(F.linear(x, t), F.linear(x.reshape(6, 64), t).view(2, 3, 24))
    assert torch.equal(F.linear(x, t[8:16]), F.linear(x, t)[..., 8:16])
    m = nn.Linear(64, 24)
    m.weight = nn.Parameter(t, requires_grad=False)
    assert_close(m(x), reference.linear_fp8(x.reshape(6, 64), parts(t), m.bias).view(2, 3, 24),
                 torch.float32)  # fmt: skip


@pytest.mark.parametrize("pre_scaled", [False, True])
def test_stacks(pre_scaled):
    """``bmm`` and the grouped product quantise rows as ``linear`` does."""
    t = fp8_weight(3, 40, 128, dtype=torch.float32)
    t.act_pre_scale = torch.rand(128) + 0.5 if pre_scaled else None
    x = torch.randn(3, 5, 128)
    one_by_one = torch.stack([F.linear(x[e], t[e]) for e in range(3)])
    assert_close(torch.bmm(x, t), one_by_one, torch.float32)
    assert_close(torch.bmm(t, x.mT), one_by_one.mT, torch.float32)
    offs = torch.tensor([5, 10, 15], dtype=torch.int32)
    got = F.grouped_mm(x.flatten(0, 1), t.transpose(1, 2), offs=offs)
    assert_close(got, one_by_one.flatten(0, 1), torch.float32)


@pytest.mark.parametrize("stack", [False, True])
def test_gradients_pass_straight_through(stack):
    shape = (2, 24, 64) if stack else (24, 64)
    t = fp8_weight(*shape, dtype=torch.float32)
    t.act_pre_scale = torch.rand(64) + 0.5
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = torch.bmm(x, t) if stack else F.linear(x, t)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected = grad @ t.dequantize() * t.act_pre_scale
    assert_close(x.grad, expected, torch.float32)


def test_opcheck_with_a_scale_of_the_activation():
    x, t = torch.randn(3, 64, requires_grad=True), fp8_weight(8, 64, dtype=torch.float32)
    args = (x, *parts(t)[:4], torch.randn(8), torch.rand(64) + 0.5)
    torch.library.opcheck(torch.ops.int4q.int4_linear_fp8, args)


@pytest.mark.slow
def test_compiles():
    torch._dynamo.reset()
    m = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    config = Int4WeightOnlyConfig(group_size=32, activation_dtype=FP8, set_inductor_config=False)
    int4q.quantize_(m, config)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 64)
    assert torch.equal(compiled(x), m(x))


# --- the table --------------------------------------------------------------------------------


def problem(op="int4_linear", M=4, N=4096, K=4096, group_size=128, **change):
    facts = dict(device="cuda", dtype=torch.bfloat16, scale_dtype=torch.bfloat16, capability=(9, 0))
    return Problem(op=op, M=M, N=N, K=K, group_size=group_size, **{**facts, **change})


REFUSED = {
    "cpu": (dict(device="cpu", capability=None), "runs on cuda, not cpu"),
    "sm80": (dict(capability=(8, 0)), r"built for compute capability 9.0, .* \(8, 0\)"),
    "sm100": (dict(capability=(10, 0)), r"built for compute capability 9.0, .* \(10, 0\)"),
    "group 32": (dict(group_size=32), "is wrong below group_size (64|128), got 32"),
    "N": (dict(N=4100), "N must be a multiple of 8, not 4100"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kernel", [fbgemm.ROWWISE, fbgemm.ROWWISE_BATCHED, fbgemm.ROWWISE_FP8])
def test_fbgemm_says_why_not(monkeypatch, kernel, case):
    change, reason = REFUSED[case]
    monkeypatch.setattr(fbgemm, "_missing", lambda: None)
    assert kernel.unsupported(problem()) is None
    assert re.search(reason, kernel.unsupported(problem(**change)))


@pytest.mark.parametrize("op", ["int4_linear", "int4_linear_fp8"])
def test_only_who_asks_gets_fbgemm(monkeypatch, op):
    monkeypatch.setattr(fbgemm, "_missing", lambda: None)
    for M in (1, 16, 256, 4096):
        for group_size in (32, 64, 128, 256):
            chosen = registry.choose(problem(op, M=M, group_size=group_size))
            assert chosen.backend is not KernelPreference.FBGEMM
    chosen = registry.choose(problem(op), KernelPreference.FBGEMM)
    assert chosen.name == {"int4_linear": "fbgemm_rowwise"}.get(op, "fbgemm_rowwise_fp8")
    for change in (dict(dtype=torch.float16), dict(scale_dtype=torch.float16)):
        with pytest.raises(ValueError, match="takes bfloat16 .*, not torch.float16"):
            registry.choose(problem(**change), KernelPreference.FBGEMM)
    assert fbgemm.ROWWISE_FP8.unsupported(problem(dtype=torch.float16)) is None


def test_without_a_gpu_the_preference_is_an_error():
    t = fp8_weight(8, 128, group=128)
    with (
        kernel_preference("fbgemm"),
        pytest.raises(ValueError, match="fbgemm_rowwise_fp8: runs on"),
    ):
        F.linear(torch.randn(2, 128), t)


def test_fbgemm_reads_whole_blocks():
    t = torch.zeros(8, 16)
    fbgemm.check_contiguous(qdata=t, scale=t)
    with pytest.raises(ValueError, match=r"reads scale as one contiguous block, got shape \[8, 8\] "
                       r"with strides \[16, 1\]. Call .contiguous\(\)"):  # fmt: skip
        fbgemm.check_contiguous(qdata=t, scale=t[:, :8])
    # A weight's own .contiguous() is the cure that the message names.
    w = fp8_weight(16, 256)[:8, :128]
    assert not w.qdata.is_contiguous()
    whole = w.contiguous()
    fbgemm.check_contiguous(qdata=whole.qdata, scale=whole.scale, zero_point=whole.zero_point)


def test_the_rows_are_quantised_by_torch_or_triton_whatever_multiplies():
    x = torch.randn(2, 64)
    for preference in KernelPreference:
        if preference is not KernelPreference.TRITON:
            assert torch.equal(fp8.quantize_rows(x, None, preference)[0], reference.fp8_rows(x)[0])
