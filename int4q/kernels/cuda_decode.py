"""int4 linear for 1 to 16 activation rows on NVIDIA GPUs (sm_80 and later): CUDA C++ kernels.

    out[m, n] = sum_k x[m, k] * act_pre_scale[k] * value[n, k] + bias[n]
    value[n, k] = q[n, k] * scale[k // group_size, n] + zero_point[k // group_size, n]

One source (``csrc/int4_decode.cu``) serves both scale layouts and three precisions:

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

import ctypes
import functools
import math
import struct
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from int4q.kernels import nvrtc
from int4q.kernels.cuda_plan import TYPE_CODES, Parts, Planner, unsupported_shape

MAX_M = 16
STEP_K = 256
"""k that a warp multiplies at a time (one ring stage)."""
ROW_UNIT = 4
"""Rows are dealt to thread blocks in units of 4, which keeps scale copies of 8 bytes aligned."""
ROUNDED_ROW_UNIT = 8
"""The same for rounded weights, which a block unpacks 8 rows at a time."""

_ACTIVATION_BITS = {torch.bfloat16: 16, torch.int8: 8}
_SOURCE_FILE = Path(__file__).parent / "csrc" / "int4_decode.cu"


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


def unsupported(
    M: int,
    N: int,
    K: int,
    group_size: int,
    x_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    capability: tuple[int, int],
) -> str | None:
    """Why these kernels cannot do this problem; None if they can. Looks at its arguments only."""
    if tuple(capability) < (8, 0):
        return f"compute capability must be 8.0 or later, got {capability[0]}.{capability[1]}"
    if not 0 <= M <= MAX_M:
        return f"M (rows of x) must be at most {MAX_M}, got {M}"
    for name, dtype in (("x", x_dtype), ("scale", scale_dtype)):
        if dtype not in TYPE_CODES:
            return f"{name} must be bfloat16, float16 or float32, got {dtype}"
    return unsupported_shape(N, K, group_size)


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    activation: torch.dtype = torch.bfloat16,
) -> Tensor:
    """x ``[..., K]`` times the transpose of an int4 weight: ``[..., N]`` in x's dtype.

    Args:
        x: bfloat16, float16 or float32, at most 16 rows.
        qdata: int8 ``[N, K/2]``, two's complement nibbles, even k in the low one.
        scale, zero_point: ``[n_groups, N]``, of one dtype. Their strides say how they lie in
            memory: a coalesced ``[N, n_groups]`` tensor is passed as ``.mT``.
        bias: ``[N]``.
        act_pre_scale: ``[K]``, multiplies x in float32.
        activation: ``torch.bfloat16`` (W4A16) or ``torch.int8`` (W4A8).
    """
    parts = (x, qdata, scale, zero_point, bias, act_pre_scale)
    return _linear(parts, group_size, activation, None)


def symmetric_linear(x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """x ``[M, K]`` times the transpose of a symmetric weight, ``value = (u - 8) * scale``.

    Args:
        x: as in :func:`linear`.
        w_packed: int8 ``[N, K/2]``, offset-binary nibbles ``u``, the even one low.
        w_scale: ``[N, n_groups]``.
    """
    scale = w_scale.mT
    parts = (x, w_packed, scale, scale, None, None)
    return _planner(parts, group_size, True, torch.bfloat16, None)


def rounded_linear(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int, config: Config | None = None
) -> Tensor:
    """:func:`symmetric_linear` with weights rounded to bfloat16, ``bf16((u - 8) * scale)``.

    Args:
        x: bfloat16 ``[M, K]``, at most 16 rows.
        w_packed: int8 ``[N, K/2]``, offset-binary nibbles ``u``, the even one low.
        w_scale: bfloat16 ``[N, n_groups]``.
        config: the tile, by default the table's.
    """
    if x.data_ptr() % 16 or x.stride(0) % 8:  # the kernel loads 16 bytes of a row at a time
        x = x.clone(memory_format=torch.contiguous_format)
    scale = w_scale.mT
    parts = (x, w_packed, scale, scale, None, None)
    return _planner(parts, group_size, True, torch.bfloat16, config, True)


def _linear(
    parts: Parts,
    group_size: int,
    activation: torch.dtype,
    config: Config | MatvecConfig | None,
) -> Tensor:
    """``linear``, with the choice of a configuration."""
    return _planner(parts, group_size, False, activation, config)


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
class _Ring:
    """The sizes of one ``int4_decode`` problem; the names are those of the kernel's constants."""

    M: int
    K: int
    group_size: int
    bits: int
    scale_item: int
    scale_copy: int
    coalesced: bool
    symmetric: bool = False
    rounded: bool = False

    @property
    def limbs(self) -> int:
        """Columns of an activation row."""
        return 1 if self.rounded else self.bits // 8

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
        scales = tensors * rows * (STEP_K // self.group_size) * self.scale_item
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
def _source() -> str:
    return _SOURCE_FILE.read_text()


# The kernel's `Params`: eight pointers, filled at every call, then what a plan fixes.
_POINTERS = struct.Struct("=8Q")
_FIXED = struct.Struct("=4q10i")


class _Plan:
    """What calls of one kind share: compiled kernels, grids, the parameter block."""

    def __init__(
        self,
        parts: Parts,
        group_size: int,
        symmetric: bool,
        activation: torch.dtype,
        config: Config | MatvecConfig | None,
        rounded: bool = False,
    ):
        if activation not in _ACTIVATION_BITS:
            raise ValueError(
                f"activation must be torch.bfloat16 (W4A16) or torch.int8 (W4A8), got {activation}"
            )
        x, qdata, scale, zero_point, bias, pre_scale = parts
        (M, K), N = x.shape, qdata.shape[0]
        self.device, self.dtype, self.shape = x.device, x.dtype, (M, N)
        self.index = x.device.index
        self.lock = threading.Lock()
        self.table_bytes, self.prepare, self.product = 0, None, None
        self.config = config
        if M * N == 0:
            return
        properties, bits = torch.cuda.get_device_properties(x.device), _ACTIVATION_BITS[activation]
        sms = properties.multi_processor_count
        if config is None and rounded:
            config = choose_rounded_config(M, N, group_size, sms)
        self.config = config = config or choose_config(M, N, K, group_size, bits, sms)
        self.dependent = properties.major >= 9
        self.params = ctypes.create_string_buffer(_POINTERS.size + _FIXED.size)
        defines = {
            "ACT_BITS": bits,
            "GROUP": group_size,
            "X_TYPE": TYPE_CODES[x.dtype],
            "SCALE_TYPE": TYPE_CODES[scale.dtype],
            "PDL": int(self.dependent),
            "SYMMETRIC": int(symmetric),
            "ROUNDED": int(rounded),
            "MIN_CTAS": config.ctas_per_sm,
        }
        row_unit = ROUNDED_ROW_UNIT if rounded else ROW_UNIT
        units = -(-N // row_unit)
        grid = min(units, sms * config.ctas_per_sm)
        _FIXED.pack_into(
            self.params,
            _POINTERS.size,
            *(qdata.stride(0), scale.stride(1), scale.stride(0), x.stride(0)),
            *(M, N, K),
            *(row_unit, units // grid, units % grid),
            0 if bias is None else TYPE_CODES[bias.dtype],
            0 if pre_scale is None else TYPE_CODES[pre_scale.dtype],
            int(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0),
            0,
        )
        if isinstance(config, MatvecConfig):
            self._prepare_matvec(scale, scale.data_ptr() | zero_point.data_ptr(), defines)
        else:
            self._prepare_ring(scale, scale.data_ptr() | zero_point.data_ptr(), defines, grid)

    def _prepare_matvec(self, scale: Tensor, pointer_bits: int, defines: dict) -> None:
        config, (M, N), item = self.config, self.shape, scale.element_size()
        if M != 1:
            raise ValueError(f"a MatvecConfig needs one row of x, got M={M}")
        vector = min(16, config.rows * item)
        aligned = not any(n % vector for n in (pointer_bits, scale.stride(0) * item))
        defines |= {
            "MATVEC": 1,
            "WARPS": config.warps,
            "ROW_BLOCK": config.rows,
            "UNROLL": config.unroll,
            "SCALE_VEC": int(scale.stride(1) == 1 and aligned and N % config.rows == 0),
        }
        module = nvrtc.load(_source(), defines, self.index)
        grid, block = -(-N // config.rows), 32 * config.warps
        self.product = module.prepare("int4_matvec", grid, block, 0, self.params, self.dependent)

    def _prepare_ring(self, scale: Tensor, pointer_bits: int, defines: dict, grid: int) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        (M, N), n_groups, item = self.shape, scale.shape[0], scale.element_size()
        group_size = defines["GROUP"]
        coalesced = scale.stride(0) == 1 and scale.stride(1) != 1
        symmetric, rounded = bool(defines["SYMMETRIC"]), bool(defines["ROUNDED"])
        copy = 0
        if coalesced or (scale.stride(1) == 1 and not rounded):
            line = (n_groups, scale.stride(1)) if coalesced else (N, scale.stride(0))
            copy = _scale_copy_bytes(coalesced, STEP_K // group_size, item, *line, pointer_bits)
        K, bits = n_groups * group_size, defines["ACT_BITS"]
        ring = _Ring(M, K, group_size, bits, item, copy, coalesced, symmetric, rounded)
        self.config = config = ring.fit(
            self.config,
            properties.shared_memory_per_block_optin,
            properties.shared_memory_per_multiprocessor,
        )
        defines |= {
            "MATVEC": 0,
            "COALESCED": int(coalesced and copy > 0),
            "SCALE_VEC": copy,
            "COL_TILES": ring.col_tiles,
            "SPLIT": ring.split,
            "FUSED": int(config.fused),
            "WARPS": config.warps,
            "ROW_TILES": config.row_tiles,
            "STAGES": config.stages,
            "ARRANGED": int(rounded and ring.table_bytes > 0),
        }
        module = nvrtc.load(_source(), defines, self.index)
        rest = self.params, self.dependent
        if ring.table_bytes and not config.fused:
            self.table_bytes = ring.table_bytes
            rows = 8 * ring.col_tiles if rounded else M
            warps = -(-ring.K // STEP_K) * rows
            name = "arrange_activations" if rounded else "quantise_activations"
            self.prepare = module.prepare(name, -(-warps // 4), 128, 0, *rest)
        shared = ring.shared_bytes(config)
        self.product = module.prepare("int4_decode", grid, 32 * config.warps, shared, *rest)

    def __call__(self, pointers: tuple[int, ...]) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if self.product is None:
            return out
        if torch._C._cuda_getDevice() == self.index:
            self._launch(out, pointers)
        else:
            with torch.cuda.device(self.index):
                self._launch(out, pointers)
        return out

    def _launch(self, out: Tensor, pointers: tuple[int, ...]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        table = 0
        if self.table_bytes:
            # From the caching allocator: streams never share it, and a graph keeps its own.
            scratch = torch.empty(self.table_bytes, dtype=torch.uint8, device=self.device)
            table = scratch.data_ptr()
        with self.lock:
            _POINTERS.pack_into(self.params, 0, *pointers, out.data_ptr(), table)
            if self.prepare is not None:
                self.prepare(stream)
            self.product(stream)


_planner = Planner("the CUDA decode kernels", unsupported, _Plan)
