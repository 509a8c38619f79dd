"""How the CUDA decode kernels cut their work: what can be chosen, and what is for a shape."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """How ``int4_decode`` cuts the work.

    ``ctas_per_sm`` thread blocks of ``warps`` warps share an SM. Each walks over its rows in
    tiles of ``16 * row_tiles``, every warp with its own ring of ``stages`` buffers. ``fused``:
    every block quantises x for itself, instead of a small kernel in front.
    """

    warps: int = 8
    row_tiles: int = 1
    stages: int = 2
    ctas_per_sm: int = 2
    fused: bool = False


@dataclass(frozen=True)
class MatvecConfig:
    """How ``int4_matvec`` (M = 1) cuts the work.

    A thread block of ``warps`` warps takes ``rows`` weight rows; every thread loads 16 bytes of
    each row, ``unroll`` times, before it computes.
    """

    warps: int = 4
    rows: int = 8
    unroll: int = 1
    ctas_per_sm: int = 4


def choose_config(
    M: int, N: int, K: int, group_size: int, bits: int, sm_count: int
) -> Config | MatvecConfig:
    """The configuration for a shape class, as tuned on an H200 (W4A16, plain scales).

    What decides is how evenly the rows of an SM fill whole row tiles, and for M > 4 how often the
    activations are read again (once a row tile).
    """
    rows = N / sm_count  # of one SM
    if M == 1 and rows <= 32 and K <= 8192:  # all of the weight in flight at once
        return MatvecConfig(2, 8, 1, 8) if K <= 2048 else MatvecConfig(4, 8, 1, 4)
    fused = M == 1
    if rows <= 32:
        if K <= 2048 or M <= 4:
            return Config(8, 1, 2, 2, fused)
        if M <= 8:
            return Config(8, 2, 3, 1) if rows <= 24 else Config(8, 1, 2, 2)
        return Config(8, 2, 2, 1)
    if M > 8:
        return Config(4, 2, 2, 2)
    if bits == 8 and group_size <= 64 and M > 2:  # the float32 work per unit of 32 k decides
        return Config(8, 1, 2, 2) if M <= 4 else Config(4, 2, 2, 3)
    # (configuration, what it reaches when its tiles are full)
    if M > 4:
        candidates = [
            (Config(4, 2, 2, 3), 1.0),
            (Config(4, 4, 2, 2), 1.0),
            (Config(8, 1, 3, 2), 0.9),
        ]
        alone = 0.9  # the empty rows of a block's only tile cost little
    else:
        last = (16, 2, 2, 1) if group_size >= 128 and bits == 16 else (8, 2, 3, 1)
        shapes = (8, 2, 2, 2), (4, 2, 2, 3), last
        candidates = [(Config(*shape, fused), 1.0) for shape in shapes]
        alone = 0.0
    best, best_score = candidates[0][0], 0.0
    for config, reach in candidates:
        tiles = rows / config.ctas_per_sm / (16 * config.row_tiles)
        score = reach * max(tiles / math.ceil(tiles), alone if tiles <= 1 else 0.0)
        if score > best_score + 0.02:
            best, best_score = config, score
    return best


def choose_rounded_config(M: int, N: int, group_size: int, sm_count: int) -> Config:
    """The configuration for rounded weights, as tuned on an H200.

    Unpacking binds on large N: what decides is how well rows fill tiles.
    """
    rows = N / sm_count  # of one SM

    def fill(config: Config) -> float:
        tiles = rows / config.ctas_per_sm / (16 * config.row_tiles)
        return tiles / math.ceil(tiles)

    if rows <= 8:
        return Config(16, 1, 2, 1)
    if rows <= 32:
        return Config(8, 2, 2, 1) if M <= 2 else Config(8, 1, 2, 2)
    if M > 8:
        return Config(4, 2, 2, 3) if group_size >= 128 else Config(4, 3, 2, 2)
    return max(Config(4, 2, 2, 4), Config(8, 2, 2, 2), key=fill)
