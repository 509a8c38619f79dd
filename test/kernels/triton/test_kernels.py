"""The Triton and Gluon kernels on a GPU, against references of each kernel's own precision."""

from __future__ import annotations

import pytest
import torch
import weights
from helpers import needs_hopper
from weights import BF16, FP16, FP32, Case, offset_binary, shifted, values

from int4q.kernels.weight import Weight

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from int4q.kernels.triton import dequant as triton_dequant  # noqa: E402
from int4q.kernels.triton import gluon_matmul  # noqa: E402
from int4q.kernels.triton import matmul as triton_matmul  # noqa: E402
from int4q.kernels.triton import matvec as triton_matvec  # noqa: E402

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
    pytest.param(gluon_matmul, id="gluon", marks=needs_hopper),
]


def parts(case):
    """x and the weight."""
    g = torch.Generator("cuda").manual_seed(0)
    weight = weights.random_weight(
        case.N, case.K, case.group_size, case.scale_dtype or case.dtype, coalesced=case.coalesced,
        generator=g,
    )  # fmt: skip
    return torch.randn(case.M, case.K, device=g.device, generator=g).to(case.dtype), weight


def check(y, x, w, bias=None):
    assert y.dtype == x.dtype
    expected = x.double() @ w.double().t()
    weights.check_norm(y, expected if bias is None else expected + bias.double())


LINEAR = [
    pytest.param(*engine.values, case, marks=engine.marks, id=f"{engine.id}-{case}")
    for engine in ENGINES
    for case in (*CASES, FLOAT32)
    if engine.id == "triton" or case.dtype != FP32  # the other takes 16-bit activations only
]


@pytest.mark.parametrize("engine,case", LINEAR)
def test_linear(engine, case):
    """Weights rounded to the dtype of x."""
    x, weight = parts(case)
    bias = torch.randn(case.N, device=x.device).to(case.dtype)
    y = engine.linear(x, weight, bias)
    check(y, x, values(weight).to(case.dtype), bias)
    # Shared tiles are added in a fixed order.
    assert torch.equal(y, engine.linear(x, weight, bias))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == BF16], ids=str)
def test_symmetric(engine, case):
    x, weight = parts(case)
    weight = offset_binary(weight)
    check(engine.linear(x, weight), x, values(weight).to(BF16))


@pytest.mark.parametrize("case", [*CASES, FLOAT32], ids=str)
def test_matvec(case):
    """Weights in float32; one row."""
    x, weight = parts(case)
    x, bias = x[:1], torch.randn(case.N, device=x.device).to(case.dtype)
    for used in (weight, offset_binary(weight)):
        w = values(used)
        check(triton_matvec.linear(x, used, bias), x, w, bias)
        expected = x.double() @ w.double().t()
        error = (triton_matvec.linear(x, used).double() - expected).abs()
        bound = 1e-3 * expected.abs().max() + expected.abs() * torch.finfo(case.dtype).eps / 2
        assert (error <= bound).all()


@pytest.mark.parametrize("case", [*CASES, FLOAT32], ids=str)
def test_dequantize(case):
    _, weight = parts(case)
    for used in (weight, offset_binary(weight)):
        expected = values(used)
        for dtype in (BF16, FP16, FP32):
            w = triton_dequant.dequantize(used, dtype)
            assert torch.equal(w, expected.to(dtype))


@pytest.mark.parametrize("case", [c for c in CASES if c.M > 16], ids=str)
def test_dequantize_then_cublas(case):
    x, weight = parts(case)
    bias = torch.randn(case.N, device=x.device).to(case.dtype)
    y = triton_dequant.linear(x, weight, bias)
    check(y, x, values(weight).to(case.dtype), bias)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("M", [12, 64])
def test_any_strides(engine, M):
    """x with strides, a weight cut out of a larger one by rows and by whole groups."""
    x, weight = parts(Case(M, 512, 1024, 128))
    w = values(weight).to(BF16)
    for view in (
        torch.stack([x, x], 1)[:, 0],
        x.t().contiguous().t(),
        torch.cat([x, x], 1)[:, :1024],
    ):
        check(engine.linear(view, weight), x, w)
    rows = slice(5, 405)
    check(engine.linear(x, weight.rows(rows)), x, w[rows])
    qdata, scale, zero, *_ = weight
    inner = Weight(qdata[:, 128:384], scale[2:6], zero[2:6], 128)
    check(engine.linear(x[:, 256:768], inner), x[:, 256:768], w[:, 256:768])
    check(engine.linear(x, weight._replace(qdata=shifted(qdata))), x, w)


@pytest.mark.parametrize("engine", ENGINES)
def test_activation_scale(engine):
    x, weight = parts(Case(24, 512, 1024, 128))
    factor = (torch.rand(1024, device=x.device) + 0.5).to(BF16)
    y = engine.linear(x, weight, None, factor)
    check(y, x * factor, values(weight).to(BF16))


@pytest.mark.parametrize("engine", ENGINES)
def test_no_rows(engine):
    x, weight = parts(Case(1, 64, 128, 128))
    assert engine.linear(x[:0], weight).shape == (0, 64)


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_past_2_31(engine):
    """M * N over 2^31: the last rows and columns are where a 32-bit offset would wrap."""
    case = Case(36000, 60032, 128, 128)
    assert case.M * case.N > 2**31
    x, weight = parts(case)
    w = values(weight).to(BF16)
    y = engine.linear(x, weight)
    check(y[-300:, -600:], x[-300:], w[-600:])
    check(y[:300, :600], x[:300], w[:600])
    check(y[35000:35100], x[35000:35100], w)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_past_2_31(engine):
    """N * K over 2^31 (and the packed bytes over 2^30)."""
    case = Case(20, 140032, 16384, 128)
    assert case.N * case.K > 2**31
    x, weight = parts(case)
    last = slice(case.N - 500, case.N)
    w = values(weight.rows(last))
    check(engine.linear(x, weight)[:, last], x, w.to(BF16))
    if engine is triton_matmul:
        assert torch.equal(triton_dequant.dequantize(weight, BF16)[last], w.to(BF16))
        check(triton_matvec.linear(x[:1], weight)[:, last], x[:1], w)
