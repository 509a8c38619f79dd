"""The CUDA C++ small-batch kernel against its own arithmetic in float64."""

import pytest
import torch
from cuda_cases import BF16, FP16, FP32, SMALL_BATCH, Case
from helpers import needs_hopper

from int4q.kernels.cuda.small_batch import Config

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
    # tails: K below and off a step of 128, N off a tile, odd N (scales never aligned)
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
    Case(16, 28672, 4096),
    Case(64, 21504, 5376, 32),
    Case(32, 12288, 4096, coalesced=True),
    Case(64, 4096, 14336, 32),
    Case(24, 4096, 4096),
    Case(16, 512, 2048, 64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    SMALL_BATCH.run(case)


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
@pytest.mark.parametrize("coalesced", BOTH)
def test_every_way_to_cut_the_work(config, coalesced):
    for group_size, K in ((32, 1312), (128, 1280), (256, 256)):
        for M in (5, 16, 64):
            for extras in BOTH:
                case = Case(M, 600, K, group_size, coalesced=coalesced, extras=extras)
                SMALL_BATCH.run(case, config)


def test_rows_go_round_several_times():
    """More rows than a wave of blocks holds: the ring runs on from tile to tile."""
    rows = torch.cuda.get_device_properties("cuda").multi_processor_count * 64
    for N in (rows + 4, 2 * rows, 5 * rows + 13):
        for config in (Config(1), Config(2, 1, 2, 3, 5)):
            SMALL_BATCH.run(Case(33, N, 288, 32), config)
