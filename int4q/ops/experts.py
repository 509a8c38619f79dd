"""``int4_bmm`` and ``int4_grouped_mm``: stacks of weights, ``[B, N, K]``."""

from __future__ import annotations

import torch
from torch import Tensor

from int4q import errors
from int4q.kernels.weight import Weight
from int4q.ops import cuda
from int4q.ops.define import (
    WEIGHT,
    check_activation,
    check_pre_scale,
    check_weight,
    count_flops,
    define,
    kernel,
)

# --- int4_bmm: [B, M, K] x [B, N, K] -> [B, M, N] -----------------------------------------------


def _check_bmm(name, x, qdata, scale, zero_point, group_size, last, act_pre_scale=None) -> None:
    check_weight(qdata, scale, zero_point, group_size, 3)
    if x.ndim != 3 or x.shape[0] != qdata.shape[0]:
        raise errors.value(f"{name} must be 3-D with batch {qdata.shape[0]}", errors.dims(x.shape))
    check_activation(name, x, qdata, last)
    check_pre_scale(x, act_pre_scale)


def _run(op: str, x, weight: Weight, *rest):
    """The chosen kernel; M of the problem is the rows of all experts together."""
    shape = x.numel() // max(1, x.shape[-1]), weight.N, weight.K, weight.group_size
    run = kernel(op, x, weight.scale, *shape, experts=weight.qdata.shape[0])
    return run(x, weight, *rest)


def _int4_bmm(x, qdata, scale, zero_point, group_size, act_pre_scale=None):
    K = 2 * qdata.shape[-1]
    _check_bmm("x", x, qdata, scale, zero_point, group_size, K, act_pre_scale)
    return _run("int4_bmm", x, Weight(qdata, scale, zero_point, group_size), act_pre_scale)


def _int4_bmm_fake(x, qdata, scale, zero_point, group_size, act_pre_scale=None):
    K = 2 * qdata.shape[-1]
    _check_bmm("x", x, qdata, scale, zero_point, group_size, K, act_pre_scale)
    return x.new_empty((*x.shape[:-1], qdata.shape[1]))


def _int4_bmm_backward(grad, qdata, scale, zero_point, group_size):
    _check_bmm("grad", grad, qdata, scale, zero_point, group_size, qdata.shape[1])
    return _run("int4_bmm_backward", grad, Weight(qdata, scale, zero_point, group_size))


def _int4_bmm_backward_fake(grad, qdata, scale, zero_point, group_size):
    return grad.new_empty((*grad.shape[:-1], 2 * qdata.shape[2]))


def _save_bmm(ctx, inputs, output):
    _, *weight, ctx.group_size, act_pre_scale = inputs
    ctx.save_for_backward(*weight, act_pre_scale)


def _bmm_grad(ctx, grad):
    *weight, act_pre_scale = ctx.saved_tensors
    grad_x = torch.ops.int4q.int4_bmm_backward(grad, *weight, ctx.group_size)
    return _times(grad_x, act_pre_scale), None, None, None, None, None


def _times(grad_x, act_pre_scale):
    if act_pre_scale is None:
        return grad_x
    return grad_x * act_pre_scale.reshape(-1).to(grad_x.dtype)


def _save_bmm_backward(ctx, inputs, output):
    _, *weight, ctx.group_size = inputs
    ctx.save_for_backward(*weight)


def _bmm_backward_grad(ctx, grad):
    grad_grad = torch.ops.int4q.int4_bmm(grad, *ctx.saved_tensors, ctx.group_size)
    return grad_grad, None, None, None, None


def run_stack(name: str, x: Tensor, *rest) -> Tensor:
    """The op ``name`` of a stack, past the dispatcher where that would add nothing."""
    if x.is_cuda and cuda.dispatches_nothing(x, None) and cuda.by_core():
        return cuda.run(name, x, *rest)
    return getattr(torch.ops.int4q, name)(x, *rest)


# --- int4_grouped_mm: rows of x sorted by expert ------------------------------------------------


