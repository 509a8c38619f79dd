"""The CUDA C++ small-batch kernel against its own arithmetic in float64.

The reference rounds the weights (and x * act_pre_scale) to x's dtype as the kernel does and
multiplies in float64. What is left is float32 accumulation and the rounding of the output: tight,
and the same for every K, M and layout.
"""

import threading
from dataclasses import dataclass, replace

import pytest
import torch

from int4q.kernels.cuda import small_batch as cuda_small_batch
from int4q.kernels.cuda.small_batch import Config
from int4q.kernels.weight import Weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="wgmma needs compute capability 9.0",
    ),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group: int = 128
    x: torch.dtype = BF16
    scale: torch.dtype = BF16
    coalesced: bool = False
    extras: bool = False  # bias and act_pre_scale
    symmetric: bool = False

    def __str__(self):
        dtypes = f"{self.x}-{self.scale}".replace("torch.", "")
        flags = ("coalesced", "extras", "symmetric")
        names = "".join(f"-{flag}" for flag in flags if getattr(self, flag))
        return f"{self.M}x{self.N}x{self.K}-g{self.group}-{dtypes}{names}"


def weight(case: Case):
    """Both end nibbles in every position; another scale and zero point in every group."""
    groups = case.K // case.group
    q = torch.randint(-8, 8, (case.N, case.K), device="cuda", dtype=torch.int8)
    q[::3, 0::4], q[::3, 1::4], q[1::3, 2::4], q[1::3, 3::4] = -8, 7, 7, -8
    stored = q + 8 if case.symmetric else q & 15
    qdata = (stored[:, 0::2] & 15) | (stored[:, 1::2] << 4)
    scale = (torch.rand(groups, case.N, device="cuda") + 0.1).to(case.scale) * 0.02
    zero_point = torch.randn(groups, case.N, device="cuda").to(case.scale) * 0.05
    if case.coalesced:
        scale, zero_point = scale.mT.contiguous().mT, zero_point.mT.contiguous().mT
    return q, qdata, scale, zero_point


def reference(case: Case, x, q, scale, zero_point, bias=None, pre=None):
    """The exact result (float64) of the rounded operands, and the sum of the absolute terms."""
    wide = [t.double().repeat_interleave(case.group, 0).mT for t in (scale, zero_point)]
    w = q * wide[0] if case.symmetric else q * wide[0] + wide[1]
    w = w.float().to(case.x).double()
    x = (x if pre is None else (x.float() * pre.float()).to(case.x)).double()
    exact = x @ w.mT
    return (exact if bias is None else exact + bias.double()), x.abs() @ w.abs().mT


def check(case: Case, out, exact, size):
    assert out.dtype == case.x and out.shape == exact.shape
    assert not out.isnan().any()
    # Output: half a spacing. Float32 sums, and weights that lie between two numbers of x's dtype
    # and that float32 rounds first here: 2 ** -18 of the terms.
    spacing = {BF16: 2**-7, FP16: 2**-10}[case.x]
    bound = exact.abs() * spacing * 0.51 + size * 2**-18 + (6e-8 if case.x == FP16 else 0)
    worst = ((out.double() - exact).abs() / bound).max().item()
    assert worst <= 1, f"error is {worst:.2f} of the bound"


def poison(case: Case):
    """NaN into the memory that the allocator hands out next."""
    torch.full((case.M, case.N), float("nan"), dtype=case.x, device="cuda")


def run(case: Case, config: Config | None = None):
    q, qdata, scale, zero_point = weight(case)
    x = torch.randn(case.M, case.K, device="cuda").to(case.x)
    bias = torch.randn(case.N, device="cuda").to(case.x) if case.extras else None
    pre = (torch.rand(case.K, device="cuda") + 0.5).to(case.x) if case.extras else None
    parts = (x, qdata, scale, scale if case.symmetric else zero_point, bias, pre)
    outs = []
    for _ in range(2):
        poison(case)
        outs.append(cuda_small_batch._run(parts, case.group, case.symmetric, config))
    check(case, outs[0], *reference(case, x, q, scale, zero_point, bias, pre))
    assert torch.equal(*outs)


