"""The numbers inside the compiled CPU kernels: limbs of fixed point at their edges, outliers, the
ends of the range, weights rounded to bfloat16, int8 activations."""

import pytest
import torch
import torch.nn.functional as F

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, q4gsw
from int4q.kernels import linear_q4gsw, reference
from int4q.kernels.cpu import NATIVE, NATIVE_INT8, blocked, native
from int4q.kernels.cpu.native import Product
from int4q.kernels.registry import Problem, choose
from int4q.kernels.weight import Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
SUBNORMAL = {BF16: 2.0**-134, FP16: 2.0**-25, FP32: 2.0**-150}
# Half a step of fixed point, relative to the largest of its block; and float32 sums.
FIXED_POINT = {BF16: 2.0**-15, FP16: 2.0**-15, FP32: 2.0**-23}
FLOAT32_SUM = 2.0**-22

_missing = native.unsupported(Problem("int4_linear", "cpu", BF16, BF16, 1, 64, 256, 32))
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch):
    """On a CPU with AMX too, the decode kernel is what these tests look at."""
    monkeypatch.setattr(native, "TILES_MIN_M", 1 << 30)


def weight(N=16, K=64, group_size=32):
    """One without zero points, float32, and its float64 values: every nibble in each row."""
    qdata = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8)
    scale = torch.rand(K // group_size, N) * 0.02 + 0.002
    found = Weight(qdata, scale, None, group_size)
    return found, reference.dequantize(found, torch.float64)


def float32_of(significand, exponent):
    """``significand * 2^(exponent - 23)``; a significand of 24 bits, 2^23 to 2^24."""
    return torch.ldexp(significand.double(), torch.tensor(exponent - 23.0)).float()


# v = significand / 2 (three limbs) or / 2^9 (two) must stay below 8355711.5 or 32639.5.
EDGES = {"three limbs": 2 * 8355711 + 1, "two limbs": 512 * 32639 + 256, "a power of two": 1 << 24}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("exponent", [-100, -1, 0, 7, 118])
def test_float32_at_the_edge_of_a_limb(edge, exponent):
    """Every significand around an edge, in each place of a block, with both signs."""
    near = torch.arange(EDGES[edge] - 600, EDGES[edge] + 600).clamp(max=(1 << 24) - 1)
    values = float32_of(near, exponent)
    parts, w = weight()
    for place in range(8):
        x = torch.zeros(len(values), 64)
        x[:, 8 * place + place] = values * (-1) ** place
        x[:, (8 * place + 9) % 64] = values * 0.5  # another block's, so that they do not cancel
        for rows in x.split(min(100, native.decode_max_m(FP32))):
            y = native.linear(rows, parts).double()
            allowed = (FIXED_POINT[FP32] + FLOAT32_SUM) * (rows.double().abs() @ w.abs().T)
            assert ((y - rows.double() @ w.T).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_16_bit_value_alone_in_a_row(dtype):
    """16-bit values are exact in fixed point: float32 sums and one rounding are all there is."""
    values = torch.arange(1 << 16).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    parts, w = weight(K=32)
    for some in values.split(native.decode_max_m(dtype)):
        x = torch.zeros(len(some), 32, dtype=dtype)
        x[:, 5] = some
        golden = x.double() @ w.T
        allowed = (ROUNDING[dtype] + FLOAT32_SUM) * golden.abs() + SUBNORMAL[dtype]
        # Below 2^-112 bfloat16 is rounded to multiples of 2^-126.
        allowed += 2.0**-127 * w.abs().sum(1) * (x.double().abs().amax(1, keepdim=True) < 2.0**-112)
        error = (NATIVE.run(x, parts).double() - golden).abs()
        assert (error <= allowed).all()


def check_normal(run, w, M, K):
    for _ in range(-(-400 // M)):
        x = torch.randn(M, K)
        error = (run(x).double() - x.double() @ w.T).abs()
        block = x.double().abs().unflatten(1, (-1, 8)).amax(-1).repeat_interleave(8, dim=1)
        fixed = 4 * FIXED_POINT[FP32] * (block**2 @ (w**2).T).sqrt()  # seven standard deviations
        assert (error <= fixed + FLOAT32_SUM * (x.double().abs() @ w.abs().T)).all()
        assert (error.norm(dim=1) <= 2e-6 * (x.double() @ w.T).norm(dim=1)).all()


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("M", range(1, 9))
def test_float32_normal_inputs(M, group_size):
    """Element by element and row by row; a wrapped limb is off by 2 in a hundred rows."""
    t = Int4Tensor.from_hp(torch.randn(16, 4096) * 0.02, [1, group_size])
    check_normal(lambda x: F.linear(x, t), t.dequantize(torch.float64), M, 4096)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("M", range(1, 9))
def test_q4gsw_normal_inputs(M, group_size):
    packed = q4gsw.from_weight(torch.randn(16, 4096) * 0.02, group_size)
    w = q4gsw.to_linear(packed).weight.double().detach()
    check_normal(lambda x: linear_q4gsw(x, *packed), w, M, 4096)


@pytest.mark.parametrize("outlier", [10.0, 1e2, 1e3, 1e4, 6e4])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("K", [512, 4096])
def test_an_outlier_whose_weight_is_zero(K, dtype, outlier):
    """It takes bits from its block; the result shows no more than twice its own rounding."""
    parts, _ = weight(256, K, 128)
    parts.qdata[:, :4] &= -16  # q = 0 for k = 0, 2, 4, 6
    w = reference.dequantize(parts, torch.float64)
    for M in (1, 4, 5, 8):
        x = torch.randn(M, K).to(dtype)
        x[:, 0] = outlier
        golden = x.double() @ w.T
        error = (native.linear(x, parts).double() - golden).norm(dim=1)
        own = (golden.to(dtype).double() - golden).norm(dim=1)
        assert (error <= 2 * own).all()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("bad", ["inf", "-inf", "nan", "both"])
def test_a_row_with_inf_or_nan_is_as_in_torch(bad, dtype):
    t = Int4Tensor.from_hp(torch.randn(20, 256).to(dtype), [1, 64])
    x = torch.randn(4, 256).to(dtype)
    x[1, 200] = float("inf" if bad == "both" else bad)
    if bad == "both":
        x[1, 17] = float("-inf")
    y, expected = F.linear(x, t), F.linear(x.double(), t.dequantize(torch.float64))
    assert torch.equal(y[1].double(), expected[1]) or y[1].isnan().equal(expected[1].isnan())
    assert torch.equal(y[1].isinf() & (y[1] > 0), expected[1].isinf() & (expected[1] > 0))
    torch.testing.assert_close(y[[0, 2, 3]].double(), expected[[0, 2, 3]], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", [1e-38, 1e-36, 1e-30, 1e-20])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_tiny_activations(dtype, size):
    """Down to 2^-112 (float32: 2^-104) as any other; below, to multiples of 2^-126."""
    parts, w = weight(33, 256)
    x = (torch.randn(5, 256) * size).to(dtype)
    golden = x.double() @ w.T
    block = x.double().abs().unflatten(1, (-1, 8)).amax(-1).repeat_interleave(8, dim=1)
    step = torch.maximum(FIXED_POINT[dtype] * block, torch.tensor(2.0**-127).double())
    allowed = ROUNDING[dtype] * golden.abs() + step @ w.abs().T
    allowed += FLOAT32_SUM * (x.double().abs() @ w.abs().T) + 256 * 2.0**-149 + SUBNORMAL[dtype]
    assert ((native.linear(x, parts).double() - golden).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("size", [2.0**120, 2.0**121, 2.0**122, 3e38])
def test_huge_activations(dtype, size):
    """A sum of ``q * x`` that leaves float32 where the scaled one does not is no Inf."""
    parts, w = weight(33, 64)
    parts.qdata[:, :4] = -0x78  # eight weights of -8
    w = reference.dequantize(parts, torch.float64)
    x = torch.randn(3, 64).to(dtype)
    x[1, :4] = size
    golden = x.double() @ w.T
    y = NATIVE.run(x, parts)
    assert y.isfinite().all()
    # (Rows beyond the range meet weights rounded to their dtype.)
    bound = 2 * ROUNDING[dtype] * (x.double().abs() @ w.abs().T)
    bound += FIXED_POINT[dtype] * x.double().abs().amax(1, keepdim=True) * w.abs().sum(1)
    assert ((y.double() - golden).abs() <= bound).all()


def test_weights_and_activations_at_the_end_of_their_range():
    """float16 results saturate as in torch; bfloat16 sums of the largest weights stay finite."""
    parts, w = weight(8, 128)
    x = torch.full((2, 128), 65504.0, dtype=FP16)
    y, golden = native.linear(x, parts), (x.double() @ w.T).to(FP16)
    assert torch.equal(y.isinf(), golden.isinf())
    large = parts._replace(scale=parts.scale * 0 + 3.0e37)
    x = torch.zeros(1, 128, dtype=BF16)
    x[0, 7] = 1.0
    q = reference.dequantize(parts._replace(scale=parts.scale * 0 + 1), torch.float64)
    torch.testing.assert_close(
        native.linear(x, large).double(), 3.0e37 * q[:, 7][None], rtol=2**-8, atol=0
    )


FEATURES = {"bf16 products": ~native._AMX, "float products": native._AVX512}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("offset_binary", [False, True])
def test_bf16_weights(monkeypatch, features, group_size, offset_binary):
    """With and without the processor's bf16 products; short blocks, units and chunks."""
    allowed_features = native._features() & FEATURES[features]
    if not allowed_features & native._AVX512:
        pytest.skip("AVX-512 only")
    monkeypatch.setattr(native, "_features", lambda: allowed_features)
    for N, units in ((1, 1), (33, 3), (100, 5)):
        K = units * group_size
        qdata = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8)
        scale = (torch.rand(units, N) + 0.1).to(BF16)
        parts = Weight(qdata, scale, None, group_size, signed=not offset_binary)
        w = reference.dequantize(parts, BF16).double()
        for M in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16):
            x = torch.randn(M, K).to(BF16)
            y = native.linear(x, parts, product=Product.BF16)
            golden = x.double() @ w.T
            allowed = ROUNDING[BF16] * golden.abs() + FLOAT32_SUM * (x.double().abs() @ w.abs().T)
            assert ((y.double() - golden).abs() <= allowed).all()


def test_bf16_weights_take_no_zero_points():
    parts, _ = weight()
    with pytest.raises(ValueError, match="zero_point must be None"):
        x = torch.zeros(1, 64).to(BF16)
        native.linear(x, parts._replace(zero_point=parts.scale), product=Product.BF16)
    with pytest.raises(ValueError, match="for bfloat16 activations, not torch.float32"):
        native.linear(torch.zeros(1, 64), parts, product=Product.BF16)


@pytest.mark.parametrize("N, K, group_size", [(1, 32, 32), (33, 160, 32), (20, 192, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, torch.float64])
def test_int8_activations_are_the_references(N, K, group_size, dtype):
    """The same int8 numbers, so float32 sums and the result's rounding are all that differs."""
    qdata = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8)
    scale, zero = torch.rand(K // group_size, N), torch.randn(K // group_size, N)
    bias, pre = torch.randn(N), torch.rand(K) + 0.5
    for M in range(1, 9):
        x = torch.randn(M, K)
        x[:, 3] *= 1000
        x[0, :32] = torch.arange(-16, 16) * 127 / 32 + 0.5  # ties
        x = x.to(dtype)
        rest = Weight(qdata, scale, zero, group_size), bias, pre
        y, expected = NATIVE_INT8.run(x, *rest), reference.linear_int8(x, *rest)
        assert y.dtype == dtype
        xq, d = reference.quantize_activation(x.float() * pre)
        values = (xq.float() * d.unsqueeze(-1)).flatten(1).abs().double()
        w = reference.dequantize(Weight(qdata, scale, None, group_size), torch.float64).abs()
        w += zero.double().abs().T.repeat_interleave(group_size, dim=1)
        allowed = 2 * FLOAT32_SUM * (values @ w.T + bias.abs())
        allowed += 2 * ROUNDING.get(dtype, ROUNDING[FP32]) * expected.double().abs()
        assert ((y.double() - expected.double()).abs() <= allowed).all()


def test_int8_activations_at_the_ends():
    """Zeros, blocks whose d rounds to 0 or is subnormal, the largest float, NaN and Inf."""
    t = CudaCoalescedInt4Tensor.from_hp(torch.randn(16, 256), [1, 32])
    x = torch.randn(8, 256)
    x[0], x[1], x[2] = 0, 1e-45, 1e-41
    x[3], x[4, 9], x[5, 9] = 2e37, float("nan"), float("inf")
    parts = Weight(t.qdata, t.scale.mT, t.zero_point.mT, 32)
    y, expected = NATIVE_INT8.run(x, parts), reference.linear_int8(x, parts)
    assert torch.equal(y.isnan(), expected.isnan()) and y[4:6].isnan().all()
    finite = expected.isfinite()
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-5, atol=1e-5)


def test_a_coalesced_weight_with_int8_activations_has_a_kernel_of_its_own():
    for dtype in (BF16, FP16, FP32, torch.float64):
        for M, name in ((1, "cpu_native_w4a8"), (8, "cpu_native_w4a8"), (9, "cpu_native")):
            problem = Problem("int4_plain_mm", "cpu", dtype, BF16, M, 4096, 4096, 128)
            if dtype != torch.float64 or M < 9:
                assert choose(problem).name == name


@pytest.mark.parametrize("M, dtype", [(9, FP16), (200, FP16), (9, FP32), (100, FP32), (16, BF16)])
def test_more_rows_than_a_chunk(M, dtype):
    """Chunks of eight rows over a block of weights: each row is what it is alone."""
    M = min(M, native.decode_max_m(dtype))
    parts, _ = weight(50, 320, 64)
    x = torch.randn(M, 320).to(dtype)
    y = native.linear(x, parts)
    alone = torch.cat([native.linear(row, parts) for row in x.split(1)])
    assert torch.equal(y, alone)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, torch.float64])
def test_both_contractions_by_blocks(monkeypatch, dtype):
    """Several blocks in one buffer, the last one shorter; float16 products run in float32."""
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 20 * 256)
    scale_dtype = FP32 if dtype == torch.float64 else dtype
    qdata = torch.randint(-128, 128, (50, 128), dtype=torch.int8)
    scale, zero = (torch.rand(4, 50) * 0.02).to(scale_dtype), torch.randn(4, 50).to(scale_dtype)
    parts = Weight(qdata, scale, zero, 64)
    w = reference.dequantize(parts, torch.float64)
    rounding = {BF16: 2.0**-7, FP16: 2.0**-10, FP32: 2.0**-21, torch.float64: 2.0**-50}[dtype]
    for M in (1, 40):
        x, grad = torch.randn(M, 256).to(dtype), torch.randn(M, 50).to(dtype)
        y = blocked.linear(x, parts)
        assert y.dtype == dtype
        error, size = (y.double() - x.double() @ w.T).abs(), x.double().abs() @ w.abs().T
        assert (error <= rounding * size).all()
        back = blocked.grad_input(grad, parts)
        assert back.dtype == dtype
        error, size = (back.double() - grad.double() @ w).abs(), grad.double().abs() @ w.abs()
        assert (error <= rounding * size).all()


def test_float16_blocks_are_as_exact_as_their_result():
    """Weights are not rounded to float16 on the way, and sums are float32."""
    parts, w = weight(40, 256, 64)
    x = torch.randn(300, 256).to(FP16)  # more rows than the decode kernel takes
    golden = x.double() @ w.T
    allowed = ROUNDING[FP16] * golden.abs() + 2.0**-20 * (x.double().abs() @ w.abs().T)
    error = (blocked.linear(x, parts).double() - golden).abs()
    assert (error <= allowed + SUBNORMAL[FP16]).all()


def test_dequant_w4_to_bf16_is_the_reference_bit_by_bit():
    w_packed = torch.randint(-128, 128, (50, 160), dtype=torch.int8)
    w_scale = (torch.rand(50, 10) + 0.1).to(BF16)
    y = torch.ops.int4q.dequant_w4_to_bf16(w_packed, w_scale, 32)
    weight = Weight(w_packed, w_scale.mT, None, 32, signed=False)
    assert torch.equal(y, reference.dequantize(weight, BF16))


@pytest.mark.parametrize("dtype, factor", [(BF16, 2.0**6), (FP16, 2.0**3)])
def test_16_bit_activations_of_like_size_are_exact(dtype, factor):
    """Integers times integers below 2^24, one rounding: no tolerance."""
    parts, _ = weight(33, 256)
    parts = parts._replace(scale=parts.scale * 0 + 1)
    q = reference.dequantize(parts, torch.float64)
    digits = {BF16: 7, FP16: 10}[dtype]
    x = (2**digits + torch.randint(0, 2**digits, (8, 256))) * torch.tensor([1, -1]).repeat(128)
    x = (x * torch.where(torch.rand(8, 256) < 0.5, 1.0, 1 / factor) * 2.0**-12).to(dtype)
    y = native.linear(x.double().to(dtype), parts)
    assert torch.equal(y, (x.double() @ q.T).to(dtype))
