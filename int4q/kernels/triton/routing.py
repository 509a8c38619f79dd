"""Tokens to experts and back, one kernel each; what they compute: :mod:`int4q.kernels.routing`.

Sorting and counting by torch takes a dozen kernels, each longer to launch than to run for the few
rows of decoding. Here a row's place is the number of rows that go before it, counted by comparing
all with all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from int4q.kernels.launch.record import planned
from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton.common import FLOATS, INTERPRET, rounded

MAX_ROWS = 4096
"""Comparing all rows with all beats a sort up to here, by far: 4096 rows are 16.8 M comparisons."""
_NONE = tl.constexpr(2**31 - 1)


def unsupported(problem) -> str | None:
    """Why :func:`permute` cannot run ``problem``; ``None`` where it can."""
    if problem.M > MAX_ROWS:
        return f"sorting is faster for more than {MAX_ROWS} rows, not for {problem.M}"
    return None


def unsupported_combine(problem) -> str | None:
    """Why :func:`combine` cannot run ``problem``; ``None`` where it can."""
    if problem.dtype not in FLOATS:
        return f"the dtype must be bfloat16, float16 or float32, not {problem.dtype}"
    return None


@triton.jit
def _permute_kernel(
    index_ptr,  # [S]
    token_ptr, offs_ptr, position_ptr, expert_ptr,  # int32 [S], [n_experts], [S], [S]
    S, n_experts, top_k,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(S, BLOCK)
    if pid < row_blocks:
        s = pid * BLOCK + tl.arange(0, BLOCK)
        expert = tl.load(index_ptr + s, mask=s < S, other=0).to(tl.int32)
        before = tl.zeros([BLOCK], tl.int32)
        for start in range(0, S, CHUNK):
            o = start + tl.arange(0, CHUNK)
            other = tl.load(index_ptr + o, mask=o < S, other=_NONE).to(tl.int32)
            first = other[None, :] < expert[:, None]
            tie = (other[None, :] == expert[:, None]) & (o[None, :] < s[:, None])
            before += tl.sum((first | tie).to(tl.int32), axis=1)
        tl.store(position_ptr + s, before, mask=s < S)
        tl.store(token_ptr + before, s // top_k, mask=s < S)
        tl.store(expert_ptr + before, tl.minimum(expert, n_experts - 1), mask=s < S)
    else:
        n = (pid - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        end = tl.zeros([BLOCK], tl.int32)
        for start in range(0, S, CHUNK):
            o = start + tl.arange(0, CHUNK)
            other = tl.load(index_ptr + o, mask=o < S, other=_NONE).to(tl.int32)
            end += tl.sum((other[None, :] <= n[:, None]).to(tl.int32), axis=1)
        tl.store(offs_ptr + n, end, mask=n < n_experts)


@triton.jit
def _combine_kernel(
    y_ptr,  # [S, H] contiguous
    position_ptr, index_ptr, weights_ptr,  # [S]
    out_ptr,  # [T, H] contiguous
    H, n_experts,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(H, BLOCK)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    h = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP_K):
        s = token * TOP_K + j
        here = tl.load(index_ptr + s) < n_experts
        row = tl.load(position_ptr + s).to(tl.int64)
        weight = tl.load(weights_ptr + s).to(tl.float32)
        # A row of no group is not read: nothing was written there.
        y = tl.load(y_ptr + row * H + h, mask=(h < H) & here, other=0.0).to(tl.float32)
        total += tl.where(here, y * weight, 0.0)
    tl.store(out_ptr + token * H + h, rounded(total, out_ptr.dtype.element_ty, ON_GPU), mask=h < H)


@planned
def permute(top_k_index: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`int4q.kernels.routing.permute`."""
    index = top_k_index.contiguous()
    S, device = index.numel(), index.device
    token, position, expert = (torch.empty(S, dtype=torch.int32, device=device) for _ in range(3))
    offs = torch.empty(n_experts, dtype=torch.int32, device=device)
    block = 16
    launch(
        _permute_kernel, triton.cdiv(S, block) + triton.cdiv(n_experts, block),
        index, token, offs, position, expert, S, n_experts, index.shape[1],
        BLOCK=block, CHUNK=min(256, triton.next_power_of_2(max(S, 1))), num_warps=4,
    )  # fmt: skip
    return token, offs, position, expert


@planned
def combine(
    y: Tensor, position: Tensor, top_k_index: Tensor, top_k_weights: Tensor, n_experts: int
) -> Tensor:
    """:func:`int4q.kernels.routing.combine`."""
    T, top_k = top_k_index.shape
    y = y.contiguous()
    H = y.shape[1]
    out = torch.empty((T, H), dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    block = min(1024, triton.next_power_of_2(H))
    launch(
        _combine_kernel, T * triton.cdiv(H, block),
        y, position, top_k_index.contiguous(), top_k_weights.contiguous(), out, H, n_experts,
        TOP_K=top_k, BLOCK=block, ON_GPU=not INTERPRET, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
