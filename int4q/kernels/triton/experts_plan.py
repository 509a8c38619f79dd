"""Rows sorted by expert, cut into blocks on the device: what every grouped kernel walks over.

Which expert has how many rows is known to the device alone (``offs``), and asking would stop the
host. So the kernel that arranges the activation also writes a *plan*: one entry a block of at most
``block_m`` rows of one expert. The host knows only a bound on their number. Tile ``t`` of a
product with ``tiles_n`` tiles of N belongs to the expert of block ``t // tiles_n``, because the
tiles of an expert are numbered together; within it the tiles of one piece of the weight are
neighbours, which read it from L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from int4q.kernels.launch.record import planned
from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton.arrange import arrange_tile, zero_counters
from int4q.kernels.triton.common import INTERPRET, tile_of, wait_for_producer
from int4q.kernels.weight import Weight

_AHEAD = 8
"""Entries past the last block, which a kernel's copies may look at before they know the end."""
_BLOCK_ENTRIES = 16


@dataclass(frozen=True)
class Rows:
    """How the rows of an activation fall to experts.

    Attributes:
        total: rows of the activation.
        experts: weights in the stack.
        offs: int32 ``[experts]`` on the device, end row of each; ``None`` where all have as many.
    """

    total: int
    experts: int
    offs: Tensor | None = None

    def max_blocks(self, block_m: int) -> int:
        """A bound on the blocks of ``block_m`` rows, whatever ``offs`` holds."""
        if self.offs is None:
            return self.experts * triton.cdiv(self.total // max(1, self.experts), block_m)
        return self.total // block_m + min(self.experts, self.total)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _ends(offs_ptr, index, E, T, rows_each, UNIFORM: tl.constexpr):
    """End row of the expert ``index``, and of all before it: rising, from 0 to at most T."""
    if UNIFORM:
        return tl.minimum(index + 1, E) * rows_each
    else:
        ends = tl.load(offs_ptr + index, mask=(index >= 0) & (index < E), other=0)
        return tl.associative_scan(tl.minimum(tl.maximum(ends, 0), T), 0, _larger)


@triton.jit
def _write_plan(
    plan_ptr,  # int32 [1 + n_entries, 4]: the number of blocks; (expert, its first block, rows)
    offs_ptr, E, T, rows_each, n_entries,
    UNIFORM: tl.constexpr, BLOCK_M: tl.constexpr, PAD_E: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, PAD_E)
    begin = _ends(offs_ptr, lane - 1, E, T, rows_each, UNIFORM)
    end = _ends(offs_ptr, lane, E, T, rows_each, UNIFORM)
    blocks = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    after = tl.cumsum(blocks, 0)
    if tl.program_id(0) == 0:
        tl.store(plan_ptr, tl.sum(blocks, 0))
    for low in range(tl.program_id(0) * ENTRIES, n_entries, tl.num_programs(0) * ENTRIES):
        entry = low + tl.arange(0, ENTRIES)
        passed = after[None, :] <= entry[:, None]
        expert = tl.sum(passed.to(tl.int32), 1)
        own = lane[None, :] == expert[:, None]
        target = plan_ptr + 4 + entry * 4
        inside = entry < n_entries
        tl.store(target, expert, mask=inside)
        tl.store(target + 1, tl.sum(tl.where(passed, blocks[None, :], 0), 1), mask=inside)
        tl.store(target + 2, tl.sum(tl.where(own, begin[None, :], 0), 1), mask=inside)
        tl.store(target + 3, tl.sum(tl.where(own, end[None, :], 0), 1), mask=inside)


@triton.jit
def _zero_rows(out_ptr, first, T, N, BLOCK: tl.constexpr):
    """Rows of no expert: ``out[first:T]`` = 0, shared by all programs."""
    start = first.to(tl.int64) * N
    size = (T - first).to(tl.int64) * N
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for low in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        at = low + tl.arange(0, BLOCK)
        tl.store(out_ptr + start + at, 0.0, mask=at < size)


@triton.jit(do_not_specialize=["T", "n_counters", "n_entries", "rows_each"])
def _arrange_experts_kernel(
    x_ptr,  # [T, K], strides below
    pre_scale_ptr,  # [K] or unused
    arranged_ptr,  # [4, T, K/4] contiguous, see arrange.py
    offs_ptr,  # int32 [E] or unused
    plan_ptr,  # see _write_plan
    counter_ptr,  # int32 [n_counters], set to 0
    out_ptr,  # [T, N]: rows past the last expert's are set to 0
    T, K, quarter, N, E, rows_each, n_entries, n_counters, stride_xm, stride_xk,
    UNIFORM: tl.constexpr, ARRANGE: tl.constexpr, HAS_PRE_SCALE: tl.constexpr,
    ON_GPU: tl.constexpr, PDL: tl.constexpr,
    PLAN_M: tl.constexpr, PAD_E: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    wait_for_producer(PDL)
    if PDL:
        gdc_launch_dependents()
    if tl.program_id(0) * ENTRIES < n_entries:
        _write_plan(plan_ptr, offs_ptr, E, T, rows_each, n_entries, UNIFORM, PLAN_M, PAD_E, ENTRIES)
    zero_counters(counter_ptr, n_counters)
    if ARRANGE:
        arrange_tile(
            x_ptr, pre_scale_ptr, arranged_ptr, T, K, quarter, stride_xm, stride_xk,
            HAS_PRE_SCALE, ON_GPU, BLOCK_M, BLOCK_J,
        )  # fmt: skip
    if not UNIFORM:
        last = tl.minimum(tl.maximum(tl.load(offs_ptr + E - 1), 0), T)
        _zero_rows(out_ptr, last, T, N, 1024)


def plan_experts(
    x: Tensor,
    rows: Rows,
    out: Tensor,
    block_m: int,
    counters: Tensor | None = None,
    pdl: bool = False,
    arrange: bool = True,
    act_pre_scale: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The arranged ``x [T, K]``, times ``act_pre_scale [K]``, and the plan of its blocks.

    Sets the rows of ``out`` that belong to no expert, and all ``counters``, to 0. With ``pdl``
    the kernel after must wait before it reads any of these. ``arrange=False`` leaves x alone.

    Returns:
        ``[4, T, K/4]`` (see ``arrange.py``) or ``None``, and int32 ``[1 + entries, 4]``.
    """
    T, K = x.shape
    n_entries = rows.max_blocks(block_m) + _AHEAD
    plan = torch.empty((1 + n_entries, 4), dtype=torch.int32, device=x.device)
    arranged = None
    block_j = 64 if T * K < 1 << 18 else 256
    rows_a_program = 1 if T * K < 1 << 20 else 4
    programs = triton.cdiv(n_entries, _BLOCK_ENTRIES)
    if arrange:
        arranged = torch.empty((4, T, K // 4), dtype=x.dtype, device=x.device)
        programs = triton.cdiv(K // 4, block_j) * triton.cdiv(T, rows_a_program)
    launch(
        _arrange_experts_kernel, programs,
        x, x if act_pre_scale is None else act_pre_scale.contiguous(),
        out if arranged is None else arranged, plan if rows.offs is None else rows.offs, plan,
        plan if counters is None else counters, out,
        T, K, K // 4, out.shape[1], rows.experts, T // rows.experts, n_entries,
        0 if counters is None else counters.numel(), *x.stride(),
        UNIFORM=rows.offs is None, ARRANGE=arrange, HAS_PRE_SCALE=act_pre_scale is not None,
        ON_GPU=not INTERPRET, PDL=pdl,
        PLAN_M=block_m, PAD_E=triton.next_power_of_2(rows.experts), ENTRIES=_BLOCK_ENTRIES,
        BLOCK_M=rows_a_program, BLOCK_J=block_j, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return arranged, plan


@triton.jit
def locate(
    tile, plan_ptr, M, tiles_m, tiles_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """Where tile number ``tile`` lies: expert, tile of N, first row of x, end of its rows.

    Without ``EXPERTS`` there is one weight and no plan.
    """
    if EXPERTS:
        entry = plan_ptr + 4 + (tile // tiles_n) * 4
        expert = tl.load(entry)
        first = tl.load(entry + 1)
        begin = tl.load(entry + 2)
        end = tl.load(entry + 3)
        blocks = tl.cdiv(end - begin, BLOCK_M)
        tile_m, tile_n = tile_of(tile - first * tiles_n, blocks, tiles_n, GROUP_M)
        return expert, tile_n, begin + tile_m * BLOCK_M, end
    else:
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        return tile * 0, tile_n, tile_m * BLOCK_M, M


# --- stacks of weights ------------------------------------------------------------------------


def flat_words(qdata: Tensor) -> tuple[Tensor, int]:
    """int8 ``[E, N, K/2]`` as int16 rows ``[.., K/4]``, and how many rows lie between experts.

    Copies only where the bytes cannot be seen so.
    """
    E, N, half = qdata.shape
    stride_e, stride_n, stride_k = qdata.stride()
    if E == 1:
        stride_e = N * stride_n
    regular = stride_k == 1 and stride_n % 16 == 0 and stride_e % max(1, stride_n) == 0
    if not regular or stride_n < half or stride_e < 0 or qdata.data_ptr() % 16:
        qdata = qdata.clone(memory_format=torch.contiguous_format)
        stride_e, stride_n = N * half, half
    pitch = stride_e // stride_n
    rows = (E - 1) * pitch + N
    return qdata.as_strided((rows, half), (stride_n, 1)).view(torch.int16), pitch


def products(rows_times: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], ...]:
    """The grouped and the batched product, out of one of rows with the weights of their experts.

    Args:
        rows_times: ``(x [T, K], rows, weight, ...) -> [T, N]`` (a gradient: ``[T, N]`` to
            ``[T, K]``).

    Returns:
        ``grouped(x [T, K], weight, offs, ...) -> [T, N]`` and
        ``batched(x [B, M, K], weight, ...) -> [B, M, N]``, for

        * x: bfloat16, float16 or float32, any strides;
        * weight: a stack ``[E, N, K]``;
        * offs: int32 ``[E]`` on the device, the end row of each expert. Not read by the host; an
          end before the one in front of it, or past T, counts as none and as T; rows past the
          last end give 0;
        * more (``act_pre_scale [K]``, which multiplies x first) goes to ``rows_times``.
    """

    @planned
    def grouped(x: Tensor, weight: Weight, offs: Tensor, *rest) -> Tensor:
        rows = Rows(x.shape[0], weight.qdata.shape[0], offs.contiguous())
        return rows_times(x, rows, weight, *rest)

    @planned
    def batched(x: Tensor, weight: Weight, *rest) -> Tensor:
        rows = Rows(x.shape[0] * x.shape[1], x.shape[0])
        y = rows_times(x.flatten(0, 1), rows, weight, *rest)
        return y.view(*x.shape[:2], y.shape[1])

    return grouped, batched
