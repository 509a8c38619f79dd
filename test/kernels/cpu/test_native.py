"""The compiled CPU kernels against float64, within the error that their arithmetic allows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from int4q.kernels.cpu import native
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOATS = (BF16, FP16, FP32)
GROUPS = (32, 64, 128, 256)
# Half a unit in the last place of each result dtype, relative.
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
# Half a step of the fixed point, relative to the largest of its block of eight: the largest takes
# 15 bits (two int8 limbs) or 23 (three), one less when it is within 1/128 of a power of two.
FIXED_POINT = {BF16: 2.0**-15, FP16: 2.0**-15, FP32: 2.0**-23}
# float32 sums of 16 lanes of K / 128 partial sums each, whose errors add as a random walk.
FLOAT32_SUM = 2.0**-22
SUBNORMAL_FP16 = 2.0**-25

_decode = native.unsupported(Problem("int4_linear", "cpu", BF16, BF16, 1, 64, 256, 32))
_many = native.BF16_DECODE_MAX_M + 1
_gemm = native.unsupported(Problem("int4_linear", "cpu", BF16, BF16, _many, 64, 256, 32))
pytestmark = pytest.mark.skipif(_decode is not None, reason=str(_decode))
needs_gemm = pytest.mark.skipif(_gemm is not None, reason=str(_gemm))


def make_weight(N, K, group_size, dtype=BF16):
    """Every nibble value, another scale and zero point in each group."""
    qdata = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8)
    qdata[0, :2] = torch.tensor([0x78, -0x79], dtype=torch.int8)  # -8 low, 7 high; 7 low, -8 high
    groups = K // group_size
    scale = ((torch.rand(groups, N) + 0.1) * 0.02).to(dtype)
    zero_point = (torch.randn(groups, N) * 0.03).to(dtype)
    return Weight(qdata, scale, zero_point, group_size)


def nibbles(qdata):
    q = qdata.to(torch.int16)
    return torch.stack([((q & 15) ^ 8) - 8, q >> 4], dim=-1).flatten(-2)


def spread(part, weight, dtype):
    """A scale or zero point of every element, ``[N, K]``."""
    return part.to(dtype).T.repeat_interleave(weight.group_size, dim=1)


def parts_float64(weight):
    """``q * scale`` and ``zero_point``, both ``[N, K]``."""
    scale, zero_point = (spread(t, weight, torch.float64) for t in weight[1:3])
    return nibbles(weight.qdata).double() * scale, zero_point


def dequantized(weight, dtype):
    """float32 with the product rounded before the sum, then rounded once to ``dtype``."""
    scale, zero_point = (spread(t, weight, torch.float32) for t in weight[1:3])
    return (nibbles(weight.qdata).float() * scale + zero_point).to(dtype)


def check_decode(x, weight, bias=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "TILES_MIN_M", native.decode_max_m(x.dtype) + 1)
        y = native.linear(x, weight, bias)
    assert y.dtype == x.dtype and y.shape == (x.shape[0], weight.N)
    product, zero = parts_float64(weight)
    golden = x.double() @ (product + zero).T + (0 if bias is None else bias.double())
    block = x.double().abs().unflatten(1, (-1, 8)).amax(-1).repeat_interleave(8, dim=1)
    # Errors of independent sign add as the root of their squares. A uniform error of half a step
    # h has the standard deviation h / sqrt(3): 4 h is seven of them.
    fixed = 4 * FIXED_POINT[x.dtype] * (block**2 @ (product**2).T).sqrt()
    sums = FLOAT32_SUM * (x.double().abs() @ (product.abs() + zero.abs()).T)
    allowed = ROUNDING[x.dtype] * golden.abs() + fixed + sums + SUBNORMAL_FP16
    assert ((y.double() - golden).abs() <= allowed).all()


def check_gemm(x, weight, bias=None):
    y = native.linear(x, weight, bias)
    assert y.dtype == BF16 and y.shape == (x.shape[0], weight.N)
    w = dequantized(weight, BF16).double()  # the kernel's defined precision
    golden = x.double() @ w.T + (0 if bias is None else bias.double())
    allowed = ROUNDING[BF16] * golden.abs() + FLOAT32_SUM * (x.double().abs() @ w.abs().T)
    assert ((y.double() - golden).abs() <= allowed + 1e-30).all()


def check(x, *args):
    (check_decode if x.shape[0] <= native.decode_max_m(x.dtype) else check_gemm)(x, *args)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_decode_dtypes(x_dtype, scale_dtype, group_size):
    weight = make_weight(33, 512, group_size, scale_dtype)
    for M in range(1, 9):
        check_decode(torch.randn(M, 512).to(x_dtype), weight)


SIZES = [
    (N, K, group_size)
    for N in (1, 7, 16, 33, 64, 100)  # short blocks of 16 rows and panels of 32
    for K in (32, 96, 160, 320, 1024, 1280)  # short units of 128, chunks of 512
    for group_size in GROUPS
    if K % group_size == 0
]


@pytest.mark.parametrize("N, K, group_size", SIZES)
def test_decode_tails(N, K, group_size):
    weight = make_weight(N, K, group_size)
    for M, dtype in ((1, BF16), (2, FP32), (3, FP16), (5, BF16), (8, FP32), (8, BF16)):
        check_decode(torch.randn(M, K).to(dtype), weight, torch.randn(N))


@needs_gemm
@pytest.mark.parametrize("N, K, group_size", SIZES)
def test_gemm_tails(N, K, group_size):
    weight = make_weight(N, K, group_size)
    for M in (native.TILES_MIN_M, 9, 16, 17, 31, 33, 130):
        check_gemm(torch.randn(M, K).to(BF16), weight, torch.randn(N))


@needs_gemm
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_gemm_scale_dtypes(group_size, scale_dtype):
    weight = make_weight(48, 768, group_size, scale_dtype)
    check_gemm(torch.randn(40, 768).to(BF16), weight)


@needs_gemm
def test_gemm_more_rows_than_a_block():
    """x is packed 512 rows at a time, and eight panels of 32 weight rows share a pass."""
    check_gemm(torch.randn(1050, 640).to(BF16), make_weight(600, 640, 128), torch.randn(600))


@pytest.mark.parametrize("x_dtype, limit", [(BF16, 1e-4), (FP16, 1e-4), (FP32, 2e-6)])
@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_decode_precision(x_dtype, limit, outlier):
    """Relative to the results' scale, without their own rounding, also beside one huge channel."""
    weight = make_weight(256, 4096, 128, FP32)
    x = torch.randn(4, 4096)
    x[:, 77] *= outlier
    x = x.to(x_dtype)
    golden = x.double() @ sum(parts_float64(weight)).T
    y = native.linear(x, weight).double()
    error = (y - golden).abs() - ROUNDING[x_dtype] * golden.abs()
    assert error.max() <= limit * golden.abs().max()


