"""The layout of torch's own CPU int4 kernels, and its inverse.

``aten._convert_weight_to_int4pack_for_cpu`` cuts the N rows into blocks of 64 (AVX-512) or 32
(other vector units) and stores each block k by k: byte ``j`` of a (block, k) row pairs two rows
of that block. Which two depends on the vector unit, so the order is read off a probe packed by
the op itself instead of being assumed; :func:`unpack` inverts exactly what :func:`pack` did on
this machine.

``scale_and_zero`` is ``[n_groups, N, 2]``; ``value = (u - 8) * scale + zero``, so torch's
``zero`` is our ``zero_point`` and ``u = q + 8``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from int4q import errors
from int4q.kernels import reference
from int4q.kernels.cpu import blocked
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight
from int4q.packing import unpack_nibbles

N_MULTIPLE = 16
"""torch's kernel takes N only in multiples of this."""
MAX_M = 64
"""Rows up to which torch's kernel beats dequantising blocks: its time grows with M (it re-reads the
weight's registers every four rows), the blocks' hardly does."""
_BLOCKS = (64, 32, 16)
_CHUNK_ROWS = 512


def pack(qdata: Tensor) -> Tensor:
    """Plain ``qdata`` int8 ``[N, K/2]`` -> torch's CPU layout, uint8 ``[N, K/2]``.

    Works on a bounded number of rows at a time (the op wants int32, eight times the bytes).
    Row blocks are independent, so the pieces put together are what one call would give.
    """
    packed = torch.empty_like(qdata, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for start in range(0, qdata.shape[0], _CHUNK_ROWS):
        rows = qdata[start : start + _CHUNK_ROWS]
        packed[start : start + _CHUNK_ROWS] = _convert(unpack_nibbles(rows).to(torch.int32) + 8)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Torch's CPU layout, uint8 ``[N, K/2]`` -> plain ``qdata`` int8 ``[N, K/2]``."""
    N, half = packed.shape
    qdata = torch.empty_like(packed, dtype=torch.int8)
    block = block_rows()
    full = N // block * block
    if full:
        qdata[:full] = _unpack_blocks(packed[:full], block)
    if full < N:
        qdata[full:] = _unpack_blocks(packed[full:], N - full)
    return qdata


def scale_and_zero(scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n_groups, N]`` scale and zero_point -> one ``[n_groups, N, 2]``."""
    return torch.stack([scale, zero_point], dim=-1).to(dtype).contiguous()


@functools.cache
def block_rows() -> int:
    """Rows of one block of torch's layout on this machine, found by packing a probe."""
    probe = _row_digits(2 * _BLOCKS[0])[0]
    whole = _convert(probe)
    for block in _BLOCKS:
        pieces = [_convert(probe[i : i + block]) for i in range(0, len(probe), block)]
        if torch.equal(whole, torch.cat(pieces)) and not _splits_further(probe, block):
            return block
    raise errors.value(
        "torch's CPU int4 layout must come in blocks of 64, 32 or 16 rows", "neither"
    )


def _splits_further(probe: Tensor, block: int) -> bool:
    half = block // 2
    if half < _BLOCKS[-1]:
        return False
    one = _convert(probe[:block])
    return torch.equal(one, torch.cat([_convert(probe[:half]), _convert(probe[half:block])]))


def _unpack_blocks(packed: Tensor, block: int) -> Tensor:
    order = _row_order(block)
    rows, half = packed.shape
    K = 2 * half
    # Stored as [blocks][K][block / 2 bytes]; nibbles of one k cover the rows of the block.
    u = packed.reshape(-1, K, block // 2)
    nibbles = torch.stack([u & 0x0F, u >> 4], dim=-1).flatten(-2)
    by_row = nibbles[..., order].transpose(1, 2).reshape(rows, K)
    q = by_row ^ 0x08  # u = q + 8: the same low nibble with its top bit flipped
    return (q[:, 0::2] | (q[:, 1::2] << 4)).view(torch.int8)


@functools.cache
def _row_order(block: int) -> Tensor:
    """For each row of a block: the place of its nibble among the ``block`` nibbles of one k."""
    place = torch.zeros(block, dtype=torch.long)
    for digit, probe in enumerate(_row_digits(block)):
        packed = _convert(probe)  # K = 2, both columns hold the row number's digit
        first = packed.view(2, block // 2)[0].long()
        place += torch.stack([first & 0x0F, first >> 4], dim=-1).flatten() << (4 * digit)
    return torch.argsort(place)


def _row_digits(rows: int) -> list[Tensor]:
    """Probes ``[rows, 2]`` whose entries are the hexadecimal digits of the row number."""
    number = torch.arange(rows, dtype=torch.int32)
    return [((number >> shift) & 15).unsqueeze(1).repeat(1, 2) for shift in (0, 4)]


def _convert(u: Tensor) -> Tensor:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(u.contiguous(), 1)
    return packed.view(u.shape[0], u.shape[1] // 2)


def unsupported(problem: Problem) -> str | None:
    """Why torch's kernel cannot (or should not) run ``problem``, or ``None``."""
    if problem.device != "cpu":
        return f"runs on cpu, not {problem.device}"
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 and bfloat16 activations, not {problem.dtype}"
    if problem.N % N_MULTIPLE:
        return f"N must be a multiple of {N_MULTIPLE}, not {problem.N}"
    if problem.M > MAX_M:
        return f"slower than blocks above M = {MAX_M}"
    return None


def linear(x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
    """``x [M, K]`` times a packed weight by torch's kernel.

    Args:
        packed: uint8 ``[N, K/2]``.
        scale_and_zero: ``[n_groups, N, 2]``; the product runs in the wider of its dtype and
            ``x``'s, so neither is rounded.

    Returns:
        ``[M, N]`` in ``x.dtype``.
    """
    dtype = reference.compute_dtype(x, scale_and_zero)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.to(dtype).contiguous(), packed, group_size, scale_and_zero.to(dtype)
    )
    return y.to(x.dtype)


def unpacking_linear(x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
    """:func:`linear` for many rows: unpack and dequantise block by block, then multiply."""
    y = x.new_empty((x.shape[0], packed.shape[0]))
    block = block_rows()
    step = max(block, blocked.BLOCK_ELEMENTS // max(2 * packed.shape[1], 1) // block * block)
    for start in range(0, packed.shape[0], step):
        rows = slice(start, start + step)
        scale, zero_point = scale_and_zero[:, rows].unbind(-1)
        weight = Weight(unpack(packed[rows]), scale, zero_point, group_size)
        y[:, rows] = blocked.linear(x, weight)
    return y
