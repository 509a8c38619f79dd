"""The components of a weight: how a layout holds them, and whether they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from int4q import errors, geometry
from int4q.ops import SCALE_DTYPES

if TYPE_CHECKING:
    from int4q.tensor.base import Int4TensorBase


@dataclass(frozen=True)
class Part:
    """How a layout holds one component.

    Attributes:
        swapped: the last two storage dims are exchanged (``[.., n_groups, N]``).
        nibbles: one entry packs two values; otherwise one entry serves a whole group.
    """

    swapped: bool = False
    nibbles: bool = False

    def swap(self, t: Tensor) -> Tensor:
        """Storage order <-> the order held; a view, and its own inverse."""
        return t.transpose(-1, -2) if self.swapped and t.ndim > 1 else t

    def unit(self, group_size: int) -> int:
        """Logical elements one entry covers along the grouped dim."""
        return geometry.NIBBLES_PER_BYTE if self.nibbles else group_size


def check_parts(
    cls: type[Int4TensorBase],
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    block_size: Sequence[int],
    shape: Sequence[int],
    activation_dtype: torch.dtype | None,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the parts make one weight of layout ``cls``."""
    if len(block_size) != len(shape):
        raise errors.value(
            f"block_size must have one entry for each of the {len(shape)} dims of shape",
            list(block_size),
        )
    grouped = geometry.grouped_dim(block_size)
    group_size = block_size[grouped]
    storage = geometry.storage_shape(shape, grouped)
    if storage[-1] % group_size:
        raise errors.value(
            f"the grouped dim {grouped} must be a multiple of group_size {group_size}",
            storage[-1],
        )
    for name, part in (("qdata", qdata), ("scale", scale), ("zero_point", zero_point)):
        _check_part(cls, name, part, storage, group_size)
        if part.device != qdata.device:
            raise errors.value(f"{name} must be on qdata's device {qdata.device}", part.device)
    if scale.dtype != zero_point.dtype:
        raise errors.type_(f"zero_point must have scale's dtype {scale.dtype}", zero_point.dtype)
    if activation_dtype is not None and activation_dtype not in cls.activation_dtypes:
        raise errors.value(
            f"activation_dtype of {cls.__name__} must be {errors.dtypes(cls.activation_dtypes)}",
            activation_dtype,
        )


def _check_part(
    cls: type[Int4TensorBase], name: str, t: Tensor, storage: list[int], group_size: int
) -> None:
    if not isinstance(t, Tensor):
        raise errors.type_(f"{name} must be a tensor", type(t).__name__)
    part = cls.parts[name]
    allowed = (torch.int8,) if part.nibbles else SCALE_DTYPES
    if t.dtype not in allowed:
        raise errors.type_(f"{name} must be {errors.dtypes(allowed)}", t.dtype)
    held = [*storage[:-1], storage[-1] // part.unit(group_size)]
    expected = [*held[:-2], held[-1], held[-2]] if part.swapped and len(held) > 1 else held
    if list(t.shape) == expected:
        return
    names = (
        "[.., N, K/2]"
        if part.nibbles
        else ("[.., n_groups, N]" if part.swapped else "[.., N, n_groups]")
    )
    turned = t.ndim > 1 and [*t.shape[:-2], t.shape[-1], t.shape[-2]] == expected
    raise errors.value(
        f"{name} of {cls.__name__} must have shape {names} = {errors.dims(expected)}",
        errors.dims(t.shape),
        cls.other_layout_fix if turned and not part.nibbles else "",
    )


class ActPreScale:
    """The attribute ``act_pre_scale``: whatever multiplies an activation is held as ``[K]``.

    A number, a tensor of one element, ``[K]`` and ``[1, K]`` (any leading ones) may be assigned.
    Reads find the instance's dictionary, at no cost: a descriptor without ``__get__``.
    """

    if TYPE_CHECKING:  # what a read gives

        def __get__(self, weight: Int4TensorBase, owner: type[Int4TensorBase]) -> Tensor | None: ...

    def __set__(self, weight: Int4TensorBase, value: Tensor | float | None) -> None:
        if value is not None:
            value = _pre_scale(value, weight)
        weight.__dict__["act_pre_scale"] = value


def _pre_scale(value: Tensor | float, weight: Int4TensorBase) -> Tensor:
    K = weight.shape[weight.grouped_dim]
    rule = f"act_pre_scale must be a number or a floating-point tensor of 1 or {K} (K) entries"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = torch.tensor(value, dtype=weight.dtype, device=weight.device)
    if not isinstance(value, Tensor):
        raise errors.type_(rule, type(value).__name__)
    if not value.is_floating_point():
        raise errors.type_(rule, value.dtype)
    if value.numel() != 1 and (value.numel() != K or value.shape[-1] != K):
        raise errors.value(rule, errors.dims(value.shape))
    if value.device != weight.device:
        raise errors.value(f"act_pre_scale must be on the device {weight.device}", value.device)
    return value if value.shape == (K,) else value.reshape(-1).expand(K).contiguous()
