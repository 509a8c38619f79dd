"""The CUDA C++ decode kernels against the same arithmetic in plain torch."""

import pytest
import torch
from cuda_cases import BF16, DECODE, FP16, FP32, INT8, Case, inputs
from weights import integers

from int4q.kernels.cuda.decode import Config, MatvecConfig, linear
from int4q.kernels.weight import Weight

pytestmark = pytest.mark.gpu
BOTH = (False, True)
PRECISIONS = (BF16, INT8)
FLOATS = (BF16, FP16, FP32)
CASES = [
    # every group, layout and precision, more than one tile a block
    *(
        Case(M, 1152, 1024, group_size, activation=a, coalesced=c)
        for group_size in (32, 64, 128, 256)
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
    *(Case(2, 100, 384, group_size, coalesced=c) for group_size in (64, 128) for c in BOTH),
    *(Case(4, 66, 5376, 256, activation=a, coalesced=c) for a in PRECISIONS for c in BOTH),
    # dtypes
    *(
        Case(M, 144, 640, group_size, x, scale, a, c, extras=True)
        for M in (1, 6)
        for x in FLOATS
        for scale in FLOATS
        for a in PRECISIONS
        for group_size, c in ((32, False), (128, True), (64, False))
    ),
    # no zero points
    *(
        Case(M, 333, 640, 64, activation=a, coalesced=c, symmetric=True)
        for M in (1, 6)
        for a in PRECISIONS
        for c in BOTH
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
    DECODE.run(case)


CONFIGS = [
    Config(warps, row_tiles, stages, ctas, fused)
    for warps, row_tiles, stages, ctas in (
        (1, 1, 2, 1),
        (2, 2, 3, 4),
        (4, 4, 2, 1),
        (8, 2, 3, 1),
        (16, 1, 2, 1),
        (8, 1, 6, 1),
    )
    for fused in BOTH
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("activation", PRECISIONS)
@pytest.mark.parametrize("coalesced", BOTH)
def test_every_way_to_cut_the_work(config, activation, coalesced):
    for K, group_size, scale in ((1312, 32, BF16), (1280, 128, FP32)):
        for M in (1, 4, 16):
            DECODE.run(Case(M, 600, K, group_size, BF16, scale, activation, coalesced), config)


MATVECS = [MatvecConfig(*c) for c in ((4, 8, 1, 4), (2, 4, 2, 2), (1, 16, 1, 1), (7, 2, 1, 1))]


@pytest.mark.parametrize("config", MATVECS, ids=str)
@pytest.mark.parametrize("activation", PRECISIONS)
@pytest.mark.parametrize("coalesced", BOTH)
def test_every_matvec(config, activation, coalesced):
    for x, scale in ((BF16, BF16), (FP16, FP32), (FP32, FP16)):
        for N, K, group_size in (
            (600, 1312, 32),
            (7, 160, 32),
            (513, 1344, 64),
            (130, 640, 128),
            (12352, 4096, 256),
            (1000, 14336, 128),
        ):
            extras = x != BF16
            case = Case(1, N, K, group_size, x, scale, activation, coalesced, extras)
            DECODE.run(case, config)


@pytest.mark.parametrize("activation,top", [(INT8, 127), (BF16, 32639)])
@pytest.mark.parametrize("M", [1, 4, 9])
def test_integer_sums_are_bit_exact(activation, top, M):
    """Activations that are their own integers (a block's maximum is `top`, over a zero weight)."""
    N, K = 96, 1024
    qdata = torch.randint(-128, 128, (N, K // 2), device="cuda", dtype=INT8)
    qdata[:, ::16] &= -16
    one = torch.ones(K // 64, N, device="cuda")
    weight = Weight(qdata, one, torch.zeros_like(one), 64)
    x = torch.randint(-127, 128, (M, K), device="cuda").float()
    x[:, ::32] = top
    out = linear(x, weight, activation=activation)
    exact = x.double() @ integers(weight).double().mT
    torch.testing.assert_close(out, exact.float(), rtol=0, atol=0)


@pytest.mark.parametrize("activation", PRECISIONS)
def test_infinity_makes_its_row_nan(activation):
    """There is no integer for it, nor a scale for its block."""
    x, weight, *_ = inputs(Case(3, 64, 512))
    x[0, 300] = float("inf")
    out = linear(x, weight, activation=activation)
    assert out[0].isnan().all() and out[1:].isfinite().all()


def test_an_activation_dtype_that_is_none():
    x, weight, *_ = inputs(Case(1, 64, 256))
    with pytest.raises(ValueError, match="activation must be torch.bfloat16 .* got torch.float16"):
        linear(x, weight, activation=FP16)


def test_a_matvec_takes_one_row():
    x, weight, *_ = inputs(Case(2, 64, 256))
    with pytest.raises(ValueError, match="a MatvecConfig needs one row of x, got M=2"):
        linear(x, weight, config=MatvecConfig())
