"""Slicing, permuting, joining, once, for all layouts: ``dequantize(op(t)) == op(dequantize(t))``.

A handler maps the logical dim to the storage dim, checks that no group is cut, and calls the
same aten op on each part. Slices and views alias the parts. What a grouped tensor cannot hold
(a column, half a group) raises and says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import fill_defaults

from int4q import errors, geometry
from int4q.tensor.base import FLAT_BUFFERS, Int4TensorBase

aten = torch.ops.aten
implements = Int4TensorBase.implements

_DEQUANTIZE = "Use .dequantize() first"


def _without(sequence: Sequence[int], dim: int) -> list[int]:
    return [s for d, s in enumerate(sequence) if d != dim]


def _ungrouped(self: Int4TensorBase, dim: int, what: str) -> tuple[int, int]:
    """``dim`` wrapped, and its storage dim; ``ValueError`` for the grouped dim."""
    dim = geometry.wrap_dim(dim, self.ndim)
    grouped = self.grouped_dim
    if dim == grouped:
        raise errors.value(
            f"{what} must not take single elements of the grouped dim {grouped} "
            f"({self.group_size} share a scale)",
            f"dim {dim}",
            _DEQUANTIZE,
        )
    return dim, geometry.storage_dim(dim, grouped, self.ndim)


# --- slicing ------------------------------------------------------------------------------------


def slice_dim(
    self: Int4TensorBase, dim: int, start: int | None, end: int | None, step: int = 1
) -> Int4TensorBase:
    """``self`` with ``[start:end:step]`` along logical ``dim``, as views of the parts."""
    dim = geometry.wrap_dim(dim, self.ndim)
    grouped, group_size, size = self.grouped_dim, self.group_size, self.shape[dim]
    start, end = geometry.slice_bounds(size, start, end)
    storage_dim = geometry.storage_dim(dim, grouped, self.ndim)
    shape, act_pre_scale = list(self.shape), self.act_pre_scale
    if dim != grouped:
        shape[dim] = -(-(end - start) // step)
        return self._rebuild(
            lambda c, unit: aten.slice.Tensor(c, storage_dim, start, end, step),
            shape,
            self.block_size,
        )
    geometry.check_aligned_slice(start, end, step, group_size)
    shape[dim] = end - start
    if act_pre_scale is not None:
        act_pre_scale = act_pre_scale[..., start:end]
    return self._rebuild(
        lambda c, unit: aten.slice.Tensor(c, storage_dim, start // unit, end // unit, 1),
        shape,
        self.block_size,
        act_pre_scale,
    )


@implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    self, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    out = slice_dim(self, dim, start, end, step)
    return return_and_correct_aliasing(func, args, kwargs, out)


@implements(
    [
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
    ]
)
def _(func, types, args, kwargs):
    self, sizes = args[0], args[1]
    dim = geometry.wrap_dim(args[2] if len(args) > 2 else kwargs.get("dim", 0), self.ndim)
    total = self.shape[dim]
    if isinstance(sizes, int):
        if sizes <= 0 and total:
            raise errors.value("split_size must be positive", sizes)
        sizes = [min(sizes, total - s) for s in range(0, total, sizes)] if total else [0]
    elif sum(sizes) != total:
        raise errors.value(f"split sizes must add up to {total} along dim {dim}", list(sizes))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    out = [slice_dim(self, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return return_and_correct_aliasing(func, args, kwargs, out)


def select_index(self: Int4TensorBase, dim: int, index: int) -> Int4TensorBase:
    """``self`` at ``index`` of logical ``dim``, one dim less, as views of the parts."""
    dim, storage_dim = _ungrouped(self, dim, "select")
    return self._rebuild(
        lambda c, unit: aten.select.int(c, storage_dim, index),
        _without(self.shape, dim),
        _without(self.block_size, dim),
    )


@implements(aten.select.int)
def _(func, types, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, select_index(*args))


@implements(aten.unbind.int)
def _(func, types, args, kwargs):
    self, dim = fill_defaults(args, 2, [0])
    out = [select_index(self, dim, i) for i in range(self.shape[dim])]
    return return_and_correct_aliasing(func, args, kwargs, out)


def take(self: Int4TensorBase, dim: int, index: Tensor) -> Int4TensorBase:
    """Rows gathered by an index tensor: ``index``'s dims replace logical ``dim`` (a copy)."""
    dim, storage_dim = _ungrouped(self, dim, "indexing by a tensor")
    if index.dtype == torch.bool:
        if index.shape != (self.shape[dim],):
            raise IndexError(
                f"a mask for dim {dim} must have shape [{self.shape[dim]}], "
                f"got {errors.dims(index.shape)}"
            )
        index = index.nonzero().squeeze(1)
    lead: list[Tensor | None] = [None] * storage_dim

    def replaced(sizes: Sequence[int], by: Sequence[int]) -> list[int]:
        return [*sizes[:dim], *by, *sizes[dim + 1 :]]

    return self._rebuild(
        lambda c, unit: aten.index.Tensor(c, [*lead, index]),
        replaced(self.shape, index.shape),
        replaced(self.block_size, [1] * index.ndim),
    )


