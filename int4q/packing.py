"""Bytes: nibble packing, sign conventions. Inverse pairs stand side by side.

Two 4-bit values share a byte: the even index of the last dim in the low nibble, the odd one in
the high nibble. The tensors store signed ``q`` in two's complement; the symmetric ops store
``u = q + 8`` (offset binary). As bytes one is the other XOR 0x88.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(q: Tensor) -> Tensor:
    """int8 ``[..., K]`` in -8..7 -> int8 ``[..., K/2]``."""
    pairs = q.unflatten(-1, (-1, 2))
    return (pairs[..., 0] & 0x0F) | (pairs[..., 1] << 4)


def unpack_nibbles(qdata: Tensor) -> Tensor:
    """int8 ``[..., K/2]`` -> int8 ``[..., K]`` in -8..7 (arithmetic shifts keep the sign)."""
    low = (qdata << 4) >> 4
    high = qdata >> 4
    return torch.stack([low, high], dim=-1).flatten(-2)


def signed_to_offset(qdata: Tensor) -> Tensor:
    """Packed two's complement nibbles ``q`` -> packed offset binary ``u = q + 8``, same dtype."""
    return qdata ^ (0x88 if qdata.dtype == torch.uint8 else -0x78)


def offset_to_signed(packed: Tensor) -> Tensor:
    """Packed offset binary ``u`` -> packed two's complement ``q = u - 8`` (its own inverse)."""
    return signed_to_offset(packed)
