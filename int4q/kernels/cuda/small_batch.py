"""int4 linear for up to 64 activation rows on Hopper (sm_90): CUDA C++ kernels.

    out[m, n] = sum_k x[m, k] * act_pre_scale[k] * value[n, k] + bias[n]
    value[n, k] = q[n, k] * scale[k // group_size, n] + zero_point[k // group_size, n]

Weights are dequantised in registers and rounded to x's dtype (once: ``q * scale + zero_point`` is
one fused multiply-add), products are summed in float32 by wgmma and rounded once, to x's dtype.
``x * act_pre_scale`` is rounded to x's dtype too. Where a weight's rows are too few to fill the
device, clusters of blocks share them by parts of K and add up in a fixed order: results repeat
bit for bit. ``int4_small_batch.cu`` says how.

The weights are read while the kernel in front on the stream may still be running (programmatic
dependent launch). That is right unless that very kernel writes the weights *and* releases its
dependents before it ends; no PyTorch kernel does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

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

MAX_M = 64
STEP_K = 128
"""k that a block multiplies at a time (one stage of its ring)."""
_HALVES = (torch.bfloat16, torch.float16)
_SOURCE_FILE = Path(__file__).with_name("int4_small_batch.cu")


@dataclass(frozen=True)
class Config:
    """How ``int4_small_batch`` cuts the work.

    Attributes:
        warpgroups, row_tiles, k_parts: a block of ``warpgroups`` takes :attr:`rows` weight rows at
            a time, ``row_tiles`` instructions of 64 rows a warpgroup; ``k_parts`` of them share
            rows and take turns along K.
        stages, x_stages: depths of the rings of weights and of x (more than ``2 * k_parts``).
        split: blocks (a cluster) that share rows by parts of K.
        blocks: thread blocks on a multiprocessor.
    """

    warpgroups: int = 2
    row_tiles: int = 1
    k_parts: int = 1
    stages: int = 5
    x_stages: int = 5
    split: int = 1
    blocks: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups * self.row_tiles // self.k_parts

    def shared_bytes(self, cols: int, scale_bytes: int) -> int:
        """Dynamic shared memory; ``scale_bytes`` of scales and zero points a row travel along.

        It is at least so much that no more than ``blocks`` fit on a multiprocessor (228 KiB):
        with programmatic launches two blocks of a kernel would else land on one and none on
        another.
        """
        stage = 256 * self.warpgroups * self.row_tiles * (16 + scale_bytes)
        ring = self.stages * stage + self.x_stages * (2 * STEP_K * cols + 16)
        parts = 4 * self.rows * self.k_parts * cols if self.split * self.k_parts > 1 else 0
        used = max(ring, parts) if self.split > 1 else ring + parts
        return max(used, 233472 // (self.blocks + 1) - 1023)

    def fit(self, cols: int, scale_bytes: int) -> Config:
        """This, with rings made shorter until they fit into shared memory."""
        config, limit = self, 233472 // self.blocks - 1024
        while config.shared_bytes(cols, scale_bytes) > limit and config.stages > 3:
            config = replace(config, stages=config.stages - 1)
        while (
            config.shared_bytes(cols, scale_bytes) > limit
            and config.x_stages > 2 * config.k_parts + 1
        ):
            config = replace(config, x_stages=config.x_stages - 1)
        if config.shared_bytes(cols, scale_bytes) > limit:
            raise ValueError(f"{self} needs more shared memory than there is for {cols} columns")
        return config


def choose_config(N: int, sm_count: int) -> Config:
    """The configuration for a shape class, as tuned on an H200 (zero points, plain scales).

    Clusters of 8 and 4 are for few tiles only: an H200 does not hold 32 clusters of 4 such blocks
    at a time (22 it does).
    """
    rows = N / sm_count
    if rows <= 4:
        return Config(1, 1, 1, 4, 5, split=8)
    if rows <= 8:
        return Config(1, 1, 1, 4, 5, split=4)
    if rows <= 32:
        return Config(2, 1, 2, 5, 8, split=2)
    if rows <= 64:
        return Config(2, 1, 2, 5, 8)
    if rows <= 192:
        return Config(3, 1, 1, 5, 5)
    return Config(2, 2, 1, 5, 5)


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
def _source() -> str:
    return _SOURCE_FILE.read_text()


def defines(
    config: Config,
    M: int,
    group_size: int,
    x_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    copies: bool,
    symmetric: bool,
) -> dict[str, int]:
    """The kernel's compile-time parameters; ``copies``: scales travel with the weights."""
    return {
        "GROUP": group_size,
        "X_TYPE": TYPE_CODES[x_dtype],
        "SCALE_TYPE": TYPE_CODES[scale_dtype],
        "SCALE_COPY": int(copies),
        "COLS": -(-M // 8) * 8,
        "WARPGROUPS": config.warpgroups,
        "ROW_TILES": config.row_tiles,
        "STAGES": config.stages,
        "X_STAGES": config.x_stages,
        "SPLIT": config.split,
        "K_PARTS": config.k_parts,
        "MIN_CTAS": config.blocks,
        "SYMMETRIC": int(symmetric),
    }


class _Product(Product):
    """One kernel that arranges x, and the product."""

    def __init__(self, parts: Parts, config: Config | None = None):
        super().__init__(parts)
        x, weight = parts.x, parts.weight
        (M, N), scale = self.shape, weight.scale
        if M * N == 0:
            return
        sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        config = config or choose_config(N, sms)
        item, symmetric = scale.element_size(), weight.zero_point is None
        zeros = scale if symmetric else weight.zero_point
        piece = 2 * config.row_tiles * item  # a thread's scales
        aligned = (N * item, scale.stride(0) * item, scale.data_ptr() | zeros.data_ptr())
        copies = scale.stride(1) == 1 and not any(n % piece for n in aligned)
        scale_bytes = copies * item * (1 if symmetric else 2)
        cols = -(-M // 8) * 8
        self.config = config = config.fit(cols, scale_bytes)
        units = -(-N // ROW_UNIT)
        tiles = -(-N // config.rows) if config.split > 1 else min(units, sms * config.blocks)
        self.fix(parts, units // tiles, units % tiles)
        facts = defines(config, M, weight.group_size, x.dtype, scale.dtype, copies, symmetric)
        module = nvrtc.load(_source(), facts, self.index, "a")  # wgmma is in sm_90a only
        steps = -(-weight.K // STEP_K)
        self.scratch_bytes = 2 * cols * steps * STEP_K
        # A warp for 8 rows and 32 k of each step.
        self.launch(module, "arrange_activations", -(-steps * cols // 8), 128)
        grid, block = tiles * config.split, 128 * config.warpgroups
        shared = config.shared_bytes(cols, scale_bytes)
        self.launch(module, "int4_small_batch", grid, block, shared)


linear = Planner("the CUDA small-batch kernel", unsupported, _Product)
"""For at most 64 rows. ``config``: how the work is cut, by shape if not given."""
