"""The same weight under another shape: once, for all layouts, and never a group cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from int4q import errors, geometry
from int4q.tensor.arguments import overrides
from int4q.tensor.base import FLAT_BUFFERS, Int4TensorBase
from int4q.tensor.shape_ops import select_index

aten = torch.ops.aten
implements = Int4TensorBase.implements


# --- adding and dropping dims of size 1 -----------------------------------------------------------


@implements(aten.unsqueeze.default)
def _(func, types, args, kwargs):
    self, dim = args
    dim = geometry.wrap_dim(dim, self.ndim + 1)
    storage_dim = dim - (dim > self.grouped_dim)
    shape, block_size = list(self.shape), list(self.block_size)
    shape.insert(dim, 1)
    block_size.insert(dim, 1)
    out = self._rebuild(lambda c, unit: c.unsqueeze(storage_dim), shape, block_size)
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements([aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims])
def _(func, types, args, kwargs):
    self = args[0]
    dims = args[1] if len(args) > 1 else range(self.ndim)
    dims = [dims] if isinstance(dims, int) else dims
    out = self
    for dim in sorted({geometry.wrap_dim(d, self.ndim) for d in dims}, reverse=True):
        if self.shape[dim] == 1:
            out = select_index(out, dim, 0)
    return return_and_correct_aliasing(func, args, kwargs, aliased(out) if out is self else out)


def aliased(self: Int4TensorBase) -> Int4TensorBase:
    """A new wrapper over the same parts."""
    return self._rebuild(lambda c, unit: c, self.shape, self.block_size)


# --- views ----------------------------------------------------------------------------------------


def view(self: Int4TensorBase, size: Sequence[int], reshape: bool = False) -> Int4TensorBase:
    """``self`` with another shape that keeps every group whole.

    Args:
        size: the new shape; one entry may be -1.
        reshape: copy where the parts cannot be viewed (the plain layout's scales under a merge
            of leading dims); then every part is copied, so no half of the result aliases.

    Raises:
        ValueError: the shape would mix groups, or a view would have to copy.
    """
    grouped, group_size = self.grouped_dim, self.group_size
    fix = FLAT_BUFFERS if len(size) == 1 else ""
    size, new_grouped = geometry.regroup(self.shape, size, grouped, group_size, fix)
    block_size = [1] * len(size)
    block_size[new_grouped] = group_size
    act_pre_scale = self.act_pre_scale
    if act_pre_scale is not None and size[new_grouped] != self.shape[grouped]:
        raise errors.value(
            "a weight with act_pre_scale must keep its in features in one dim",
            f"{errors.dims(self.shape)} -> {errors.dims(size)}",
            fix,
        )

    def regrouped(c: Tensor, unit: int, copy: bool) -> Tensor:
        sizes = [s // unit if d == new_grouped else s for d, s in enumerate(size)]
        logical = c.movedim(-1, grouped)
        logical = logical.clone(memory_format=torch.contiguous_format) if copy else logical
        return _viewed(logical, sizes).movedim(new_grouped, -1)

    try:
        return self._rebuild(lambda c, unit: regrouped(c, unit, False), size, block_size)
    except RuntimeError as error:
        if not reshape:
            raise errors.value(
                "a view must alias every part, and the scales of this layout cannot be viewed so",
                f"{errors.dims(self.shape)} -> {errors.dims(size)}",
                f"Use .reshape(), which copies. {FLAT_BUFFERS}",
            ) from error
    return self._rebuild(lambda c, unit: regrouped(c, unit, True), size, block_size)


def _viewed(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """``t.view(sizes)``; where it cannot be, a fake tensor too raises ``RuntimeError``."""
    try:
        return t.view(sizes)
    except ValueError as error:
        raise RuntimeError(str(error)) from error


@implements([aten.view.default, aten._unsafe_view.default])
def _(func, types, args, kwargs):
    out = view(*args)
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements(aten.reshape.default)
def _(func, types, args, kwargs):
    self, size = args
    return view(self, size, reshape=True)


@overrides(torch.reshape, Tensor.reshape)
def _reshape(input, *size, shape=None):
    size = size if shape is None else shape
    size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return view(input, size, reshape=True)


@overrides(torch.ravel, Tensor.ravel)
def _ravel(input):
    return view(input, [-1], reshape=True)


@overrides(torch.flatten, Tensor.flatten)
def _flatten(input, start_dim=0, end_dim=-1):
    start = geometry.wrap_dim(start_dim, input.ndim)
    end = geometry.wrap_dim(end_dim, input.ndim)
    if start > end:
        raise errors.value("flatten() needs start_dim <= end_dim", f"{start} > {end}")
    size = [*input.shape[:start], -1, *input.shape[end + 1 :]]
    return view(input, size, reshape=True)


@overrides(torch.unflatten, Tensor.unflatten)
def _unflatten(input, dim, sizes):
    dim = geometry.wrap_dim(dim, input.ndim)
    return view(input, [*input.shape[:dim], *sizes, *input.shape[dim + 1 :]], reshape=True)


@implements([aten.expand.default])
def _(func, types, args, kwargs):
    self, size = args[0], list(args[1])
    if list(self.shape) == [o if s == -1 else s for s, o in zip(size, self.shape, strict=False)]:
        return return_and_correct_aliasing(func, args, kwargs, aliased(self))
    raise errors.value(
        "a 4-bit weight expands to its own shape only",
        f"{errors.dims(self.shape)} -> {size}",
        "Use .dequantize() first",
    )
