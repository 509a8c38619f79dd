"""The ring of stages that ``int4_decode`` copies weights and scales through: sizes, alignment."""

from __future__ import annotations

from dataclasses import dataclass, replace

from int4q.kernels.cuda.decode_config import Config
from int4q.kernels.launch.planner import ROW_UNIT
from int4q.kernels.weight import Weight

STEP_K = 256
"""k that a warp multiplies at a time (one ring stage)."""


@dataclass(frozen=True)
class Scales:
    """How a weight's scales lie in memory, and so how ``int4_decode`` copies them.

    Attributes:
        item: bytes of one.
        coalesced: the groups of a row are adjacent, not the rows of a group.
        copy: bytes of one asynchronous copy, 0 where they are read one by one.
    """

    item: int
    coalesced: bool
    copy: int

    @classmethod
    def of(cls, weight: Weight, by_group: bool = True) -> Scales:
        """The scales of a weight or of a stack; without ``by_group`` plain ones are not copied."""
        scale, item = weight.scale, weight.scale.element_size()
        zeros = scale if weight.zero_point is None else weight.zero_point
        to_group, to_row = scale.stride(-2), scale.stride(-1)
        coalesced = to_group == 1 and to_row != 1
        if not coalesced and (to_row != 1 or not by_group):
            return cls(item, False, 0)
        line = (scale.shape[-2], to_row) if coalesced else (weight.N, to_group)
        bits = scale.data_ptr() | zeros.data_ptr()
        if scale.dim() > 2:
            bits |= scale.stride(0) * item
        groups = STEP_K // weight.group_size
        return cls(item, coalesced, _scale_copy_bytes(coalesced, groups, item, *line, bits))


def _scale_copy_bytes(
    coalesced: bool, groups_per_step: int, item: int, length: int, stride: int, pointer_bits: int
) -> int:
    """Bytes of one asynchronous scale copy; 0 if alignment allows none.

    A copy must lie in one line (the groups of a row if coalesced, else the rows of a group; lines
    have ``length`` elements and start ``stride`` apart) and wholly in or out of the tensor.
    """
    piece = (groups_per_step if coalesced else ROW_UNIT) * item
    for size in (16, 8, 4):
        if not any(n % size for n in (piece, length * item, stride * item, pointer_bits)):
            return size
    return 0


@dataclass(frozen=True)
class Ring:
    """The sizes of one ``int4_decode`` problem; the names are those of the kernel's constants."""

    M: int
    K: int
    group_size: int
    bits: int
    scales: Scales
    symmetric: bool = False
    rounded: bool = False

    @property
    def limbs(self) -> int:
        """Columns of an activation row."""
        return 1 if self.rounded else self.bits // 8

    @property
    def scale_copy(self) -> int:
        return self.scales.copy

    @property
    def coalesced(self) -> bool:
        return self.scales.coalesced

    @property
    def col_tiles(self) -> int:
        return -(-self.M * self.limbs // 8)

    @property
    def sums(self) -> int:
        return self.col_tiles * 8 // self.limbs

    @property
    def x_block(self) -> int:
        return 128 if self.bits == 16 else 32

    @property
    def split(self) -> int:
        """The largest power of two of columns for one activation row."""
        split, units = 1, STEP_K // min(self.group_size, self.x_block)
        if not self.scale_copy or self.col_tiles > 1 or self.rounded:
            return 1
        while 2 * split * self.M <= self.sums and 2 * split <= units:
            split *= 2
        # coalesced scales of single units are 2-byte loads; with SPLIT == 1 they come as vectors
        return 1 if self.coalesced and self.bits == 16 and units // split >= 4 else split

    @property
    def table_bytes(self) -> int:
        """The quantised activations with their scales and sums; x in the product's order."""
        if self.rounded:
            return -(-self.K // STEP_K) * STEP_K * 2 * 8 * self.col_tiles * (self.M > 2)
        if self.split > 1:
            factors = 2 * STEP_K // min(self.group_size, self.x_block)
        else:
            factors = -(-(STEP_K // self.x_block + STEP_K // min(self.group_size, 128)) // 4) * 4
        rows = self.sums // self.split
        return -(-self.K // STEP_K) * (STEP_K * 8 * self.col_tiles + 4 * rows * factors)

    def shared_bytes(self, config: Config) -> int:
        rows = 16 * config.row_tiles
        tensors = (1 if self.symmetric else 2) if self.scale_copy else 0  # that are copied
        scales = tensors * rows * (STEP_K // self.group_size) * self.scales.item
        stage = rows * 128 + -(-scales // 128) * 128
        partial = 8 * config.warps * rows * self.sums
        return config.warps * config.stages * stage + partial + self.table_bytes * config.fused

    def fit(self, config: Config, per_block: int, per_sm: int) -> Config:
        """``config``, made smaller until it fits into shared memory (1 KiB a block is taken)."""
        if not self.scale_copy:  # scales are read one by one, into registers
            config = replace(config, row_tiles=1)
        limit = min(per_block, per_sm // config.ctas_per_sm - 1024)
        if self.shared_bytes(config) > limit and config.fused:
            config = replace(config, fused=False)
        while self.shared_bytes(config) > limit and config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        while self.shared_bytes(config) > limit and config.warps > 1:
            config = replace(config, warps=config.warps // 2)
        return config
