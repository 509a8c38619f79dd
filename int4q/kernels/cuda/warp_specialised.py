"""int4 linear for 8 to 64 activation rows on Hopper (sm_90): a warp-specialised CUDA C++ kernel.

    out[m, n] = sum_k x[m, k] * act_pre_scale[k] * value[n, k] + bias[n]
    value[n, k] = q[n, k] * scale[k // group_size, n] + zero_point[k // group_size, n]

Products are summed in float32 by wgmma and rounded once, to x's dtype; ``x * act_pre_scale`` is
rounded to x's dtype too. Symmetric weights (``int4_matmul``) are rounded to x's dtype, once. Others
are, or keep float32 scales and zero points, as :class:`Config` says. Sums of one output are added
in a fixed order: results repeat bit for bit. ``int4_warp_specialised.cu`` says how.

The weights are read while the kernel in front on the stream may still be running (programmatic
dependent launch). That is right unless that very kernel writes the weights *and* releases its
dependents before it ends; no PyTorch kernel does.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from int4q.kernels.cuda.ring import Scales
from int4q.kernels.cuda.warp_specialised_config import STEP_K, Config, choose_config
from int4q.kernels.launch import nvrtc, tensor_map
from int4q.kernels.launch.planner import (
    TYPE_CODES,
    Map,
    Parts,
    Planner,
    Product,
    unsupported_weight,
)
from int4q.kernels.registry import Problem

MAX_M = 64
_HALVES = (torch.bfloat16, torch.float16)
_SOURCE_FILE = Path(__file__).with_name("int4_warp_specialised.cu")


def unsupported(problem: Problem) -> str | None:
    """Why this kernel cannot run ``problem``; ``None`` where it can."""
    if reason := unsupported_weight(problem):
        return reason
    major, minor = problem.capability
    if (major, minor) != (9, 0):
        return f"needs compute capability 9.0 (wgmma), got {major}.{minor}"
    if problem.M > MAX_M:
        return f"M (rows of x) must be at most {MAX_M}, got {problem.M}"
    if problem.dtype not in _HALVES:
        return f"x must be bfloat16 or float16, got {problem.dtype}"
    return None


@functools.cache
def source() -> str:
    """The CUDA C++."""
    return _SOURCE_FILE.read_text()


def defines(parts: Parts, config: Config) -> dict[str, int]:
    """The kernel's compile-time parameters."""
    x, weight = parts.x, parts.weight
    stages, loaded = config.stages(stage_bytes(parts, config)), _loaded_bytes(parts)
    return {
        "GROUP": weight.group_size,
        "X_TYPE": TYPE_CODES[x.dtype],
        "SCALE_TYPE": TYPE_CODES[weight.scale.dtype],
        "SCALE_BYTES_LOADED": loaded,
        "SYMMETRIC": int(weight.zero_point is None),
        "COLS": columns(x.shape[0]),
        "WARPGROUPS": config.warpgroups,
        "K_PARTS": config.k_parts,
        "SPLIT": config.split,
        "STAGES": stages,
        "EARLY": min(config.early, stages - 1),
        "SCALE_SUMS": int(config.scale_sums),
        "CHUNKS": config.chunks,
        "REGISTERS": config.launch_registers,
    }


def columns(M: int) -> int:
    """Rows of x as wgmma counts them."""
    return -(-M // 8) * 8


def stage_bytes(parts: Parts, config: Config) -> int:
    """Of a stage of the ring."""
    weight = parts.weight
    scale_bytes = weight.scale.element_size() * (1 if weight.zero_point is None else 2)
    return config.stage_bytes(columns(parts.x.shape[0]), weight.group_size, scale_bytes)


def _loaded_bytes(parts: Parts) -> int:
    """Bytes of one load of scales, 0 where the copy engine reads them."""
    scale, zeros = parts.weight.scale, parts.weight.zero_point
    if tensor_map.fits(scale) and (zeros is None or tensor_map.fits(zeros)):
        return 0
    scales = Scales.of(parts.weight)
    return scales.copy if scales.coalesced and scales.copy else scales.item


class _Product(Product):
    """One kernel that arranges x, and the product."""

    def __init__(self, parts: Parts, config: Config | None = None):
        super().__init__(parts)
        (M, N), weight = self.shape, parts.weight
        if M * N == 0:
            return
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        symmetric, K = weight.zero_point is None, weight.K
        config = config or choose_config(M, N, K, weight.group_size, symmetric, sms)
        cols, steps = columns(M), -(-K // STEP_K)
        facts = defines(parts, config)
        shared = config.shared_bytes(stage_bytes(parts, config))
        cut = config.cut(N, steps, sms)
        self.config = config
        self.fix(parts, *divmod(cut.tiles * steps, cut.blocks), row_unit=cut.tile_rows)
        self.scratch_bytes = steps * config.x_bytes(cols, weight.group_size)
        self.scratch_bytes += config.shared_tile_bytes(cut, cols)
        module = nvrtc.load(source(), facts, self.index, "a")  # wgmma is in sm_90a only
        # A warp for 8 rows and 128 k.
        self.launch(module, "arrange_activations", -(-steps * cols // 16), 128)
        threads = 128 * (config.warpgroups + 1)
        maps = self._maps(parts, config, cut.tile_rows, facts["SCALE_BYTES_LOADED"] == 0)
        self.launch(module, "int4_warp_specialised", cut.blocks, threads, shared, maps)

    def _maps(self, parts: Parts, config: Config, tile_rows: int, scales: bool) -> tuple[Map, ...]:
        qdata, scale, zeros, group_size, _ = parts.weight
        box = [tile_rows, STEP_K // 2]
        weights = Map(qdata, tensor_map.of_matrix(qdata, box, tensor_map.SWIZZLE_128_BYTES))
        if not scales:
            return (weights,)
        box = [STEP_K // group_size, config.capacity]
        tensors = (scale, scale if zeros is None else zeros)
        return (weights, *(Map(tensor, tensor_map.of_matrix(tensor, box)) for tensor in tensors))


linear = Planner("the CUDA warp-specialised kernel", unsupported, _Product)
"""For at most 64 rows. ``config``: how the work is cut, by shape if not given."""
