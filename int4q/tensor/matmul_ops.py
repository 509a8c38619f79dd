"""Matmuls and embedding, once for all layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from int4q import errors
from int4q.kernels.fp8 import scaled_back
from int4q.ops import run_stack
from int4q.tensor.arguments import overrides, overrides_in_place
from int4q.tensor.base import Int4TensorBase
from int4q.tensor.shape_ops import select_index, take, transpose

aten = torch.ops.aten


# --- products ------------------------------------------------------------------------------------


def _autocast(x: Tensor) -> Tensor:
    """What a plain matmul does to its activation under ``torch.autocast``."""
    if not torch._C._is_any_autocast_enabled():
        return x
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
    if not x.is_floating_point():
        raise errors.type_("the activation must be floating-point", x.dtype)
    return w.dequantize(x.dtype)


def _on_activation(x: Tensor, w: Int4TensorBase, product: Callable[..., Tensor]) -> Tensor:
    """``product(activation, act_pre_scale)``, the activation quantised to float8 if ``w`` asks."""
    x = _autocast(x)
    if w.activation_dtype != torch.float8_e4m3fn:
        return product(x, w.act_pre_scale)
    values, rows = torch.ops.int4q.fp8_rows(x, w.act_pre_scale)
    return scaled_back(product(values, None), rows, None, x.dtype)


def added(bias: Tensor, product: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * product`` in the dtype and shape of ``product``.

    As in ``torch.addmm``, ``beta = 0`` leaves ``bias`` out, NaN and all.

    Raises:
        TypeError: ``bias`` is a 4-bit weight.
        ValueError: ``bias`` does not broadcast to the product.
    """
    if isinstance(bias, Int4TensorBase):
        raise errors.type_("what is added must be a plain tensor", type(bias).__name__)
    shape, lead = product.shape, product.ndim - bias.ndim
    pairs = zip(bias.shape, shape[max(lead, 0) :], strict=False)
    if lead < 0 or not all(b in (1, p) for b, p in pairs):
        raise errors.value(
            f"bias must have shape {errors.dims(shape[-1:])} or broadcast to {errors.dims(shape)}",
            errors.dims(bias.shape),
        )
    product = product if alpha == 1 else alpha * product
    if beta == 0:
        return product
    bias = bias.to(product.dtype)
    return product + (bias if beta == 1 else beta * bias)


def linear(x: Tensor, w: Int4TensorBase, bias: Tensor | None = None) -> Tensor:
    """``x [.., K] @ w.T + bias`` for a logical ``w [N, K]``, in ``x``'s dtype.

    Grouped along K (as quantised) it runs on the 4-bit parts; grouped along N (a transposed
    weight) no kernel fits and the weight is dequantised. A bias other than ``[N]`` broadcasts.
    """
    _only_weight("linear", x, w)
    if len(w.block_size) == 2 and w.block_size[1] > 1:
        return linear_along_groups(x, w, bias)
    x = _autocast(x)
    if bias is not None and bias.shape != w.shape[:1]:
        return added(bias, linear(x, w))
    return F.linear(x, _dequantized(w, x), None if bias is None else bias.to(x.dtype))


