"""The layout of torch's own CPU int4 kernel: multiply and unpack."""

from __future__ import annotations

import torch

from int4q import errors
from int4q.kernels.cpu import aten_packed
from int4q.ops.define import check_activation, count_flops, define, kernel


def _check_cpu_packed(x, qdata, scale_and_zero, group_size) -> None:
    N, K = qdata.shape[0], 2 * qdata.shape[1]
    if qdata.dtype != torch.uint8 or scale_and_zero.shape != (K // group_size, N, 2):
        raise errors.value(
            "a CPU-packed weight is uint8 [N, K/2] with scale_and_zero "
            f"[{K // group_size}, {N}, 2]",
            f"{qdata.dtype} and {errors.dims(scale_and_zero.shape)}",
        )
    check_activation("x", x, qdata, K)


def _int4_cpu_packed_linear(x, qdata, scale_and_zero, group_size):
    _check_cpu_packed(x, qdata, scale_and_zero, group_size)
    flat = x.reshape(-1, x.shape[-1])
    (M, K), N = flat.shape, qdata.shape[0]
    run = kernel("int4_cpu_packed_linear", x, scale_and_zero, M, N, K, group_size)
    return run(flat, qdata, scale_and_zero, group_size).view(*x.shape[:-1], N)


def _int4_cpu_packed_linear_fake(x, qdata, scale_and_zero, group_size):
    _check_cpu_packed(x, qdata, scale_and_zero, group_size)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


def _int4_cpu_unpack(qdata):
    return aten_packed.unpack(qdata)


def _int4_cpu_unpack_fake(qdata):
    return qdata.new_empty(qdata.shape, dtype=torch.int8)


def _save_packed(ctx, inputs, output):
    _, qdata, scale_and_zero, ctx.group_size = inputs
    ctx.save_for_backward(qdata, scale_and_zero)


def _cpu_packed_grad(ctx, grad):
    packed, scale_and_zero = ctx.saved_tensors
    qdata = torch.ops.int4q.int4_cpu_unpack(packed)
    parts = (qdata, *scale_and_zero.unbind(-1))
    grad_x = torch.ops.int4q.int4_linear_backward(grad, *parts, ctx.group_size)
    return grad_x, None, None, None


define(
    "int4_cpu_packed_linear(Tensor x, Tensor qdata, Tensor scale_and_zero, int group_size)",
    _int4_cpu_packed_linear,
    _int4_cpu_packed_linear_fake,
    _cpu_packed_grad,
    _save_packed,
    gpu=False,
    any_lead=True,
)
define("int4_cpu_unpack(Tensor qdata)", _int4_cpu_unpack, _int4_cpu_unpack_fake, gpu=False)
count_flops("int4_cpu_packed_linear", -1)