def _check_grouped(
    name, x, qdata, scale, zero_point, group_size, offs, last, act_pre_scale=None
) -> None:
    check_weight(qdata, scale, zero_point, group_size, 3)
    if x.ndim != 2:
        raise errors.value(f"{name} must be 2-D", errors.dims(x.shape))
    check_activation(name, x, qdata, last)
    check_pre_scale(x, act_pre_scale)
    if offs.dtype != torch.int32 or offs.shape != (qdata.shape[0],):
        raise errors.value(
            f"offs must be int32 [{qdata.shape[0]}], the end row of each expert",
            f"{offs.dtype} {errors.dims(offs.shape)}",
        )
    if offs.device != qdata.device:
        raise errors.value(f"offs must be on the weight's device {qdata.device}", offs.device)


def _int4_grouped_mm(x, qdata, scale, zero_point, group_size, offs, act_pre_scale=None):
    K = 2 * qdata.shape[-1]
    _check_grouped("x", x, qdata, scale, zero_point, group_size, offs, K, act_pre_scale)
    weight = Weight(qdata, scale, zero_point, group_size)
    return _run("int4_grouped_mm", x, weight, offs, act_pre_scale)


def _int4_grouped_mm_fake(x, qdata, scale, zero_point, group_size, offs, act_pre_scale=None):
    K = 2 * qdata.shape[-1]
    _check_grouped("x", x, qdata, scale, zero_point, group_size, offs, K, act_pre_scale)
    return x.new_empty((x.shape[0], qdata.shape[1]))


def _int4_grouped_mm_backward(grad, qdata, scale, zero_point, group_size, offs):
    _check_grouped("grad", grad, qdata, scale, zero_point, group_size, offs, qdata.shape[1])
    weight = Weight(qdata, scale, zero_point, group_size)
    return _run("int4_grouped_mm_backward", grad, weight, offs)


def _int4_grouped_mm_backward_fake(grad, qdata, scale, zero_point, group_size, offs):
    return grad.new_empty((grad.shape[0], 2 * qdata.shape[2]))


def _save_grouped(ctx, inputs, output):
    _, *weight, ctx.group_size, offs, act_pre_scale = inputs
    ctx.save_for_backward(*weight, offs, act_pre_scale)


def _grouped_grad(ctx, grad):
    *weight, offs, act_pre_scale = ctx.saved_tensors
    grad_x = torch.ops.int4q.int4_grouped_mm_backward(grad, *weight, ctx.group_size, offs)
    return _times(grad_x, act_pre_scale), None, None, None, None, None, None


def _save_grouped_backward(ctx, inputs, output):
    _, *weight, ctx.group_size, offs = inputs
    ctx.save_for_backward(*weight, offs)


def _grouped_backward_grad(ctx, grad):
    *weight, offs = ctx.saved_tensors
    grad_grad = torch.ops.int4q.int4_grouped_mm(grad, *weight, ctx.group_size, offs)
    return grad_grad, None, None, None, None, None


define(
    f"int4_bmm(Tensor x, {WEIGHT}, Tensor? act_pre_scale=None)",
    _int4_bmm,
    _int4_bmm_fake,
    _bmm_grad,
    _save_bmm,
)
define(
    f"int4_bmm_backward(Tensor grad, {WEIGHT})",
    _int4_bmm_backward,
    _int4_bmm_backward_fake,
    _bmm_backward_grad,
    _save_bmm_backward,
)
define(
    f"int4_grouped_mm(Tensor x, {WEIGHT}, Tensor offs, Tensor? act_pre_scale=None)",
    _int4_grouped_mm,
    _int4_grouped_mm_fake,
    _grouped_grad,
    _save_grouped,
)
define(
    f"int4_grouped_mm_backward(Tensor grad, {WEIGHT}, Tensor offs)",
    _int4_grouped_mm_backward,
    _int4_grouped_mm_backward_fake,
    _grouped_backward_grad,
    _save_grouped_backward,
)
for _name in ("int4_bmm", "int4_grouped_mm"):
    count_flops(_name, -1)
    count_flops(f"{_name}_backward", -2)
