"""int4 linear for 1 to 16 activation rows on NVIDIA GPUs (sm_80 and later): CUDA C++ kernels.

    out[m, n] = sum_k x[m, k] * act_pre_scale[k] * value[n, k] + bias[n]
    value[n, k] = q[n, k] * scale[k // group_size, n] + zero_point[k // group_size, n]

One source (``int4_decode.cu``) serves both scale layouts and three precisions:

* W4A16: x as 16-bit integers that share a float32 scale per 128 elements, so each element is off
  by at most 2 ** -16 of its block's largest ``|x|``. Against float32 arithmetic on the same
  weights that is some 2e-5 of the result, hidden by the rounding of a bfloat16 or float16 output;
  for float32 x it is the error.
* W4A8: x as int8 per 32 elements, ``d = amax / 127`` in float32, ``q = round_half_even(x / d)``.
* Rounded (``int4_matmul``): symmetric weights rounded to bfloat16, bfloat16 x as it is.

The products of the first two are exact integers, the scales are applied in float32; float32 sums
are rounded once, to x's dtype. A block of x with NaN or Inf makes its row's outputs NaN.
Rounded weights meet x in bfloat16 tensor cores; NaN and Inf go the way they do in a matrix product.

On sm_90 the weights are read while the kernel in front on the stream may still be running
(programmatic dependent launch). That is right unless that very kernel writes the weights *and*
releases its dependents before it ends; no PyTorch kernel does.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from int4q.kernels.launch import nvrtc
from int4q.kernels.launch.planner import (
    ROW_UNIT,
    TYPE_CODES,
    Parts,
    Plan,
    Planner,
    unsupported_weight,
)
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight

MAX_M = 16
STEP_K = 256
"""k that a warp multiplies at a time (one ring stage)."""
ROUNDED_ROW_UNIT = 8
"""Rounded weights are dealt to thread blocks, which unpack 8 rows at a time, in units of 8 rows."""

_ACTIVATION_BITS = {torch.bfloat16: 16, torch.int8: 8}
_SOURCE_FILE = Path(__file__).with_name("int4_decode.cu")


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


def unsupported(problem: Problem) -> str | None:
    """Why these kernels cannot run ``problem``; ``None`` where they can."""
    if reason := unsupported_weight(problem):
        return reason
    major, minor = problem.capability
    if major < 8:
        return f"compute capability must be 8.0 or later, got {major}.{minor}"
    if problem.M > MAX_M:
        return f"M (rows of x) must be at most {MAX_M}, got {problem.M}"
    if problem.dtype not in TYPE_CODES:
        return f"x must be bfloat16, float16 or float32, got {problem.dtype}"
    return None


def unsupported_rounded(problem: Problem) -> str | None:
    """Why :func:`linear_rounded` cannot run ``problem``; ``None`` where it can."""
    for name, dtype in (("x", problem.dtype), ("scale", problem.scale_dtype)):
        if dtype != torch.bfloat16:
            return f"{name} must be bfloat16, got {dtype}"
    return unsupported(problem)


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


@functools.cache
def source() -> str:
    """The CUDA C++."""
    return _SOURCE_FILE.read_text()


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


def ring_defines(
    parts: Parts, ring: Ring, config: Config, bits: int, dependent: bool
) -> dict[str, int]:
    """The compile-time parameters of ``int4_decode`` and the kernel that prepares x for it."""
    return _defines(parts, bits, dependent) | {
        "MATVEC": 0,
        "COALESCED": int(ring.coalesced and ring.scale_copy > 0),
        "SCALE_VEC": ring.scale_copy,
        "COL_TILES": ring.col_tiles,
        "SPLIT": ring.split,
        "FUSED": int(config.fused),
        "WARPS": config.warps,
        "ROW_TILES": config.row_tiles,
        "STAGES": config.stages,
        "MIN_CTAS": config.ctas_per_sm,
        "ROUNDED": int(ring.rounded),
        "ARRANGED": int(ring.rounded and ring.table_bytes > 0),
    }


def _defines(parts: Parts, bits: int, dependent: bool) -> dict[str, int]:
    return {
        "ACT_BITS": bits,
        "GROUP": parts.weight.group_size,
        "X_TYPE": TYPE_CODES[parts.x.dtype],
        "SCALE_TYPE": TYPE_CODES[parts.weight.scale.dtype],
        "PDL": int(dependent),
        "SYMMETRIC": int(parts.weight.zero_point is None),
    }


class _Plan(Plan):
    """One kernel, or one that quantises x in front of it."""

    def __init__(
        self,
        parts: Parts,
        activation: torch.dtype = torch.bfloat16,
        config: Config | MatvecConfig | None = None,
        rounded: bool = False,
    ):
        super().__init__(parts)
        if activation not in _ACTIVATION_BITS:
            raise ValueError(
                f"activation must be torch.bfloat16 (W4A16) or torch.int8 (W4A8), got {activation}"
            )
        (M, N), weight = self.shape, parts.weight
        self.config = config
        if M * N == 0:
            return
        bits = _ACTIVATION_BITS[activation]
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        if config is None and rounded:
            config = choose_rounded_config(M, N, weight.group_size, sms)
        config = config or choose_config(M, N, weight.K, weight.group_size, bits, sms)
        row_unit = ROUNDED_ROW_UNIT if rounded else ROW_UNIT
        units = -(-N // row_unit)
        grid = min(units, sms * config.ctas_per_sm)
        self.fix(parts, units // grid, units % grid, row_unit=row_unit)
        if isinstance(config, MatvecConfig):
            self._prepare_matvec(parts, config, bits)
        else:
            self._prepare_ring(parts, config, bits, grid, rounded)

    def _prepare_matvec(self, parts: Parts, config: MatvecConfig, bits: int) -> None:
        (M, N), scale, zeros = self.shape, parts.weight.scale, parts.weight.zero_point
        if M != 1:
            raise ValueError(f"a MatvecConfig needs one row of x, got M={M}")
        vector = min(16, config.rows * scale.element_size())
        pointer_bits = scale.data_ptr() | (scale if zeros is None else zeros).data_ptr()
        lines = pointer_bits, scale.stride(0) * scale.element_size()
        aligned = not any(n % vector for n in lines)
        defines = _defines(parts, bits, self.dependent) | {
            "MATVEC": 1,
            "WARPS": config.warps,
            "ROW_BLOCK": config.rows,
            "UNROLL": config.unroll,
            "SCALE_VEC": int(scale.stride(1) == 1 and aligned and N % config.rows == 0),
            "MIN_CTAS": config.ctas_per_sm,
        }
        module = nvrtc.load(source(), defines, self.index)
        self.launch(module, "int4_matvec", -(-N // config.rows), 32 * config.warps)

    def _prepare_ring(
        self, parts: Parts, config: Config, bits: int, grid: int, rounded: bool
    ) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        M, weight = self.shape[0], parts.weight
        scales = Scales.of(weight, by_group=not rounded)
        symmetric = weight.zero_point is None
        ring = Ring(M, weight.K, weight.group_size, bits, scales, symmetric, rounded)
        self.config = config = ring.fit(
            config,
            properties.shared_memory_per_block_optin,
            properties.shared_memory_per_multiprocessor,
        )
        defines = ring_defines(parts, ring, config, bits, self.dependent)
        module = nvrtc.load(source(), defines, self.index)
        if ring.table_bytes and not config.fused:
            self.scratch_bytes = ring.table_bytes
            rows = 8 * ring.col_tiles if rounded else M
            warps = -(-ring.K // STEP_K) * rows
            name = "arrange_activations" if rounded else "quantise_activations"
            self.launch(module, name, -(-warps // 4), 128)
        self.launch(module, "int4_decode", grid, 32 * config.warps, ring.shared_bytes(config))


linear = Planner("the CUDA decode kernels", unsupported, _Plan)
"""For at most 16 rows. ``activation``: ``torch.bfloat16`` (W4A16) or ``torch.int8`` (W4A8);
``config``: how the work is cut, by shape if not given. ``act_pre_scale`` multiplies x in float32.
"""


def linear_rounded(x: Tensor, weight: Weight, config: Config | None = None) -> Tensor:
    """``x @ W.T`` with symmetric weights rounded to bfloat16; x bfloat16, at most 16 rows."""
    if x.data_ptr() % 16 or x.stride(0) % 8:  # the kernel loads 16 bytes of a row at a time
        x = x.clone(memory_format=torch.contiguous_format)
    return linear(x, weight, rounded=True, config=config)
