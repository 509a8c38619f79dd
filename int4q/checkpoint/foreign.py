"""What every foreign format is turned into, and the bit arithmetic that several share.

A format's module has pure functions from its parts to an :class:`~int4q.Int4Tensor` and, where its
weights lie in safetensors files, ``weights(source)``, which finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from int4q import errors, geometry
from int4q.checkpoint.source import Stored
from int4q.packing import pack_nibbles
from int4q.tensor import Int4Tensor

EXACT = "exact"


@dataclass(frozen=True)
class Foreign:
    """A weight of another format in a checkpoint.

    Attributes:
        name: that its parameter has in the model: ``model.layers.0.mlp.up_proj.weight``.
        stored: names of the tensors that ``make`` takes, in this order.
        like: what comes of it, without data.
        make: the stored tensors -> the weight, and how exact it is, in words.
    """

    name: str
    stored: tuple[str, ...]
    like: Int4Tensor
    make: Callable[..., tuple[Int4Tensor, str]]


def assemble(u: Tensor, scale: Tensor, zero_point: Tensor | None) -> Int4Tensor:
    """A weight of unsigned values and its scales.

    Args:
        u: integer ``[.., N, K]`` in 0..15; the value is ``(u - 8) * scale + zero_point``.
        scale: floating point ``[.., N, n_groups]``.
        zero_point: as ``scale``; ``None`` for 0.
    """
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    qdata = pack_nibbles(u.to(torch.int8) - 8)
    parts = (scale.mT.contiguous(), zero_point.mT.contiguous())
    block_size = [1] * (u.ndim - 1) + [u.shape[-1] // scale.shape[-1]]
    return Int4Tensor(qdata, *parts, block_size, u.shape)


def like(shape: tuple[int, ...], group_size: int, dtype: torch.dtype) -> Int4Tensor:
    """What :func:`assemble` gives for ``shape`` (.., N, K), without data.

    Raises:
        ValueError: a group size that :class:`~int4q.Int4Tensor` does not have.
    """
    geometry.check_group_size(group_size)
    *rows, K = shape
    if K % group_size:
        raise errors.value(f"K must be a multiple of group_size {group_size}", K)
    u = torch.empty(shape, dtype=torch.int8, device="meta")
    scale = torch.empty((*rows, K // group_size), dtype=dtype, device="meta")
    return assemble(u, scale, None)


def from_zeros(u: Tensor, scale: Tensor, zero: Tensor) -> Int4Tensor:
    """A weight whose value is ``(u - zero) * scale``, exactly.

    Where every zero is 8 the scales keep their dtype. Else they are held in float32: the zero
    point ``(8 - zero) * scale`` has up to five bits more than a scale.

    Args:
        u: integer ``[N, K]`` in 0..15.
        scale: float16 or bfloat16 ``[N, n_groups]`` (float32: see below).
        zero: integer ``[N, n_groups]`` in 0..16.

    With scales in float32 the zero point is rounded to float32.
    """
    if bool((zero == 8).all()):
        return assemble(u, scale, None)
    scale = scale.float()
    return assemble(u, scale, (8 - zero).float() * scale)


def unpack_int32(packed: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 ``[R, C]`` -> int8 ``[R, 8 * C]`` in 0..15: nibble ``i`` is column ``order[i]``.

    Nibble 0 is the lowest of a word.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = ((packed.unsqueeze(-1) >> shifts) & 0xF).to(torch.int8)
    places = torch.tensor(order, device=packed.device).argsort()
    return nibbles[..., places].flatten(-2)


def pack_int32(u: Tensor) -> Tensor:
    """int8 ``[R, 8 * C]`` in 0..15 -> int32 ``[R, C]``, the first column lowest."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64, device=u.device)
    words = (u.unflatten(-1, (-1, 8)).long() << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def check(
    name: str, t: Tensor | Stored, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a stored tensor is as its format says."""
    if t.dtype not in dtypes:
        raise errors.type_(f"{name} must be {errors.dtypes(dtypes)}", t.dtype)
    if tuple(t.shape) != shape:
        raise errors.value(f"{name} must have shape {errors.dims(shape)}", errors.dims(t.shape))
