"""Matmuls, embedding, and the ops that copy, cast and compare, once for all layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from int4q import errors
from int4q.kernels.fp8 import scaled_back
from int4q.ops import SCALE_DTYPES
from int4q.tensor.base import Int4TensorBase
from int4q.tensor.shape_ops import aliased, take, transpose

aten = torch.ops.aten
implements = Int4TensorBase.implements
implements_torch_function = Int4TensorBase.implements_torch_function


# --- matmuls ------------------------------------------------------------------------------------


def _autocast(x: Tensor) -> Tensor:
    """What a plain matmul does to its activation under ``torch.autocast``."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _only_weight(op: str, x: Tensor, w: Tensor) -> None:
    if isinstance(x, Int4TensorBase):
        raise errors.type_(f"{op} takes a plain activation", type(x).__name__, "Dequantize it")
    if not isinstance(w, Int4TensorBase):
        raise errors.type_(f"{op} takes the 4-bit tensor as its weight", type(w).__name__)


def _dequantized(w: Int4TensorBase, x: Tensor) -> Tensor:
    """The weight for a product that contracts another dim than the grouped one."""
    if w.act_pre_scale is not None:
        raise errors.value(
            f"a weight with act_pre_scale contracts its grouped dim {w.grouped_dim}", "another one"
        )
    return w.dequantize(x.dtype)


def _on_activation(x: Tensor, w: Int4TensorBase, product: Callable[..., Tensor]) -> Tensor:
    """``product(activation, act_pre_scale)``, the activation quantised to float8 if ``w`` asks."""
    x = _autocast(x)
    if w.activation_dtype != torch.float8_e4m3fn:
        return product(x, w.act_pre_scale)
    values, rows = torch.ops.int4q.fp8_rows(x, w.act_pre_scale)
    return scaled_back(product(values, None), rows, None, x.dtype)


def linear(x: Tensor, w: Int4TensorBase, bias: Tensor | None = None) -> Tensor:
    """``x [.., K] @ w.T + bias`` for a logical ``w [N, K]``, in ``x``'s dtype.

    Grouped along K (as quantised) it runs on the 4-bit parts; grouped along N (a transposed
    weight) no kernel fits and the weight is dequantised.
    """
    _only_weight("linear", x, w)
    x = _autocast(x)
    if bias is not None and bias.shape != w.shape[:1]:
        raise errors.value(
            f"bias must have shape {errors.dims(w.shape[:1])}", errors.dims(bias.shape)
        )
    if len(w.block_size) != 2 or w.grouped_dim != 1:  # (``w.ndim`` would be dispatched: 1 us)
        return F.linear(x, _dequantized(w, x), None if bias is None else bias.to(x.dtype))
    return w._linear(x, bias)


def weight_first(op: str, w: Int4TensorBase, x: Tensor) -> Tensor:
    """``w [.., N, K] @ x [.., K, M]`` by ``(x.T @ w.T).T``, in ``x``'s dtype.

    The plain meaning, for ``bmm`` too: it contracts the last dim of ``w`` and the last but one
    of ``x``.
    """
    _only_weight(op, x, w)
    if w.ndim < 2 or x.ndim != w.ndim:
        raise errors.value(
            f"{op} of a 4-bit weight and an activation takes the same number of dims, 2 or 3",
            f"{errors.dims(w.shape)} and {errors.dims(x.shape)}",
        )
    return matmul(x.transpose(-1, -2), transpose(w, -1, -2)).transpose(-1, -2)


def matmul(x: Tensor, w: Int4TensorBase) -> Tensor:
    """``x @ w`` in torch's plain meaning: it contracts the last but one dim of ``w``."""
    if isinstance(x, Int4TensorBase):
        return weight_first("matmul", x, w)
    _only_weight("matmul", x, w)
    if w.ndim == 2:
        return linear(x, transpose(w, 0, 1))
    if w.ndim == 3 and x.ndim == 3 and w.grouped_dim == 1:
        return bmm(x, w)
    x = _autocast(x)
    return torch.matmul(x, _dequantized(w, x))


def bmm(x: Tensor, w: Int4TensorBase) -> Tensor:
    """``x [B, M, K]`` times a stack, to ``[B, M, N]``; a stack times ``x``: :func:`weight_first`.

    The grouped dim of ``w`` is the one contracted: a stack as quantised, ``[B, N, K]``
    (torchao's convention), and its transpose ``[B, K, N]`` (torch's plain meaning) give the same.
    """
    if isinstance(x, Int4TensorBase):
        return weight_first("bmm", x, w)
    _only_weight("bmm", x, w)
    if w.ndim != 3 or w.grouped_dim == 0:
        raise errors.value(
            "bmm takes a 3-D weight grouped along one of its last two dims",
            f"{errors.dims(w.shape)} with block_size {w.block_size}",
        )
    weight = *w._weight_parts(), w.group_size
    op = torch.ops.int4q.int4_bmm
    return _on_activation(x, w, lambda x, act_pre_scale: op(x, *weight, act_pre_scale))


