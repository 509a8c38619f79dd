"""``int4_matmul`` on up to 16 rows: bfloat16 tensor cores on weights rounded once, to bfloat16."""

import pytest
import torch
import torch.nn.functional as F

from int4q.kernels import cuda_decode, reference
from int4q.kernels.cuda_decode import Config

pytestmark = pytest.mark.gpu
ROUNDING, FLOAT32_SUM = 2.0**-8, 2.0**-20
EXACT_FROM = 2.0**-119
"""Smaller weights may be off by ``TINY``: divided by 64 they are subnormal numbers."""
TINY = 2.0**-126


def weight(N, K, group_size):
    w_packed = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8, device="cuda")
    w_packed[:, :4] = torch.tensor([0x00, -1, 0x0F, -16], dtype=torch.int8)
    w_scale = (torch.rand(N, K // group_size, device="cuda") + 0.1) * 0.02
    return w_packed, w_scale.bfloat16()


def check(y, x, w_packed, w_scale, group_size):
    w = reference.dequantize_symmetric(w_packed, w_scale, group_size).double()
    exact = x.double() @ w.mT
    allowed = ROUNDING * exact.abs() + FLOAT32_SUM * (x.double().abs() @ w.abs().mT)
    assert y.dtype == torch.bfloat16 and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= allowed).all()


SHAPES = [(7, 1), (1, 1), (333, 5), (600, 41), (12352, 2), (100, 8)]  # N, groups


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("M", range(1, 17))
def test_matches_float64_on_rounded_weights(M, group_size):
    for N, n_groups in SHAPES:
        parts = weight(N, n_groups * group_size, group_size)
        wide = torch.randn(M, n_groups * group_size + 8, device="cuda").bfloat16()
        for x in (wide[:, :-8].contiguous(), wide[:, 3:-5], wide[:, 8:]):  # any alignment
            y = cuda_decode.rounded_linear(x, *parts, group_size)
            check(y, x, *parts, group_size)


CONFIGS = [(1, 1, 2, 1), (2, 2, 3, 4), (4, 4, 2, 1), (8, 3, 2, 2), (16, 1, 2, 1), (8, 1, 6, 1)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_way_to_cut_the_work(config):
    for group_size, K in ((32, 1312), (128, 1280)):
        parts = weight(600, K, group_size)
        for M in (1, 8, 16):
            x = torch.randn(M, K, device="cuda").bfloat16()
            y = cuda_decode.rounded_linear(x, *parts, group_size, Config(*config))
            check(y, x, *parts, group_size)


@pytest.mark.parametrize("M", [1, 6, 13])
def test_strided_weights_and_scales(M):
    w_packed, w_scale = weight(520, 1536, 64)
    x = torch.randn(M, 768, device="cuda").bfloat16()
    part = w_packed[8:200, 128:512], w_scale[8:200, 4:16]
    check(cuda_decode.rounded_linear(x, *part, 64), x, *part, 64)
    part = w_packed[3:84, 32:416], w_scale[3:84, 1:13]  # scales that no copy is aligned for
    check(cuda_decode.rounded_linear(x, *part, 64), x, *part, 64)
    part = w_packed[:, :384], w_scale[:, :12].mT.contiguous().mT  # the rows of a group adjoin
    check(cuda_decode.rounded_linear(x, *part, 64), x, *part, 64)


@pytest.mark.parametrize("M", [1, 4, 16])
def test_every_weight_is_rounded_once(M):
    """Rows of the identity pick single weights out: bit for bit the reference's."""
    K, group_size = 64, 32
    w_packed, w_scale = weight(256, K, group_size)
    exponent = torch.randint(-118, 120, w_scale.shape, device="cuda")
    w_scale = ((1 + torch.rand(w_scale.shape, device="cuda")) * 2.0**exponent).bfloat16()
    w = reference.dequantize_symmetric(w_packed, w_scale, group_size)
    for first in range(0, K, M):
        x = torch.eye(K, device="cuda").bfloat16()[first : first + M]
        y = cuda_decode.rounded_linear(x, w_packed, w_scale, group_size)
        assert torch.equal(y, w.mT[first : first + M])


def test_tiny_and_huge_weights():
    K, group_size = 64, 32
    w_packed, w_scale = weight(256, K, group_size)
    x = torch.eye(K, device="cuda").bfloat16()[:4]
    for size in (2.0**-133, 2.0**-126, 2.0**-122, 2.0**-119, 2.0**120, 2.0**124):
        scale = (w_scale * 50 * size).bfloat16()
        y = cuda_decode.rounded_linear(x, w_packed, scale, group_size).double()
        w = reference.dequantize_symmetric(w_packed, scale, group_size).double().mT[:4]
        error = (y - w).abs()
        assert (error <= TINY).all() and (error[w.abs() >= EXACT_FROM] == 0).all()


@pytest.mark.parametrize("M", [1, 4, 16])
def test_infinity_and_nan_go_as_in_a_matrix_product(M):
    w_packed, w_scale = weight(96, 352, 32)
    for place in (5, 351):
        for value in (float("inf"), float("-inf"), float("nan")):
            x = torch.randn(M, 352, device="cuda").bfloat16()
            x[0, place] = value
            y = cuda_decode.rounded_linear(x, w_packed, w_scale, 32)
            w = reference.dequantize_symmetric(w_packed, w_scale, 32)
            expected = F.linear(x.float(), w.float())
            assert torch.equal(y[0].isnan(), expected[0].isnan())
            assert torch.equal(y[0][y[0].isinf()], expected[0].bfloat16()[y[0].isinf()])
            check(y[1:], x[1:], w_packed, w_scale, 32)


@pytest.mark.parametrize("M", [1, 16])
def test_graph_capture(M):
    """Captured on the very first call, chained, replayed."""
    w_packed, w_scale = weight(736, 736, 32)
    x = torch.randn(M, 736, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once = cuda_decode.rounded_linear(x, w_packed, w_scale, 32)
        twice = cuda_decode.rounded_linear(once, w_packed, w_scale, 32)
    for _ in range(3):
        x.normal_()
        graph.replay()
        check(once, x, w_packed, w_scale, 32)
        check(twice, once, w_packed, w_scale, 32)
