"""``int4_matmul`` on up to 16 rows: bfloat16 tensor cores on weights rounded once, to bfloat16."""

import pytest
import torch
import torch.nn.functional as F

from int4q.kernels import reference
from int4q.kernels.cuda.decode import Config, linear_rounded
from int4q.kernels.weight import Weight

pytestmark = pytest.mark.gpu
ROUNDING, FLOAT32_SUM = 2.0**-8, 2.0**-20
EXACT_FROM = 2.0**-119
"""Smaller weights may be off by ``TINY``: divided by 64 they are subnormal numbers."""
TINY = 2.0**-126


def symmetric(packed, by_row, group_size):
    """A weight whose scales lie ``[N, n_groups]`` in memory."""
    return Weight(packed, by_row.mT, None, group_size, signed=False)


def random_symmetric(N, K, group_size):
    packed = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8, device="cuda")
    packed[:, :4] = torch.tensor([0x00, -1, 0x0F, -16], dtype=torch.int8)
    by_row = (torch.rand(N, K // group_size, device="cuda") + 0.1) * 0.02
    return symmetric(packed, by_row.bfloat16(), group_size)


def rounded(weight):
    return reference.dequantize(weight, torch.bfloat16)


def check(y, x, weight):
    w = rounded(weight).double()
    exact = x.double() @ w.mT
    allowed = ROUNDING * exact.abs() + FLOAT32_SUM * (x.double().abs() @ w.abs().mT)
    assert y.dtype == torch.bfloat16 and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= allowed).all()


SHAPES = [(7, 1), (1, 1), (333, 5), (600, 41), (12352, 2), (100, 8)]  # N, groups


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("M", range(1, 17))
def test_matches_float64_on_rounded_weights(M, group_size):
    for N, n_groups in SHAPES:
        weight = random_symmetric(N, n_groups * group_size, group_size)
        wide = torch.randn(M, n_groups * group_size + 8, device="cuda").bfloat16()
        for x in (wide[:, :-8].contiguous(), wide[:, 3:-5], wide[:, 8:]):  # any alignment
            check(linear_rounded(x, weight), x, weight)


CONFIGS = [(1, 1, 2, 1), (2, 2, 3, 4), (4, 4, 2, 1), (8, 3, 2, 2), (16, 1, 2, 1), (8, 1, 6, 1)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_way_to_cut_the_work(config):
    for group_size, K in ((32, 1312), (128, 1280)):
        weight = random_symmetric(600, K, group_size)
        for M in (1, 8, 16):
            x = torch.randn(M, K, device="cuda").bfloat16()
            check(linear_rounded(x, weight, Config(*config)), x, weight)


@pytest.mark.parametrize("M", [1, 6, 13])
def test_strided_weights_and_scales(M):
    packed, scale, *_ = random_symmetric(520, 1536, 64)
    by_row = scale.mT
    x = torch.randn(M, 768, device="cuda").bfloat16()
    for part in (
        symmetric(packed[8:200, 128:512], by_row[8:200, 4:16], 64),
        symmetric(packed[3:84, 32:416], by_row[3:84, 1:13], 64),  # no copy is aligned for these
        symmetric(packed[:, :384], by_row[:, :12].mT.contiguous().mT, 64),  # [n_groups, N]
    ):
        check(linear_rounded(x, part), x, part)


@pytest.mark.parametrize("M", [1, 4, 16])
def test_every_weight_is_rounded_once(M):
    """Rows of the identity pick single weights out: bit for bit the reference's."""
    K, group_size = 64, 32
    weight = random_symmetric(256, K, group_size)
    exponent = torch.randint(-118, 120, weight.scale.shape, device="cuda")
    scale = (1 + torch.rand(weight.scale.shape, device="cuda")) * 2.0**exponent
    weight = symmetric(weight.qdata, scale.bfloat16().mT.contiguous(), group_size)
    w = rounded(weight)
    for first in range(0, K, M):
        x = torch.eye(K, device="cuda").bfloat16()[first : first + M]
        assert torch.equal(linear_rounded(x, weight), w.mT[first : first + M])


def test_tiny_and_huge_weights():
    K, group_size = 64, 32
    weight = random_symmetric(256, K, group_size)
    x = torch.eye(K, device="cuda").bfloat16()[:4]
    for size in (2.0**-133, 2.0**-126, 2.0**-122, 2.0**-119, 2.0**120, 2.0**124):
        scale = (weight.scale.mT * 50 * size).bfloat16()
        sized = symmetric(weight.qdata, scale, group_size)
        w = rounded(sized).double().mT[:4]
        error = (linear_rounded(x, sized).double() - w).abs()
        assert (error <= TINY).all() and (error[w.abs() >= EXACT_FROM] == 0).all()


@pytest.mark.parametrize("M", [1, 4, 16])
def test_infinity_and_nan_go_as_in_a_matrix_product(M):
    weight = random_symmetric(96, 352, 32)
    for place in (5, 351):
        for value in (float("inf"), float("-inf"), float("nan")):
            x = torch.randn(M, 352, device="cuda").bfloat16()
            x[0, place] = value
            y, expected = linear_rounded(x, weight), F.linear(x.float(), rounded(weight).float())
            assert torch.equal(y[0].isnan(), expected[0].isnan())
            assert torch.equal(y[0][y[0].isinf()], expected[0].bfloat16()[y[0].isinf()])
            check(y[1:], x[1:], weight)


@pytest.mark.parametrize("M", [1, 16])
def test_graph_capture(M):
    """Captured on the very first call, chained, replayed."""
    weight = random_symmetric(736, 736, 32)
    x = torch.randn(M, 736, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once = linear_rounded(x, weight)
        twice = linear_rounded(once, weight)
    for _ in range(3):
        x.normal_()
        graph.replay()
        check(once, x, weight)
        check(twice, once, weight)
