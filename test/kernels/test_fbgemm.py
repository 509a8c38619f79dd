"""fbgemm's kernels where asked for, and float8 activations, on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.gpu

from int4q import Int4Tensor, KernelPreference, kernel_preference  # noqa: E402
from int4q.kernels import fbgemm, reference, registry  # noqa: E402
from int4q.kernels.registry import Problem  # noqa: E402
from int4q.kernels.weight import Weight  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_fbgemm = pytest.mark.skipif(
    not HOPPER or fbgemm._missing() is not None, reason="fbgemm-gpu-genai does not run here"
)


def weight(*shape, group=128, dtype=BF16, activation=None):
    w = torch.randn(*shape, device="cuda").to(dtype)
    return Int4Tensor.from_hp(w, [1] * (len(shape) - 1) + [group], activation)


def parts(t):
    return Weight(t.qdata, t.scale, t.zero_point, t.group_size)


def error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def assert_close(got, expected, tolerance):
    assert got.shape == expected.shape
    assert error(got, expected) < tolerance


# --- fbgemm ---------------------------------------------------------------------------------------


@needs_fbgemm
@pytest.mark.parametrize("M", [1, 17, 64, 128, 129, 1000])
@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize("scale_dtype", [BF16, FP32])
def test_rowwise(M, group, scale_dtype):
    t = weight(520, 768, group=group, dtype=scale_dtype)
    x = torch.randn(M, 768, device="cuda", dtype=BF16)
    with kernel_preference("fbgemm"):
        got = F.linear(x, t)
    assert got.dtype == BF16
    expected = x.double() @ t.dequantize(FP32).double().t()
    # Weights, and the result, rounded to bfloat16: uniform in half a unit each (0.0017).
    assert_close(got, expected, 5e-3)


@needs_fbgemm
def test_rowwise_bias_scale_and_no_rows():
    t = weight(256, 512)
    t.act_pre_scale = torch.rand(512, device="cuda", dtype=BF16) + 0.5
    x, bias = torch.randn(2, 9, 512, device="cuda", dtype=BF16), torch.randn(256, device="cuda")
    with kernel_preference("fbgemm"):
        got = F.linear(x, t, bias)
        assert F.linear(x[:, :0], t, bias).shape == (2, 0, 256)
    scaled = (x * t.act_pre_scale).double()
    assert_close(got, scaled @ t.dequantize(FP32).double().t() + bias.double(), 5e-3)


@needs_fbgemm
@pytest.mark.parametrize("M", [1, 16, 100, 300])
@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize("scale_dtype", [BF16, FP32])
def test_rowwise_batched(M, group, scale_dtype):
    """Scales of three dims reach the op as it counts groups: K is more than one group here."""
    t = weight(3, 256, 1024, group=group, dtype=scale_dtype)
    x = torch.randn(3, M, 1024, device="cuda", dtype=BF16)
    got = fbgemm.ROWWISE_BATCHED.run(x, parts(t))
    expected = torch.bmm(x.double(), t.dequantize(FP32).double().mT)
    assert_close(got, expected, 5e-3)
    assert fbgemm.ROWWISE_BATCHED.run(x[:, :0], parts(t)).shape == (3, 0, 256)


@needs_fbgemm
@pytest.mark.parametrize("M", [1, 16, 64, 200])
@pytest.mark.parametrize("group", [128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rowwise_fp8(M, group, dtype):
    t = weight(256, 1024, group=group, dtype=dtype, activation=FP8)
    x = torch.randn(M, 1024, device="cuda", dtype=dtype)
    bias = torch.randn(256, device="cuda", dtype=dtype)
    with kernel_preference("fbgemm"):
        got = F.linear(x, t, bias)
    assert got.dtype == dtype
    # fbgemm rounds the weights to e4m3 as well, 3 bits of mantissa: some 2.6 % of a product.
    assert_close(got, reference.linear_fp8(x, parts(t), bias), 5e-2)
    values, rows = reference.fp8_rows(x)
    w = t.dequantize(FP32).to(FP8).float()
    expected = values.float() @ w.t() * rows + bias.float()
    # 16-bit scales: it rounds q * scale to their dtype first, and e4m3 then goes the other way
    # for some. Otherwise the bfloat16 result alone is left (0.0017).
    assert_close(got, expected, 4e-3 if dtype == FP32 else 2.5e-2)


@needs_fbgemm
def test_refusals():
    x = torch.randn(4, 512, device="cuda", dtype=BF16)
    cases = {
        "is wrong below group_size 64, got 32": (x, weight(256, 512, group=32)),
        "is wrong below group_size 128, got 64": (
            x,
            weight(256, 512, group=64, activation=FP8),
        ),
        "bfloat16 and float32 scales, not torch.float16": (x, weight(256, 512, dtype=FP16)),
        "N must be a multiple of 8, not 250": (x, weight(250, 512)),
        "takes bfloat16 activations, not torch.float16": (x.half(), weight(256, 512)),
        "reads x as one contiguous block": (x[:, :256], weight(256, 256)),
        "reads qdata as one contiguous block": (x[:, :256].clone(), weight(256, 512)[:, :256]),
        "reads scale as one contiguous block": (x, weight(256, 512)[:128]),
    }
    for reason, (activation, t) in cases.items():
        with kernel_preference("fbgemm"), pytest.raises(ValueError, match=reason):
            F.linear(activation, t)
        F.linear(activation, t)  # what other kernels run


@needs_fbgemm
def test_auto_never_takes_it():
    capability = torch.cuda.get_device_capability()
    for op in ("int4_linear", "int4_linear_fp8"):
        for M in (1, 16, 64, 1024, 8192):
            problem = Problem(op, "cuda", BF16, BF16, M, 4096, 4096, 128, capability)
            assert registry.choose(problem).backend is not KernelPreference.FBGEMM


# --- float8 activations ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("K", [96, 4096, 14336])
def test_rows_are_the_references(dtype, K):
    from int4q.kernels.triton import fp8 as triton_fp8

    x = (torch.randn(9, K, device="cuda") * torch.logspace(-3, 3, 9, device="cuda")[:, None]).to(
        dtype
    )
    x[3] = 0
    x[:, 5::7] = x[:, 5::7] * 1e-4  # subnormal e4m3 values
    factor = torch.rand(K, device="cuda") + 0.5
    for scale in (None, factor):
        got, expected = triton_fp8.fp8_rows(x, scale), reference.fp8_rows(x, scale)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("preference", ["auto", "triton", "cuda", "torch"])
@pytest.mark.parametrize("M", [1, 7, 40, 300])
@pytest.mark.parametrize("group", [32, 128])
def test_linear(preference, M, group):
    if preference == "cuda" and M > 16:
        pytest.skip("the decode kernels take up to 16 rows")
    if preference == "cuda" and M > 8 and group < 128:
        pytest.skip("and leave small groups to others from 9")
    t = weight(520, 768, group=group, activation=FP8)
    t.act_pre_scale = torch.rand(768, device="cuda", dtype=BF16) + 0.5
    x, bias = torch.randn(M, 768, device="cuda", dtype=BF16), torch.randn(520, device="cuda")
    with kernel_preference(preference):
        got = F.linear(x, t, bias)
    expected = reference.linear_fp8(x, parts(t), bias, t.act_pre_scale)
    # Roundings to bfloat16: of the weights, of the product, of the scaled result.
    assert_close(got, expected, 6e-3)


def test_stacks():
    t = weight(3, 256, 512, group=32, activation=FP8)
    x = torch.randn(3, 5, 512, device="cuda", dtype=BF16)
    expected = torch.stack([reference.linear_fp8(x[e], parts(t[e])) for e in range(3)])
    assert_close(torch.bmm(x, t), expected, 6e-3)
    offs = torch.tensor([5, 10, 15], dtype=torch.int32, device="cuda")
    got = F.grouped_mm(x.flatten(0, 1), t.transpose(1, 2), offs=offs)
    assert_close(got, expected.flatten(0, 1), 6e-3)


def test_in_a_cuda_graph():
    t = weight(256, 512, activation=FP8)
    x = torch.randn(4, 512, device="cuda", dtype=BF16)
    expected = F.linear(x, t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.linear(x, t)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
