"""Bytes: nibble packing, sign conventions. Inverse pairs stand side by side.

Two 4-bit values share a byte: the even index of the last dim in the low nibble, the odd one in
the high nibble. The tensors store signed ``q`` in two's complement; the symmetric ops store
``u = q + 8`` (offset binary). As bytes one is the other XOR 0x88.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4q import errors


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


def symmetric_parts(t: Tensor) -> tuple[Tensor, Tensor, int]:
    """The values of a symmetric 4-bit weight tensor as ``linear_q4gsw`` holds them.

    Args:
        t: a 4-bit weight ``[N, K]`` of any layout (whatever has ``to_int4_tensor()``).

    Returns:
        ``weights`` uint8 ``[N, K/2]``, ``weight_scales`` ``[K/group_size, N]``, ``group_size``.

    Raises:
        TypeError: ``t`` is no 4-bit weight.
        ValueError: a zero point is not 0, ``t`` is a stack or transposed, or has an
            ``act_pre_scale``, which the op cannot hold.
    """
    if not hasattr(t, "to_int4_tensor"):
        raise errors.type_("t must be a 4-bit weight of int4q", type(t).__name__)
    plain = t.to_int4_tensor()
    if plain.ndim != 2 or plain.grouped_dim != 1:
        raise errors.value(
            "t must be [N, K] with groups along K",
            f"{errors.dims(plain.shape)} with block_size {plain.block_size}",
        )
    if plain.act_pre_scale is not None:
        raise errors.value(
            "t must have no act_pre_scale", "one", "Multiply the activations by it instead"
        )
    if bool(plain.zero_point.any()):
        raise errors.value(
            "a symmetric weight has zero points of 0",
            "others",
            'Quantise with Int4Tensor.from_hp(w, block_size, algorithm="symmetric")',
        )
    return signed_to_offset(plain.qdata).view(torch.uint8), plain.scale, plain.group_size
