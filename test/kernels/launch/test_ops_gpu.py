"""The ops on a GPU through the C++ core: the bits of Python's way, and no Python on the way."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code
from weights import random_weight

import int4q
from int4q import CudaCoalescedInt4Tensor, Int4Tensor, kernel_preference
from int4q.kernels.core import library
from int4q.kernels.launch import record
from int4q.ops import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(library.load()[0] is None, reason=str(library.load()[1])),
]
BF16 = torch.bfloat16
N, K = 512, 1024


def generator(seed, device="cuda"):
    return torch.Generator(device).manual_seed(seed)


def x_of(M, seed, dtype=BF16, device="cuda"):
    return torch.randn(M, K, device=device, generator=generator(seed, device)).to(dtype)


def plain(M, seed, dtype=BF16, bias=False, device="cuda"):
    w = random_weight(N, K, 128, BF16, generator=generator(seed, device))
    b = torch.randn(N, device=device).to(dtype) if bias else None
    return x_of(M, seed, dtype, device), *w[:4], b, None


def coalesced(M, seed):
    x, qdata, scale, zero_point, *rest = plain(M, seed)
    return x, qdata, scale.mT.contiguous(), zero_point.mT.contiguous(), *rest, True


def gradient(M, seed, is_coalesced=False):
    _, qdata, *scales = plain(M, seed)[:4]
    if is_coalesced:
        scales = [part.mT.contiguous().mT for part in scales]
    grad = torch.randn(M, N, device="cuda", generator=generator(seed)).to(BF16)
    return grad, qdata, *scales, 128


def routed(seed):
    scores = torch.rand(12, 20, device="cuda", generator=generator(seed))
    weights, index = scores.topk(4)
    return index, weights


def combined(seed):
    index, weights = routed(seed)
    position = torch.ops.int4q.experts_permute(index, 16)[2]
    y = torch.randn(48, K, device="cuda", generator=generator(seed)).to(BF16)
    return y, position, index, weights, 16


def symmetric(M, seed):
    x, qdata, scale, *_ = plain(M, seed)
    return x, qdata, scale.mT.contiguous(), 128


def stack(T, seed, grouped):
    g, E = generator(seed), 4
    qdata = torch.randint(-128, 128, (E, N, K // 2), dtype=torch.int8, device="cuda", generator=g)
    scale = torch.rand(2, E, K // 128, N, device="cuda", generator=g).to(BF16)
    x = x_of(T, seed)
    offs = torch.tensor([T // 4, T // 4, T // 2, T], dtype=torch.int32, device="cuda")
    return (x, qdata, *scale, 128, offs, None) if grouped else (
        x.view(E, T // E, K), qdata, *scale, 128, None
    )  # fmt: skip


CASES = {
    "matvec": ("int4_linear", lambda seed: plain(1, seed)),
    "decode": ("int4_linear", lambda seed: plain(8, seed)),
    "decode, float32": ("int4_linear", lambda seed: plain(5, seed, torch.float32)),
    "small batch": ("int4_linear", lambda seed: plain(32, seed, bias=True)),
    "dequantised": ("int4_linear", lambda seed: plain(128, seed)),
    "dequantised, bias": ("int4_linear", lambda seed: plain(128, seed, bias=True)),
    "W4A8": ("int4_plain_mm", lambda seed: coalesced(4, seed)),
    "coalesced": ("int4_plain_mm", lambda seed: coalesced(40, seed)),
    "rounded, few rows": ("int4_matmul", lambda seed: symmetric(4, seed)),
    "rounded": ("int4_matmul", lambda seed: symmetric(48, seed)),
    "symmetric matvec": ("int4_matvec", lambda seed: symmetric(1, seed)),
    "dequantise": ("dequant_w4_to_bf16", lambda seed: symmetric(1, seed)[1:]),
    "bmm": ("int4_bmm", lambda seed: stack(8, seed, False)),
    "bmm, many rows": ("int4_bmm", lambda seed: stack(256, seed, False)),
    "grouped": ("int4_grouped_mm", lambda seed: stack(8, seed, True)),
    "grouped, many rows": ("int4_grouped_mm", lambda seed: stack(256, seed, True)),
    "gradient": ("int4_linear_backward", lambda seed: gradient(40, seed)),
    "gradient, coalesced": ("int4_linear_backward", lambda seed: gradient(40, seed, True)),
    "permute": ("experts_permute", lambda seed: (routed(seed)[0], 16)),
    "combine": ("experts_combine", lambda seed: combined(seed)),
    "fp8 rows": ("fp8_rows", lambda seed: (x_of(16, seed), None)),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def fresh():
    assert library.unavailable() is None
    record.clear()
    yield
    record.clear()


def equal(a, b):
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else ((a, b),)
    return all(torch.equal(x, y) and x.stride() == y.stride() for x, y in pairs)


def normally(op, args):
    """The result without plans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "unavailable", lambda: "asked not to")
        patch.setattr(library, "unavailable", lambda: "asked not to")
        return getattr(torch.ops.int4q, op)(*args)


@cases
def test_same_bits_for_other_tensors_of_the_kind(case, monkeypatch):
    op, make = CASES[case]
    cuda.run(op, *make(0))
    for seed in (1, 2, 3):
        args = make(seed)
        wanted = normally(op, args)
        with monkeypatch.context() as patch:
            patch.setattr(record, "recording", None)  # nothing comes back to Python
            patch.setattr(record, "planned", None)
            patch.setattr("int4q.kernels.registry.route", None)
            assert equal(cuda.run(op, *args), wanted)
        assert equal(getattr(torch.ops.int4q, op)(*args), wanted)


