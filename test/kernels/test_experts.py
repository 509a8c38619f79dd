"""Grouped and batched products on a GPU against float64 on each kernel's own weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import weights
from helpers import needs_hopper
from weights import BF16, FP16, FP32, NORM_TOLERANCE, values

from int4q.kernels.weight import Weight

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from int4q.kernels.cuda import decode as cuda_decode  # noqa: E402
from int4q.kernels.cuda import experts as cuda_experts  # noqa: E402
from int4q.kernels.triton import experts as triton_experts  # noqa: E402
from int4q.kernels.triton import gluon_experts, tuned  # noqa: E402
from int4q.kernels.triton.experts_plan import Rows  # noqa: E402

# The decode kernels hold x in 16 bits a block of 128: 2e-5 of the result, theirs for float32 too.
DECODE_TOLERANCE = NORM_TOLERANCE | {FP32: 4e-5}


@dataclass(frozen=True)
class Case:
    E: int
    N: int
    K: int
    group_size: int
    ends: tuple[int, ...]  # of the experts; the rest of them end with the last
    T: int
    dtype: torch.dtype = BF16
    scale_dtype: torch.dtype | None = None
    coalesced: bool = False
    why: str = ""

    def __str__(self):
        return f"{self.T}r-{self.E}x{self.N}x{self.K}-g{self.group_size}-" + self.why.replace(
            " ", "_"
        )


def random_ends(experts, rows, seed=0):
    """Ends of experts under random routing."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(experts, (rows,), generator=g).bincount(minlength=experts)
    return tuple(counts.cumsum(0).tolist())


CASES = [
    Case(4, 256, 512, 128, (1, 2, 3, 4), 4, why="one row each"),
    Case(8, 100, 160, 32, (0, 3, 3, 20, 41, 41, 41, 45), 45, why="K tail N tail empty experts"),
    Case(8, 76, 416, 32, (5,) * 8, 9, why="all on the first, rows of none"),
    Case(8, 528, 320, 64, (0,) * 7 + (70,), 70, why="all on the last"),
    Case(3, 64, 256, 256, (0, 0, 0), 5, why="rows of none only"),
    Case(128, 192, 768, 128, random_ends(128, 64), 64, why="128 experts, most empty"),
    Case(128, 1536, 256, 32, random_ends(128, 512), 512, why="128 experts"),
    Case(128, 1536, 256, 32, random_ends(128, 512), 512, coalesced=True, why="coalesced"),
    Case(300, 64, 256, 128, random_ends(300, 900), 900, why="300 experts"),
    Case(8, 4096, 1024, 128, random_ends(8, 128), 128, why="16 rows each"),
    Case(8, 2048, 512, 64, random_ends(8, 300), 300, coalesced=True, why="40 rows each"),
    Case(8, 1000, 1024, 128, random_ends(8, 1100), 1111, why="prefill"),
    Case(4, 272, 384, 128, random_ends(4, 9), 9, FP16, why="fp16"),
    Case(4, 272, 384, 128, random_ends(4, 400), 400, FP16, BF16, True, why="fp16 mixed"),
    Case(4, 260, 640, 128, random_ends(4, 9), 9, BF16, FP32, why="float32 scales"),
    Case(4, 260, 640, 128, random_ends(4, 200), 200, BF16, FP32, True, why="float32 scales"),
    Case(1, 512, 1024, 128, (12,), 12, why="one expert"),
    Case(8, 3072, 1024, 128, random_ends(8, 24), 24, why="several rows, plain"),
    Case(8, 3072, 1024, 64, random_ends(8, 24), 24, coalesced=True, why="several rows"),
    Case(8, 3072, 1024, 256, (1, 2, 3, 40, 41, 42, 43, 44), 44, why="one popular expert"),
]
FLOAT32 = Case(5, 68, 320, 64, (3, 3, 20, 41, 41), 45, FP32, why="float32")
ENGINES = {"triton": triton_experts, "gluon": gluon_experts, "cuda": cuda_experts}


@pytest.fixture(params=["cuda", pytest.param("gluon", marks=needs_hopper), "triton"])
def engine(request):
    return request.param


def parts(case):
    """x, the stack of weights and offs."""
    g = torch.Generator("cuda").manual_seed(0)
    stack = weights.random_weight(
        case.N, case.K, case.group_size, case.scale_dtype or case.dtype, experts=case.E,
        coalesced=case.coalesced, generator=g,
    )  # fmt: skip
    rest = (case.ends[-1],) * (case.E - len(case.ends))
    offs = torch.tensor(case.ends + rest, dtype=torch.int32, device=g.device)
    return torch.randn(case.T, case.K, device=g.device, generator=g).to(case.dtype), stack, offs


def seen(weight, dtype, name="triton"):
    """float64 values as the kernel sees them: the decode kernels do not round them to ``dtype``."""
    w = values(weight)
    return (w if name == "cuda" else w.to(dtype)).double()