def grouped_mm(x: Tensor, w: Int4TensorBase, offs: Tensor | None = None, bias=None, out_dtype=None):
    """Rows of ``x [T, K]`` sorted by expert times ``w [E, K, N]`` (a transposed stack).

    Args:
        offs: int32 ``[E]``, the end row of each expert; rows past the last end give 0.

    Raises:
        ValueError: ``w`` is not grouped along the contracted dim, or shapes do not fit.
    """
    _only_weight("grouped_mm", x, w)
    if bias is not None:
        raise errors.value("grouped_mm takes no bias", errors.dims(bias.shape))
    if x.ndim == 3 and offs is None:
        y = matmul(x, w)
    elif w.ndim == 3 and w.grouped_dim == 1 and offs is not None:
        weight = *w._weight_parts(), w.group_size, offs
        op = torch.ops.int4q.int4_grouped_mm
        y = _on_activation(x, w, lambda x, act_pre_scale: op(x, *weight, act_pre_scale))
    else:
        raise errors.value(
            "grouped_mm takes x [T, K], w [E, K, N] grouped along K, and offs [E]",
            f"x {errors.dims(x.shape)}, w {errors.dims(w.shape)} with block_size {w.block_size}",
            "Quantise experts as [E, N, K] and pass w.transpose(-2, -1)",
        )
    return y if out_dtype is None else y.to(out_dtype)


@implements_torch_function(F.linear)
@implements(aten.linear.default)
def _(func, types, args, kwargs):
    return _linear(*args, **kwargs)


def _linear(input, weight, bias=None):
    """:func:`linear` under the argument names of torch."""
    return linear(input, weight, bias)


@implements_torch_function([torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__])
@implements_torch_function([torch.mm, torch.Tensor.mm])
@implements([aten.mm.default, aten.matmul.default, aten.bmm.default])
def _(func, types, args, kwargs):
    return matmul(*args)


@implements_torch_function([torch.bmm, torch.Tensor.bmm])
def _(func, types, args, kwargs):
    return bmm(*args)


@implements(aten.addmm.default)
def _(func, types, args, kwargs):
    bias, x, w = args
    return kwargs.get("alpha", 1) * matmul(x, w) + kwargs.get("beta", 1) * bias


@implements_torch_function(
    [f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f]
)
@implements(aten._grouped_mm.default)
def _(func, types, args, kwargs):
    return grouped_mm(*args, **kwargs)


@implements_torch_function(F.embedding)
def _(func, types, args, kwargs):
    def embedding(
        input,
        weight,
        padding_idx=None,
        max_norm=None,
        norm_type=2.0,
        scale_grad_by_freq=False,
        sparse=False,
    ):
        if max_norm is not None:
            raise errors.value("a 4-bit embedding takes no max_norm", max_norm)
        return take(weight, 0, input).dequantize()

    return embedding(*args, **kwargs)


@implements(aten.embedding.default)
def _(func, types, args, kwargs):
    weight, indices = args[:2]
    return take(weight, 0, indices).dequantize()


# --- copying, casting, comparing ------------------------------------------------------------------


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    """``.to(device)`` moves every part; ``.to(dtype)`` casts scale and zero_point."""
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **{k: v for k, v in kwargs.items() if v is not None})
    dtype = to.pop("dtype")
    if dtype not in SCALE_DTYPES:
        raise errors.type_(
            f"a 4-bit weight can be cast to {errors.dtypes(SCALE_DTYPES)}",
            dtype,
            f"Use .dequantize({dtype}) for a plain tensor",
        )

    def copy(t: Tensor) -> Tensor:
        return t.to(**to, dtype=dtype if t.is_floating_point() else t.dtype, copy=True)

    return return_and_correct_aliasing(func, args, kwargs, self._apply_fn_to_data(copy))


@implements(aten.copy_.default)
def _(func, types, args, kwargs):
    """In place, from a weight of the same shape and groups in any layout."""
    self, src = args[0], args[1]
    if not hasattr(src, "to_int4_tensor"):
        raise errors.type_(
            f"copy_ into a {type(self).__name__} takes a 4-bit weight",
            type(src).__name__,
            "Quantise it with from_hp first",
        )
    src = self._in_my_layout(src)
    if self.shape != src.shape or self.block_size != src.block_size:
        raise errors.value(
            f"copy_ needs shape {errors.dims(self.shape)} and block_size {self.block_size}",
            f"{errors.dims(src.shape)} and {src.block_size}",
        )
    if (self.act_pre_scale is None) != (src.act_pre_scale is None):
        raise errors.value("either both sides of copy_ have an act_pre_scale or none", "one has")
    for name, part in self.data_tensors().items():
        part.copy_(getattr(src, name))
    return self


@implements([aten.empty_like.default, aten.zeros_like.default])
def _(func, types, args, kwargs):
    """Parts of the same shape on the asked device; a dtype is that of scale and zero_point."""
    self = args[0]
    dtype = kwargs.pop("dtype", None) or self.dtype
    kwargs.pop("memory_format", None)
    return self._apply_fn_to_data(
        lambda t: func(t, dtype=dtype if t.is_floating_point() else t.dtype, **kwargs)
    )


@implements(aten.equal.default)
def _(func, types, args, kwargs):
    """Same class, shape, groups, and bytes of every part."""
    a, b = args
    if type(a) is not type(b) or a.shape != b.shape or a.block_size != b.block_size:
        return False
    left, right = a.data_tensors(), b.data_tensors()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@implements(aten.is_pinned.default)
def _(func, types, args, kwargs):
    return args[0].is_pinned()


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
