"""The Triton and Gluon kernels on a GPU, against references of each kernel's own precision."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from int4q.kernels.weight import Weight

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from int4q.kernels.triton import dequant as triton_dequant  # noqa: E402
from int4q.kernels.triton import gluon_matmul  # noqa: E402
from int4q.kernels.triton import matmul as triton_matmul  # noqa: E402
from int4q.kernels.triton import matvec as triton_matvec  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# ||y - reference|| / ||reference||: rounding of the output, uniform in half a unit (0.0017 for
# bf16), and float32 accumulation. It does not grow with M or N.
TOLERANCE = {BF16: 2.2e-3, FP16: 3e-4, FP32: 3e-6}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group_size: int
    dtype: torch.dtype = BF16
    scale_dtype: torch.dtype | None = None
    coalesced: bool = False
    why: str = ""

    def __str__(self):
        return f"{self.M}x{self.N}x{self.K}-g{self.group_size}-{self.why.replace(' ', '_')}"


CASES = [
    Case(1, 4096, 4096, 128, why="one row"),
    Case(9, 70, 160, 32, why="K tail and N under a tile"),
    Case(16, 12352, 192, 64, why="N no power of two"),
    Case(17, 12352, 320, 32, why="two tiles of M", coalesced=True),
    Case(33, 4096, 768, 256, why="group of two K tiles"),
    Case(64, 1000, 4096, 128, why="N no multiple of 16"),
    Case(64, 33792, 1024, 128, why="more tiles than places"),
    Case(64, 4096, 4096, 128, why="tiles shared by programs"),
    Case(64, 4096, 4096, 32, why="group 32 coalesced", coalesced=True),
    Case(100, 272, 384, 128, FP16, why="fp16"),
    Case(129, 4096, 1024, 64, FP16, coalesced=True, why="fp16 coalesced"),
    Case(300, 1040, 640, 128, BF16, FP32, why="float32 scales"),
    Case(256, 4096, 4096, 128, why="prefill"),
    Case(4095, 2048, 512, 128, why="M 4095"),
]
FLOAT32 = Case(20, 130, 320, 64, FP32, why="float32")


ENGINES = [
    pytest.param(triton_matmul, id="triton"),
    pytest.param(
        gluon_matmul,
        id="gluon",
        marks=pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.x"),
    ),
]


def parts(case, seed=0):
    """x, qdata, scale, zero_point; both end values of a nibble in both places, a scale of its own
    for every group (neighbours differ by up to 10 times)."""
    g = torch.Generator("cuda").manual_seed(seed)
    on = {"device": "cuda", "generator": g}
    groups = case.K // case.group_size
    qdata = torch.randint(-128, 128, (case.N, case.K // 2), dtype=torch.int8, **on)
    ends = torch.tensor([0x87, 0x78, 0x88, 0x77], dtype=torch.uint8, device="cuda")
    qdata[:, :4] = ends.view(torch.int8)
    qdata[-1, -4:] = ends.view(torch.int8)
    dtype = case.scale_dtype or case.dtype
    scale = (torch.rand(groups, case.N, **on) * 0.009 + 0.001).to(dtype)
    zero = (torch.randn(groups, case.N, **on) * 0.01).to(dtype)
    if case.coalesced:
        scale, zero = scale.t().contiguous().t(), zero.t().contiguous().t()
    return torch.randn(case.M, case.K, **on).to(case.dtype), qdata, scale, zero


def weight(qdata, scale, zero, group_size):
    """float32 ``[N, K]``, by broadcasting over the groups."""
    low, high = (qdata << 4) >> 4, qdata >> 4
    q = torch.stack([low, high], dim=-1).flatten(1).float().unflatten(1, (-1, group_size))
    value = q * scale.float().t().unsqueeze(-1)
    if zero is not None:
        value = value + zero.float().t().unsqueeze(-1)
    return value.flatten(1)


def offset_binary(qdata):
    return qdata ^ torch.tensor(-0x78, dtype=torch.int8, device="cuda")


def check(y, x, w, bias=None):
    expected = x.double() @ w.double().t()
    if bias is not None:
        expected += bias.double()
    assert torch.isfinite(y).all()
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE[y.dtype], error


LINEAR = [
    pytest.param(*engine.values, case, marks=engine.marks, id=f"{engine.id}-{case}")
    for engine in ENGINES
    for case in (*CASES, FLOAT32)
    if engine.id == "triton" or case.dtype != FP32  # the other takes 16-bit activations only
]


@pytest.mark.parametrize("engine,case", LINEAR)
def test_linear(engine, case):
    x, qdata, scale, zero = parts(case)
    bias = torch.randn(case.N, device="cuda").to(case.dtype)
    y = engine.linear(x, Weight(qdata, scale, zero, case.group_size), bias)
    w = weight(qdata, scale, zero, case.group_size)
    if case.M > 1 or engine is gluon_matmul:  # the one-row kernel keeps float32 weights
        w = w.to(case.dtype)
    check(y, x, w, bias)
    again = engine.linear(x, Weight(qdata, scale, zero, case.group_size), bias)
    assert torch.equal(y, again)  # shared tiles are added in a fixed order


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == BF16], ids=str)
def test_matmul(engine, case):
    x, qdata, scale, _ = parts(case)
    packed, by_row = offset_binary(qdata), scale.t()
    y = engine.int4_matmul(x, packed, by_row, case.group_size)
    check(y, x, weight(qdata, scale, None, case.group_size).to(BF16))


@pytest.mark.parametrize("case", [*CASES, FLOAT32], ids=str)
def test_matvec(case):
    x, qdata, scale, _ = parts(case)
    y = triton_matvec.int4_matvec(x[:1], offset_binary(qdata), scale.t(), case.group_size)
    expected = x[:1].double() @ weight(qdata, scale, None, case.group_size).double().t()
    bound = 1e-3 * expected.abs().max() + expected.abs() * torch.finfo(case.dtype).eps / 2
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("case", [*CASES, FLOAT32], ids=str)
def test_dequantize(case):
    _, qdata, scale, zero = parts(case)
    expected = weight(qdata, scale, zero, case.group_size)
    for dtype in (BF16, FP16, FP32):
        w = triton_dequant.dequantize(Weight(qdata, scale, zero, case.group_size), dtype)
        assert torch.equal(w, expected.to(dtype))
    w = triton_dequant.dequant_w4_to_bf16(offset_binary(qdata), scale.t(), case.group_size)
    assert torch.equal(w, weight(qdata, scale, None, case.group_size).to(BF16))


@pytest.mark.parametrize("case", [c for c in CASES if c.M > 16], ids=str)
def test_dequantize_then_cublas(case):
    x, qdata, scale, zero = parts(case)
    bias = torch.randn(case.N, device="cuda").to(case.dtype)
    y = triton_dequant.linear(x, Weight(qdata, scale, zero, case.group_size), bias)
    check(y, x, weight(qdata, scale, zero, case.group_size).to(case.dtype), bias)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("M", [12, 64])
def test_any_strides(engine, M):
    """x with strides, a weight cut out of a larger one by rows and by whole groups."""
    x, qdata, scale, zero = parts(Case(M, 512, 1024, 128))
    w = weight(qdata, scale, zero, 128).to(BF16)
    for view in (
        torch.stack([x, x], 1)[:, 0],
        x.t().contiguous().t(),
        torch.cat([x, x], 1)[:, :1024],
    ):
        check(engine.linear(view, Weight(qdata, scale, zero, 128)), x, w)
    rows = slice(5, 405)
    y = engine.linear(x, qdata[rows], scale[:, rows], zero[:, rows], 128)
    check(y, x, w[rows])
    y = engine.linear(x[:, 256:768], qdata[:, 128:384], scale[2:6], zero[2:6], 128)
    check(y, x[:, 256:768], w[:, 256:768])
    odd = torch.empty(512 * 512 + 1, dtype=torch.int8, device="cuda")[1:].view(512, 512)
    odd.copy_(qdata)
    check(engine.linear(x, odd, scale, zero, 128), x, w)


@pytest.mark.parametrize("engine", ENGINES)
def test_activation_scale(engine):
    x, qdata, scale, zero = parts(Case(24, 512, 1024, 128))
    factor = (torch.rand(1024, device="cuda") + 0.5).to(BF16)
    y = engine.linear(x, Weight(qdata, scale, zero, 128), None, factor)
    check(y, x * factor, weight(qdata, scale, zero, 128).to(BF16))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_rows(engine):
    x, qdata, scale, zero = parts(Case(1, 64, 128, 128))
    assert engine.linear(x[:0], Weight(qdata, scale, zero, 128)).shape == (0, 64)


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_past_2_31(engine):
    """M * N over 2^31: the last rows and columns are where a 32-bit offset would wrap."""
    case = Case(36000, 60032, 128, 128)
    assert case.M * case.N > 2**31
    x, qdata, scale, zero = parts(case)
    w = weight(qdata, scale, zero, 128).to(BF16)
    y = engine.linear(x, Weight(qdata, scale, zero, 128))
    check(y[-300:, -600:], x[-300:], w[-600:])
    check(y[:300, :600], x[:300], w[:600])
    check(y[35000:35100], x[35000:35100], w)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_past_2_31(engine):
    """N * K over 2^31 (and the packed bytes over 2^30)."""
    case = Case(20, 140032, 16384, 128)
    assert case.N * case.K > 2**31
    x, qdata, scale, zero = parts(case)
    y = engine.linear(x, Weight(qdata, scale, zero, 128))
    last = slice(case.N - 500, case.N)
    check(y[:, last], x, weight(qdata[last], scale[:, last], zero[:, last], 128).to(BF16))
    if engine is triton_matmul:
        w = triton_dequant.dequantize(Weight(qdata, scale, zero, 128), BF16)
        expected = weight(qdata[last], scale[:, last], zero[:, last], 128).to(BF16)
        assert torch.equal(w[last], expected)
        y = triton_matvec.linear(x[:1], Weight(qdata, scale, zero, 128))
        check(y[:, last], x[:1], weight(qdata[last], scale[:, last], zero[:, last], 128))
