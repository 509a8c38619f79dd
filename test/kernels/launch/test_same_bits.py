"""Replayed launches give the bits of the normal ones, whatever moves between the calls."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import needs_hopper
from weights import coalesced_scales, random_weight, shifted

from int4q.kernels.weight import Weight

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from int4q.kernels.launch import record, triton_launch  # noqa: E402
from int4q.kernels.triton import dequant as triton_dequant  # noqa: E402
from int4q.kernels.triton import gluon_matmul  # noqa: E402
from int4q.kernels.triton import matmul as triton_matmul  # noqa: E402
from int4q.kernels.triton import matvec as triton_matvec  # noqa: E402

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh():
    record.clear()
    yield
    record.clear()


def parts(M, N, K, seed=0):
    """x and the weight."""
    g = torch.Generator("cuda").manual_seed(seed)
    weight = random_weight(N, K, 128, BF16, generator=g)
    return torch.randn(M, K, device=g.device, generator=g).to(BF16), weight


def normally(monkeypatch, run, *args):
    """The result without plans."""
    with monkeypatch.context() as patched:
        patched.setattr(record, "unavailable", lambda: "asked not to")
        return run(*args)


def dequantised(x, weight):
    return triton_dequant.dequantize(weight, BF16)


RUNS = [
    pytest.param(gluon_matmul.linear, 17, marks=needs_hopper, id="gluon-shared-tiles"),
    pytest.param(gluon_matmul.linear, 256, marks=needs_hopper, id="gluon-prefill"),
    pytest.param(triton_matmul.linear, 20, id="triton-split-k"),
    pytest.param(triton_matvec.linear, 1, id="matvec"),
    pytest.param(triton_dequant.linear, 32, id="dequantise-cublas"),
    pytest.param(dequantised, 1, id="dequantise"),
]


@pytest.mark.parametrize("run,M", RUNS)
def test_same_bits_for_other_tensors_of_the_kind(monkeypatch, run, M):
    run(*parts(M, 1024, 2048))
    plans = len(record._plans)
    assert plans > 0 and all(record._plans.values())
    for seed in (1, 2, 3):  # every tensor at an address of its own
        inputs = parts(M, 1024, 2048, seed=seed)
        assert torch.equal(run(*inputs), normally(monkeypatch, run, *inputs))
    assert len(record._plans) == plans


@pytest.mark.parametrize("run,M", RUNS)
def test_alignment_strides_and_bias_make_a_kind(monkeypatch, run, M):
    x, weight = parts(M, 1024, 2048)
    run(x, weight)
    kinds = [
        (shifted(x), weight),
        (torch.cat([x, x], 1)[:, :2048], weight),
        (x, weight._replace(qdata=shifted(weight.qdata, 2))),
        (x, coalesced_scales(weight)),
        (x, weight._replace(zero_point=weight.scale)),  # one tensor at two places
        (x, weight),
    ]
    for inputs in kinds * 2:
        assert torch.equal(run(*inputs), normally(monkeypatch, run, *inputs))


@needs_hopper
def test_bias_and_activation_scale_are_found_anew(monkeypatch):
    inputs = parts(33, 512, 1024)
    for seed in range(3):
        torch.manual_seed(seed)
        bias, factor = torch.randn(512, device="cuda").to(BF16), torch.rand(1024, device="cuda")
        y = gluon_matmul.linear(*inputs, bias, factor.to(BF16))
        z = normally(monkeypatch, gluon_matmul.linear, *inputs, bias, factor.to(BF16))
        assert torch.equal(y, z)


@pytest.mark.parametrize("run,M", RUNS)
def test_in_a_graph(run, M):
    x, weight = parts(M, 1024, 2048)
    run(x, weight)
    run(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, weight)
    for seed in (1, 2):
        x.copy_(parts(M, 1024, 2048, seed=seed)[0])
        graph.replay()
        assert torch.equal(y, run(x, weight))


@pytest.mark.parametrize("run,M", RUNS)
def test_threads_and_streams(run, M):
    """Eight fresh threads (no CUDA context yet), each on a stream of its own, one plan."""
    inputs = [parts(M, 1024, 2048, seed=seed) for seed in range(8)]
    expected = [run(*one) for one in inputs]
    torch.cuda.synchronize()
    failures = []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    y = run(*inputs[i])
                    torch.cuda.current_stream().synchronize()
                    if not torch.equal(y, expected[i]):
                        raise AssertionError(f"thread {i} got another result")
        except Exception as error:  # a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@needs_hopper
def test_a_thread_without_a_context():
    """A replay is the first thing that a thread does with CUDA."""
    inputs = parts(64, 1024, 2048)
    expected = gluon_matmul.linear(*inputs)
    torch.cuda.synchronize()
    got = []
    thread = threading.Thread(target=lambda: got.append(gluon_matmul.linear(*inputs)))
    thread.start()
    thread.join()
    assert torch.equal(got[0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("run,M", RUNS)
def test_two_devices(run, M):
    x, weight = parts(M, 1024, 2048)
    expected = run(x, weight)
    there = (t.to("cuda:1") if isinstance(t, torch.Tensor) else t for t in weight)
    with torch.cuda.device(1):
        y = run(x.to("cuda:1"), Weight(*there))
    assert torch.equal(y.to("cuda:0"), expected)


@needs_hopper
def test_an_unknown_triton_launches_normally(monkeypatch):
    inputs = parts(64, 512, 1024)
    expected = gluon_matmul.linear(*inputs)
    record.clear()
    triton_launch.unavailable.cache_clear()
    monkeypatch.setattr(triton_launch, "KNOWN_TRITON", ("0.0",))
    try:
        assert "Triton must be one of" in triton_launch.unavailable()
        for _ in range(2):
            assert torch.equal(gluon_matmul.linear(*inputs), expected)
        assert not any(record._plans.values())
    finally:
        triton_launch.unavailable.cache_clear()