def linear_along_groups(x: Tensor, w: Int4TensorBase, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` for a ``w [N, K]`` grouped along K.

    ``w`` may be anything that holds a weight's parts and has its layout's ``_linear``. Its logical
    shape is not asked for: on a tensor subclass that costs a dispatch.
    """
    x = _autocast(x)
    if bias is not None and bias.shape != w.qdata.shape[:1]:
        return added(bias, w._linear(x, None))
    return w._linear(x, bias)


def matmul(x: Tensor, w: Int4TensorBase) -> Tensor:
    """``x @ w`` in torch's plain meaning: it contracts the last but one dim of ``w``.

    Leading dims broadcast as ``torch.matmul`` says; either operand may be the 4-bit one.
    """
    if isinstance(x, Int4TensorBase):
        return _weight_first(x, w)
    _only_weight("matmul", x, w)
    if w.ndim == 2:
        return linear(x, transpose(w, 0, 1))
    if w.ndim == 3 and w.grouped_dim == 1:
        return bmm(x, w) if x.ndim == 3 and x.shape[0] == w.shape[0] else _broadcast(x, w)
    x = _autocast(x)
    return torch.matmul(x, _dequantized(w, x))


def _weight_first(w: Int4TensorBase, x: Tensor) -> Tensor:
    """``w @ x`` by ``(x.T @ w.T).T``: it contracts the last dim of ``w``."""
    if isinstance(x, Int4TensorBase):
        raise errors.type_("matmul takes a plain activation", type(x).__name__, "Dequantize it")
    if w.ndim == 1:
        x = _autocast(x)
        return torch.matmul(_dequantized(w, x), x)
    turned = transpose(w, -1, -2)
    return matmul(x, turned) if x.ndim == 1 else matmul(x.mT, turned).mT


def _broadcast(x: Tensor, w: Int4TensorBase) -> Tensor:
    """``x [.., M, K] @ w [B, K, N]``, the batch of ``w`` against the last leading dim of ``x``."""
    rows = x.unsqueeze(0) if x.ndim == 1 else x
    lead = torch.broadcast_shapes(rows.shape[:-2], w.shape[:1])
    rows = rows.expand(*lead, *rows.shape[-2:])
    if w.shape[0] == 1:
        y = linear(rows, transpose(select_index(w, 0, 0), 0, 1))
    else:
        rows = rows.movedim(-3, 0)  # [B, .., M, K]
        y = bmm(rows.flatten(1, -2), w).unflatten(1, rows.shape[1:-1]).movedim(0, -3)
    return y.squeeze(-2) if x.ndim == 1 else y


def bmm(x: Tensor, w: Int4TensorBase) -> Tensor:
    """``x [B, M, K]`` times a stack, to ``[B, M, N]``; a stack times ``x`` in the plain meaning.

    The grouped dim of ``w`` is the one contracted: a stack as quantised, ``[B, N, K]``
    (torchao's convention), and its transpose ``[B, K, N]`` (torch's plain meaning) give the same.
    """
    if isinstance(x, Int4TensorBase):
        _check_dims("bmm", (3, 3), x, w)
        return matmul(x, w)
    _only_weight("bmm", x, w)
    if w.ndim != 3 or w.grouped_dim == 0:
        raise errors.value(
            "bmm takes a 3-D weight grouped along one of its last two dims",
            f"{errors.dims(w.shape)} with block_size {w.block_size}",
        )
    weight = *w._weight_parts(), w.group_size
    return _on_activation(x, w, lambda x, pre: run_stack("int4_bmm", x, *weight, pre))


def grouped_mm(
    x: Tensor,
    w: Int4TensorBase,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
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
        y = grouped_along_groups(x, w, offs)
    else:
        raise errors.value(
            "grouped_mm takes x [T, K], w [E, K, N] grouped along K, and offs [E]",
            f"x {errors.dims(x.shape)}, w {errors.dims(w.shape)} with block_size {w.block_size}",
            "Quantise experts as [E, N, K] and pass w.transpose(-2, -1)",
        )
    return y if out_dtype is None else y.to(out_dtype)


def grouped_along_groups(x: Tensor, w: Int4TensorBase, offs: Tensor) -> Tensor:
    """:func:`grouped_mm` for a ``w`` grouped along the contracted dim, or what holds its parts."""
    weight = *w._weight_parts(), w.group_size, offs
    return _on_activation(x, w, lambda x, pre: run_stack("int4_grouped_mm", x, *weight, pre))


# --- the functions of torch, each under its own parameter names -----------------------------------


def _check_dims(op: str, ndims: tuple[int, int], left: Tensor, right: Tensor) -> None:
    """Both operands have the dims that ``op`` takes, and a batch is not broadcast."""
    same_batch = ndims != (3, 3) or left.shape[:1] == right.shape[:1]
    if (left.ndim, right.ndim) != ndims or not same_batch:
        batch = " of one batch" if ndims == (3, 3) else ""
        raise errors.value(
            f"{op} takes operands of {ndims[0]} and {ndims[1]} dims{batch}",
            f"{errors.dims(left.shape)} and {errors.dims(right.shape)}",
            "torch.matmul broadcasts",
        )


@overrides(F.linear, aten.linear.default)
def _linear(input, weight, bias=None):
    return linear(input, weight, bias)


@overrides(torch.matmul, Tensor.matmul, Tensor.__matmul__, aten.matmul.default)
def _matmul(input, other):
    return matmul(input, other)


@overrides(torch.bmm, Tensor.bmm)
def _bmm(input, mat2):
    return bmm(input, mat2)


@overrides(torch.mm, Tensor.mm, aten.mm.default)
def _mm(input, mat2):
    _check_dims("mm", (2, 2), input, mat2)
    return matmul(input, mat2)


@overrides(aten.bmm.default)
def _plain_bmm(input, mat2):
    _check_dims("bmm", (3, 3), input, mat2)
    return matmul(input, mat2)


@overrides(torch.mv, Tensor.mv, aten.mv.default)
def _mv(input, vec):
    _check_dims("mv", (2, 1), input, vec)
    return matmul(input, vec)


@overrides(torch.addmm, Tensor.addmm, aten.addmm.default)
def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    return added(input, _mm(mat1, mat2), beta, alpha)


@overrides(torch.addmv, Tensor.addmv, aten.addmv.default)
def _addmv(input, mat, vec, *, beta=1, alpha=1):
    return added(input, _mv(mat, vec), beta, alpha)


@overrides(torch.baddbmm, Tensor.baddbmm)
def _baddbmm(input, batch1, batch2, *, beta=1, alpha=1):
    if not isinstance(batch1, Int4TensorBase) and not isinstance(batch2, Int4TensorBase):
        return torch.baddbmm(input.dequantize(), batch1, batch2, beta=beta, alpha=alpha)
    return added(input, bmm(batch1, batch2), beta, alpha)


@overrides(torch.addbmm, Tensor.addbmm)
def _addbmm(input, batch1, batch2, *, beta=1, alpha=1):
    return added(input, bmm(batch1, batch2).sum(0), beta, alpha)


for _method, _handler in (
    (Tensor.addmm_, _addmm),
    (Tensor.addmv_, _addmv),
    (Tensor.baddbmm_, _baddbmm),
    (Tensor.addbmm_, _addbmm),
):
    overrides_in_place(_method, _handler)


@overrides(
    *(f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f),
    aten._grouped_mm.default,
)
def _grouped_mm(input, mat2, offs=None, bias=None, out_dtype=None):
    return grouped_mm(input, mat2, offs, bias, out_dtype)


@overrides(F.embedding)
def _embedding(
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


@overrides(torch.embedding, aten.embedding.default)
def _rows_of(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return take(weight, 0, indices).dequantize()
