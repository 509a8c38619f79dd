"""The Hopper (sm_90) kernel of gluon_matmul.py over stacks of weights.

A fixed number of programs shares all tiles of all experts evenly; how many tiles there are, and
whose, they read from the plan that the kernel in front wrote (experts_plan.py). Tiles of one piece
of a weight are neighbours, so an expert with many rows is read from memory about once.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton import tuned
from int4q.kernels.triton.common import matched_groups
from int4q.kernels.triton.experts_plan import (
    Rows,
    flat_words,
    plan_experts,
    products,
)
from int4q.kernels.triton.gluon_matmul import _stream_kernel, unsupported_at_any_m
from int4q.kernels.triton.gluon_tile import can_stage, descriptor, group_layout, spread_layout
from int4q.kernels.triton.tiles import StreamConfig
from int4q.kernels.weight import Weight


def unsupported(problem) -> str | None:
    """Why this kernel cannot run ``problem``; ``None`` where it can."""
    return unsupported_at_any_m(problem)


def _grouped(
    x: Tensor,
    rows: Rows,
    weight: Weight,
    act_pre_scale: Tensor | None = None,
    config: StreamConfig | None = None,
) -> Tensor:
    """Rows of ``x [T, K] * act_pre_scale`` times the weight of their expert: ``[T, N]``."""
    (T, K), E, N = x.shape, rows.experts, weight.N
    group_size = weight.group_size
    out = torch.empty((T, N), dtype=x.dtype, device=x.device)
    if E == 0 or out.numel() == 0:
        return out.zero_()
    words, pitch = flat_words(weight.qdata)
    scale, zero = matched_groups(weight.scale, weight.zero_point)
    staged = can_stage(scale, zero, N)
    config = config or tuned.experts_config(T, E, N, K, staged and group_size >= 128, x.device)
    tiles = rows.max_blocks(config.block_m) * triton.cdiv(N, config.block_n)
    partial = torch.empty(
        (2 * config.programs, config.block_n, config.block_m), dtype=torch.float32, device=x.device
    )
    counters = torch.empty(tiles, dtype=torch.int32, device=x.device)
    arranged, plan = plan_experts(
        x, rows, out, config.block_m, counters, pdl=True, act_pre_scale=act_pre_scale
    )
    block_j = config.block_k // 4
    groups = max(1, config.block_k // group_size)
    launch(
        _stream_kernel, config.programs,
        descriptor(words, [config.block_n, block_j]),
        descriptor(arranged, [4, config.block_m, block_j]),
        scale, zero, out, out, partial, counters, plan,
        T, N, K, K // group_size, pitch, *scale.stride(), *zero.stride(),
        GROUP_SIZE=group_size, SIGNED=True, HAS_ZERO=True, HAS_BIAS=False,
        STAGED_SCALES=staged and config.stage_scales and config.num_stages > 2, STREAM=True,
        EXPERTS=True, MIN_STEPS=config.min_steps, STAGES=config.num_stages,
        IN_FLIGHT=config.in_flight, GROUP_M=config.group_m,
        SPREAD=spread_layout(config.block_n, config.num_warps, block_j, block_j // groups),
        GROUP=group_layout(config.block_n, config.num_warps, groups),
        num_warps=config.num_warps, launch_pdl=True, maxnreg=config.max_registers,
    )  # fmt: skip
    return out


int4_grouped_mm, int4_bmm = products(_grouped)
