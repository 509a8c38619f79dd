"""The CUDA C++ warp-specialised kernel against its own arithmetic in float64."""

from dataclasses import replace

import pytest
import torch
from cuda_cases import BF16, FP16, FP32, WARP_SPECIALISED, Case, inputs
from helpers import needs_hopper

from int4q.kernels.cuda.warp_specialised import linear
from int4q.kernels.cuda.warp_specialised_config import Config

pytestmark = [pytest.mark.gpu, needs_hopper]
BOTH = (False, True)
CASES = [
    # every number of column tiles, and M between them
    *(Case(M, 272, 512, 64, coalesced=M % 2 == 1) for M in (1, 8, 9, 16, 17, 24, 31, 40, 48, 56)),
    # every group and layout, more than one tile a block
    *(
        Case(M, 1152, 1024, group_size, coalesced=c, symmetric=s)
        for group_size in (32, 64, 128, 256)
        for M in (9, 33, 64)
        for c in BOTH
        for s in BOTH
    ),
    # as the symmetric ops hand them over: [N, n_groups] in memory
    Case(16, 192, 512, 64, coalesced=True, symmetric=True),
    # tails: K below and off a step of 256, N off a tile, odd N (scales never aligned)
    *(
        Case(M, N, K, 32, coalesced=c)
        for M in (13, 64)
        for N, K in ((7, 160), (1, 32), (30, 288), (333, 96), (130, 320), (66, 192), (12352, 160))
        for c in BOTH
    ),
    *(Case(20, 100, 384, group_size, coalesced=c) for group_size in (64, 128) for c in BOTH),
    *(Case(36, 66, 5376, 256, coalesced=c) for c in BOTH),
    # dtypes
    *(
        Case(M, 144, 640, group_size, x, scale, coalesced=c, extras=True)
        for M in (11, 50)
        for x in (BF16, FP16)
        for scale in (BF16, FP16, FP32)
        for group_size, c in ((32, False), (128, True), (64, False))
    ),
    # shapes of real models
    *(
        Case(M, N, K, group_size)
        for N, K in ((28672, 4096), (4096, 14336), (6144, 4096), (5376, 21504))
        for M, group_size in ((16, 128), (64, 32))
    ),
    Case(64, 21504, 5376, 32),
    Case(32, 12288, 4096, coalesced=True),
    Case(24, 4096, 4096),
    Case(16, 512, 2048, 64),
    Case(40, 57344, 1024),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    WARP_SPECIALISED.run(case)


SHAPES = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1), (1, 1, 1, True), (3, 1, 1, True)]
"""Warpgroups, parts of K, blocks of a cluster, even shares."""
SHAPES += [(2, 2, 1), (4, 4, 1), (1, 1, 2), (2, 2, 2), (4, 2, 2), (1, 1, 4), (2, 1, 8)]


GROUPS = [(32, 1312), (64, 64), (128, 1280), (256, 2560)]
"""Group sizes, and a K for each."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", [(False, 1), (False, 2), (True, 1), (True, 2)], ids=str)
def test_every_way_to_cut_the_work(shape, mode):
    scale_sums, chunks = mode
    config = Config(*shape, scale_sums=scale_sums, chunks=chunks)
    turn = SHAPES.index(shape) + 2 * scale_sums + chunks
    for i, M in enumerate((5, 16) if scale_sums or chunks == 2 else (5, 64)):
        group_size, K = GROUPS[(turn + i) % 4]
        case = Case(M, 600, K, group_size, coalesced=turn % 2 == i, extras=i == 0)
        WARP_SPECIALISED.run(case, config)


@pytest.mark.parametrize("tile_rows", [8, 40, 64])
@pytest.mark.parametrize("N", [8, 333, 2056])
def test_tiles_of_any_height(tile_rows, N):
    for shape in ((1, 1, 1), (1, 1, 2), (2, 2, 1)):
        config = Config(*shape, tile_rows=tile_rows)
        WARP_SPECIALISED.run(Case(24, N, 1536, 32), config)


def test_blocks_that_take_many_tiles_and_parts_of_them():
    """Every way in which a block's share of the steps can lie on the tiles."""
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    for blocks in (1, 2, 3, 7, 50):
        for even in BOTH:
            config = Config(1, even=even, scale_sums=blocks % 2 == 1, spare=sms - blocks)
            for K in (256, 288, 1280, 4096):
                WARP_SPECIALISED.run(Case(12, 650, K, 32), config)


@pytest.mark.parametrize("scale_sums", BOTH)
def test_large_activations_that_cancel(scale_sums):
    """Outliers of 10 ** 4 and a mean far from 0, whose sum the zero points multiply."""
    parts = inputs(Case(16, 512, 2048, 128))
    x = parts.x.float()
    for other in (x + 8, x * (1 + 1e4 * (torch.rand_like(x) < 0.01))):
        parts = parts._replace(x=other.bfloat16())
        config = Config(scale_sums=scale_sums)
        WARP_SPECIALISED.check(linear(*parts, config=config), parts, config=config)


@pytest.mark.parametrize("case", [Case(16, 4096, 4096), Case(64, 5376, 21504, 32)], ids=str)
def test_the_same_bits_every_time(case):
    for config in (None, Config(), Config(even=True), Config(2, 2, 2)):
        parts = inputs(replace(case, extras=True))
        first = linear(*parts, config=config)
        assert all(torch.equal(linear(*parts, config=config), first) for _ in range(60))
