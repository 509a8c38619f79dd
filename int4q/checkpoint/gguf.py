"""GGUF files: tensors of llama.cpp's block formats.

A block holds 32 values (``Q4_K``: 256, in eight parts of 32) along the last dim:

``Q4_0``  18 bytes: float16 ``d``, 16 bytes of ``u``;                     ``d * (u - 8)``
``Q4_1``  20 bytes: float16 ``d``, ``m``, 16 bytes of ``u``;              ``d * u + m``
``Q4_K``  144 bytes: float16 ``d``, ``dmin``, 12 bytes of 6-bit scales ``s`` and minima ``t``,
          128 bytes of ``u``;                                             ``d * s * u - dmin * t``

Low nibbles of ``Q4_0`` and ``Q4_1`` are values 0 to 15, high ones 16 to 31; in ``Q4_K`` 32 bytes
hold one part in their low nibbles and the next in the high ones. With float32 scales such a weight
is an :class:`~int4q.Int4Tensor` in groups of 32. Every other type is dequantised by the package
``gguf``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from int4q import errors
from int4q.checkpoint import foreign
from int4q.checkpoint.foreign import EXACT
from int4q.checkpoint.gguf_file import GGUFTensor
from int4q.packing import unpack_nibbles
from int4q.tensor import Int4Tensor

GROUP_SIZE = 32


# --- blocks <-> weights ---------------------------------------------------------------------------


def _halves(blocks: Tensor) -> Tensor:
    """uint8 ``[.., 16]`` -> ``[.., 32]``: low nibbles first."""
    return torch.cat([blocks & 0xF, blocks >> 4], dim=-1)


def _f16(blocks: Tensor, at: int) -> Tensor:
    """A float16 of every block, in float32 ``[N, n_blocks]``."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1).float()


def from_q4_0(blocks: Tensor) -> Int4Tensor:
    """uint8 ``[N, n_blocks, 18]`` -> a weight ``[N, 32 * n_blocks]`` with float32 scales; exact."""
    return foreign.assemble(_halves(blocks[..., 2:]).flatten(-2), _f16(blocks, 0), None)


def from_q4_1(blocks: Tensor) -> Int4Tensor:
    """uint8 ``[N, n_blocks, 20]`` -> a weight; its zero points ``m + 8 d`` rounded to float32."""
    d, m = _f16(blocks, 0), _f16(blocks, 2)
    return foreign.assemble(_halves(blocks[..., 4:]).flatten(-2), d, m + 8 * d)


def from_q4_k(blocks: Tensor) -> Int4Tensor:
    """uint8 ``[N, n_blocks, 144]`` -> a weight; zero points rounded to float32 as in ``q4_1``."""
    scale, minimum = _k_scales(blocks)
    u = _k_values(blocks)
    # In float64, so that the only rounding is the last one.
    zero = (8 * scale.double() - minimum.double()).float()
    return foreign.assemble(u.flatten(-2), scale.flatten(-2), zero.flatten(-2))


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """``d * s`` and ``dmin * t`` of the eight parts, float32 ``[N, n_blocks, 8]``."""
    a, b, c = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    s = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], dim=-1)
    t = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], dim=-1)
    d, dmin = _f16(blocks, 0).unsqueeze(-1), _f16(blocks, 2).unsqueeze(-1)
    return d * s, dmin * t


def _k_values(blocks: Tensor) -> Tensor:
    """``[N, n_blocks, 256]``: 32 low nibbles, the 32 high ones of the same bytes, and so on."""
    packed = blocks[..., 16:].unflatten(-1, (4, 32))
    return torch.stack([packed & 0xF, packed >> 4], dim=-2).flatten(-3)


def to_q4_0(t: Int4Tensor, *, rounded: bool = False) -> Tensor:
    """uint8 ``[.., N, n_blocks, 18]``: the inverse of :func:`from_q4_0`.

    Args:
        t: a weight ``[.., N, K]``; each of its groups becomes ``group_size / 32`` blocks.
        rounded: as in :func:`halves`, whose errors are raised.

    Raises:
        ValueError: groups that do not run along K, or an ``act_pre_scale``.
    """
    return _blocks(t, "Q4_0", rounded)


def to_q4_1(t: Int4Tensor, *, rounded: bool = False) -> Tensor:
    """uint8 ``[.., N, n_blocks, 20]``: the inverse of :func:`from_q4_1`; as :func:`to_q4_0`."""
    return _blocks(t, "Q4_1", rounded)


