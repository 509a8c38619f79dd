"""``experts_permute`` and ``experts_combine``: tokens to experts and back."""

from __future__ import annotations

import torch
from torch import Tensor

from int4q import errors
from int4q.kernels import routing
from int4q.ops import cuda
from int4q.ops.define import define

# --- experts_permute: top_k_index [T, top_k] -> token, offs, position, expert --------------------


def _check_index(top_k_index: Tensor, n_experts: int) -> None:
    if top_k_index.dtype not in (torch.int64, torch.int32):
        raise errors.type_("top_k_index must be int64 or int32", top_k_index.dtype)
    if top_k_index.ndim != 2:
        raise errors.value("top_k_index must be [T, top_k]", errors.dims(top_k_index.shape))
    if n_experts < 1:
        raise errors.value("n_experts must be positive", n_experts)


def _experts_permute(top_k_index, n_experts):
    _check_index(top_k_index, n_experts)
    return routing.run(routing.PERMUTE, top_k_index, top_k_index.numel(), n_experts)


def _experts_permute_fake(top_k_index, n_experts):
    _check_index(top_k_index, n_experts)
    S = top_k_index.numel()
    return tuple(top_k_index.new_empty(n, dtype=torch.int32) for n in (S, n_experts, S, S))


# --- experts_combine: y [S, H] -> [T, H] ----------------------------------------------------------


def _check_combine(y, position, top_k_index, top_k_weights, n_experts) -> None:
    _check_index(top_k_index, n_experts)
    if not y.is_floating_point() or not top_k_weights.is_floating_point():
        raise errors.type_(
            "y and top_k_weights must be floating-point", f"{y.dtype} and {top_k_weights.dtype}"
        )
    if top_k_weights.shape != top_k_index.shape:
        raise errors.value(
            f"top_k_weights must be {errors.dims(top_k_index.shape)} as top_k_index",
            errors.dims(top_k_weights.shape),
        )
    S = top_k_index.numel()
    if y.ndim != 2 or y.shape[0] != S or position.shape != (S,):
        raise errors.value(
            f"y must be [{S}, H] and position [{S}], a row for each entry of top_k_index",
            f"{errors.dims(y.shape)} and {errors.dims(position.shape)}",
        )


def _experts_combine(y, position, top_k_index, top_k_weights, n_experts):
    _check_combine(y, position, top_k_index, top_k_weights, n_experts)
    rest = position, top_k_index, top_k_weights, n_experts
    return routing.run(routing.COMBINE, y, y.shape[0], *rest)


def _experts_combine_fake(y, position, top_k_index, top_k_weights, n_experts):
    _check_combine(y, position, top_k_index, top_k_weights, n_experts)
    return y.new_empty((top_k_index.shape[0], y.shape[1]))


def _save(ctx, inputs, output):
    *tensors, ctx.n_experts = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx, grad):
    y, position, index, weights = ctx.saved_tensors
    here = (index < ctx.n_experts).unsqueeze(-1)
    grad = grad.unsqueeze(1).where(here, 0)  # [T, top_k, H]
    grad_y = grad_weights = None
    if ctx.needs_input_grad[0]:
        rows = (grad * weights.unsqueeze(-1)).flatten(0, 1).to(y.dtype)
        grad_y = torch.zeros_like(y).index_put((position,), rows)
    if ctx.needs_input_grad[3]:
        rows = y[position].view_as(grad).where(here, 0)
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_weights = (grad * rows).sum(-1, dtype=wide).to(weights.dtype)
    return grad_y, None, None, grad_weights, None


def _jvp(inputs, tangents):
    y, position, index, weights, n_experts = inputs
    parts = []
    for tangent, args in ((tangents[0], (None, weights)), (tangents[3], (y, None))):
        if tangent is not None:
            first, last = (tangent if a is None else a for a in args)
            combined = torch.ops.int4q.experts_combine(first, position, index, last, n_experts)
            parts.append(combined)
    return sum(parts) if parts else torch.zeros_like(y[: index.shape[0]])


# --- past the dispatcher where that would add nothing ---------------------------------------------


def experts_permute(top_k_index: Tensor, n_experts: int) -> list[Tensor]:
    """The op, see :func:`int4q.kernels.routing.permute`."""
    if top_k_index.is_cuda and cuda.dispatches_nothing(top_k_index, None) and cuda.by_core():
        return cuda.run(routing.PERMUTE, top_k_index, n_experts)
    return torch.ops.int4q.experts_permute(top_k_index, n_experts)


def experts_combine(
    y: Tensor, position: Tensor, top_k_index: Tensor, top_k_weights: Tensor, n_experts: int
) -> Tensor:
    """The op, see :func:`int4q.kernels.routing.combine`; derivatives in y and the weights."""
    parts = y, position, top_k_index, top_k_weights, n_experts
    if y.is_cuda and cuda.dispatches_nothing(y, top_k_weights) and cuda.by_core():
        return cuda.run(routing.COMBINE, *parts)
    return torch.ops.int4q.experts_combine(*parts)


define(
    "experts_permute(Tensor top_k_index, int n_experts)",
    _experts_permute,
    _experts_permute_fake,
    returns="(Tensor, Tensor, Tensor, Tensor)",
)
define(
    "experts_combine(Tensor y, Tensor position, Tensor top_k_index, Tensor top_k_weights, "
    "int n_experts)",
    _experts_combine,
    _experts_combine_fake,
    _grad,
    _save,
    jvp=_jvp,
    also="top_k_weights",
)
