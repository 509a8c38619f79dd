"""How ``int4_warp_specialised`` cuts its work: what can be chosen, and what is for a shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from int4q import errors

STEP_K = 256
_MOST_SHARED = 232448  # bytes of a block on an H100 or H200
_MOST_STAGES = 8
_ALONE = 120000  # with so much a block is alone on its multiprocessor


class Cut(NamedTuple):
    """The tiles of a weight and the blocks that share them.

    Attributes:
        tile_rows: a multiple of 8.
        tiles: of so many weight rows, the last one less.
        blocks: of threads.
    """

    tile_rows: int
    tiles: int
    blocks: int

    def shared_bytes(self, config: Config, steps: int, cols: int) -> int:
        """Scratch memory in which blocks that share a tile meet."""
        if not config.stream:
            return 0
        warps = 4 * config.warpgroups
        counters = 4 * (-(-self.tiles * warps // 64) * 64)
        return counters + 2 * self.blocks * warps * cols * 64


@dataclass(frozen=True)
class Config:
    """How ``int4_warp_specialised`` cuts the work.

    Attributes:
        warpgroups: that multiply, 64 weight rows each (1 to 4).
        k_parts: of them share rows and take steps in turn.
        split: blocks (a cluster) that share rows by parts of K.
        scale_sums: scale the sums of groups, instead of rounded weights.
        chunks: of 32 k that are multiplied at a time (1 takes fewer registers than 2).
        registers: of a thread at launch.
        tile_rows: weight rows of a tile, by default as even as possible.
        spare: multiprocessors that are left to the kernel that arranges x.
    """

    warpgroups: int = 4
    k_parts: int = 1
    split: int = 1
    scale_sums: bool = False
    chunks: int = 1
    registers: int = 88
    tile_rows: int = 0
    spare: int = 4

    def __post_init__(self) -> None:
        if self.warpgroups % self.k_parts:
            raise errors.value("warpgroups must be a multiple of k_parts", self)

    @property
    def capacity(self) -> int:
        """The most rows of a tile."""
        return 64 * self.warpgroups // self.k_parts

    @property
    def stream(self) -> bool:
        """Whether blocks share the list of steps evenly, rather than one tile a cluster."""
        return self.split * self.k_parts == 1

    def x_bytes(self, cols: int, group_size: int) -> int:
        """Of a step of x, and of its sums over at most 128 k."""
        sums = STEP_K // min(group_size, 128) if self.scale_sums else 0
        return cols * (2 * STEP_K + 4 * sums)

    def stage_bytes(self, cols: int, group_size: int, item: int, symmetric: bool) -> int:
        """Of a stage of the ring."""
        x = -(-self.x_bytes(cols, group_size) // 128) * 128
        scales = (1 if symmetric else 2) * STEP_K // group_size * self.capacity * item
        return -(-(self.capacity * STEP_K // 2 + x + scales) // 1024) * 1024

    def stages(self, stage: int) -> int:
        """Depth of a ring of stages of ``stage`` bytes, a multiple of ``k_parts``.

        A part would otherwise wait for a stage two rounds ahead, which a barrier cannot tell from
        this round's.
        """
        most = min(_MOST_STAGES, (_MOST_SHARED - 1024) // (stage + 16))
        if most < max(2, self.k_parts):
            raise errors.value(f"{self} needs more shared memory than there is: bytes", stage)
        return most // self.k_parts * self.k_parts

    def shared_bytes(self, stage: int) -> int:
        """Dynamic shared memory: the ring on a boundary of 1 KiB, and its barriers."""
        return max(1024 + self.stages(stage) * (stage + 16), _ALONE)

    def cut(self, N: int, steps: int, sm_count: int) -> Cut:
        """The tiles of ``N`` rows and ``steps`` steps."""
        most = self.tile_rows or self.capacity
        tiles = -(-N // most)
        if not self.stream:
            tile_rows = self.tile_rows or -(-N // (8 * tiles)) * 8
            return Cut(tile_rows, -(-N // tile_rows), -(-N // tile_rows) * self.split)
        blocks = min(sm_count - self.spare, tiles * steps)
        return Cut(most, tiles, blocks)


def choose_config(
    M: int, N: int, K: int, group_size: int, symmetric: bool, sm_count: int
) -> Config:
    """The configuration for a shape class, as tuned on an H200."""
    return Config()
