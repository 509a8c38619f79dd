"""The plain-Triton W4A16 GEMM: any GPU from compute capability 8.0, and the interpreter.

``out^T = W @ x^T``: weights are unpacked in registers, where the tensor core takes its left
operand from, rounded to the activation's dtype, and accumulated in float32. When the output has
too few tiles for the device, K is split; the last split to finish adds the others' partial tiles
in a fixed order (so results repeat bit for bit) and writes the output: no second kernel.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from int4q.kernels.launch.record import planned
from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton import tuned
from int4q.kernels.triton.arrange import arrange_activation
from int4q.kernels.triton.common import (
    INTERPRET,
    as_words,
    group_of_step,
    has_launch_overlap,
    load_groups,
    matched_groups,
    scaled,
    spread,
    store_transposed,
    tile_of,
    unpack_slot,
    unsupported_anywhere,
    wait_for_producer,
    with_bias,
)
from int4q.kernels.triton.tiles import MatmulConfig
from int4q.kernels.weight import Weight


def unsupported(problem) -> str | None:
    """Why this kernel cannot run ``problem``; ``None`` where it can."""
    return unsupported_anywhere(problem)


@triton.jit
def _step(
    acc, arranged_ptr, words_ptr, scale, zero, j, cols, live_m, live_n, M, quarter,
    WIDTH: tl.constexpr, SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr, ON_GPU: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Add one block of K: 4 slots of ``words [BLOCK_N, BLOCK_J]`` against ``arranged``."""
    live_j = j < quarter
    words = tl.load(words_ptr + j[None, :], mask=live_n[:, None] & live_j[None, :], other=0)
    scale = spread(scale, WIDTH)
    zero = spread(zero, WIDTH)
    inside = live_j[:, None] & live_m[None, :]
    for slot in tl.static_range(4):
        row = (cols.to(tl.int64) + slot * M.to(tl.int64))[None, :] * quarter
        x = tl.load(arranged_ptr + row + j[:, None], mask=inside, other=0.0)
        weight = scaled(
            unpack_slot(words, slot, SIGNED, DTYPE, ON_GPU), scale, zero, HAS_ZERO, ON_GPU
        )
        if ON_GPU:
            acc = tl.dot(weight, x, acc, input_precision="tf32x3")  # for float32 x; others exact
        else:
            acc += tl.dot(weight.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    return acc


@triton.jit
def accumulate(
    arranged_ptr, words_ptr, scale_ptr, zero_ptr, rows, cols, live_m, low, high,
    M, N, quarter, n_groups, stride_wn, stride_sg, stride_sn, stride_zg, stride_zn,
    GROUP_SIZE: tl.constexpr, SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr, ON_GPU: tl.constexpr,
    PDL: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 ``[rows, cols]`` of ``W @ x^T`` over the blocks ``low .. high - 1`` of K."""
    DTYPE: tl.constexpr = arranged_ptr.dtype.element_ty
    BLOCK_J: tl.constexpr = BLOCK_K // 4
    GROUPS: tl.constexpr = max(1, BLOCK_K // GROUP_SIZE)
    WIDTH: tl.constexpr = min(BLOCK_K, GROUP_SIZE) // 4
    live_n = rows < N
    words_ptr += rows.to(tl.int64)[:, None] * stride_wn
    lane = tl.arange(0, GROUPS)
    offset = tl.arange(0, BLOCK_J)
    # Triton does not pipeline these narrow strided loads, so they run one step ahead by hand.
    first = group_of_step(low, BLOCK_K, GROUP_SIZE) + lane
    next_scale = load_groups(scale_ptr, rows, first, n_groups, N, stride_sg, stride_sn)
    next_zero = next_scale
    if HAS_ZERO:
        next_zero = load_groups(zero_ptr, rows, first, n_groups, N, stride_zg, stride_zn)
    wait_for_producer(PDL)
    acc = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for step in tl.range(low, high, num_stages=STAGES):
        scale, zero = next_scale, next_zero
        ahead = group_of_step(step + 1, BLOCK_K, GROUP_SIZE) + lane
        next_scale = load_groups(scale_ptr, rows, ahead, n_groups, N, stride_sg, stride_sn)
        next_zero = next_scale
        if HAS_ZERO:
            next_zero = load_groups(zero_ptr, rows, ahead, n_groups, N, stride_zg, stride_zn)
        acc = _step(
            acc, arranged_ptr, words_ptr, scale, zero, step * BLOCK_J + offset, cols,
            live_m, live_n, M, quarter, WIDTH, SIGNED, HAS_ZERO, ON_GPU, DTYPE,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["M"])
def _gemm_kernel(
    arranged_ptr,  # [4, M, K/4] contiguous, see arrange_activation
    words_ptr,  # int16 [N, K/4], rows stride_wn apart
    scale_ptr,  # [n_groups, N] by strides
    zero_ptr,  # [n_groups, N] by strides, or unused
    bias_ptr,  # [N] or unused
    out_ptr,  # [M, N] contiguous
    partial_ptr,  # float32 [SPLIT_K, N, M] or unused
    counter_ptr,  # int32 [tiles], zeroed, or unused
    M, N, K, quarter, n_groups, stride_wn, stride_sg, stride_sn, stride_zg, stride_zn,
    GROUP_SIZE: tl.constexpr, SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, ON_GPU: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // SPLIT_K
    split = tl.program_id(0) % SPLIT_K
    tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    live_n, live_m = rows < N, cols < M
    steps = tl.cdiv(K, BLOCK_K)
    low = steps * split // SPLIT_K
    high = steps * (split + 1) // SPLIT_K
    acc = accumulate(
        arranged_ptr, words_ptr, scale_ptr, zero_ptr, rows, cols, live_m, low, high,
        M, N, quarter, n_groups, stride_wn, stride_sg, stride_sn, stride_zg, stride_zn,
        GROUP_SIZE, SIGNED, HAS_ZERO, ON_GPU, PDL, BLOCK_K, STAGES,
    )  # fmt: skip

    if SPLIT_K == 1:
        acc = with_bias(acc, bias_ptr, rows, N, HAS_BIAS)
        store_transposed(out_ptr, acc, rows, cols, M, N, ON_GPU)
    else:
        place = rows.to(tl.int64)[:, None] * M + cols[None, :]
        inside = live_n[:, None] & live_m[None, :]
        area = M.to(tl.int64) * N
        tl.store(partial_ptr + split * area + place, acc, mask=inside)
        if ON_GPU:
            tl.debug_barrier()  # all threads' stores before the one thread's release below
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLIT_K - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for other in tl.range(SPLIT_K, num_stages=1):
                total += tl.load(partial_ptr + other * area + place, mask=inside, other=0.0)
            total = with_bias(total, bias_ptr, rows, N, HAS_BIAS)
            store_transposed(out_ptr, total, rows, cols, M, N, ON_GPU)


def _config(M: int, N: int, K: int, x: Tensor, group_size: int) -> MatmulConfig:
    config = tuned.matmul_config(M, N, K, x.device, group_size >= 128)
    if x.dtype is torch.float32:
        # Fragments of float32 take twice the registers: smaller tiles on 8 warps do not spill.
        block_m = min(config.block_m, 64)
        config = replace(config, block_n=64, block_m=block_m, block_k=64, num_warps=8)
    return config


@planned
def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    config: MatmulConfig | None = None,
) -> Tensor:
    """``(x * act_pre_scale) @ W.T + bias``, weights rounded to the dtype of x.

    Products of float32 are three TF32 ones (2^-22).

    Args:
        x: ``[M, K]`` bfloat16, float16 or float32, any strides.
        bias: ``[N]``.
        act_pre_scale: ``[K]``.
        config: the tile, by default the table's.

    Returns:
        ``[M, N]`` in the dtype of x.
    """
    packed, scale, zero_point, group_size, signed = weight
    M, N, K = x.shape[0], packed.shape[0], x.shape[1]
    out = x.new_empty((M, N))
    if out.numel() == 0:
        return out
    config = config or _config(M, N, K, x, group_size)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    split_k = config.split_k
    partial, counters = out, None
    if split_k > 1:
        partial = x.new_empty((split_k, N, M), dtype=torch.float32)
        counters = x.new_empty((tiles,), dtype=torch.int32)
    pdl = has_launch_overlap(x.device)
    arranged = arrange_activation(x, act_pre_scale, counters, pdl)
    words = as_words(packed)
    scale, zero = matched_groups(scale, zero_point)
    launch(
        _gemm_kernel, tiles * split_k,
        arranged, words, scale, zero, out if bias is None else bias.contiguous(), out, partial,
        out if counters is None else counters,
        M, N, K, K // 4, K // group_size, words.stride(0), *scale.stride(), *zero.stride(),
        GROUP_SIZE=group_size, SIGNED=signed, HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None, ON_GPU=not INTERPRET, PDL=pdl,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k,
        SPLIT_K=split_k, GROUP_M=config.group_m, STAGES=config.num_stages,
        num_warps=config.num_warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
