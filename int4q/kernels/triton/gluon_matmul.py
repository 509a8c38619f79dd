"""The Hopper (sm_90) W4A16 GEMM: weights go from shared memory through registers into wgmma.

``out^T = W @ x^T``: rows are N, columns are M padded to BLOCK_M, so the unpacked weights are the
register operand of the matrix instruction and never touch shared memory again. TMA fills a ring
of stages, each one block of K; the next fragment is unpacked while earlier ones multiply.

The work is one list of steps, tile after tile (stream-K): every program takes an equal share of
consecutive steps, so a tile count that is no multiple of the multiprocessors leaves none idle.
A tile that several programs share is added up by the one that finishes last, always in the same
order: results repeat bit for bit, no program waits for another, and no second kernel runs.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from int4q.kernels.launch.record import planned
from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton import tuned
from int4q.kernels.triton.arrange import arrange_activation
from int4q.kernels.triton.common import (
    INTERPRET,
    as_words,
    group_of_step,
    load_groups,
    matched_groups,
    scaled,
    unpack_slot,
    unsupported_anywhere,
    wait_for_producer,
)
from int4q.kernels.triton.experts_plan import locate
from int4q.kernels.triton.gluon_tile import (
    can_stage,
    copy_scales,
    descriptor,
    finish_tile,
    fits_tma,
    group_layout,
    next_step,
    of_expert,
    share_tile,
    spread_layout,
    spread_operand,
)
from int4q.kernels.triton.tiles import StreamConfig
from int4q.kernels.weight import Weight

HALVES = (torch.bfloat16, torch.float16)


def unsupported_at_any_m(problem) -> str | None:
    """Why this kernel cannot run ``problem`` at any number of rows; ``None`` where it can."""
    reason = unsupported_anywhere(problem)
    if reason is not None:
        return reason
    if INTERPRET:
        return "the interpreter runs no Gluon kernels"
    if problem.capability is None or problem.capability[0] != 9:
        return f"needs compute capability 9.x (wgmma), this device has {problem.capability}"
    if problem.dtype not in HALVES:
        return f"activation dtype must be bfloat16 or float16, not {problem.dtype}"
    return None


def unsupported(problem) -> str | None:
    """Why this kernel cannot (or should not) run ``problem``; ``None`` where it can."""
    if reason := unsupported_at_any_m(problem):
        return reason
    if problem.M < tuned.GLUON_FROM_M:
        return f"M={problem.M}: a decode kernel is faster below M={tuned.GLUON_FROM_M}"
    if tuned.dequantizes(problem.M, problem.N, problem.K, problem.capability):
        return f"M={problem.M}: dequantise + cuBLAS is faster for this shape"
    return None


# --- the kernel -------------------------------------------------------------------------------


copy_box = tma.async_copy_global_to_shared


@gluon.jit(do_not_specialize=["M"])
def _stream_kernel(
    words_desc,  # int16 [N, K/4], or experts `pitch` rows apart, in boxes [BLOCK_N, BLOCK_J]
    arranged_desc,  # [4, M, K/4] in boxes [4, BLOCK_M, BLOCK_J], see arrange.py
    scale_ptr,  # [experts, n_groups, N] by strides
    zero_ptr,  # [experts, n_groups, N] by strides, or unused
    bias_ptr,  # [N] or unused
    out_ptr,  # [M, N] contiguous
    partial_ptr,  # float32 [2 * programs, BLOCK_N, BLOCK_M], or unused
    counter_ptr,  # int32 [tiles], zeroed, or unused
    plan_ptr,  # of the rows' experts, see experts_plan.py, or unused
    M, N, K, n_groups, pitch, stride_se, stride_sg, stride_sn, stride_ze, stride_zg, stride_zn,
    GROUP_SIZE: gl.constexpr, SIGNED: gl.constexpr, HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr, STAGED_SCALES: gl.constexpr, STREAM: gl.constexpr,
    EXPERTS: gl.constexpr, MIN_STEPS: gl.constexpr, STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr, GROUP_M: gl.constexpr, SPREAD: gl.constexpr, GROUP: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = words_desc.block_type.shape[0]
    BLOCK_J: gl.constexpr = words_desc.block_type.shape[1]
    BLOCK_M: gl.constexpr = arranged_desc.block_type.shape[1]
    DTYPE: gl.constexpr = arranged_desc.dtype
    GROUPS: gl.constexpr = max(1, BLOCK_J * 4 // GROUP_SIZE)
    WIDTH: gl.constexpr = BLOCK_J // GROUPS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    BYTES: gl.constexpr = BLOCK_N * BLOCK_J * 2 + BLOCK_M * BLOCK_J * 8
    strides = (stride_se, stride_sg, stride_ze, stride_zg)
    steps = gl.cdiv(K, BLOCK_J * 4)
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    if EXPERTS:
        wait_for_producer(True)
        tiles = gl.load(plan_ptr) * tiles_n
        programs = gl.minimum(programs, gl.maximum(tiles * steps // MIN_STEPS, 1))
    # Whole tiles pid, pid + programs, ... while they go round evenly; then an equal share of the
    # steps of the rest.
    rounds = tiles // programs
    whole = rounds * programs
    base = (tiles - whole) * steps // programs
    extra = (tiles - whole) * steps % programs
    begin = pid * base + gl.minimum(pid, extra)
    end = begin + base + (pid < extra).to(gl.int32)
    if EXPERTS:  # more programs than work: those look at the first tile, which the plan has
        rounds = gl.where(pid < programs, rounds, 0)
        begin = gl.where(pid < programs, begin, 0)
        end = gl.where(pid < programs, end, begin)
    total = rounds * steps + end - begin
    rest_tile = whole + begin // steps
    rest_step = begin % steps
    first_tile = gl.where(rounds > 0, pid, rest_tile)
    first_step = gl.where(rounds > 0, 0, rest_step)

    words_smem = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, BLOCK_J], words_desc.layout)
    x_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 4, BLOCK_M, BLOCK_J], arranged_desc.layout)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(BLOCK_J * 2, 16, 2)
    if STAGED_SCALES:
        ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        SDT: gl.constexpr = scale_ptr.dtype.element_ty
        scale_smem = gl.allocate_shared_memory(SDT, [STAGES, GROUPS, BLOCK_N], ROWS)
        zero_smem = scale_smem
        if HAS_ZERO:
            zero_smem = gl.allocate_shared_memory(SDT, [STAGES, GROUPS, BLOCK_N], ROWS)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    gdc_launch_dependents()

    # Fill the ring: weights first, since only the activation depends on the kernel before.
    tile = first_tile
    step = first_step
    expert, tile_n, col, _ = locate(tile, plan_ptr, M, tiles_m, tiles_n, BLOCK_M, GROUP_M, EXPERTS)
    for i in gl.static_range(STAGES - 1):
        live = i < total
        mbarrier.expect(ready.index(i), BYTES, pred=live)
        place = [expert * pitch + tile_n * BLOCK_N, step * BLOCK_J]
        copy_box(words_desc, place, ready.index(i), words_smem.index(i), pred=live)
        if STAGED_SCALES:
            copy_scales(
                i, scale_smem, zero_smem, scale_ptr, zero_ptr, strides, expert, tile_n, step,
                live, n_groups, N, BLOCK_J * 4, GROUP_SIZE, HAS_ZERO, num_warps,
            )  # fmt: skip
        step, tile, expert, tile_n, col = next_step(
            step, tile, expert, tile_n, col, steps, whole, rest_tile, rest_step, programs,
            plan_ptr, M, tiles_m, tiles_n, BLOCK_M, GROUP_M, EXPERTS,
        )  # fmt: skip
    if not EXPERTS:
        wait_for_producer(True)
    tile = first_tile
    step = first_step
    expert, tile_n, col, _ = locate(tile, plan_ptr, M, tiles_m, tiles_n, BLOCK_M, GROUP_M, EXPERTS)
    for i in gl.static_range(STAGES - 1):
        place = [0, col, step * BLOCK_J]
        copy_box(arranged_desc, place, ready.index(i), x_smem.index(i), pred=i < total)
        step, tile, expert, tile_n, col = next_step(
            step, tile, expert, tile_n, col, steps, whole, rest_tile, rest_step, programs,
            plan_ptr, M, tiles_m, tiles_n, BLOCK_M, GROUP_M, EXPERTS,
        )  # fmt: skip
    if STAGED_SCALES:
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()

    count = 0  # steps done; the copies run STAGES - 1 ahead, at (step, tile)
    shared = gl.where(end > begin, (end - 1) // steps - begin // steps + 1, 0)
    for index in range(rounds + shared):
        work = pid + index * programs
        low = 0
        high = steps
        if index >= rounds:
            work = rest_tile + index - rounds
            low = gl.maximum(begin - (work - whole) * steps, 0)
            high = gl.minimum(end - (work - whole) * steps, steps)
        of_work, work_n, col0, last = locate(
            work, plan_ptr, M, tiles_m, tiles_n, BLOCK_M, GROUP_M, EXPERTS
        )
        scales = of_expert(scale_ptr, of_work, stride_se)
        zeros = of_expert(zero_ptr, of_work, stride_ze)
        rows = work_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, GROUP))
        lane = gl.arange(0, GROUPS, gl.SliceLayout(0, GROUP))
        if not STAGED_SCALES:
            group = group_of_step(low, BLOCK_J * 4, GROUP_SIZE) + lane
            next_scale = load_groups(scales, rows, group, n_groups, N, stride_sg, stride_sn)
            next_zero = next_scale
            if HAS_ZERO:
                next_zero = load_groups(zeros, rows, group, n_groups, N, stride_zg, stride_zn)
        acc = warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA))
        for now in range(low, high):
            slot = count % STAGES
            mbarrier.wait(ready.index(slot), (count // STAGES) & 1)
            words = words_smem.index(slot).load(OPERAND)
            x = x_smem.index(slot)._reinterpret(DTYPE, [4, BLOCK_M, BLOCK_J], FLAT)
            if STAGED_SCALES:
                scale = scale_smem.index(slot).permute([1, 0]).load(gl.SliceLayout(2, SPREAD))
                zero = scale
                if HAS_ZERO:
                    zero = zero_smem.index(slot).permute([1, 0]).load(gl.SliceLayout(2, SPREAD))
            else:
                scale = gl.convert_layout(next_scale, gl.SliceLayout(2, SPREAD))
                zero = gl.convert_layout(next_zero, gl.SliceLayout(2, SPREAD))
                group = group_of_step(now + 1, BLOCK_J * 4, GROUP_SIZE) + lane
                next_scale = load_groups(scales, rows, group, n_groups, N, stride_sg, stride_sn)
                next_zero = next_scale
                if HAS_ZERO:
                    next_zero = load_groups(zeros, rows, group, n_groups, N, stride_zg, stride_zn)
            scale = spread_operand(scale, WIDTH, OPERAND)
            zero = spread_operand(zero, WIDTH, OPERAND)
            for i in gl.static_range(4):
                # The words are a dependency too: without it the next fragment may be unpacked into
                # registers that a multiply in flight still reads.
                acc, words = warpgroup_mma_wait(IN_FLIGHT, deps=(acc, words))
                q = unpack_slot(words, i, SIGNED, DTYPE, True)
                weight = scaled(q, scale, zero, HAS_ZERO, True)
                acc = warpgroup_mma(weight, x.index(i).permute([1, 0]), acc, is_async=True)
            if STAGED_SCALES:
                async_copy.wait_group(STAGES - 3)
            gl.thread_barrier()  # all warps are done with the stage before this one: refill it
            free = (count + STAGES - 1) % STAGES
            live = count + STAGES - 1 < total
            mbarrier.expect(ready.index(free), BYTES, pred=live)
            row_n = tile_n * BLOCK_N
            place = [expert * pitch + row_n, step * BLOCK_J]
            copy_box(words_desc, place, ready.index(free), words_smem.index(free), pred=live)
            place = [0, col, step * BLOCK_J]
            copy_box(arranged_desc, place, ready.index(free), x_smem.index(free), pred=live)
            if STAGED_SCALES:
                copy_scales(
                    free, scale_smem, zero_smem, scale_ptr, zero_ptr, strides, expert, tile_n,
                    step, live, n_groups, N, BLOCK_J * 4, GROUP_SIZE, HAS_ZERO, num_warps,
                )  # fmt: skip
            step, tile, expert, tile_n, col = next_step(
                step, tile, expert, tile_n, col, steps, whole, rest_tile, rest_step, programs,
                plan_ptr, M, tiles_m, tiles_n, BLOCK_M, GROUP_M, EXPERTS,
            )  # fmt: skip
            count += 1
        result = warpgroup_mma_wait(0, deps=(acc,))
        row0 = work_n * BLOCK_N
        if STREAM:
            if (low == 0) & (high == steps):
                finish_tile(
                    result, row0, col0, bias_ptr, out_ptr, last, N, MMA, HAS_BIAS, num_warps
                )
            else:
                share_tile(
                    result, work, whole, low, steps, base, extra, row0, col0, partial_ptr,
                    counter_ptr, bias_ptr, out_ptr, last, N, MMA, HAS_BIAS, num_warps,
                )  # fmt: skip
        else:
            finish_tile(result, row0, col0, bias_ptr, out_ptr, last, N, MMA, HAS_BIAS, num_warps)


# --- calls ------------------------------------------------------------------------------------


@planned
def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    config: StreamConfig | None = None,
) -> Tensor:
    """``(x * act_pre_scale) @ W.T + bias``, weights rounded to the dtype of x, which has 16 bits.

    Args:
        x: ``[M, K]`` bfloat16 or float16, any strides.
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
    words = as_words(packed)
    if not fits_tma(words):
        words = words.clone(memory_format=torch.contiguous_format)
    scale, zero = matched_groups(scale, zero_point)
    staged = can_stage(scale, zero, N)
    light = staged and group_size >= 128
    config = config or tuned.stream_config(M, N, K, light, x.device)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    programs, partial, counters = tiles, out, None
    if config.programs:
        steps = tiles * triton.cdiv(K, config.block_k)
        programs = min(config.programs, max(1, steps // config.min_steps))
        shape = 2 * programs, config.block_n, config.block_m
        partial = x.new_empty(shape, dtype=torch.float32)
        counters = x.new_empty((tiles,), dtype=torch.int32)
    arranged = arrange_activation(x, act_pre_scale, counters, pdl=True)
    block_j = config.block_k // 4
    groups = max(1, config.block_k // group_size)
    staged = staged and config.stage_scales and config.num_stages > 2
    launch(
        _stream_kernel, programs,
        descriptor(words, [config.block_n, block_j]),
        descriptor(arranged, [4, config.block_m, block_j]),
        scale, zero, out if bias is None else bias.contiguous(), out, partial,
        out if counters is None else counters, out,
        M, N, K, K // group_size, 0, 0, *scale.stride(), 0, *zero.stride(),
        GROUP_SIZE=group_size, SIGNED=signed, HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None, STAGED_SCALES=staged, STREAM=config.programs > 0,
        EXPERTS=False, MIN_STEPS=1,
        STAGES=config.num_stages, IN_FLIGHT=config.in_flight, GROUP_M=config.group_m,
        SPREAD=spread_layout(config.block_n, config.num_warps, block_j, block_j // groups),
        GROUP=group_layout(config.block_n, config.num_warps, groups),
        num_warps=config.num_warps, launch_pdl=True, maxnreg=config.max_registers,
    )  # fmt: skip
    return out
