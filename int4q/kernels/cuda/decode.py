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
from pathlib import Path

import torch
from torch import Tensor

from int4q.kernels.cuda.decode_config import (
    Config,
    MatvecConfig,
    choose_config,
    choose_rounded_config,
)
from int4q.kernels.cuda.ring import STEP_K, Ring, Scales
from int4q.kernels.launch import nvrtc
from int4q.kernels.launch.planner import (
    ROW_UNIT,
    TYPE_CODES,
    Parts,
    Planner,
    Product,
    unsupported_weight,
)
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight

MAX_M = 16
ROUNDED_ROW_UNIT = 8
"""Rounded weights are dealt to thread blocks, which unpack 8 rows at a time, in units of 8 rows."""

_ACTIVATION_BITS = {torch.bfloat16: 16, torch.int8: 8}
_SOURCE_FILE = Path(__file__).with_name("int4_decode.cu")


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


@functools.cache
def source() -> str:
    """The CUDA C++."""
    return _SOURCE_FILE.read_text()


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


class _Product(Product):
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


linear = Planner("the CUDA decode kernels", unsupported, _Product)
"""For at most 16 rows. ``activation``: ``torch.bfloat16`` (W4A16) or ``torch.int8`` (W4A8);
``config``: how the work is cut, by shape if not given. ``act_pre_scale`` multiplies x in float32.
"""


def linear_rounded(x: Tensor, weight: Weight, config: Config | None = None) -> Tensor:
    """``x @ W.T`` with symmetric weights rounded to bfloat16; x bfloat16, at most 16 rows."""
    if x.data_ptr() % 16 or x.stride(0) % 8:  # the kernel loads 16 bytes of a row at a time
        x = x.clone(memory_format=torch.contiguous_format)
    return linear(x, weight, rounded=True, config=config)
