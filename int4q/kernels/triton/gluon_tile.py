"""Pieces of the Hopper GEMM in gluon_matmul.py: layouts, the list of steps, the epilogue."""

from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from int4q.kernels.triton.common import group_of_step, store_transposed, with_bias
from int4q.kernels.triton.experts_plan import locate

# --- what the copy engines can read -----------------------------------------------------------


def fits_tma(words: Tensor) -> bool:
    """Whether the copy engine can read ``words``: 16-byte aligned base and rows."""
    return words.data_ptr() % 16 == 0 and words.stride(0) * words.element_size() % 16 == 0


def can_stage(scale: Tensor, zero: Tensor, N: int) -> bool:
    """Whether rows of scales can be copied 16 bytes at a time (``[n_groups, N]`` storage)."""
    return N % 16 == 0 and all(
        t.stride(-1) == 1
        and not any(s % 16 for s in t.stride()[:-1])
        and t.data_ptr() % 16 == 0
        and t.itemsize == 2
        for t in (scale, zero)
    )


def descriptor(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(min(128, box[-1] * 2), 16, len(box))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout)


# --- layouts ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def spread_layout(block_n: int, num_warps: int, block_j: int, width: int):
    """``[BLOCK_N, groups, width]``: the left operand of wgmma with K seen as groups of ``width``.

    Where an element of the operand lives is fixed by the instruction; with this layout a scale,
    repeated over its group, is already in the register beside the weights that it multiplies.
    """

    def along_k(bit):
        return [0, 0, bit] if bit < width else [0, bit // width, 0]

    registers = [along_k(1), [8, 0, 0], along_k(8)]
    registers += [along_k(bit) for bit in (16, 32, 64) if bit < block_j]
    lanes = [along_k(2), along_k(4), [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    warps = [[16, 0, 0], [32, 0, 0]] + ([[64, 0, 0]] if num_warps == 8 else [])
    row = num_warps * 16
    while row < block_n:
        registers.append([row, 0, 0])
        row *= 2
    shape = [block_n, block_j // width, width]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


@functools.lru_cache(maxsize=256)
def group_layout(block_n: int, num_warps: int, groups: int):
    """``[BLOCK_N, groups]``: the operand's rows, groups in the lowest registers (wide loads)."""
    registers = [[0, 1 << bit] for bit in range(groups.bit_length() - 1)] + [[8, 0]]
    warps = [[16, 0], [32, 0]] + ([[64, 0]] if num_warps == 8 else [])
    row = num_warps * 16
    while row < block_n:
        registers.append([row, 0])
        row *= 2
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [block_n, groups])


@gluon.jit
def spread_operand(values, WIDTH: gl.constexpr, OPERAND: gl.constexpr):
    """Repeat ``values [BLOCK_N, groups]`` over their groups, in the registers of the operand."""
    ROWS: gl.constexpr = values.shape[0]
    GROUPS: gl.constexpr = values.shape[1]
    wide = gl.expand_dims(values, 2).broadcast_to([ROWS, GROUPS, WIDTH])
    flat = gl.reshape(wide, [ROWS, GROUPS * WIDTH])
    return gl.convert_layout(flat, OPERAND, assert_trivial=True)


# --- who does which step ----------------------------------------------------------------------


@gluon.jit
def owner_of(step, base, extra):
    """The program whose share holds ``step``: the first ``extra`` programs have ``base + 1``."""
    wide = extra * (base + 1)
    return gl.where(step < wide, step // (base + 1), extra + (step - wide) // gl.maximum(base, 1))


@gluon.jit
def next_step(
    step, tile, expert, tile_n, col, steps, whole, rest_tile, rest_step, programs, plan_ptr, M,
    tiles_m, tiles_n, BLOCK_M: gl.constexpr, GROUP_M: gl.constexpr, EXPERTS: gl.constexpr,
):  # fmt: skip
    """The next step of this program: its whole tiles first, then its share of the rest."""
    step += 1
    if step == steps:
        step = 0
        if tile >= whole:
            tile += 1
        elif tile + programs < whole:
            tile += programs
        else:
            tile = rest_tile
            step = rest_step
        expert, tile_n, col, _ = locate(
            tile, plan_ptr, M, tiles_m, tiles_n, BLOCK_M, GROUP_M, EXPERTS
        )
    return step, tile, expert, tile_n, col


@gluon.jit
def of_expert(ptr, expert, stride):
    """The part of ``expert`` in a stack."""
    return ptr + expert.to(gl.int64) * stride


@gluon.jit
def copy_groups(
    target, ptr, row0, group0, live, n_groups, N, stride_group, num_warps: gl.constexpr
):
    """Start copying ``[groups, BLOCK_N]`` entries of a row-contiguous ``[n_groups, N]`` tensor."""
    GROUPS: gl.constexpr = target.shape[0]
    BLOCK_N: gl.constexpr = target.shape[1]
    ACROSS: gl.constexpr = min(32, BLOCK_N // 8)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [num_warps, 1], [1, 0])
    group = group0 + gl.arange(0, GROUPS, gl.SliceLayout(1, LAYOUT))
    row = row0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    inside = (group < n_groups)[:, None] & (row < N)[None, :] & live
    async_copy.async_copy_global_to_shared(
        target, ptr + group[:, None] * stride_group + row[None, :], mask=inside
    )


@gluon.jit
def copy_scales(
    stage, scale_smem, zero_smem, scale_ptr, zero_ptr, strides, expert, tile_n, step, live,
    n_groups, N, BLOCK_K: gl.constexpr, GROUP_SIZE: gl.constexpr, HAS_ZERO: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Start copying the scales and zero points of a step into ``stage`` of the ring.

    ``strides``: from an expert to the next and from a group to the next, of both.
    """
    BLOCK_N: gl.constexpr = scale_smem.shape[2]
    group0 = group_of_step(step, BLOCK_K, GROUP_SIZE)
    row0 = tile_n * BLOCK_N
    copy_groups(
        scale_smem.index(stage), of_expert(scale_ptr, expert, strides[0]), row0, group0, live,
        n_groups, N, strides[1], num_warps,
    )  # fmt: skip
    if HAS_ZERO:
        copy_groups(
            zero_smem.index(stage), of_expert(zero_ptr, expert, strides[2]), row0, group0, live,
            n_groups, N, strides[3], num_warps,
        )  # fmt: skip
    async_copy.commit_group()


@gluon.jit
def finish_tile(
    acc, row0, col0, bias_ptr, out_ptr, M, N, MMA: gl.constexpr, HAS_BIAS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Add the bias, round, and store ``acc [BLOCK_N, BLOCK_M]`` into ``out [M, N]``."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    rows = row0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    acc = with_bias(acc, bias_ptr, rows, N, HAS_BIAS)
    ACROSS: gl.constexpr = min(16, BLOCK_N // 8)
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [ACROSS, 32 // ACROSS], [1, num_warps], [0, 1])
    values = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), LAYOUT)
    rows = row0 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT))
    cols = col0 + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT))
    store_transposed(out_ptr, values, rows, cols, M, N, True)


@gluon.jit
def share_tile(
    acc, tile, whole, low, steps, base, extra, row0, col0, partial_ptr, counter_ptr, bias_ptr,
    out_ptr, M, N, MMA: gl.constexpr, HAS_BIAS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Leave this program's part of a tile; the last of its programs adds all parts and stores."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    AREA: gl.constexpr = BLOCK_N * BLOCK_M
    # Parts lie as the accumulator's registers do, four of a thread side by side: 16-byte accesses.
    tiled = gl.reshape(acc, [BLOCK_N // 16, 2, 8, BLOCK_M // 8, 4, 2])
    flat = gl.reshape(gl.permute(tiled, [0, 3, 2, 4, 1, 5]), [AREA // 4, 4])
    FLAT: gl.constexpr = flat.type.layout
    quad = gl.arange(0, AREA // 4, gl.SliceLayout(1, FLAT))
    place = partial_ptr + quad[:, None] * 4 + gl.arange(0, 4, gl.SliceLayout(0, FLAT))[None, :]
    # A program shares two tiles at most: the one it starts inside of and the one it ends in.
    mine = gl.program_id(0) * 2 + (low == 0).to(gl.int32)
    gl.store(place + mine.to(gl.int64) * AREA, flat)
    gl.thread_barrier()  # all threads' stores before the one thread's release below
    arrived = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    first = owner_of((tile - whole) * steps, base, extra)
    last = owner_of((tile - whole + 1) * steps - 1, base, extra)
    if arrived == last - first:
        total = gl.load(place + (first * 2 + 1).to(gl.int64) * AREA)
        for other in range(first + 1, last + 1):
            total += gl.load(place + (other * 2).to(gl.int64) * AREA)
        apart = gl.reshape(total, [BLOCK_N // 16, BLOCK_M // 8, 8, 4, 2, 2])
        summed = gl.reshape(gl.permute(apart, [0, 4, 2, 1, 3, 5]), [BLOCK_N, BLOCK_M])
        summed = gl.convert_layout(summed, MMA, assert_trivial=True)
        finish_tile(summed, row0, col0, bias_ptr, out_ptr, M, N, MMA, HAS_BIAS, num_warps)