def grouped(x, w, ends):
    """float64: rows of x times their expert's ``w [E, N, K]``; 0 past the last end."""
    y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64, device=x.device)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        y[start:end] = x[start:end].double() @ w[expert].t()
        start = end
    return y


def check(y, expected, name="triton", offs=None):
    tolerance = DECODE_TOLERANCE if name == "cuda" else NORM_TOLERANCE
    weights.check_norm(y, expected, tolerance)
    # Every row on its own: one wrong row in many must not hide in the norm.
    error, size = (y.double() - expected).norm(dim=-1), expected.norm(dim=-1)
    assert (error <= 2 * tolerance[y.dtype] * size).all(), (error / size).nan_to_num().max()
    if offs is not None:
        assert (y[int(offs[-1]) :] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_mm(case, engine):
    x, stack, offs = parts(case)
    y = ENGINES[engine].int4_grouped_mm(x, stack, offs)
    assert y.shape == (case.T, case.N) and y.dtype == case.dtype
    check(y, grouped(x, seen(stack, case.dtype, engine), offs), engine, offs)


@needs_hopper
@pytest.mark.parametrize("mean", [1, 8, 20, 60, 150, 600])
@pytest.mark.parametrize("group_size,coalesced", [(128, False), (32, True)])
def test_every_tile(mean, group_size, coalesced):
    """Each row of the table of tiles, on experts whose rows end before, on and after a tile."""
    counts = [c for w in (16, 32, 64, 128, 256) for c in (w - 1, w, w + 1)] + [300, 512, 513]
    ends = tuple(torch.tensor(counts).cumsum(0).tolist())
    case = Case(len(ends), 528, 640, group_size, ends, ends[-1] + 3, coalesced=coalesced)
    x, stack, offs = parts(case)
    light = group_size == 128 and not coalesced
    config = tuned.experts_config(8 * mean, 8, case.N, case.K, light, x.device)
    rows = Rows(case.T, case.E, offs)
    y = gluon_experts._grouped(x, rows, stack, config=config)
    check(y, grouped(x, seen(stack, BF16), offs), offs=offs)


@pytest.mark.parametrize(
    "config",
    [
        cuda_decode.Config(*shape)
        for shape in ((16, 2, 2, 1), (4, 2, 2, 4), (4, 4, 2, 2), (1, 4, 2, 8), (1, 1, 2, 1))
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_every_way_to_cut_the_decode_kernels(rows, config):
    """Blocks of every size, more and fewer of them than thread blocks, experts that fill many."""
    for group_size, coalesced in ((128, False), (32, True)):
        K = 1280 if group_size == 128 else 1312
        case = Case(6, 604, K, group_size, (1, 1, 4, 13, 40, 41), 43, coalesced=coalesced)
        x, stack, offs = parts(case)
        y = cuda_experts._grouped(x, stack, offs, config=config, rows=rows)
        check(y, grouped(x, seen(stack, BF16, "cuda"), offs), "cuda", offs)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_act_pre_scale_multiplies_first(engine, dtype):
    case = CASES[1]
    x, stack, offs = parts(case)
    w = seen(stack, case.dtype, engine)
    factor = (torch.rand(case.K, device=x.device) + 0.5).to(dtype)
    scaled = x.float() * factor.float()
    if engine != "cuda":  # the matrix kernels round the product, the decode kernels do not
        scaled = scaled.to(x.dtype)
    y = ENGINES[engine].int4_grouped_mm(x, stack, offs, factor)
    check(y, grouped(scaled, w, offs), engine, offs)
    x, scaled = (t[: 5 * case.E].unflatten(0, (case.E, 5)) for t in (x, scaled))
    check(ENGINES[engine].int4_bmm(x, stack, factor), scaled.double() @ w.mT, engine)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_float32(name):
    x, stack, offs = parts(FLOAT32)
    y = ENGINES[name].int4_grouped_mm(x, stack, offs)
    assert y.dtype == FP32
    check(y, grouped(x, seen(stack, FP32, name), offs), name, offs)


@pytest.mark.parametrize("M", [1, 3, 8, 17, 150])
def test_bmm(M, engine):
    case = Case(5, 264, 384, 128, (1,), 5 * M, coalesced=M % 2 == 0)
    x, stack, _ = parts(case)
    x = x.view(5, M, 384)
    y = ENGINES[engine].int4_bmm(x, stack)
    check(y, x.double() @ seen(stack, BF16, engine).mT, engine)


@pytest.mark.parametrize("case", [*CASES[1:9], FLOAT32], ids=str)
def test_gradients(case):
    _, stack, offs = parts(case)
    grad = torch.randn(case.T, case.N, device=offs.device).to(case.dtype)
    w = seen(stack, case.dtype)
    y = triton_experts.int4_grouped_mm_backward(grad, stack, offs)
    check(y, grouped(grad, w.mT, offs), offs=offs)
    batch = grad[: case.T // case.E * case.E].view(case.E, -1, case.N)
    if batch.numel():
        check(triton_experts.int4_bmm_backward(batch, stack), batch.double() @ w)


def test_strided_parts(engine):
    """A stack that is a slice of a larger one along experts, N and K; x a slice of wider rows."""
    _, (qdata, scale, zero, *_), _ = parts(Case(6, 400, 1024, 64, (1,), 60))
    x = torch.randn(60, 1000, device=qdata.device, dtype=BF16)[:, 8:520]
    some, rows = slice(1, 5), slice(64, 320)
    cut = qdata[some, rows, 128:384], scale[some, 4:12, rows], zero[some, 4:12, rows]
    stack = Weight(*cut, 64)
    offs = torch.tensor([7, 7, 30, 55], dtype=torch.int32, device=x.device)
    y = ENGINES[engine].int4_grouped_mm(x, stack, offs)
    check(y, grouped(x, seen(stack, BF16, engine), offs), engine, offs)


@pytest.mark.parametrize("T", [24, 400])
def test_graph_with_other_offsets(T, engine):
    """Captured on the first call; the offsets change between replays, as routing does."""
    case = Case(8, 256, 512, 128, random_ends(8, T), T)
    x, stack, offs = parts(case)
    run = ENGINES[engine].int4_grouped_mm
    run(x, stack, offs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, stack, offs)
    w = seen(stack, BF16, engine)
    for ends in (random_ends(8, T, 1), random_ends(8, T - 7, 2), (0,) * 7 + (T,), (T,) * 8):
        offs.copy_(torch.tensor(ends, dtype=torch.int32))
        x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        check(y, grouped(x, w, offs), engine, offs)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_no_host_synchronisation():
    """Every op of the table, forward and backward, where the host may not wait for the device."""
    case = Case(8, 256, 512, 128, random_ends(8, 100), 100)
    x, stack, offs = parts(case)
    few = offs // 10
    for _ in range(2):  # the first compiles
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            for rows, ends in ((x, offs), (x[:10], few)):
                rows = rows.clone().requires_grad_()
                y = torch.ops.int4q.int4_grouped_mm(rows, *stack[:4], ends)
                y.sum().backward()
                batch = rows.detach()[:8].view(8, 1, -1).requires_grad_()
                torch.ops.int4q.int4_bmm(batch, *stack[:4]).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_two_streams(engine):
    """Two streams at once give the bits that they give one after the other."""
    case = Case(8, 1024, 1024, 128, random_ends(8, 40), 40)
    x, stack, offs = parts(case)
    run = ENGINES[engine].int4_grouped_mm
    xs = [x, torch.randn_like(x)]
    want = [run(x, stack, offs) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    outs = [[], []]
    for _ in range(50):
        for stream, x, out in zip(streams, xs, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(run(x, stack, offs))
    torch.cuda.synchronize()
    for expected, out in zip(want, outs, strict=True):
        assert all(torch.equal(y, expected) for y in out)


def test_falling_offsets_stay_in_bounds(engine):
    """What no router gives: rows may be anything, but nothing outside of the tensors is touched."""
    case = Case(8, 256, 512, 128, (40, 10, 9999, 0, -5, 30, 40, 20), 40)
    x, stack, offs = parts(case)
    y = ENGINES[engine].int4_grouped_mm(x, stack, offs)
    assert y.shape == (40, 256)
    torch.cuda.synchronize()


@pytest.mark.parametrize("rows", [6, 200])
def test_more_than_2_31(rows, engine):
    """Bytes of the stack past 2^31: the last expert is right."""
    case = Case(20, 16384, 16384, 256, (0,) * 5 + (2,) * 14 + (rows,), rows)
    x, stack, offs = parts(case)
    assert stack.qdata.nbytes > 2**31
    y = ENGINES[engine].int4_grouped_mm(x, stack, offs)
    last = slice(case.N - 64, case.N)
    for expert, at in ((5, slice(0, 2)), (19, slice(2, rows))):
        w = seen(stack.expert(expert).rows(last), BF16, engine)
        check(y[at, last], x[at].double() @ w.t(), engine)


@needs_hopper
def test_many_rows_past_2_31():
    """T * N past 2^31 elements."""
    T, N, K = 140000, 16384, 128
    case = Case(2, N, K, 32, (100, T), T)
    x, stack, offs = parts(case)
    y = gluon_experts.int4_grouped_mm(x, stack, offs)
    w = seen(stack, BF16)
    for at, expert in ((slice(0, 100), 0), (slice(T - 200, T), 1)):
        check(y[at], x[at].double() @ w[expert].t())