@cases
def test_in_a_graph(case):
    op, make = CASES[case]
    args = make(0)
    for warm in (False, True):
        if not warm:
            cuda.run(op, *args)  # compiled
            torch.cuda.synchronize()
            record.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # the plan is made in one, and replayed in the other
            y = cuda.run(op, *args)
        for seed in (1, 2):
            args[0].copy_(make(seed)[0])
            graph.replay()
            assert equal(y, normally(op, args))


@cases
def test_threads_and_streams(case):
    """Eight fresh threads (no CUDA context yet), each on a stream of its own, one plan."""
    op, make = CASES[case]
    inputs = [make(seed) for seed in range(8)]
    expected = [cuda.run(op, *one) for one in inputs]
    torch.cuda.synchronize()
    failures = []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(30):
                    y = cuda.run(op, *inputs[i])
                    torch.cuda.current_stream().synchronize()
                    if not equal(y, expected[i]):
                        raise AssertionError(f"thread {i} got another result")
        except Exception as error:  # a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_thread_without_a_context():
    """A replay is the first thing that a thread does with CUDA."""
    args = plain(8, 0)
    expected = cuda.run("int4_linear", *args)
    torch.cuda.synchronize()
    got = []
    thread = threading.Thread(target=lambda: got.append(cuda.run("int4_linear", *args)))
    thread.start()
    thread.join()
    assert torch.equal(got[0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@cases
def test_a_device_that_is_not_current(case):
    op, make = CASES[case]
    args = make(0)
    wanted = cuda.run(op, *args)
    there = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in args]
    for _ in range(2):
        y = cuda.run(op, *there)
        assert torch.cuda.current_device() == 0
        y = tuple(t.cpu() for t in y) if isinstance(y, tuple) else y.cpu()
        wanted_there = tuple(t.cpu() for t in wanted) if isinstance(wanted, tuple) else wanted.cpu()
        assert equal(y, wanted_there)


def test_arguments_that_do_not_fit_raise_what_they_did():
    x, *rest = plain(4, 0)
    cuda.run("int4_linear", x, *rest)
    for run in (torch.ops.int4q.int4_linear, lambda *a: cuda.run("int4_linear", *a)):
        with pytest.raises(ValueError, match="last dim of x must be 1024"):
            run(x[:, :512], *rest)
        with pytest.raises(TypeError, match="x must be"):
            run(x.int(), *rest)


def test_a_preference_is_asked_for():
    args = plain(4, 0)
    cuda.run("int4_linear", *args)
    with kernel_preference("torch"):
        wanted = normally("int4_linear", args)
        assert torch.equal(cuda.run("int4_linear", *args), wanted)


def test_memory_that_runs_out_raises_what_torch_raises():
    args = list(plain(32, 0))
    args[0] = args[0].expand(1 << 15, 32, K)[:, 0].expand(1 << 15, K)
    cuda.run("int4_linear", *args)
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        held = []
        with pytest.raises(torch.OutOfMemoryError):
            for _ in range(1 << 12):
                held.append(cuda.run("int4_linear", *args))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Net(nn.Module):
    def __init__(self, layout=Int4Tensor):
        super().__init__()
        self.linear = nn.Linear(K, N, device="cuda", dtype=BF16)
        weight = Int4Tensor.from_hp(self.linear.weight.detach(), [1, 128])
        if layout is CudaCoalescedInt4Tensor:
            weight = CudaCoalescedInt4Tensor.from_int4_tensor(weight)
        self.linear.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return torch.relu(self.linear(x))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # graph trees, on purpose
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("layout", [Int4Tensor, CudaCoalescedInt4Tensor])
def test_a_compiled_graph_calls_the_twin(layout, prepared, mode):
    net = Net(layout)
    if prepared:
        int4q.prepare_for_inference_(net)
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(net, fullgraph=True, mode=mode)
        y, code = run_and_get_code(run, x_of(4, 0))
        assert "int4q.cuda_int4_" in "".join(code)
        for seed in (0, 1, 2):
            assert torch.equal(run(x_of(4, seed)).clone(), net(x_of(4, seed)))


def test_autocast_and_gradients():
    net, x = Net(), x_of(4, 0, torch.float32)
    with torch.no_grad(), torch.autocast("cuda", dtype=BF16):
        for _ in range(2):
            assert torch.equal(net(x), net(x.to(BF16)))
    x = x_of(4, 0).requires_grad_()
    net.linear(x).sum().backward()
    exact = net.linear.weight.dequantize(torch.float32).sum(0).expand(4, K)
    assert ((x.grad - exact).norm() / exact.norm()).item() < 0.01


@pytest.mark.parametrize("M", [1, 8, 128])
def test_any_leading_dims(M):
    w = Int4Tensor.from_hp(torch.randn(N, K, device="cuda", dtype=BF16), [1, 128])
    x = x_of(2 * M, 0)
    for _ in range(2):
        flat = F.linear(x, w)
        assert torch.equal(F.linear(x.view(2, M, K), w), flat.view(2, M, N))
        turned = x.view(2, M, K).transpose(0, 1)
        assert torch.equal(F.linear(turned, w), F.linear(turned.contiguous(), w))
