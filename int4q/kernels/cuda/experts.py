"""Stacks of int4 weights that meet few rows each: the CUDA C++ decode kernels over experts.

``int4_decode.cu`` built with EXPERTS: a first kernel quantises the rows of x (16-bit integers
that share a float32 scale per 128 elements, see decode.py), cuts every expert's rows into
blocks and writes a plan of them; a second one shares the weight rows of all blocks evenly among
its thread blocks. Both read ``offs`` on the device. An expert with more rows than a block has is
read once a block, mostly from L2.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import torch
from torch import Tensor

from int4q.kernels.cuda import decode
from int4q.kernels.cuda.decode_config import Config
from int4q.kernels.cuda.ring import STEP_K, Ring, Scales
from int4q.kernels.launch import nvrtc
from int4q.kernels.launch.planner import ROW_UNIT, TYPE_CODES, Parts, Planner, Product
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight

MAX_MEAN_ROWS = {32: 2.5, 64: 2.5, 128: 5, 256: 5}
"""Group size -> rows an expert has on average, up to which these kernels are the fastest (H200)."""
_STACK = struct.Struct("=4q4i")  # what `Params` has behind the pointer to `offs`
_PLAN_ENTRY = 16  # bytes


def block_rows(T: int, E: int, even: bool = False) -> int:
    """Rows that meet a weight at a time: with random routing, all of an expert's in most cases.

    ``even``: every expert has ``T / E``.
    """
    mean = T / max(1, E)
    if even:
        return 1 if mean <= 1 else 2 if mean <= 2 else 4 if mean <= 4 else 8
    return 1 if mean <= 0.3 else 2 if mean <= 0.8 else 4 if mean <= 2.5 else 8


def choose_config(rows: int, K: int) -> Config:
    """The configuration for blocks of so many rows, as tuned on an H200 (random routing).

    Few steps of K leave a block of many warps waiting for its slowest at every row tile.
    """
    if rows <= 4:
        return Config(16, 2, 2, 1) if K >= 4096 else Config(4, 2, 2, 4)
    return Config(4, 4, 2, 2) if K >= 2048 else Config(1, 4, 2, 8)


def unsupported(problem: Problem) -> str | None:
    """Why these kernels cannot (or should not) run ``problem``; ``None`` where they can."""
    if reason := _unsupported_stack(problem):
        return reason
    if problem.M > MAX_MEAN_ROWS[problem.group_size] * problem.experts:
        return f"{problem.M} rows on {problem.experts} weights: the matrix kernels are faster"
    return None


def _unsupported_stack(problem: Problem) -> str | None:
    """Why no such stack can be run, however few its rows; ``None`` where it can."""
    if reason := decode.unsupported(replace(problem, M=1)):
        return reason
    return f"N={problem.N} must be a multiple of {ROW_UNIT}" if problem.N % ROW_UNIT else None


class _Product(Product):
    """The kernel that quantises x and writes the plan of blocks, and the product."""

    def __init__(self, parts: Parts, even: bool, config: Config | None, rows: int | None):
        super().__init__(parts)
        x, weight = parts.x, parts.weight
        (T, K), E, N = x.shape, weight.qdata.shape[0], weight.N
        properties = torch.cuda.get_device_properties(x.device)
        rows = rows or block_rows(T, E, even)
        ring = Ring(rows, K, weight.group_size, 16, Scales.of(weight))
        config = ring.fit(
            config or choose_config(rows, K),
            properties.shared_memory_per_block_optin,
            properties.shared_memory_per_multiprocessor,
        )
        blocks = E * -(-(T // E) // rows) if even else T // rows + min(E, T)
        tables = -(-_PLAN_ENTRY * (blocks + 1) // 128) * 128
        table_block = -(-ring.table_bytes // 128) * 128
        self.scratch_bytes = tables + blocks * table_block
        strides = weight.qdata.stride(0), weight.scale.stride(0)
        stack = _STACK.pack(*strides, tables, table_block, E, T // E, blocks, 0)
        self.fix(parts, N // ROW_UNIT, 0, stack)
        defines = decode.ring_defines(parts, ring, config, 16, self.dependent)
        defines |= {"EXPERTS": 1, "BLOCK_ROWS": rows}
        module = nvrtc.load(decode.source(), defines, self.index)
        warps = -(-K // STEP_K) * T
        self.launch(module, "quantise_activations", -(-warps // 4), 128)
        grid = properties.multi_processor_count * config.ctas_per_sm
        self.launch(module, "int4_decode", grid, 32 * config.warps, ring.shared_bytes(config))


_planner = Planner("the CUDA kernels over experts", _unsupported_stack, _Product, ndim=3)


def _grouped(
    x: Tensor,
    weight: Weight,
    offs: Tensor | None,
    act_pre_scale: Tensor | None = None,
    config: Config | None = None,
    rows: int | None = None,
) -> Tensor:
    """Rows of ``x [T, K]`` times the weight of their expert; ``offs`` None: as many rows each."""
    if x.shape[0] * weight.N * weight.qdata.shape[0] == 0:
        return x.new_zeros((x.shape[0], weight.N))
    if act_pre_scale is not None and act_pre_scale.dtype not in TYPE_CODES:
        act_pre_scale = act_pre_scale.float()
    choices = {"even": offs is None, "config": config, "rows": rows}
    return _planner(x, weight, None, act_pre_scale, offs=offs, **choices)


def int4_grouped_mm(
    x: Tensor, weight: Weight, offs: Tensor, act_pre_scale: Tensor | None = None
) -> Tensor:
    """Rows of ``x [T, K]`` sorted by expert; see ``triton/experts_plan.py``'s ``products``."""
    return _grouped(x, weight, offs.contiguous(), act_pre_scale)


def int4_bmm(x: Tensor, weight: Weight, act_pre_scale: Tensor | None = None) -> Tensor:
    """``x [B, M, K]`` times a stack ``[B, N, K]``."""
    y = _grouped(x.flatten(0, 1), weight, None, act_pre_scale)
    return y.view(*x.shape[:2], y.shape[1])