HALVES = (BF16, FP16)
CASES = [
    # every number of column tiles, and M between them
    *(Case(M, 272, 512, 64, coalesced=M % 2 == 1) for M in (1, 8, 9, 16, 17, 24, 31, 40, 48, 56)),
    # every group and layout, more than one tile a block
    *(
        Case(M, 1152, 1024, group, coalesced=c, symmetric=s)
        for group in (32, 64, 128, 256)
        for M in (9, 33, 64)
        for c in (False, True)
        for s in (False, True)
    ),
    # tails: K below and off a step of 128, N off a tile, odd N (scales never aligned)
    *(
        Case(M, N, K, 32, coalesced=c)
        for M in (13, 64)
        for N, K in ((7, 160), (1, 32), (30, 288), (333, 96), (130, 320), (66, 192), (12352, 160))
        for c in (False, True)
    ),
    *(Case(20, 100, 384, group, coalesced=c) for group in (64, 128) for c in (False, True)),
    *(Case(36, 66, 5376, 256, coalesced=c) for c in (False, True)),
    # dtypes
    *(
        Case(M, 144, 640, group, x, scale, c, True)
        for M in (11, 50)
        for x in HALVES
        for scale in (BF16, FP16, FP32)
        for group, c in ((32, False), (128, True), (64, False))
    ),
    # shapes of real models
    Case(16, 28672, 4096),
    Case(64, 21504, 5376, 32),
    Case(32, 12288, 4096, coalesced=True),
    Case(64, 4096, 14336, 32),
    Case(24, 4096, 4096),
    Case(16, 512, 2048, 64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    run(case)


CONFIGS = [
    Config(warpgroups, row_tiles, k_parts, stages, x_stages, split)
    for warpgroups, row_tiles, k_parts, stages, x_stages in (
        (1, 1, 1, 2, 3),
        (1, 2, 1, 3, 4),
        (2, 1, 1, 6, 4),
        (2, 2, 1, 4, 5),
        (3, 1, 1, 5, 5),
        (2, 1, 2, 4, 7),
        (4, 1, 2, 3, 5),
    )
    for split in (1, 2, 4, 8)
]


@pytest.mark.parametrize("config", [*CONFIGS, Config(1, 2, blocks=2)], ids=str)
@pytest.mark.parametrize("coalesced", [False, True])
def test_every_way_to_cut_the_work(config, coalesced):
    for group, K in ((32, 1312), (128, 1280), (256, 256)):
        for M in (5, 16, 64):
            for extras in (False, True):
                run(Case(M, 600, K, group, coalesced=coalesced, extras=extras), config)


def test_rows_go_round_several_times():
    """More rows than a wave of blocks holds: the ring runs on from tile to tile."""
    rows = torch.cuda.get_device_properties("cuda").multi_processor_count * 64
    for N in (rows + 4, 2 * rows, 5 * rows + 13):
        for config in (Config(1), Config(2, 1, 2, 3, 5)):
            run(Case(33, N, 288, 32), config)


@pytest.mark.parametrize("M", [9, 40])
def test_strided_inputs(M):
    """Rows of x, qdata and the scales that are slices of wider tensors, as a sliced weight's."""
    for coalesced in (False, True):
        big = Case(M, 520, 1536, 64, coalesced=coalesced)
        q, qdata, scale, zero_point = weight(big)
        x = torch.randn(M, 3000, device="cuda", dtype=BF16)
        for rows, cols, offset in (
            (slice(8, 200), slice(256, 1024), 8),
            (slice(3, 84), slice(64, 832), 3),
        ):
            groups = slice(cols.start // 64, cols.stop // 64)
            K, N = cols.stop - cols.start, rows.stop - rows.start
            xs = x[:, offset : offset + K]
            part = replace(big, N=N, K=K)
            args = q[rows, cols], scale[groups, rows], zero_point[groups, rows]
            out = cuda_small_batch.linear(
                xs, qdata[rows, cols.start // 2 : cols.stop // 2], *args[1:], 64
            )
            check(part, out, *reference(part, xs, *args))


def test_leading_dimensions_and_empty():
    case = Case(12, 64, 256)
    q, qdata, scale, zero_point = weight(case)
    x = torch.randn(3, 4, 256, device="cuda", dtype=BF16)
    out = cuda_small_batch.linear(x, Weight(qdata, scale, zero_point, 128))
    assert out.shape == (3, 4, 64)
    flat = cuda_small_batch.linear(x.flatten(0, 1), Weight(qdata, scale, zero_point, 128))
    assert torch.equal(out.flatten(0, 1), flat)
    assert cuda_small_batch.linear(x[:0], Weight(qdata, scale, zero_point, 128)).shape == (0, 4, 64)


def test_symmetric_op():
    case = Case(16, 192, 512, 64, symmetric=True)
    q, qdata, scale, zero_point = weight(case)
    x = torch.randn(16, 512, device="cuda", dtype=BF16)
    out = cuda_small_batch.symmetric_linear(x, qdata, scale.mT.contiguous(), 64)
    check(case, out, *reference(case, x, q, scale, zero_point))


def test_not_finite_activations():
    case = Case(12, 64, 512)
    _, qdata, scale, zero_point = weight(case)
    x = torch.randn(12, 512, device="cuda", dtype=BF16)
    x[0, 300], x[1], x[2, 7] = float("nan"), 0, float("inf")
    out = cuda_small_batch.linear(x, Weight(qdata, scale, zero_point, 128))
    assert out[0].isnan().all() and (out[1] == 0).all()
    assert not out[2].isfinite().any() and out[3:].isfinite().all()


@pytest.mark.parametrize("N", [2048, 28672])
def test_streams_and_threads(N):
    """Two threads, each on its own stream, get the bits that one stream gets."""
    case = Case(16, N, 1024)
    _, qdata, scale, zero_point = weight(case)
    xs = [torch.randn(16, 1024, device="cuda", dtype=BF16) for _ in range(2)]
    wanted = [cuda_small_batch.linear(x, Weight(qdata, scale, zero_point, 128)) for x in xs]
    torch.cuda.synchronize()
    wrong = []

    def work(x, want):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            outs = [
                cuda_small_batch.linear(x, Weight(qdata, scale, zero_point, 128))
                for _ in range(100)
            ]
        stream.synchronize()
        wrong.extend(out for out in outs if not torch.equal(out, want))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("M", [10, 64])
def test_graph_capture(M):
    """Captured on the very first call (compiled inside the capture), chained, replayed."""
    case = Case(M, 768, 768, 64, FP16, FP16)
    q, qdata, scale, zero_point = weight(case)
    x = torch.randn(M, 768, device="cuda", dtype=FP16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once = cuda_small_batch.linear(x, Weight(qdata, scale, zero_point, 64))
        twice = cuda_small_batch.linear(once, Weight(qdata, scale, zero_point, 64))
    for _ in range(3):
        x.normal_()
        graph.replay()
        check(case, once, *reference(case, x, q, scale, zero_point))
        check(case, twice, *reference(case, once, q, scale, zero_point))


def test_more_than_2_31_nibbles():
    """N * K past 2 ** 32, so that byte offsets leave 32 bits: the last rows are right."""
    N, K = 299593, 14336
    qdata = torch.randint(-128, 128, (N, K // 2), device="cuda", dtype=torch.int8)
    scale = torch.rand(K // 256, N, device="cuda").to(BF16)
    zero_point = torch.rand(K // 256, N, device="cuda").to(BF16)
    x = torch.randn(16, K, device="cuda", dtype=BF16)
    out = cuda_small_batch.linear(x, Weight(qdata, scale, zero_point, 256))
    last = slice(N - 40, N)
    want = cuda_small_batch.linear(
        x, qdata[last].clone(), scale[:, last].clone(), zero_point[:, last].clone(), 256
    )
    torch.testing.assert_close(out[:, last], want, rtol=2**-7, atol=1e-2)


def test_rules():
    why = cuda_small_batch.unsupported
    assert why(64, 7, 160, 32, BF16, BF16, (9, 0)) is None
    assert "64" in why(65, 64, 128, 128, BF16, BF16, (9, 0))
    assert "multiple" in why(16, 64, 192, 128, BF16, BF16, (9, 0))
    assert "capability" in why(16, 64, 128, 128, BF16, BF16, (8, 0))
    assert "capability" in why(16, 64, 128, 128, BF16, BF16, (10, 0))
    assert "float32" in why(16, 64, 128, 128, FP32, BF16, (9, 0))
    _, qdata, scale, zero_point = weight(Case(16, 64, 256))
    x = torch.randn(16, 256, device="cuda", dtype=BF16)
    with pytest.raises(ValueError, match="n_groups, N"):
        cuda_small_batch.linear(x, qdata, scale.mT, zero_point.mT, 128)
    with pytest.raises(ValueError, match="K=256"):
        cuda_small_batch.linear(x[:, :128], Weight(qdata, scale, zero_point, 128))
    with pytest.raises(TypeError, match="zero_point"):
        cuda_small_batch.linear(x, qdata, scale, zero_point.float(), 128)
