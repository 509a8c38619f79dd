"""The CUDA C++ decode kernels against the same arithmetic in plain torch.

The reference quantises the activations exactly as the kernel does and multiplies in float64, so
what is left is the kernel's float32 accumulation and the rounding of the output: tight, and the
same for every K, M and layout.
"""

import threading
from dataclasses import dataclass

import pytest
import torch

from int4q.kernels.cuda import decode as cuda_decode
from int4q.kernels.weight import Weight

pytestmark = pytest.mark.gpu
BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group: int = 128
    x: torch.dtype = BF16
    scale: torch.dtype = BF16
    activation: torch.dtype = BF16
    coalesced: bool = False
    extras: bool = False  # bias and act_pre_scale

    def __str__(self):
        names = (self.x, self.scale, self.activation)
        layout = "coalesced" if self.coalesced else "plain"
        dtypes = "-".join(str(dtype)[6:] for dtype in names)
        extras = "-extras" * self.extras
        return f"{self.M}x{self.N}x{self.K}-g{self.group}-{dtypes}-{layout}{extras}"


def weight(case: Case):
    """Both end nibbles in every position; another scale and zero point in every group."""
    groups = case.K // case.group
    q = torch.randint(-8, 8, (case.N, case.K), device="cuda", dtype=INT8)
    q[::3, 0::4], q[::3, 1::4], q[1::3, 2::4], q[1::3, 3::4] = -8, 7, 7, -8
    qdata = (q[:, 0::2] & 15) | (q[:, 1::2] << 4)
    scale = (torch.rand(groups, case.N, device="cuda") + 0.1).to(case.scale) * 0.02
    zero_point = torch.randn(groups, case.N, device="cuda").to(case.scale) * 0.05
    if case.coalesced:
        scale, zero_point = scale.mT.contiguous().mT, zero_point.mT.contiguous().mT
    return q, qdata, scale, zero_point


def quantised(x: torch.Tensor, activation: torch.dtype):
    """x as integers and their float32 scales, one per element."""
    bits16 = activation == BF16
    block = 128 if bits16 else 32
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    amax = padded.abs().amax(-1, keepdim=True)
    top = torch.tensor(
        32639.0 if bits16 else 127.0, device="cuda"
    )  # (a number would turn the division into a product)
    if bits16:
        amax = amax.clamp(min=1e-30)
        q, d = (padded.double() * (top / amax).double()).round(), amax / top
    else:
        d = amax / top
        q = torch.where(d > 0, (padded / d).round().clamp(-127, 127), 0.0)
    return (t.expand(padded.shape).flatten(1)[:, : x.shape[1]].double() for t in (q, d))


def reference(case: Case, x, q, scale, zero_point, bias=None, pre=None):
    """The exact result (float64) of the kernel's integers, and the sum of the absolute terms."""
    x = x.float() if pre is None else x.float() * pre.float()
    xq, xd = quantised(x, case.activation)
    wide = (t.double().repeat_interleave(case.group, 0).mT for t in (scale, zero_point))
    s, z = wide
    exact = (xq * xd) @ (q * s + z).mT
    size = (xq * xd).abs() @ ((q * s).abs() + z.abs()).mT
    return (exact if bias is None else exact + bias.double()), size


def check(case: Case, out, exact, size):
    assert out.dtype == case.x and out.shape == exact.shape
    # float32 accumulation: 2 ** -20 of the terms; output: half a spacing.
    spacing = {BF16: 2**-7, FP16: 2**-10, FP32: 2**-23}[case.x]
    bound = exact.abs() * spacing * 0.51 + size * 2**-20 + (6e-8 if case.x == FP16 else 0)
    error = (out.double() - exact).abs()
    assert not out.isnan().any()
    worst = (error / bound).max().item()
    assert worst <= 1, f"error is {worst:.2f} of the bound"


def run(case: Case, config=None):
    q, qdata, scale, zero_point = weight(case)
    x = torch.randn(case.M, case.K, device="cuda").to(case.x)
    bias = torch.randn(case.N, device="cuda").to(case.x) if case.extras else None
    pre = (torch.rand(case.K, device="cuda") + 0.5).to(case.x) if case.extras else None
    out = cuda_decode._linear(
        (x, qdata, scale, zero_point, bias, pre), case.group, case.activation, config
    )
    check(case, out, *reference(case, x, q, scale, zero_point, bias, pre))


