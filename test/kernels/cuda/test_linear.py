"""What the CUDA C++ linear kernels have in common: layouts, shapes, streams, graphs and errors."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cuda_cases import BF16, DECODE, FP16, FP32, INT8, WARP_SPECIALISED, Case, inputs
from helpers import needs_hopper
from weights import coalesced_scales, shifted

from int4q.kernels.cuda import decode, warp_specialised
from int4q.kernels.launch.planner import Parts
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight


def each(decode_cases, warp_specialised_cases):
    """Parametrises a test on a GPU over ``kernel, case``."""
    gpu = pytest.mark.gpu
    kernels = (
        ("decode", DECODE, decode_cases, [gpu]),
        ("warp_specialised", WARP_SPECIALISED, warp_specialised_cases, [gpu, needs_hopper]),
    )
    return pytest.mark.parametrize(
        "kernel,case",
        [
            pytest.param(kernel, case, marks=marks, id=f"{name}-{case}")
            for name, kernel, cases, marks in kernels
            for case in cases
        ],
    )


def strided_cases(*Ms):
    return [Case(M, 520, 1536, 64, coalesced=coalesced) for M in Ms for coalesced in (False, True)]


@each(strided_cases(1, 5), strided_cases(9, 40))
def test_strided_inputs(kernel, case):
    """Rows of x, qdata and the scales that are slices of wider tensors, as a sliced weight's."""
    qdata, scale, zero_point, group_size, _ = inputs(case).weight
    x = torch.randn(case.M, 3000, device="cuda", dtype=BF16)
    for rows, cols, offset in (
        (slice(8, 200), slice(256, 1024), 8),
        (slice(3, 84), slice(64, 832), 3),
    ):
        groups = slice(cols.start // group_size, cols.stop // group_size)
        part = Weight(
            qdata[rows, cols.start // 2 : cols.stop // 2],
            scale[groups, rows],
            zero_point[groups, rows],
            group_size,
        )
        parts = Parts(x[:, offset : offset + part.K], part, None, None)
        kernel.check(kernel.linear(*parts), parts)


@each([Case(4, 100, 256, extras=True)], [Case(12, 100, 256, extras=True)])
def test_layouts_that_are_copied(kernel, case):
    parts = inputs(case)
    weight = parts.weight
    expected = kernel.linear(*parts)
    kernel.check(expected, parts)
    for other in (
        parts._replace(x=parts.x.mT.contiguous().mT),
        parts._replace(weight=weight._replace(qdata=weight.qdata.mT.contiguous().mT)),
        parts._replace(weight=weight._replace(qdata=shifted(weight.qdata))),
        parts._replace(weight=weight._replace(zero_point=coalesced_scales(weight).zero_point)),
        parts._replace(bias=torch.stack([parts.bias] * 2, 1)[:, 0]),
        parts._replace(pre_scale=torch.stack([parts.pre_scale] * 2, 1)[:, 0]),
    ):
        assert torch.equal(kernel.linear(*other), expected)


@each([Case(6, 64, 256)], [Case(12, 64, 256)])
def test_leading_dimensions_and_empty(kernel, case):
    x, weight, *_ = inputs(case)
    expected = kernel.linear(x, weight)
    half = case.M // 2
    out = kernel.linear(x.unflatten(0, (2, half)), weight)
    assert out.shape == (2, half, case.N) and torch.equal(out.flatten(0, 1), expected)
    assert torch.equal(kernel.linear(x, weight), expected)
    assert kernel.linear(x.unflatten(0, (2, half))[:0], weight).shape == (0, half, case.N)


@each(
    [Case(4, 64, 512, activation=BF16), Case(4, 64, 512, activation=INT8)],
    [Case(12, 64, 512)],
)
def test_not_finite_and_zero_activations(kernel, case):
    x, weight, *_ = inputs(case)
    x[0, 300], x[1], x[2, 7] = float("nan"), 0, float("inf")
    out = kernel.linear(x, weight, **case.choices)
    assert out[0].isnan().all() and (out[1] == 0).all()
    assert not out[2].isfinite().any() and out[3:].isfinite().all()


@each(
    [Case(1, 2048, 2048), Case(4, 2048, 2048)],
    [Case(16, 2048, 1024), Case(16, 28672, 1024)],
)
def test_streams_and_threads(kernel, case):
    """Two threads, each on its own stream, get the bits that one stream gets."""
    x, weight, *_ = inputs(case)
    xs = [x, torch.randn_like(x)]
    wanted = [kernel.linear(x, weight) for x in xs]
    torch.cuda.synchronize()

    def work(x):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            outs = [kernel.linear(x, weight) for _ in range(200)]
        stream.synchronize()
        return outs

    with ThreadPoolExecutor(len(xs)) as pool:
        for outs, want in zip(pool.map(work, xs), wanted, strict=True):
            assert all(torch.equal(out, want) for out in outs)


@each(
    [Case(M, 768, 768, 64, FP16, activation=a) for M, a in ((1, BF16), (4, BF16), (8, INT8))],
    [Case(M, 768, 768, 64, FP16, FP16) for M in (10, 64)],
)
def test_graph_capture(kernel, case):
    """Captured on the very first call (compiled inside the capture), chained, replayed."""
    x, weight, *_ = inputs(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once = kernel.linear(x, weight, **case.choices)
        twice = kernel.linear(once, weight, **case.choices)
    for _ in range(3):
        x.normal_()
        graph.replay()
        kernel.check(once, Parts(x, weight, None, None), **case.choices)
        kernel.check(twice, Parts(once, weight, None, None), **case.choices)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each([Case(1, 512, 1024), Case(5, 512, 1024)], [Case(20, 512, 1024)])
def test_a_device_that_is_not_current(kernel, case):
    parts = inputs(case, "cuda:1")
    out = kernel.linear(*parts)
    assert out.device == parts.x.device and torch.cuda.current_device() == 0
    kernel.check(out, parts)


PAST_2_31 = Case(2, 2**31 // (14336 // 2) + 42, 14336, 256)
"""The last 40 rows of its qdata lie past ``2 ** 31`` bytes."""


@each([PAST_2_31], [replace(PAST_2_31, M=16)])
def test_byte_offsets_past_31_bits(kernel, case):
    """The last rows of a large weight are right."""
    x, weight, *_ = inputs(case)
    last = slice(case.N - 40, case.N)
    assert last.start * weight.qdata.stride(0) > 2**31
    out = kernel.linear(x, weight)
    kernel.check(out[:, last], Parts(x, weight.rows(last), None, None))


KERNELS = pytest.mark.parametrize(
    "kernel",
    [pytest.param(DECODE, id="decode"), pytest.param(WARP_SPECIALISED, id="warp_specialised")],
)
SMALL = Case(4, 64, 256)


def refused(kernel, calls):
    """Each of ``(error, message, arguments)`` is refused so."""
    for error, message, arguments in calls:
        with pytest.raises(error, match=message):
            kernel.linear(*arguments)


@KERNELS
def test_arguments_that_fit_no_device(kernel):
    x, weight, *_ = inputs(SMALL, "cpu")
    qdata = weight.qdata
    other = weight._replace
    refused(
        kernel,
        [
            (
                TypeError,
                "qdata must be int8 .* torch.uint8",
                (x, other(qdata=qdata.view(torch.uint8))),
            ),
            (ValueError, r"shape \[N, K/2\], got \[1, 64, 128\]", (x, other(qdata=qdata[None]))),
            (ValueError, "signed=True and no zero_point", (x, other(zero_point=None))),
            (ValueError, "signed=False and zero_point", (x, other(signed=False))),
            (ValueError, r"K=256 .* got x of shape \[4, 128\]", (x[:, :128], weight)),
            (ValueError, "x must be on a CUDA device, got cpu", (x, weight)),
        ],
    )


@each([SMALL], [SMALL])
def test_arguments_that_do_not_fit_together(kernel, case):
    x, weight, bias, pre_scale = inputs(replace(case, extras=True))
    _, scale, zero_point, *_ = weight
    other = weight._replace
    turned = other(scale=scale.mT, zero_point=zero_point.mT)
    refused(
        kernel,
        [
            (ValueError, "cannot do this: M .* must be at most", (x.repeat(20, 1), weight)),
            (ValueError, r"n_groups, N\] = \[2, 64\], got \[64, 2\] .* as \.mT", (x, turned)),
            (ValueError, "zero_point must have shape", (x, other(zero_point=zero_point[:1]))),
            (ValueError, r"bias must have shape \[N\] = \[64\]", (x, weight, bias[:1])),
            (ValueError, "act_pre_scale must have shape", (x, weight, None, pre_scale[:1])),
            (TypeError, "bias must be bfloat16, float16 or", (x, weight, bias.double())),
            (TypeError, "zero_point must have scale's", (x, other(zero_point=zero_point.float()))),
            (ValueError, "scale must be on x's device", (x, other(scale=scale.cpu()))),
            (ValueError, "bias must be on x's device", (x, weight, bias.cpu())),
        ],
    )


RUNS = Problem("int4_linear", "cuda", BF16, BF16, 1, 7, 160, 32, (9, 0))
REFUSALS = [
    (decode, {"M": decode.MAX_M + 1}, "at most 16, got 17"),
    (decode, {"capability": (7, 5)}, "capability must be 8.0 or later, got 7.5"),
    (decode, {"dtype": torch.float64}, "x must be .* got torch.float64"),
    (warp_specialised, {"M": warp_specialised.MAX_M + 1}, "at most 64, got 65"),
    (warp_specialised, {"capability": (8, 0)}, "needs compute capability 9.0 .* got 8.0"),
    (warp_specialised, {"capability": (10, 0)}, "needs compute capability 9.0 .* got 10.0"),
    (warp_specialised, {"dtype": FP32}, "x must be .* got torch.float32"),
    *(
        (module, change, message)
        for module in (decode, warp_specialised)
        for change, message in (
            ({"K": 192, "group_size": 128}, "multiple of group_size=128, got 192"),
            ({"K": 144, "group_size": 48}, "group_size must be one of .* got 48"),
            ({"scale_dtype": torch.float64}, "scale must be .* got torch.float64"),
            ({"device": "cpu"}, "runs on cuda, not cpu"),
        )
    ),
]


@pytest.mark.parametrize(
    "module,change,message",
    REFUSALS,
    ids=[f"{module.__name__.rpartition('.')[2]}-{change}" for module, change, _ in REFUSALS],
)
def test_what_a_kernel_lacks_is_a_reason(module, change, message):
    assert module.unsupported(RUNS) is None
    with pytest.raises(ValueError, match=message):
        raise ValueError(module.unsupported(replace(RUNS, **change)))


@pytest.mark.parametrize("module", [decode, warp_specialised])
def test_the_most_rows_run(module):
    assert module.unsupported(replace(RUNS, M=module.MAX_M)) is None