def _blocks(t: Int4Tensor, kind: str, rounded: bool) -> Tensor:
    if t.grouped_dim != t.ndim - 1 or t.act_pre_scale is not None:
        raise errors.value(
            "GGUF's 4-bit tensors are [N, K] in groups along K, without act_pre_scale",
            f"{errors.dims(t.shape)} with block_size {t.block_size}",
        )
    blocks = t.group_size // GROUP_SIZE
    parts = [
        half.mT.repeat_interleave(blocks, dim=-1).contiguous().unsqueeze(-1).view(torch.uint8)
        for half in halves(t.scale, t.zero_point, kind, rounded=rounded)
    ]
    return torch.cat([*parts, _paired(t)], dim=-1)


def halves(
    scale: Tensor, zero_point: Tensor, kind: str, *, rounded: bool = False
) -> tuple[Tensor, ...]:
    """float16 ``d``, and ``m`` of ``Q4_1``, of a weight's scales and zero points.

    Args:
        kind: ``Q4_0`` or ``Q4_1``.
        rounded: take the nearest float16 of what is none.

    Raises:
        ValueError: read again these would be other scales or zero points (and ``rounded`` is not
            said), or one is too large for a float16.
    """
    d = _half(scale)
    if not rounded and not torch.equal(d.float(), scale.float()):
        raise errors.value("every scale in GGUF must be a float16", "others", _NEAR)
    if kind == "Q4_0":
        if bool(zero_point.any()):
            raise errors.value("a Q4_0 tensor has no zero points", "some", "Q4_1 may hold it")
        return (d,)
    # From the scale as it will be read, so that half of what that is off is made good for.
    m = _half(zero_point.double() - 8 * d.double())
    if not rounded and not torch.equal(m.float() + 8 * d.float(), zero_point.float()):
        raise errors.value("every minimum in GGUF must be a float16", "others", _NEAR)
    return d, m


def _half(value: Tensor) -> Tensor:
    half = value.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise errors.value("scales and minima in GGUF must be float16", "larger ones")
    return half


_NEAR = "int4q convert --round takes the nearest that GGUF can hold"


def _paired(t: Int4Tensor) -> Tensor:
    """The values as ``[.., N, n_blocks, 16]``: value i low, value i + 16 high."""
    low, high = (unpack_nibbles(t.qdata) + 8).unflatten(-1, (-1, 2, 16)).unbind(-2)
    return (low | (high << 4)).view(torch.uint8)


def exactness(t: Int4Tensor, blocks: Tensor, kind: str) -> str:
    """In words: whether every zero point is what the blocks say, or how many were rounded."""
    scale, zero = t.scale.mT.double(), t.zero_point.mT.double()
    if kind == "Q4_K":
        minimum = _k_scales(blocks)[1].flatten(-2).double()
    else:
        minimum = -_f16(blocks, 2).double() if kind == "Q4_1" else 8 * scale
    rounded = int((zero != 8 * scale - minimum).sum())
    return EXACT if not rounded else f"{rounded} of {zero.numel()} zero points rounded to float32"


FROM: dict[str, Callable[[Tensor], Int4Tensor]] = {
    "Q4_0": from_q4_0,
    "Q4_1": from_q4_1,
    "Q4_K": from_q4_k,
}
"""GGUF's name of a type -> the function that reads it."""
TO: dict[str, Callable[..., Tensor]] = {"Q4_0": to_q4_0, "Q4_1": to_q4_1}
"""GGUF's name of a type -> the function that writes it."""
BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q4_K": (256, 144)}
"""Values and bytes of a block."""


def blocks(tensor: GGUFTensor) -> Tensor:
    """The blocks of a matrix, uint8 ``[N, n_blocks, bytes]``; a copy."""
    _, nbytes = BLOCKS[tensor.kind]
    return torch.from_numpy(tensor.data.copy()).unflatten(-1, (-1, nbytes))


def dequantized(tensor: GGUFTensor) -> np.ndarray[Any, Any]:
    """A tensor of any type as float32, by the package ``gguf``."""
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[tensor.kind]
    stored = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(tensor.kind, np.uint8)
    values = dequantize(tensor.data.view(stored), kind)
    return np.asarray(values, dtype=np.float32).reshape(tensor.shape)


def is_4bit(tensor: GGUFTensor) -> bool:
    """Whether a tensor becomes a 4-bit weight: a matrix, or a stack, of one of the three types."""
    return tensor.kind in FROM and len(tensor.shape) in (2, 3)
