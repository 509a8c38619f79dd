"""How ``int4_warp_specialised`` cuts its work: what can be chosen, and what is for a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from int4q import errors

STEP_K = 256
"""k that a block multiplies at a time (one stage of its ring)."""
_MOST_SHARED = 232448  # bytes of a block, on compute capability 9.0
_ALONE = 120000  # with so many a block is alone on its multiprocessor
_REGISTERS = {1: 160, 2: 128, 3: 112, 4: 96}
"""Of a thread at launch, by warpgroups: what the kernel in front needs to fit beside it is left."""

_SCALE_SUMS_TO = {32: 8, 64: 16, 128: 32, 256: 32}
"""Rows of x up to which it is sums that are scaled, by group size: more take too many registers."""

_LONG_K = 8192
"""Beyond it, blocks that share tiles are worth adding up their sums."""
_FULL = 0.8
"""How full a tile must be for blocks to take whole ones."""


class Cut(NamedTuple):
    """The tiles of a weight and the blocks that share them.

    Attributes:
        tile_rows: weight rows of a tile, a multiple of 8.
        tiles: of so many rows; the last ones may have less, or none.
        blocks: of threads.
    """

    tile_rows: int
    tiles: int
    blocks: int


@dataclass(frozen=True)
class Config:
    """How ``int4_warp_specialised`` cuts the work.

    Attributes:
        warpgroups: that multiply, 64 weight rows each (1 to 4).
        k_parts: of them share rows and take steps in turn.
        split: blocks (a cluster) that share rows by parts of K.
        even: blocks share the steps of all tiles evenly, rather than take whole tiles.
        scale_sums: scale the sums of groups, instead of rounded weights.
        chunks: of 32 k that are multiplied at a time (1 takes fewer registers than 2).
        most_stages: of the ring; fewer where shared memory ends.
        early: stages whose weights are asked for before the activations are there.
        tile_rows: weight rows of a tile; 0: as evenly as possible.
        registers: of a thread at launch; 0: by ``warpgroups``.
        spare: multiprocessors left to the kernel in front.
    """

    warpgroups: int = 4
    k_parts: int = 1
    split: int = 1
    even: bool = False
    scale_sums: bool = False
    chunks: int = 1
    most_stages: int = 4
    early: int = 3
    tile_rows: int = 0
    registers: int = 0
    spare: int = 4

    def __post_init__(self) -> None:
        if self.warpgroups % self.k_parts:
            raise errors.value("warpgroups must be a multiple of k_parts", self)
        if self.tile_rows % 8 or self.tile_rows > self.capacity:
            rule = f"tile_rows must be a multiple of 8, at most {self.capacity}"
            raise errors.value(rule, self.tile_rows)
        if self.even and self.k_parts * self.split > 1:
            raise errors.value("even shares need k_parts = split = 1", self)

    @property
    def capacity(self) -> int:
        """The most rows of a tile."""
        return 64 * self.warpgroups // self.k_parts

    @property
    def launch_registers(self) -> int:
        return self.registers or _REGISTERS[self.warpgroups]

    def x_bytes(self, cols: int, group_size: int) -> int:
        """Of a step of x, and of its sums over at most 128 k."""
        sums = STEP_K // min(group_size, 128) if self.scale_sums else 0
        return cols * (2 * STEP_K + 4 * sums)

    def stage_bytes(self, cols: int, group_size: int, scale_bytes: int) -> int:
        """Of a stage of the ring; ``scale_bytes`` of scales and zero points a row and group."""
        x = -(-self.x_bytes(cols, group_size) // 128) * 128
        scales = STEP_K // group_size * self.capacity * scale_bytes
        return -(-(self.capacity * STEP_K // 2 + x + scales) // 1024) * 1024

    def stages(self, stage_bytes: int) -> int:
        """Depth of the ring, a multiple of ``k_parts``.

        (A part would otherwise wait for a stage two rounds ahead, which a barrier cannot tell from
        this round's.)
        """
        fit = min(self.most_stages, (_MOST_SHARED - 1024) // (stage_bytes + 16))
        if fit < max(2, self.k_parts):
            raise errors.value(f"{self} needs more shared memory than there is", stage_bytes)
        return fit // self.k_parts * self.k_parts

    def shared_bytes(self, stage_bytes: int) -> int:
        """Dynamic shared memory: the ring on a boundary of 1 KiB, and its barriers."""
        return max(1024 + self.stages(stage_bytes) * (stage_bytes + 16), _ALONE)

    def cut(self, N: int, steps: int, sm_count: int) -> Cut:
        """The tiles of ``N`` rows and ``steps`` steps of K."""
        if self.even:
            tile_rows = self.tile_rows or self.capacity
            tiles = -(-N // tile_rows)
            return Cut(tile_rows, tiles, min(sm_count - self.spare, tiles * steps))
        at_once = max(1, (sm_count - self.spare) // self.split)
        rounds = -(-N // (at_once * (self.tile_rows or self.capacity)))
        tile_rows = self.tile_rows or -(-N // (8 * rounds * at_once)) * 8
        tiles = -(-N // tile_rows)
        if self.k_parts * self.split > 1:  # a cluster has one tile
            return Cut(tile_rows, tiles, tiles * self.split)
        blocks = -(-tiles // rounds)
        return Cut(tile_rows, rounds * blocks, blocks)

    def shared_tile_bytes(self, cut: Cut, cols: int) -> int:
        """Scratch memory in which blocks that share a tile meet."""
        if self.k_parts * self.split > 1:
            return 0
        warps = 4 * self.warpgroups
        counters = 4 * (-(-cut.tiles * warps // 64) * 64)
        shared = cut.tiles % cut.blocks > 0
        return counters + shared * 2 * cut.blocks * warps * cols * 64


_FEW_ROWS = (
    (4, Config(1, 1, 8, tile_rows=64)),
    (8, Config(1, 1, 4, tile_rows=64)),
    (16, Config(2, 2, 3, tile_rows=64)),
    (32, Config(2, 2, 2, most_stages=8)),
)
"""Up to so many rows of a multiprocessor. (An H200 holds 66 clusters of 2 such blocks at a time, 39
of 3, 30 of 4 and 15 of 8.)"""


def choose_config(
    M: int, N: int, K: int, group_size: int, symmetric: bool, sm_count: int
) -> Config:
    """The configuration for a shape class, as tuned on an H200."""
    config = _choose_cut(N / max(1, sm_count - 4), K)
    scale_sums = not symmetric and M <= _SCALE_SUMS_TO[group_size]
    wide = config.warpgroups < 4 or (scale_sums and M <= 16)  # whether registers are enough
    return replace(config, scale_sums=scale_sums, chunks=2 if wide else 1)


def _choose_cut(rows: float, K: int) -> Config:
    """For so many rows of a multiprocessor: a cluster's tile, even shares, or whole tiles."""
    for most, config in _FEW_ROWS:
        if rows <= most:
            return config
    if rows <= 64:
        if K > _LONG_K:
            return _even(2)
        return Config(2, 2, 1, most_stages=8, tile_rows=64)
    if rows > 256:
        return _even(4)
    warpgroups = 2 if rows <= 128 else 3 if rows <= 192 else 4
    if rows < _FULL * 64 * warpgroups:
        return _even(warpgroups)
    return Config(4, 2, 1) if warpgroups == 2 else Config(warpgroups, early=2)


def _even(warpgroups: int) -> Config:
    return Config(warpgroups, even=True, spare=0)