@pytest.mark.parametrize("M", [1, 8, pytest.param(24, marks=needs_gemm)])
def test_strides(M):
    """Slices of a larger weight, both layouts of the scales, x with gaps and x transposed."""
    whole = make_weight(80, 512, 64)
    plain = Weight(whole.qdata[3:50, 32:160], *(t[1:5, 3:50] for t in whole[1:3]), 64)
    layouts = [
        plain,
        plain._replace(qdata=plain.qdata.T.contiguous().T),
        Weight(plain.qdata, *(t.T.contiguous().T for t in plain[1:3]), 64),
        Weight(plain.qdata, *(torch.stack([t, t], -1).flatten(-2)[:, ::2] for t in plain[1:3]), 64),
    ]
    x = torch.randn(M, 512).to(BF16)[:, 128:384]
    for weight in layouts:
        check(x, weight)
        check(torch.randn(256, M).to(BF16).T, weight)
        assert torch.equal(native.linear(x, weight), native.linear(x, plain))


@pytest.mark.parametrize("M", [1, 8, pytest.param(24, marks=needs_gemm)])
def test_exact_on_small_integers(M):
    """Every sum here is an integer below 2^24: no tolerance at all."""
    qdata, scale, *_ = make_weight(33, 256, 32, FP32)
    scale = (2.0 ** torch.randint(0, 3, scale.shape)).float()
    weight = Weight(qdata, scale, torch.randint(-4, 5, scale.shape).float(), 32)
    x = torch.randint(-8, 9, (M, 256))
    golden = x.double() @ dequantized(weight, torch.float64).T
    y = native.linear(x.to(BF16), weight)
    assert torch.equal(y, golden.float().to(BF16))
    if M <= native.decode_max_m(FP32):
        y = native.linear(x.float(), weight)
        assert torch.equal(y.double(), golden)


