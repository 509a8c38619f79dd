"""The activation in the order of the weight words: what both matrix kernels read.

Word j of a row of weights holds k = 4j .. 4j+3. Nibble i of many words is one fragment, so the
activation is stored as four matrices, one a nibble. The scale of the activation and any strides
are dealt with on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton.common import INTERPRET, rounded, wait_for_producer


@triton.jit
def zero_counters(counter_ptr, n_counters):
    """Set ``counter [n_counters]`` to 0, shared by all programs."""
    for begin in range(tl.program_id(0) * 256, n_counters, tl.num_programs(0) * 256):
        entry = begin + tl.arange(0, 256)
        tl.store(counter_ptr + entry, 0, mask=entry < n_counters)


@triton.jit
def arrange_tile(
    x_ptr, pre_scale_ptr, arranged_ptr, M, K, quarter, stride_xm, stride_xk,
    HAS_PRE_SCALE: tl.constexpr, ON_GPU: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """This program's ``[BLOCK_M, 4 * BLOCK_J]`` of x."""
    tiles_j = tl.cdiv(quarter, BLOCK_J)
    pid = tl.program_id(0)
    j = (pid % tiles_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    m = (pid // tiles_j) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.arange(0, 4)
    k = (4 * j[:, None] + slot[None, :])[None, :, :]
    row = m.to(tl.int64)[:, None, None]
    inside = (m < M)[:, None, None] & (j < quarter)[None, :, None]
    x = tl.load(x_ptr + row * stride_xm + k.to(tl.int64) * stride_xk, mask=inside, other=0.0)
    if HAS_PRE_SCALE:
        factor = tl.load(pre_scale_ptr + k, mask=k < K, other=0.0)
        product = x.to(tl.float32) * factor.to(tl.float32)
        x = rounded(product, arranged_ptr.dtype.element_ty, ON_GPU)
    target = (slot.to(tl.int64)[None, None, :] * M + row) * quarter + j[None, :, None]
    tl.store(arranged_ptr + target, x, mask=inside)


@triton.jit
def _arrange_kernel(
    x_ptr,  # [M, K], strides below
    pre_scale_ptr,  # [K] or unused
    arranged_ptr,  # [4, M, K/4] contiguous: arranged[i, m, j] = x[m, 4j + i]
    counter_ptr,  # int32 [n_counters], set to 0
    M, K, quarter, n_counters, stride_xm, stride_xk,
    HAS_PRE_SCALE: tl.constexpr, ON_GPU: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    # First wait, then release: the kernel after reads weights before it waits for this one, and
    # they may come from the kernel before.
    wait_for_producer(PDL)
    if PDL:
        gdc_launch_dependents()
    zero_counters(counter_ptr, n_counters)
    arrange_tile(
        x_ptr, pre_scale_ptr, arranged_ptr, M, K, quarter, stride_xm, stride_xk, HAS_PRE_SCALE,
        ON_GPU, BLOCK_M, BLOCK_J,
    )  # fmt: skip


def arrange_activation(
    x: Tensor,
    act_pre_scale: Tensor | None,
    counters: Tensor | None,
    pdl: bool = False,
) -> Tensor:
    """``x [M, K]`` (times ``act_pre_scale [K]``) as ``[4, M, K/4]``; entry i, m, j is x[m, 4j+i].

    Also zeroes ``counters``, which a split-K kernel launched after it counts arrivals in. With
    ``pdl`` the kernel after may start early and must wait before it reads any of the two.
    """
    M, K = x.shape
    # (K/4 is an argument of the kernel, here and elsewhere, because only arguments are known to be
    # multiples of 16, and without that no access is wide.)
    arranged = x.new_empty((4, M, K // 4))
    block_j = 64 if M * K < 1 << 18 else 256
    block_m = 1 if M * K < 1 << 20 else 4
    launch(
        _arrange_kernel, triton.cdiv(K // 4, block_j) * triton.cdiv(M, block_m),
        x, x if act_pre_scale is None else act_pre_scale.contiguous(), arranged,
        counters if counters is not None else arranged,
        M, K, K // 4, 0 if counters is None else counters.numel(), *x.stride(),
        HAS_PRE_SCALE=act_pre_scale is not None, ON_GPU=not INTERPRET, PDL=pdl,
        BLOCK_M=block_m, BLOCK_J=block_j, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return arranged
