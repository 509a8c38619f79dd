"""W4A8 on a GPU: the plain-Triton kernel, and what every kernel of ``int4_plain_mm`` promises."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import weights
from torch import nn
from weights import BF16, FP16, FP32, shifted, values

from int4q.kernels.weight import Weight

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, kernel_preference  # noqa: E402
from int4q.kernels import reference  # noqa: E402
from int4q.kernels.cuda import decode as cuda_decode  # noqa: E402
from int4q.kernels.triton import tuned  # noqa: E402
from int4q.kernels.triton import w4a8 as triton_w4a8  # noqa: E402


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group_size: int
    dtype: torch.dtype = BF16
    scale_dtype: torch.dtype = BF16
    coalesced: bool = True
    extras: bool = False  # bias and act_pre_scale

    def __str__(self):
        names = f"{str(self.dtype)[6:]}-{str(self.scale_dtype)[6:]}"
        layout = "coalesced" if self.coalesced else "plain"
        return f"{self.M}x{self.N}x{self.K}-g{self.group_size}-{names}-{layout}"


CASES = [
    *(Case(M, 333, 1056, 32, coalesced=M % 2 == 0) for M in range(1, 9)),
    *(Case(M, N, K, 32, coalesced=c) for M in (1, 5) for N, K in ((7, 160), (1, 32), (12352, 96))
      for c in (True, False)),
    *(Case(2, 272, 5376, g, coalesced=c) for g in (64, 128, 256) for c in (True, False)),
    *(Case(3, 144, 640, 128, x, s, extras=True) for x in (BF16, FP16, FP32)
      for s in (BF16, FP16, FP32)),
    Case(8, 4096, 14336, 128),
    Case(4, 28672, 4096, 32),
]  # fmt: skip


def parts(case):
    """x and the weight."""
    g = torch.Generator("cuda").manual_seed(0)
    weight = weights.random_weight(
        case.N, case.K, case.group_size, case.scale_dtype, coalesced=case.coalesced, generator=g
    )
    return torch.randn(case.M, case.K, device=g.device, generator=g).to(case.dtype), weight


def check(y, x, weight, bias=None):
    """Against float64 arithmetic on the reference's own int8 activations."""
    xq, d = reference.quantize_activation(x)
    x = (xq.double() * d.double().unsqueeze(-1)).flatten(1)
    exact = x @ values(weight).double().t()
    weights.check_norm(y, exact if bias is None else exact + bias.double())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_is_the_reference(case):
    x, weight = parts(case)
    on = {"device": x.device}
    bias = torch.randn(case.N, **on).to(case.dtype) if case.extras else None
    pre = (torch.rand(case.K, **on) + 0.5).to(case.dtype) if case.extras else None
    sums = torch.full((case.M, case.N, case.K // 32), -1, dtype=torch.int32, **on)
    args = x, weight, bias, pre
    y = triton_w4a8.linear(*args, sums=sums)
    seen = x if pre is None else x.float() * pre.float()
    xq, _ = reference.quantize_activation(seen)
    assert y.dtype == case.dtype
    assert torch.equal(sums.mT, reference.int8_dots(xq, weight.qdata))
    check(y, seen, weight, bias)
    again = triton_w4a8.linear(*args)  # as users call it: without the sums
    check(again, seen, weight, bias)
    assert torch.equal(again, triton_w4a8.linear(*args))


@pytest.mark.parametrize("config", list(itertools.product((1, 2, 8), (1, 2, 8))), ids=str)
def test_every_way_to_cut_the_work(config):
    x, weight = parts(Case(2, 131, 1312, 32))
    check(triton_w4a8.linear(x, weight, config=tuned.W4A8Config(*config)), x, weight)


def test_special_rows():
    x, weight = parts(Case(6, 65, 512, 64, FP32, FP32))
    x[0], x[1, 40], x[2, 3] = 0, float("nan"), float("inf")
    x[3], x[4, :32] = 2e-44 * torch.randn(512, device=x.device), 1e-43
    x[5, :32] = torch.arange(32, device=x.device) * 1e33
    x[5, 32:64] = torch.arange(32, device=x.device) - 15.5  # halves, to even
    x[5, 32] = 127
    expected = reference.linear_int8(x, weight)
    for y in (
        triton_w4a8.linear(x, weight),
        cuda_decode.linear(x, weight, activation=torch.int8),
    ):
        assert (y[0] == 0).all() and y[1:3].isnan().all() and not y[3:].isnan().any()
        torch.testing.assert_close(y[3:], expected[3:], rtol=1e-4, atol=1e-42)


def test_slices():
    """Rows and whole groups cut from a weight; x by columns of another, and transposed."""
    x, weight = parts(Case(4, 520, 1536, 64))
    qdata, scale, zero, *_ = weight
    rows, k = slice(3, 201), slice(64, 832)
    cut = Weight(qdata[rows, 32:416], scale[1:13, rows], zero[1:13, rows], 64)
    for view in (x[:, k], x[:, k].t().contiguous().t()):
        check(triton_w4a8.linear(view, cut), view, cut)
    check(triton_w4a8.linear(x, weight._replace(qdata=shifted(qdata))), x, weight)


def test_past_2_31():
    """N * K past 2^32, so that byte offsets leave 32 bits: the last rows are right."""
    case = Case(2, 299593, 14336, 256)
    x, weight = parts(case)
    last = slice(case.N - 40, case.N)
    check(triton_w4a8.linear(x, weight)[:, last], x, weight.rows(last))


# --- every kernel of the op ---------------------------------------------------------------------

KERNELS = ["auto", "triton", "torch"]


def plain_mm(x, weight):
    """The op, whose scales are ``[N, n_groups]``."""
    scale, zero_point = weight.scale.mT, weight.zero_point.mT
    return torch.ops.int4q.int4_plain_mm(x, weight.qdata, scale, zero_point, weight.group_size)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("M", [1, 3, 8, 40])
def test_two_streams_at_once(kernel, M):
    """The bits of one after the other: no scratch is shared."""
    x, weight = parts(Case(2 * M, 1024, 1024, 32))
    xs = x.split(M)
    with kernel_preference(kernel):
        wanted = [plain_mm(x, weight) for x in xs]
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in xs], [[], []]
        for _ in range(20):
            for stream, x, ys in zip(streams, xs, found, strict=True):
                with torch.cuda.stream(stream):
                    ys.append(plain_mm(x, weight))
        torch.cuda.synchronize()
    for ys, want in zip(found, wanted, strict=True):
        assert all(torch.equal(y, want) for y in ys)


@pytest.mark.parametrize("kernel", KERNELS[:2])
@pytest.mark.parametrize("M", [1, 5])
def test_graph_capture(kernel, M):
    x, weight = parts(Case(M, 512, 512, 64))
    graph = torch.cuda.CUDAGraph()
    with kernel_preference(kernel):
        plain_mm(x, weight)
        with torch.cuda.graph(graph):
            y = plain_mm(x, weight)
    for _ in range(2):
        x.normal_()
        graph.replay()
        check(y, x, weight)


def model(layout, activation_dtype):
    torch.manual_seed(5)
    m = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128)).cuda().bfloat16()
    for i in (0, 2):
        t = layout.from_hp(m[i].weight.detach(), [1, 32], activation_dtype)
        m[i].weight = nn.Parameter(t, requires_grad=False)
    return m


