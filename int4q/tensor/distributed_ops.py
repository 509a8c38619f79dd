"""Collectives, and the ops by which DTensor, FSDP2 and DCP cut, pad and join: for all layouts.

Work on shards needs no more than slicing (``shape_ops.py``) and this: every part of a weight takes
its own way through a collective. Where a collective joins shards along the first dim, the parts
travel in logical order, so that what is joined in each of them is that dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchao.utils import fill_defaults

from int4q import errors
from int4q.tensor.base import FLAT_BUFFERS, Int4TensorBase
from int4q.tensor.view_ops import aliased

aten = torch.ops.aten
implements = Int4TensorBase.implements
_FUNCTIONAL = torch.ops._c10d_functional


def in_logical_order(
    self: Int4TensorBase, fn: Callable[[Tensor, int], Tensor], shape: Sequence[int]
) -> Int4TensorBase:
    """``self`` of ``shape``, each part by ``fn(part with the dims in logical order, unit)``."""
    grouped = self.grouped_dim
    return self._rebuild(
        lambda c, unit: fn(c.movedim(-1, grouped), unit).movedim(grouped, -1),
        shape,
        self.block_size,
    )


# --- what DTensor pads shards with, and FSDP2 copies them into ------------------------------------


@implements(aten.new_zeros.default)
def _(func, types, args, kwargs):
    """A weight of value 0 and any shape, groups along the same dim; any view of it is a view."""
    self, size = args[0], list(args[1])
    grouped, group_size = self.grouped_dim, self.group_size
    if len(size) != self.ndim or size[grouped] % group_size:
        raise errors.value(
            f"a 4-bit weight like this one has {self.ndim} dims and whole groups of {group_size} "
            f"along dim {grouped}",
            errors.dims(size),
        )
    dtype = kwargs.pop("dtype", None) or self.dtype

    def new(c: Tensor, unit: int) -> Tensor:
        sizes = [s // unit if d == grouped else s for d, s in enumerate(size)]
        return func(c, sizes, dtype=dtype if c.is_floating_point() else c.dtype, **kwargs)

    pre_scale = self.act_pre_scale
    if pre_scale is not None and size[grouped] != self.shape[grouped]:
        raise errors.value(
            "a weight with act_pre_scale must keep its in features",
            f"{errors.dims(self.shape)} -> {errors.dims(size)}",
        )
    return in_logical_order(self, new, size)


@implements(aten.constant_pad_nd.default)
def _(func, types, args, kwargs):
    """More rows, or whole groups, of value 0 at the end of any dim."""
    self, pad, value = fill_defaults(args, 3, [0])
    before, after = pad[0::2], pad[1::2]  # the last dim first
    if value or any(before) or min(after) < 0:
        raise errors.value("a 4-bit weight is padded by zeros, at the end", [list(pad), value])
    for dim, n in zip(range(self.ndim - 1, -1, -1), after, strict=False):
        if n:
            size = [n if d == dim else s for d, s in enumerate(self.shape)]
            self = torch.cat([self, self.new_zeros(size)], dim=dim)
    return self


@implements(aten.as_strided.default)
def _(func, types, args, kwargs):
    """FSDP2 asks for the strides that a weight has anyhow."""
    self, size, stride, offset = fill_defaults(args, 4, [None])
    if tuple(size) != self.shape or tuple(stride) != self.stride() or offset:
        raise errors.value(
            f"as_strided of a 4-bit weight must keep {errors.dims(self.shape)} and "
            f"{errors.dims(self.stride())}",
            f"{errors.dims(size)} and {errors.dims(stride)} at {offset or 0}",
            "Use .dequantize() first",
        )
    return return_and_correct_aliasing(func, args, kwargs, aliased(self))


# --- collectives ----------------------------------------------------------------------------------


@implements([torch.ops.c10d.broadcast_.default, torch.ops.c10d.scatter_.default])
def _(func, types, args, kwargs):
    """In place, part by part; done, or on CUDA queued on the current stream, on return."""
    # Asked for a collective that is not async, NCCL's group returns no work, which a null pointer
    # stands for here: there is something to wait for, and to return, only if it is async.
    at = [a.name for a in func._schema.arguments].index("async_op")
    leaves, spec = tree_flatten((*args[:at], True, *args[at + 1 :]))
    weights: list[Any] = [x for x in leaves if isinstance(x, Tensor)]
    _check_alike(func, weights)
    for name in weights[0].data_tensors():
        parts = [getattr(x, name).contiguous() if isinstance(x, Tensor) else x for x in leaves]
        _, work = func(*tree_unflatten(parts, spec))
        work.wait()
        for x, part in zip(leaves, parts, strict=True):
            if isinstance(x, Tensor) and part is not (held := getattr(x, name)):
                held.copy_(part)
    return args[0], work


def _check_alike(func: Any, weights: Sequence[Any]) -> None:
    def kind(t: Any) -> str:
        parts = list(t.data_tensors()) if isinstance(t, Int4TensorBase) else ""
        return f"{type(t).__name__} {errors.dims(t.shape)} {getattr(t, 'block_size', '')} {parts}"

    first = kind(weights[0])
    for t in weights:
        if kind(t) != first:
            rule = (
                f"{func} takes 4-bit weights of one layout, shape, block_size and parts ({first})"
            )
            raise errors.value(rule, kind(t), FLAT_BUFFERS)


@implements(torch.ops._c10d_functional.all_gather_into_tensor.default)
def _(func, types, args, kwargs):
    """The shards of a group, joined along the first dim."""
    self, ranks, group = args

    def gather(c: Tensor, unit: int = 1) -> Tensor:
        return _FUNCTIONAL.wait_tensor(func(c.contiguous(), ranks, group))

    if self.act_pre_scale is not None:
        every = gather(self.act_pre_scale).view(ranks, -1)
        if self.grouped_dim == 0 or not torch.equal(every, every[:1].expand_as(every)):
            raise errors.value(
                "shards of a weight with act_pre_scale are gathered along their out features",
                "shards of the in features",
            )
    return in_logical_order(self, gather, [self.shape[0] * ranks, *self.shape[1:]])


@implements(
    [
        op.default
        for name in ("wait_tensor", "_wrap_tensor_autograd")
        if (op := getattr(_FUNCTIONAL, name, None))
    ]
)
def _(func, types, args, kwargs):
    """Nothing to wait for: see above."""
    return aliased(args[0])
