"""Ops on symmetric weights in offset binary: ``value = (u - 8) * scale``.

``w_packed`` int8 ``[N, K/2]`` (even k in the low nibble), ``w_scale`` bfloat16
``[N, K/group_size]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4q import errors
from int4q.kernels.weight import Weight
from int4q.ops.define import count_flops, define, kernel, run_2d
from int4q.packing import offset_to_signed

_WEIGHT = "Tensor w_packed, Tensor w_scale, int group_size"


def _check_symmetric(w_packed: Tensor, w_scale: Tensor, group_size: int) -> None:
    if w_packed.dtype != torch.int8 or w_packed.ndim != 2:
        got = f"{w_packed.dtype} {errors.dims(w_packed.shape)}"
        raise errors.type_("w_packed must be int8 [N, K/2]", got)
    N, K = w_packed.shape[0], 2 * w_packed.shape[1]
    if group_size <= 0 or K % group_size:
        raise errors.value("group_size must be positive and divide K", f"{group_size} for K {K}")
    if w_scale.dtype != torch.bfloat16:
        raise errors.type_(
            "w_scale must be bfloat16",
            w_scale.dtype,
            "Call .bfloat16() on it, or use int4_linear, which takes float32 and float16 scales",
        )
    if w_scale.shape != (N, K // group_size):
        raise errors.value(
            f"w_scale must have shape [N, n_groups] = {errors.dims((N, K // group_size))}",
            errors.dims(w_scale.shape),
        )
    if w_scale.device != w_packed.device:
        raise errors.value(f"w_scale must be on {w_packed.device}", w_scale.device)


def _check_activation(x: Tensor, w_packed: Tensor) -> None:
    if x.dtype != torch.bfloat16:
        raise errors.type_("x must be bfloat16", x.dtype)
    if x.ndim != 2 or x.shape[1] != 2 * w_packed.shape[1]:
        raise errors.value(
            f"x must have shape [M, K] with K = {2 * w_packed.shape[1]}", errors.dims(x.shape)
        )
    if x.device != w_packed.device:
        raise errors.value(f"x must be on the weight's device {w_packed.device}", x.device)


def _int4_matmul(x, w_packed, w_scale, group_size):
    _check_symmetric(w_packed, w_scale, group_size)
    _check_activation(x, w_packed)
    return _run("int4_matmul", x, w_packed, w_scale, group_size)


def _int4_matvec(x, w_packed, w_scale, group_size):
    _check_one_row(x, w_packed, w_scale, group_size)
    return _run("int4_matvec", x, w_packed, w_scale, group_size)


def _check_one_row(x, w_packed, w_scale, group_size) -> None:
    _check_symmetric(w_packed, w_scale, group_size)
    _check_activation(x, w_packed)
    if x.shape[0] != 1:
        raise errors.value(
            "int4_matvec takes one row, x [1, K]", errors.dims(x.shape), "Use int4_matmul"
        )


def _run(op: str, x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    return run_2d(op, x, _weight(w_packed, w_scale, group_size))


def _weight(w_packed: Tensor, w_scale: Tensor, group_size: int) -> Weight:
    return Weight(w_packed, w_scale.mT, None, group_size, signed=False)


def _int4_matmul_fake(x, w_packed, w_scale, group_size):
    _check_symmetric(w_packed, w_scale, group_size)
    _check_activation(x, w_packed)
    return x.new_empty((x.shape[0], w_packed.shape[0]))


def _int4_matvec_fake(x, w_packed, w_scale, group_size):
    _check_one_row(x, w_packed, w_scale, group_size)
    return x.new_empty((1, w_packed.shape[0]))


def _save(ctx, inputs, output):
    _, w_packed, w_scale, ctx.group_size = inputs
    ctx.save_for_backward(w_packed, w_scale)


def _grad(ctx, grad):
    w_packed, w_scale = ctx.saved_tensors
    scale = w_scale.mT
    parts = offset_to_signed(w_packed), scale, torch.zeros_like(scale)
    return torch.ops.int4q.int4_linear_backward(grad, *parts, ctx.group_size), None, None, None


def _dequant_w4_to_bf16(w_packed, w_scale, group_size):
    _check_symmetric(w_packed, w_scale, group_size)
    weight = _weight(w_packed, w_scale, group_size)
    shape = 0, weight.N, weight.K, group_size
    run = kernel("dequant_w4_to_bf16", w_scale, w_scale, *shape, torch.bfloat16)
    return run(weight, torch.bfloat16)


def _dequant_w4_to_bf16_fake(w_packed, w_scale, group_size):
    _check_symmetric(w_packed, w_scale, group_size)
    return w_packed.new_empty((w_packed.shape[0], 2 * w_packed.shape[1]), dtype=torch.bfloat16)


define(f"int4_matmul(Tensor x, {_WEIGHT})", _int4_matmul, _int4_matmul_fake, _grad, _save)
define(f"int4_matvec(Tensor x, {_WEIGHT})", _int4_matvec, _int4_matvec_fake, _grad, _save)
define(f"dequant_w4_to_bf16({_WEIGHT})", _dequant_w4_to_bf16, _dequant_w4_to_bf16_fake)
count_flops("int4_matmul", -1)
count_flops("int4_matvec", -1)
