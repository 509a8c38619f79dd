"""``int4_linear_fp8`` and ``fp8_rows``: activations quantised to float8 e4m3, a scale a row."""

from __future__ import annotations

import torch

from int4q import errors
from int4q.kernels import fp8, registry
from int4q.kernels.reference import fp8_values_dtype
from int4q.kernels.weight import Weight
from int4q.ops.autograd import linear_jvp
from int4q.ops.define import ACTIVATION_DTYPES, WEIGHT, check_linear, count_flops, define, run_2d
from int4q.ops.linear import linear_fake, linear_grad, save_linear

# --- fp8_rows: x [.., K] -> values [.., K], rows [.., 1] -----------------------------------------


def _check_rows(x, act_pre_scale) -> None:
    if x.dtype not in ACTIVATION_DTYPES:
        raise errors.type_(f"x must be {errors.dtypes(ACTIVATION_DTYPES)}", x.dtype)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise errors.value("the last dim of x must not be empty", errors.dims(x.shape))
    if act_pre_scale is not None and act_pre_scale.numel() != x.shape[-1]:
        raise errors.value(
            f"act_pre_scale must have {x.shape[-1]} entries", errors.dims(act_pre_scale.shape)
        )


def _fp8_rows(x, act_pre_scale=None):
    _check_rows(x, act_pre_scale)
    flat = x.reshape(-1, x.shape[-1])
    values, rows = fp8.quantize_rows(flat, act_pre_scale, registry.preference())
    # Contiguous whatever the strides of x, as the fake says: elementwise torch keeps them.
    return values.contiguous().view(x.shape), rows.contiguous().view(*x.shape[:-1], 1)


def _fp8_rows_fake(x, act_pre_scale=None):
    _check_rows(x, act_pre_scale)
    values = x.new_empty(x.shape, dtype=fp8_values_dtype(x.dtype))
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _save_rows(ctx, inputs, output):
    x, act_pre_scale = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(act_pre_scale, output[1])


def _rows_grad(ctx, grad_values, grad_rows):
    """Straight through the rounding: ``values * rows`` stands for ``x * act_pre_scale``."""
    act_pre_scale, rows = ctx.saved_tensors
    grad = grad_values / rows
    if act_pre_scale is not None:
        grad = grad * act_pre_scale.reshape(-1)
    return grad.to(ctx.dtype), None


def _rows_jvp(inputs, tangents):
    """As the gradient: all of the tangent in ``values``, none in ``rows``."""
    values, rows = torch.ops.int4q.fp8_rows(*inputs)
    tangent, act_pre_scale = tangents[0], inputs[1]
    if act_pre_scale is not None:
        tangent = tangent * act_pre_scale.reshape(-1)
    return (tangent / rows).to(values.dtype), torch.zeros_like(rows)


# --- int4_linear_fp8 ----------------------------------------------------------------------------


def _int4_linear_fp8(x, qdata, scale, zero_point, group_size, bias=None, act_pre_scale=None):
    check_linear(x, qdata, scale, zero_point, group_size, bias, act_pre_scale)
    weight = Weight(qdata, scale, zero_point, group_size)
    return run_2d("int4_linear_fp8", x, weight, bias, act_pre_scale)


define(
    "fp8_rows(Tensor x, Tensor? act_pre_scale=None)",
    _fp8_rows,
    _fp8_rows_fake,
    _rows_grad,
    _save_rows,
    returns="(Tensor, Tensor)",
    jvp=_rows_jvp,
    any_lead=True,
)
define(
    f"int4_linear_fp8(Tensor x, {WEIGHT}, Tensor? bias=None, Tensor? act_pre_scale=None)",
    _int4_linear_fp8,
    linear_fake,
    linear_grad,
    save_linear,
    jvp=linear_jvp(torch.ops.int4q.int4_linear.default),  # as the gradient: past the rounding
    any_lead=True,
)
count_flops("int4_linear_fp8", -1)
