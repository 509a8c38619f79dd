"""``int4_linear`` and ``int4_plain_mm``: one weight, any rows of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from int4q import errors
from int4q.kernels import reference
from int4q.kernels.weight import Weight
from int4q.ops import cuda
from int4q.ops.autograd import linear_jvp
from int4q.ops.cuda import dispatches_nothing
from int4q.ops.define import (
    WEIGHT,
    check_activation,
    check_linear,
    check_weight,
    count_flops,
    define,
    run_2d,
)


def _int4_linear(x, qdata, scale, zero_point, group_size, bias=None, act_pre_scale=None):
    check_linear(x, qdata, scale, zero_point, group_size, bias, act_pre_scale)
    weight = Weight(qdata, scale, zero_point, group_size)
    return run_2d("int4_linear", x, weight, bias, act_pre_scale)


def linear_fake(x, qdata, scale, zero_point, group_size, bias=None, act_pre_scale=None):
    check_linear(x, qdata, scale, zero_point, group_size, bias, act_pre_scale)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


def _int4_linear_backward(grad, qdata, scale, zero_point, group_size):
    check_weight(qdata, scale, zero_point, group_size, 2)
    check_activation("grad", grad, qdata, qdata.shape[0])
    return run_2d("int4_linear_backward", grad, Weight(qdata, scale, zero_point, group_size))


def _int4_linear_backward_fake(grad, qdata, scale, zero_point, group_size):
    return grad.new_empty((*grad.shape[:-1], 2 * qdata.shape[1]))


def _save_linear_backward(ctx, inputs, output):
    _, *weight, ctx.group_size = inputs
    ctx.save_for_backward(*weight)


def _linear_backward_grad(ctx, grad):
    """The transpose of ``grad @ W`` is ``x @ W.T``: second derivatives come back to the forward."""
    grad_grad = torch.ops.int4q.int4_linear(grad, *ctx.saved_tensors, ctx.group_size)
    return grad_grad, None, None, None, None


def save_linear(ctx, inputs, output):
    *weight, bias, act_pre_scale = inputs
    ctx.save_for_backward(*weight[1:4], act_pre_scale)
    ctx.group_size, ctx.bias_dtype = weight[4], None if bias is None else bias.dtype


def linear_grad(ctx, grad):
    *weight, act_pre_scale = ctx.saved_tensors
    return _grads(ctx, grad, weight, act_pre_scale)


def _backward(*parts):
    """``int4_linear_backward``, without the dispatcher where it would add nothing."""
    grad = parts[0]
    if grad.is_cuda and dispatches_nothing(grad, None) and cuda.by_core():
        return cuda.run("int4_linear_backward", *parts)
    return torch.ops.int4q.int4_linear_backward(*parts)


def _grads(ctx, grad, weight, act_pre_scale):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _backward(grad, *weight, ctx.group_size)
        if act_pre_scale is not None:
            grad_x = grad_x * act_pre_scale.reshape(-1).to(grad_x.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None


# --- int4_plain_mm: int8 activations for few rows, W4A16 above ---------------------------------


def _check_plain_mm(x, qdata, scale, zero_point, group_size, bias=None, act_pre_scale=None) -> None:
    K = 2 * qdata.shape[-1] if qdata.ndim == 2 else 0
    if K and group_size > 0 and K % group_size == 0:  # (anything else is said below)
        expected = (qdata.shape[0], K // group_size)
        for name, part in (("scale", scale), ("zero_point", zero_point)):
            if part.shape != expected:
                raise errors.value(
                    f"{name} must have shape [N, n_groups] = {errors.dims(expected)}",
                    errors.dims(part.shape),
                    "Repack a plain [n_groups, N] weight with "
                    "CudaCoalescedInt4Tensor.from_int4_tensor",
                )
    check_linear(x, qdata, *turned(scale, zero_point), group_size, bias, act_pre_scale)
    if group_size % reference.INT8_BLOCK:
        raise errors.value(
            f"group_size must be a multiple of {reference.INT8_BLOCK}, the activations that share "
            "an int8 scale",
            group_size,
        )


def turned(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """The coalesced ``[N, n_groups]`` parts as kernels index them, ``[n_groups, N]`` (views)."""
    return (scale.mT, zero_point.mT) if scale.ndim == zero_point.ndim == 2 else (scale, zero_point)


def _run_plain_mm(x, qdata, scale, zero_point, group_size, bias, act_pre_scale, int8_activations):
    op = "int4_plain_mm" if int8_activations else "int4_plain_mm_w4a16"
    weight = Weight(qdata, scale.mT, zero_point.mT, group_size)
    return run_2d(op, x, weight, bias, act_pre_scale)


def _int4_plain_mm(
    x, qdata, scale, zero_point, group_size, bias=None, act_pre_scale=None, int8_activations=True
):
    parts = x, qdata, scale, zero_point, group_size, bias, act_pre_scale
    _check_plain_mm(*parts)
    return _run_plain_mm(*parts, int8_activations)


def _int4_plain_mm_fake(
    x, qdata, scale, zero_point, group_size, bias=None, act_pre_scale=None, int8_activations=True
):
    _check_plain_mm(x, qdata, scale, zero_point, group_size, bias, act_pre_scale)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


def _save_plain_mm(ctx, inputs, output):
    save_linear(ctx, inputs[:-1], output)


def _plain_mm_grad(ctx, grad):
    qdata, scale, zero_point, act_pre_scale = ctx.saved_tensors
    return *_grads(ctx, grad, (qdata, scale.mT, zero_point.mT), act_pre_scale), None


def _plain_mm_jvp(inputs, tangents):
    """As the gradient: straight through the rounding of activations, so W4A16 on the tangent."""
    jvp = linear_jvp(torch.ops.int4q.int4_plain_mm.default)
    return jvp((*inputs[:-1], False), tangents)


# --- the way in from a tensor ---


def linear_parts(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """``int4_linear`` on the parts of a tensor, which its constructor has checked."""
    parts = x, qdata, scale, zero_point, group_size, bias, act_pre_scale
    if not dispatches_nothing(x, bias):
        return torch.ops.int4q.int4_linear(*parts)
    if x.is_cuda and cuda.by_core():
        return cuda.run("int4_linear", *parts)
    check_activation("x", x, qdata, 2 * qdata.shape[1])
    weight = Weight(qdata, scale, zero_point, group_size)
    return run_2d("int4_linear", x, weight, bias, act_pre_scale)


def coalesced_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    int8_activations: bool = True,
) -> Tensor:
    """``int4_plain_mm`` on the parts of a coalesced tensor, which its constructor has checked."""
    parts = x, qdata, scale, zero_point, group_size, bias, act_pre_scale, int8_activations
    if not dispatches_nothing(x, bias):
        return torch.ops.int4q.int4_plain_mm(*parts)
    if x.is_cuda and cuda.by_core():
        return cuda.run("int4_plain_mm", *parts)
    check_activation("x", x, qdata, 2 * qdata.shape[1])
    return _run_plain_mm(*parts)


define(
    f"int4_linear(Tensor x, {WEIGHT}, Tensor? bias=None, Tensor? act_pre_scale=None)",
    _int4_linear,
    linear_fake,
    linear_grad,
    save_linear,
    any_lead=True,
)
define(
    f"int4_linear_backward(Tensor grad, {WEIGHT})",
    _int4_linear_backward,
    _int4_linear_backward_fake,
    _linear_backward_grad,
    _save_linear_backward,
    any_lead=True,
)
define(
    f"int4_plain_mm(Tensor x, {WEIGHT}, Tensor? bias=None, Tensor? act_pre_scale=None, "
    "bool int8_activations=True)",
    _int4_plain_mm,
    _int4_plain_mm_fake,
    _plain_mm_grad,
    _save_plain_mm,
    jvp=_plain_mm_jvp,
    any_lead=True,
)
for _op, _dim in (("int4_linear", -1), ("int4_linear_backward", -2), ("int4_plain_mm", -1)):
    count_flops(_op, _dim)