@implements(aten.index.Tensor)
def _(func, types, args, kwargs):
    self, indices = args
    given = [d for d, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise errors.value(
            "indexing takes one index tensor at a time", f"{len(given)} of them", _DEQUANTIZE
        )
    return take(self, given[0], indices[given[0]])


@implements(aten.index_select.default)
def _(func, types, args, kwargs):
    self, dim, index = args
    return take(self, dim, index.reshape(-1))


# --- permuting ----------------------------------------------------------------------------------


def permute(self: Int4TensorBase, dims: Sequence[int]) -> Int4TensorBase:
    """Lazy: the grouped dim stays last in storage and ``block_size`` says where it is now."""
    dims = [geometry.wrap_dim(d, self.ndim) for d in dims]
    if sorted(dims) != list(range(self.ndim)):
        raise errors.value(f"permute must name each of the {self.ndim} dims once", dims)
    order = geometry.storage_permutation(dims, self.grouped_dim)
    return self._rebuild(
        lambda c, unit: aten.permute.default(c, order),
        [self.shape[d] for d in dims],
        [self.block_size[d] for d in dims],
    )


def transpose(self: Int4TensorBase, dim0: int, dim1: int) -> Int4TensorBase:
    """Two logical dims exchanged, lazily."""
    dims = list(range(self.ndim))
    dim0, dim1 = geometry.wrap_dim(dim0, self.ndim), geometry.wrap_dim(dim1, self.ndim)
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permute(self, dims)


@implements(aten.permute.default)
def _(func, types, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, permute(*args))


@implements(aten.transpose.int)
def _(func, types, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, transpose(*args))


@implements(aten.t.default)
def _(func, types, args, kwargs):
    (self,) = args
    if self.ndim > 2:
        raise errors.value("t() takes a tensor of at most 2 dims", errors.dims(self.shape))
    out = transpose(self, 0, -1)
    return return_and_correct_aliasing(func, args, kwargs, out)


# --- joining --------------------------------------------------------------------------------------


def _check_same(tensors: Sequence[Int4TensorBase]) -> None:
    first = tensors[0]
    for i, t in enumerate(tensors):
        if type(t) is not type(first):
            raise errors.type_(
                f"cat takes tensors of one class ({type(first).__name__})",
                f"{type(t).__name__} at {i}",
                f"Use .dequantize() first. {FLAT_BUFFERS}",
            )
        for what in ("block_size", "dtype", "activation_dtype", "ndim"):
            if getattr(t, what) != getattr(first, what):
                raise errors.value(
                    f"cat takes tensors of one {what} ({getattr(first, what)})",
                    f"{getattr(t, what)} at {i}",
                )


def _joined_pre_scale(tensors: Sequence[Int4TensorBase], along_groups: bool) -> Tensor | None:
    scales = [t.act_pre_scale for t in tensors if t.act_pre_scale is not None]
    if not scales:
        return None
    if len(scales) < len(tensors):
        raise errors.value("either every tensor of a cat has an act_pre_scale or none", "some do")
    if along_groups:
        return torch.cat(scales, dim=-1)
    if not all(torch.equal(s, scales[0]) for s in scales):
        raise errors.value("tensors joined along out features must share act_pre_scale", "several")
    return scales[0]


@implements(aten.cat.default)
def _(func, types, args, kwargs):
    tensors, dim = fill_defaults(args, 2, [0])
    first = tensors[0]
    _check_same(tensors)
    dim = geometry.wrap_dim(dim, first.ndim)
    grouped = first.grouped_dim
    storage_dim = geometry.storage_dim(dim, grouped, first.ndim)
    for t in tensors:
        if _without(t.shape, dim) != _without(first.shape, dim):
            raise errors.value(
                f"cat takes shapes that agree except in dim {dim}",
                f"{errors.dims(first.shape)} and {errors.dims(t.shape)}",
            )
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)

    parts = {
        name: part.swap(
            torch.cat([part.swap(getattr(t, name)) for t in tensors], dim=storage_dim)
        ).contiguous()
        for name, part in first.parts.items()
    }
    return type(first)(
        **parts,
        block_size=first.block_size,
        shape=shape,
        act_pre_scale=_joined_pre_scale(tensors, dim == grouped),
        activation_dtype=first.activation_dtype,
    )


@implements(aten.stack.default)
def _(func, types, args, kwargs):
    tensors, dim = fill_defaults(args, 2, [0])
    return torch.cat([t.unsqueeze(dim) for t in tensors], dim=dim)
