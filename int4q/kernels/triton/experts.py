"""Plain-Triton products with a stack of weights: any GPU from compute capability 8.0, and the
interpreter.

Every row of x meets the weight of its expert (``int4_grouped_mm``: rows sorted by expert, ends on
the device; ``int4_bmm``: as many rows each). The plan in experts_plan.py says which tile is whose;
the product of a tile is that of matmul.py. There are as many programs as tiles could be
needed; those past the plan's end leave at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton import tuned
from int4q.kernels.triton.common import (
    INTERPRET,
    group_of_step,
    has_launch_overlap,
    load_groups,
    matched_groups,
    rounded,
    scaled,
    spread,
    store_transposed,
    unpack_slot,
    unsupported_anywhere,
    wait_for_producer,
)
from int4q.kernels.triton.experts_plan import (
    Rows,
    flat_words,
    locate,
    plan_experts,
    products,
)
from int4q.kernels.triton.matmul import accumulate
from int4q.kernels.weight import Weight


def unsupported(problem) -> str | None:
    """Why these kernels cannot run ``problem``; ``None`` where they can."""
    return unsupported_anywhere(problem)


@triton.jit(do_not_specialize=["T"])
def _experts_kernel(
    arranged_ptr,  # [4, T, K/4] contiguous, see arrange.py
    words_ptr,  # int16 [.., K/4], rows stride_wn apart, experts `pitch` rows apart
    scale_ptr,  # [E, n_groups, N] by strides
    zero_ptr,  # as scale
    out_ptr,  # [T, N] contiguous
    plan_ptr,  # see experts_plan.py
    T, N, K, quarter, n_groups, pitch, stride_wn,
    stride_se, stride_sg, stride_sn, stride_ze, stride_zg, stride_zn,
    GROUP_SIZE: tl.constexpr, ON_GPU: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    wait_for_producer(PDL)
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if tile < tl.load(plan_ptr) * tiles_n:
        expert, tile_n, col, end = locate(tile, plan_ptr, T, 0, tiles_n, BLOCK_M, GROUP_M, True)
        expert = expert.to(tl.int64)
        rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        cols = col + tl.arange(0, BLOCK_M)
        acc = accumulate(
            arranged_ptr, words_ptr + expert * pitch * stride_wn, scale_ptr + expert * stride_se,
            zero_ptr + expert * stride_ze, rows, cols, cols < end, 0, tl.cdiv(K, BLOCK_K),
            T, N, quarter, n_groups, stride_wn, stride_sg, stride_sn, stride_zg, stride_zn,
            GROUP_SIZE, True, True, ON_GPU, False, BLOCK_K, STAGES,
        )  # fmt: skip
        store_transposed(out_ptr, acc, rows, cols, end, N, ON_GPU)


def _grouped(x: Tensor, rows: Rows, weight: Weight, act_pre_scale: Tensor | None = None) -> Tensor:
    """Rows of ``x [T, K] * act_pre_scale`` times the weight of their expert: ``[T, N]``."""
    T, K = x.shape
    N = weight.N
    out = torch.empty((T, N), dtype=x.dtype, device=x.device)
    if rows.experts == 0 or out.numel() == 0:
        return out.zero_()
    config = tuned.matmul_config(triton.cdiv(T, rows.experts), N, K, x.device)
    pdl = has_launch_overlap(x.device)
    arranged, plan = plan_experts(
        x, rows, out, config.block_m, pdl=pdl, act_pre_scale=act_pre_scale
    )
    words, pitch = flat_words(weight.qdata)
    scale, zero = matched_groups(weight.scale, weight.zero_point)
    tiles = rows.max_blocks(config.block_m) * triton.cdiv(N, config.block_n)
    launch(
        _experts_kernel, tiles, arranged, words, scale, zero, out, plan,
        T, N, K, K // 4, K // weight.group_size, pitch, words.stride(0),
        *scale.stride(), *zero.stride(),
        GROUP_SIZE=weight.group_size, ON_GPU=not INTERPRET, PDL=pdl,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k,
        GROUP_M=config.group_m, STAGES=config.num_stages, num_warps=config.num_warps,
        launch_pdl=pdl,
    )  # fmt: skip
    return out


# --- the gradient to x: grad [T, N] @ W [N, K] ------------------------------------------------


@triton.jit
def _add(acc, grad, words, scale, zero, SLOT: tl.constexpr, ON_GPU: tl.constexpr):
    """Add ``grad [BLOCK_M, BLOCK_N]`` times the columns k = 4j + SLOT of ``words``."""
    q = unpack_slot(words, SLOT, True, grad.dtype, ON_GPU)
    weight = scaled(q, scale, zero, True, ON_GPU)
    if ON_GPU:
        return tl.dot(grad, weight, acc, input_precision="tf32x3")  # for float32; others exact
    else:
        return acc + tl.dot(grad.to(tl.float32), weight.to(tl.float32), input_precision="ieee")


@triton.jit(do_not_specialize=["T"])
def _experts_grad_kernel(
    grad_ptr,  # [T, N], strides below
    words_ptr,  # int16 [.., K/4], rows stride_wn apart, experts `pitch` rows apart
    scale_ptr,  # [E, n_groups, N] by strides
    zero_ptr,  # as scale
    out_ptr,  # [T, K] contiguous
    plan_ptr,  # see experts_plan.py
    T, N, K, quarter, n_groups, pitch, stride_gm, stride_gn, stride_wn,
    stride_se, stride_sg, stride_sn, stride_ze, stride_zg, stride_zn,
    GROUP_SIZE: tl.constexpr, ON_GPU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    BLOCK_K: tl.constexpr = 4 * BLOCK_J
    GROUPS: tl.constexpr = max(1, BLOCK_K // GROUP_SIZE)
    WIDTH: tl.constexpr = min(BLOCK_K, GROUP_SIZE) // 4
    tile = tl.program_id(0)
    tiles_k = tl.cdiv(K, BLOCK_K)
    if tile < tl.load(plan_ptr) * tiles_k:
        expert, tile_k, row, end = locate(tile, plan_ptr, T, 0, tiles_k, BLOCK_M, GROUP_M, True)
        expert = expert.to(tl.int64)
        m = row + tl.arange(0, BLOCK_M)
        j = tile_k * BLOCK_J + tl.arange(0, BLOCK_J)
        group = group_of_step(tile_k, BLOCK_K, GROUP_SIZE) + tl.arange(0, GROUPS)
        words_ptr += expert * pitch * stride_wn
        scale_ptr += expert * stride_se
        zero_ptr += expert * stride_ze
        grad_rows = grad_ptr + m.to(tl.int64)[:, None] * stride_gm
        acc0 = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
        acc1 = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
        acc2 = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
        acc3 = tl.zeros([BLOCK_M, BLOCK_J], tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            live = n < N
            place = n.to(tl.int64)[:, None] * stride_wn + j[None, :]
            words = tl.load(words_ptr + place, mask=live[:, None] & (j < quarter)[None, :], other=0)
            grad = tl.load(
                grad_rows + n.to(tl.int64)[None, :] * stride_gn,
                mask=(m < end)[:, None] & live[None, :], other=0.0,
            )  # fmt: skip
            scale = load_groups(scale_ptr, n, group, n_groups, N, stride_sg, stride_sn)
            zero = load_groups(zero_ptr, n, group, n_groups, N, stride_zg, stride_zn)
            scale = spread(scale, WIDTH)
            zero = spread(zero, WIDTH)
            acc0 = _add(acc0, grad, words, scale, zero, 0, ON_GPU)
            acc1 = _add(acc1, grad, words, scale, zero, 1, ON_GPU)
            acc2 = _add(acc2, grad, words, scale, zero, 2, ON_GPU)
            acc3 = _add(acc3, grad, words, scale, zero, 3, ON_GPU)
        # The last two dims of this are the two bits of the slot, so k = 4j + slot is in order.
        quads = tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3))
        values = rounded(tl.reshape(quads, [BLOCK_M, BLOCK_K]), out_ptr.dtype.element_ty, ON_GPU)
        k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        target = out_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(target, values, mask=(m < end)[:, None] & (k < K)[None, :])


def _grouped_grad(grad: Tensor, rows: Rows, weight: Weight) -> Tensor:
    """Rows of ``grad [T, N]`` times the weight ``[N, K]`` of their expert: ``[T, K]``."""
    T, E, N, K = grad.shape[0], rows.experts, weight.N, weight.K
    out = torch.empty((T, K), dtype=grad.dtype, device=grad.device)
    if E == 0 or out.numel() == 0:
        return out.zero_()
    config = tuned.experts_grad_config(T, E)
    _, plan = plan_experts(grad, rows, out, config.block_m, arrange=False)
    words, pitch = flat_words(weight.qdata)
    scale, zero = matched_groups(weight.scale, weight.zero_point)
    tiles = rows.max_blocks(config.block_m) * triton.cdiv(K, config.block_k)
    launch(
        _experts_grad_kernel, tiles, grad, words, scale, zero, out, plan,
        T, N, K, K // 4, K // weight.group_size, pitch, *grad.stride(), words.stride(0),
        *scale.stride(), *zero.stride(),
        GROUP_SIZE=weight.group_size, ON_GPU=not INTERPRET,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, BLOCK_J=config.block_k // 4,
        GROUP_M=config.group_m, num_warps=config.num_warps,
    )  # fmt: skip
    return out


int4_grouped_mm, int4_bmm = products(_grouped)
int4_grouped_mm_backward, int4_bmm_backward = products(_grouped_grad)