@pytest.mark.parametrize("x_dtype", FLOATS)
def test_decode_range(x_dtype):
    """The ends of the dtype's range, zeros, and blocks of very different size side by side."""
    weight = make_weight(16, 256, 32, FP32)
    x = torch.zeros(6, 256)
    x[1] = torch.randn(256) * torch.finfo(x_dtype).smallest_normal * 4
    x[2] = torch.randn(256) * 2.0 ** torch.linspace(-14, 0, 256)
    x[3] = torch.linspace(0.98, 1.02, 256)  # either side of a power of two
    x[4] = -x[3]
    # (Fixed point ends at 2^121; cpu.native_linear takes the rows beyond another way.)
    x[5, 3::64] = min(torch.finfo(x_dtype).max / 64, native._RANGE / 2)
    check_decode(x.to(x_dtype), weight)
    assert not native.linear(x[:1].to(x_dtype), weight._replace(zero_point=None)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_decode_non_finite_x(bad):
    x = torch.randn(3, 256).to(BF16)
    x[1, 200] = bad
    y = native.linear(x, make_weight(20, 256, 64))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize(
    "N, K, group_size", [(1, 32, 32), (37, 320, 64), (16, 4096, 32), (50, 768, 256)]
)
def test_dequantize(N, K, group_size, scale_dtype, dtype):
    """The same float32 operations, so the same bits."""
    weight = make_weight(N, K, group_size, scale_dtype)
    got = native.dequantize(weight, dtype)
    assert torch.equal(got, dequantized(weight, dtype))
    rows = weight.rows(slice(N // 2, N))
    assert torch.equal(native.dequantize(rows, dtype), dequantized(rows, dtype))


@pytest.mark.parametrize(
    "M", [1, 8, pytest.param(24, marks=needs_gemm), pytest.param(100, marks=needs_gemm)]
)
def test_threads(M):
    """The same bits with one thread, with several, and from several callers at once."""
    weight = make_weight(500, 1024, 128)
    x = torch.randn(M, 1024).to(BF16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native.linear(x, weight)
        torch.set_num_threads(3)
        assert torch.equal(native.linear(x, weight), one)
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: native.linear(x, weight), range(16)):
            assert torch.equal(y, one)


def test_empty_x():
    y = native.linear(torch.empty(0, 64).to(BF16), make_weight(8, 64, 32))
    assert y.shape == (0, 8)


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(x=torch.zeros(1, 128)), ValueError, "x must have 256 columns .* got 128"),
        (dict(x=torch.zeros(1, 256).double()), ValueError, "activations, not torch.float64"),
        (dict(x=torch.zeros(129, 256)), ValueError, "slower than blocks above M = "),
        (dict(qdata=torch.zeros(16, 128)), TypeError, "qdata must be int8"),
        (dict(scale=torch.ones(16, 4)), ValueError, r"scale must have shape .* = \[4, 16\]"),
        (dict(zero_point=torch.ones(4, 16).half()), TypeError, "zero_point must have scale's"),
        (dict(bias=torch.ones(4)), ValueError, r"bias must have shape \[16\]"),
        (
            dict(group_size=16, scale=torch.ones(16, 16), zero_point=torch.ones(16, 16)),
            ValueError,
            "group_size must be 32, 64, 128 or 256, not 16",
        ),
    ],
)
def test_errors(change, error, match):
    x, bias = change.pop("x", torch.zeros(1, 256)), change.pop("bias", None)
    weight = Weight(
        torch.zeros(16, 128, dtype=torch.int8), torch.ones(4, 16), torch.ones(4, 16), 64
    )
    with pytest.raises(error, match=match):
        native.linear(x, weight._replace(**change), bias)


def test_a_broken_library_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "_int4_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    library, reason = native.load.__wrapped__()
    assert library is None and "did not load" in reason
    (tmp_path / "_int4_cpu.so").unlink()
    library, reason = native.load.__wrapped__()
    assert library is None and "not built" in reason