MODELS = [
    (Int4Tensor, BF16),
    (CudaCoalescedInt4Tensor, BF16),
    (CudaCoalescedInt4Tensor, torch.int8),
]
# The compiler computes GELU in float32 without rounding its input: two roundings of bf16 apart.
COMPILED = dict(rtol=2e-2, atol=2e-2)


# torch's CUDA graph trees capture an empty graph of their own to start a memory pool.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("layout,activation_dtype", MODELS)
@torch.no_grad()
def test_compiled_under_cuda_graphs(layout, activation_dtype):
    m = model(layout, activation_dtype)
    compiled = torch.compile(m, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(2, 256, device="cuda", dtype=BF16)
        torch.testing.assert_close(compiled(x), m(x), **COMPILED)


AOT = """
import sys, torch, int4q
x, programs = torch.load(sys.argv[1])
for name, (program, y) in programs.items():
    package = torch._inductor.aoti_compile_and_package(
        torch.export.load(program), package_path=program + ".aot.pt2"
    )
    got = torch._inductor.aoti_load_package(package)(x)
    torch.testing.assert_close(got, y, rtol=2e-2, atol=2e-2)
    print(name, flush=True)
"""


@pytest.mark.slow
@torch.no_grad()
def test_aot_inductor(tmp_path):
    """In a process of its own, as a server would run it; a model without int4q goes first."""
    x = torch.randn(2, 256, device="cuda", dtype=BF16)
    models = {"dense": nn.Linear(256, 128).cuda().bfloat16()}
    models |= {f"{layout.__name__} {dtype}": model(layout, dtype) for layout, dtype in MODELS}
    programs = {}
    for i, (name, m) in enumerate(models.items()):
        path = str(tmp_path / f"{i}.pt2")
        torch.export.save(torch.export.export(m, (x,)), path)
        programs[name] = path, m(x)
    torch.save((x, programs), tmp_path / "all.pt")
    arguments = [sys.executable, "-c", AOT, str(tmp_path / "all.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode and "dense" not in done.stdout:
        pytest.skip(f"AOTInductor does not run a dense model here: {done.stderr[-500:]}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
