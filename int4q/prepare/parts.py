"""A 4-bit weight's parts as the buffers of a module."""

from __future__ import annotations

import functools

from torch import nn

from int4q import errors
from int4q.tensor.base import Int4TensorBase


class Parts(nn.Module):
    """A weight's parts as buffers, and its layout's products: what compiled code reads.

    Each layout has a subclass of its own, with those methods of the layout that read nothing but
    parts. Stored nowhere: the buffers are not persistent, and copies are made of the parameter.
    """

    shape: tuple[int, ...]
    block_size: list[int]

    def __init__(self, weight: Int4TensorBase):
        super().__init__()
        self.take(weight)

    def take(self, weight: Int4TensorBase) -> None:
        """Hold the parts of ``weight``."""
        for name in (*weight.tensor_data_names, *weight.optional_tensor_data_names):
            self.register_buffer(name, getattr(weight, name), persistent=False)
        _, attributes = weight.__tensor_flatten__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        """The logical shape and the group size."""
        return f"{errors.dims(self.shape)}, group_size={max(self.block_size)}"


def parts_of(weight: Int4TensorBase) -> Parts:
    """The :class:`Parts` of ``weight``, of its layout's class."""
    return _class(type(weight))(weight)


@functools.cache
def _class(layout: type[Int4TensorBase]) -> type[Parts]:
    shared = ("parts", "grouped_dim", "group_size", "_weight_parts", "_linear")
    return type(f"{layout.__name__}Parts", (Parts,), {n: getattr(layout, n) for n in shared})