BOTH = (False, True)
PRECISIONS = (BF16, INT8)
FLOATS = (BF16, FP16, FP32)
CASES = [
    # every group, layout and precision, more than one tile a block
    *(
        Case(M, 1152, 1024, group, activation=a, coalesced=c)
        for group in (32, 64, 128, 256)
        for M in (1, 3, 8)
        for a in PRECISIONS
        for c in BOTH
    ),
    # every M
    *(
        Case(M, 272, 512, 64, activation=a, coalesced=M % 2 == 1)
        for M in range(1, 17)
        for a in PRECISIONS
    ),
    # tails: K below and off a step of 256, N off a tile, odd N (scales never aligned); K = 160 with
    # several tiles a block has fewer steps than warps
    *(
        Case(M, N, K, 32, activation=a, coalesced=c)
        for M in (1, 5)
        for N, K in ((7, 160), (1, 32), (30, 288), (333, 96), (12352, 160))
        for a in PRECISIONS
        for c in BOTH
    ),
    # odd n_groups, K off a step with large groups
    *(Case(2, 100, 384, group, coalesced=c) for group in (64, 128) for c in BOTH),
    *(Case(4, 66, 5376, 256, activation=a, coalesced=c) for a in PRECISIONS for c in BOTH),
    # dtypes
    *(
        Case(M, 144, 640, group, x, scale, a, c, extras=True)
        for M in (1, 6)
        for x in FLOATS
        for scale in FLOATS
        for a in PRECISIONS
        for group, c in ((32, False), (128, True), (64, False))
    ),
    # shapes of real models
    Case(1, 28672, 4096),
    Case(4, 28672, 4096),
    Case(7, 12288, 4096, coalesced=True),
    Case(4, 4096, 14336, 32, coalesced=True),
    Case(1, 4096, 14336, activation=INT8),
    Case(16, 4096, 4096),
    Case(1, 512, 2048, 64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    run(case)


CONFIGS = [
    cuda_decode.Config(warps, row_tiles, stages, ctas, fused)
    for warps, row_tiles, stages, ctas in (
        (1, 1, 2, 1),
        (2, 2, 3, 4),
        (4, 4, 2, 1),
        (8, 2, 3, 1),
        (16, 1, 2, 1),
        (8, 1, 6, 1),
    )
    for fused in (False, True)
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("activation", [BF16, INT8])
@pytest.mark.parametrize("coalesced", [False, True])
def test_every_way_to_cut_the_work(config, activation, coalesced):
    for group, scale in ((32, BF16), (128, FP32)):
        for M in (1, 4, 16):
            run(
                Case(
                    M,
                    600,
                    1312 if group == 32 else 1280,
                    group,
                    scale=scale,
                    activation=activation,
                    coalesced=coalesced,
                ),
                config,
            )


@pytest.mark.parametrize(
    "config",
    [
        cuda_decode.MatvecConfig(*c)
        for c in ((4, 8, 1, 4), (2, 4, 2, 2), (1, 16, 1, 1), (7, 2, 1, 1))
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", [BF16, INT8])
@pytest.mark.parametrize("coalesced", [False, True])
def test_every_matvec(config, activation, coalesced):
    for x, scale in ((BF16, BF16), (FP16, FP32), (FP32, FP16)):
        for N, K, group in (
            (600, 1312, 32),
            (7, 160, 32),
            (513, 1344, 64),
            (130, 640, 128),
            (12352, 4096, 256),
            (1000, 14336, 128),
        ):
            run(Case(1, N, K, group, x, scale, activation, coalesced, extras=x != BF16), config)


@pytest.mark.parametrize("activation,top", [(INT8, 127), (BF16, 32639)])
@pytest.mark.parametrize("M", [1, 4, 9])
def test_integer_sums_are_bit_exact(activation, top, M):
    """Activations that are their own integers (a block's maximum is `top`, over a zero weight)."""
    N, K = 96, 1024
    q = torch.randint(-8, 8, (N, K), device="cuda", dtype=INT8)
    q[:, ::32] = 0
    qdata = (q[:, 0::2] & 15) | (q[:, 1::2] << 4)
    x = torch.randint(-127, 128, (M, K), device="cuda").float()
    x[:, ::32] = top
    one = torch.ones(K // 64, N, device="cuda")
    out = cuda_decode.linear(x, qdata, one, torch.zeros_like(one), 64, activation=activation)
    torch.testing.assert_close(out, (x.double() @ q.double().mT).float(), rtol=0, atol=0)


@pytest.mark.parametrize("M", [1, 5])
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
            part = Case(M, N, K, 64, coalesced=coalesced)
            args = q[rows, cols], scale[groups, rows], zero_point[groups, rows]
            out = cuda_decode.linear(
                xs, qdata[rows, cols.start // 2 : cols.stop // 2], *args[1:], 64
            )
            check(part, out, *reference(part, xs, *args))


def test_leading_dimensions_and_empty():
    case = Case(6, 64, 256)
    q, qdata, scale, zero_point = weight(case)
    x = torch.randn(2, 3, 256, device="cuda", dtype=BF16)
    out = cuda_decode.linear(x, Weight(qdata, scale, zero_point, 128))
    assert out.shape == (2, 3, 64)
    assert torch.equal(
        out.flatten(0, 1),
        cuda_decode.linear(x.flatten(0, 1), Weight(qdata, scale, zero_point, 128)),
    )
    assert torch.equal(
        out[0, 0], cuda_decode.linear(x, Weight(qdata, scale, zero_point, 128))[0, 0]
    )
    assert cuda_decode.linear(x[:0], Weight(qdata, scale, zero_point, 128)).shape == (0, 3, 64)


@pytest.mark.parametrize("activation", [BF16, INT8])
def test_not_finite_and_zero_activations(activation):
    case = Case(3, 64, 512, activation=activation)
    q, qdata, scale, zero_point = weight(case)
    x = torch.randn(3, 512, device="cuda", dtype=BF16)
    x[0, 300], x[1] = float("nan"), 0
    out = cuda_decode.linear(x, Weight(qdata, scale, zero_point, 128), activation=activation)
    assert out[0].isnan().all() and (out[1] == 0).all() and out[2].isfinite().all()
    x[0, 300] = float("inf")
    assert (
        cuda_decode.linear(x, Weight(qdata, scale, zero_point, 128), activation=activation)[0]
        .isnan()
        .all()
    )


@pytest.mark.parametrize("M", [1, 4])
def test_streams_and_threads(M):
    """Two threads, each on its own stream, get the bits that one stream gets."""
    case = Case(M, 2048, 2048)
    _, qdata, scale, zero_point = weight(case)
    xs = [torch.randn(M, 2048, device="cuda", dtype=BF16) for _ in range(2)]
    wanted = [cuda_decode.linear(x, Weight(qdata, scale, zero_point, 128)) for x in xs]
    torch.cuda.synchronize()
    wrong = []

    def work(x, want):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            outs = [
                cuda_decode.linear(x, Weight(qdata, scale, zero_point, 128)) for _ in range(200)
            ]
        stream.synchronize()
        wrong.extend(out for out in outs if not torch.equal(out, want))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("M,activation", [(1, BF16), (4, BF16), (8, INT8)])
def test_graph_capture(M, activation):
    """Captured on the very first call (compiled inside the capture), chained, replayed."""
    case = Case(M, 768, 768, 64, FP16, activation=activation)
    q, qdata, scale, zero_point = weight(case)
    x = torch.randn(M, 768, device="cuda", dtype=FP16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once = cuda_decode.linear(x, Weight(qdata, scale, zero_point, 64), activation=activation)
        twice = cuda_decode.linear(
            once, Weight(qdata, scale, zero_point, 64), activation=activation
        )
    for _ in range(3):
        x.normal_()
        graph.replay()
        check(case, once, *reference(case, x, q, scale, zero_point))
        check(case, twice, *reference(case, once, q, scale, zero_point))


def test_more_than_2_31_nibbles():
    """N * K past 2 ** 32, so that byte offsets leave 32 bits: the last rows are right."""
    N, K = 299593, 14336
    qdata = torch.randint(-128, 128, (N, K // 2), device="cuda", dtype=INT8)
    scale = torch.rand(K // 256, N, device="cuda").to(BF16)
    zero_point = torch.rand(K // 256, N, device="cuda").to(BF16)
    x = torch.randn(2, K, device="cuda", dtype=BF16)
    out = cuda_decode.linear(x, Weight(qdata, scale, zero_point, 256))
    last = slice(N - 40, N)
    want = cuda_decode.linear(
        x, qdata[last].clone(), scale[:, last].clone(), zero_point[:, last].clone(), 256
    )
    torch.testing.assert_close(out[:, last], want, rtol=2**-7, atol=1e-3)


def test_rules():
    why = cuda_decode.unsupported
    assert why(1, 7, 160, 32, BF16, BF16, (9, 0)) is None
    assert "16" in why(17, 64, 128, 128, BF16, BF16, (9, 0))
    assert "multiple" in why(1, 64, 192, 128, BF16, BF16, (9, 0))
    assert "capability" in why(1, 64, 128, 128, BF16, BF16, (7, 5))
    assert "float64" in why(1, 64, 128, 128, torch.float64, BF16, (9, 0))
    _, qdata, scale, zero_point = weight(Case(1, 64, 256))
    x = torch.randn(1, 256, device="cuda", dtype=BF16)
    with pytest.raises(ValueError, match="n_groups, N"):
        cuda_decode.linear(x, qdata, scale.mT, zero_point.mT, 128)
    with pytest.raises(ValueError, match="K=256"):
        cuda_decode.linear(x[:, :128], Weight(qdata, scale, zero_point, 128))
    with pytest.raises(TypeError, match="zero_point"):
        cuda_decode.linear(x, qdata, scale, zero_point.float(), 128)
    with pytest.raises(ValueError, match="activation"):
        cuda_decode.linear(x, Weight(qdata, scale, zero_point, 128), activation=FP16)
