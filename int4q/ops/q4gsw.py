"""``linear_q4gsw``: 4-bit groupwise symmetric weights, float32 activations.

The op that portable GPU backends define: ``weights`` uint8 ``[N, K/2]`` in offset binary (even k
in the low nibble, ``u = q + 8``), ``weight_scales`` ``[K/group_size, N]``, and
``value[n, k] = (u[n, k] - 8) * weight_scales[k // group_size, n]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4q import errors
from int4q.kernels.weight import Weight
from int4q.ops.define import SCALE_DTYPES, count_flops, define, run_2d

_WEIGHT = "Tensor weights, Tensor weight_scales, int group_size"


def _check_weight(weights: Tensor, weight_scales: Tensor, group_size: int) -> None:
    if weights.dtype != torch.uint8 or weights.ndim != 2:
        raise errors.type_(
            "weights must be uint8 [N, K/2]", f"{weights.dtype} {errors.dims(weights.shape)}"
        )
    N, K = weights.shape[0], 2 * weights.shape[1]
    if group_size <= 0 or K % group_size:
        raise errors.value("group_size must be positive and divide K", f"{group_size} for K {K}")
    if weight_scales.dtype not in SCALE_DTYPES:
        raise errors.type_(
            f"weight_scales must be {errors.dtypes(SCALE_DTYPES)}", weight_scales.dtype
        )
    n_groups = K // group_size
    if weight_scales.shape != (n_groups, N):
        turned = weight_scales.shape == (N, n_groups)
        raise errors.value(
            f"weight_scales must have shape [K/group_size, N] = {errors.dims((n_groups, N))}",
            errors.dims(weight_scales.shape),
            "Scales [N, K/group_size] go in through .mT" if turned else "",
        )
    if weight_scales.device != weights.device:
        raise errors.value(f"weight_scales must be on {weights.device}", weight_scales.device)


def _check_rows(name: str, x: Tensor, weights: Tensor, last: int) -> None:
    if x.dtype != torch.float32:
        raise errors.type_(f"{name} must be float32", x.dtype)
    if x.ndim == 0 or x.shape[-1] != last:
        raise errors.value(
            f"the last dim of {name} must be {last} to meet the weight", errors.dims(x.shape)
        )
    if x.device != weights.device:
        raise errors.value(f"{name} must be on the weight's device {weights.device}", x.device)


def _check(x, weights, weight_scales, group_size, bias) -> None:
    _check_weight(weights, weight_scales, group_size)
    _check_rows("x", x, weights, 2 * weights.shape[1])
    if bias is None:
        return
    if bias.dtype != torch.float32:
        raise errors.type_("bias must be float32", bias.dtype)
    if bias.shape != (weights.shape[0],):
        raise errors.value(f"bias must have shape [{weights.shape[0]}]", errors.dims(bias.shape))
    if bias.device != weights.device:
        raise errors.value(f"bias must be on {weights.device}", bias.device)


def _linear_q4gsw(x, weights, weight_scales, group_size, bias=None):
    _check(x, weights, weight_scales, group_size, bias)
    return run_2d("linear_q4gsw", x, _weight(weights, weight_scales, group_size), bias)


def _weight(weights: Tensor, weight_scales: Tensor, group_size: int) -> Weight:
    return Weight(weights.view(torch.int8), weight_scales, None, group_size, signed=False)


def _linear_q4gsw_fake(x, weights, weight_scales, group_size, bias=None):
    _check(x, weights, weight_scales, group_size, bias)
    return x.new_empty((*x.shape[:-1], weights.shape[0]))


def _backward(grad_out, weights, weight_scales, group_size):
    _check_weight(weights, weight_scales, group_size)
    _check_rows("grad_out", grad_out, weights, weights.shape[0])
    weight = _weight(weights, weight_scales, group_size)
    return run_2d("linear_q4gsw_backward", grad_out, weight)


def _backward_fake(grad_out, weights, weight_scales, group_size):
    return grad_out.new_empty((*grad_out.shape[:-1], 2 * weights.shape[1]))


def _save(ctx, inputs, output):
    _, weights, weight_scales, ctx.group_size, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(weights, weight_scales)


def _grad(ctx, grad):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        args = (grad, *ctx.saved_tensors, ctx.group_size)
        grad_x = torch.ops.int4q.linear_q4gsw_backward(*args)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.sum_to_size(grad.shape[-1])
    return grad_x, None, None, None, grad_bias


define(
    f"linear_q4gsw(Tensor x, {_WEIGHT}, Tensor? bias=None)",
    _linear_q4gsw,
    _linear_q4gsw_fake,
    _grad,
    _save,
)
define(f"linear_q4gsw_backward(Tensor grad_out, {_WEIGHT})", _backward, _backward_fake)
count_flops("linear_q4gsw", -1)
count_flops("linear_q4gsw_backward", -2)
