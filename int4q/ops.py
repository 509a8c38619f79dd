"""The ``torch.library`` ops of the namespace ``int4q``: schema, checks, fake, gradient.

Each op takes a weight's parts (never a tensor subclass), checks them, and hands them to the
kernel that :func:`int4q.kernels.registry.choose` picks; importing this module registers all.
Weights are 2-D (``qdata`` int8 ``[N, K/2]``, ``scale`` and ``zero_point`` ``[n_groups, N]``) or
stacks of them with one more leading dim. The weight takes no gradient; activations and bias do.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from int4q import errors
from int4q.kernels import aten_packed, reference, registry
from int4q.kernels import table as _table  # noqa: F401  (fills the registry)

_LIBRARY = torch.library.Library("int4q", "DEF")
ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _kernel(op: str, x: Tensor, scale: Tensor, M: int, N: int, K: int, group_size: int):
    device = x.device
    capability = _capability(device.index) if device.type == "cuda" else None
    problem = (op, device.type, x.dtype, scale.dtype, M, N, K, group_size, capability)
    return registry.route(registry.preference(), *problem).run


def _check_weight(qdata: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, ndim: int):
    if qdata.dtype != torch.int8 or qdata.ndim != ndim:
        raise errors.type_(
            f"qdata must be int8 with {ndim} dims", f"{qdata.dtype} {errors.dims(qdata.shape)}"
        )
    if group_size <= 0:
        raise errors.value("group_size must be positive", group_size)
    N, K = qdata.shape[-2], 2 * qdata.shape[-1]
    if K % group_size:
        raise errors.value(f"K must be a multiple of group_size {group_size}", K)
    expected = (*qdata.shape[:-2], K // group_size, N)
    for name, part in (("scale", scale), ("zero_point", zero_point)):
        if part.shape != expected:
            raise errors.value(
                f"{name} must have shape [.., n_groups, N] = {errors.dims(expected)}",
                errors.dims(part.shape),
                "A coalesced tensor's [.., N, n_groups] parts go in through .mT",
            )
        if part.dtype not in SCALE_DTYPES or part.dtype != scale.dtype:
            raise errors.type_(
                f"{name} must be {errors.dtypes(SCALE_DTYPES)}, the same for scale and zero_point",
                part.dtype,
            )
        if part.device != qdata.device:
            raise errors.value(f"{name} must be on qdata's device {qdata.device}", part.device)


def _check_activation(name: str, x: Tensor, qdata: Tensor, last: int) -> None:
    if x.dtype not in ACTIVATION_DTYPES:
        raise errors.type_(f"{name} must be {errors.dtypes(ACTIVATION_DTYPES)}", x.dtype)
    if x.ndim == 0 or x.shape[-1] != last:
        raise errors.value(
            f"the last dim of {name} must be {last} to meet the weight", errors.dims(x.shape)
        )
    if x.device != qdata.device:
        raise errors.value(f"{name} must be on the weight's device {qdata.device}", x.device)


def _check_linear(x, qdata, scale, zero_point, group_size, bias=None) -> None:
    _check_weight(qdata, scale, zero_point, group_size, 2)
    _check_activation("x", x, qdata, 2 * qdata.shape[1])
    if bias is not None and bias.shape != (qdata.shape[0],):
        raise errors.value(f"bias must have shape [{qdata.shape[0]}]", errors.dims(bias.shape))


def dispatches_nothing(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the dispatcher would add nothing to ``linear(x, w, bias)``: no gradient, no tracing.

    Then a caller whose weight is checked already may run the kernel directly, which halves the
    host time of a small layer.
    """
    return (
        type(x) is Tensor
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or (bias is not None and bias.requires_grad))
        )
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def linear_parts(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """``int4_linear`` on the parts of a tensor, which its constructor has checked."""
    if not dispatches_nothing(x, bias):
        return torch.ops.int4q.int4_linear(x, qdata, scale, zero_point, group_size, bias)
    _check_activation("x", x, qdata, 2 * qdata.shape[1])
    return _run_2d("int4_linear", x, qdata, scale, group_size, zero_point, group_size, bias)


def _run_2d(op: str, x: Tensor, qdata: Tensor, scale: Tensor, group_size: int, *rest) -> Tensor:
    """Flatten the leading dims of ``x``, run the chosen kernel, restore them."""
    N, half = qdata.shape
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    y = _kernel(op, x, scale, flat.shape[0], N, 2 * half, group_size)(flat, qdata, scale, *rest)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


# --- int4_linear -----------------------------------------------------------------------------


def _int4_linear(x, qdata, scale, zero_point, group_size, bias=None):
    _check_linear(x, qdata, scale, zero_point, group_size, bias)
    return _run_2d("int4_linear", x, qdata, scale, group_size, zero_point, group_size, bias)


def _int4_linear_fake(x, qdata, scale, zero_point, group_size, bias=None):
    _check_linear(x, qdata, scale, zero_point, group_size, bias)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


def _int4_linear_backward(grad, qdata, scale, zero_point, group_size):
    _check_weight(qdata, scale, zero_point, group_size, 2)
    _check_activation("grad", grad, qdata, qdata.shape[0])
    op = "int4_linear_backward"
    return _run_2d(op, grad, qdata, scale, group_size, zero_point, group_size)


def _int4_linear_backward_fake(grad, qdata, scale, zero_point, group_size):
    return grad.new_empty((*grad.shape[:-1], 2 * qdata.shape[1]))


def _save_weight(ctx, inputs, output):
    _, qdata, scale, zero_point, group_size, *rest = inputs
    ctx.save_for_backward(qdata, scale, zero_point)
    ctx.group_size = group_size
    ctx.bias_dtype = rest[0].dtype if rest and rest[0] is not None else None


def _linear_grad(ctx, grad):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.int4q.int4_linear_backward(grad, *ctx.saved_tensors, ctx.group_size)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.sum_to_size(grad.shape[-1]).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias


# --- int4_plain_mm: int8 activations for few rows, W4A16 above ---------------------------------


def _check_plain_mm(x, qdata, scale, zero_point, group_size) -> None:
    K = 2 * qdata.shape[-1]
    for name, part in (("scale", scale), ("zero_point", zero_point)):
        expected = (qdata.shape[0], K // group_size if group_size > 0 else 0)
        if part.shape != expected:
            raise errors.value(
                f"{name} must have shape [N, n_groups] = {errors.dims(expected)}",
                errors.dims(part.shape),
                "Repack a plain [n_groups, N] weight with CudaCoalescedInt4Tensor.from_int4_tensor",
            )
    _check_linear(x, qdata, scale.mT, zero_point.mT, group_size)


def _int4_plain_mm(x, qdata, scale, zero_point, group_size):
    _check_plain_mm(x, qdata, scale, zero_point, group_size)
    s, z = scale.mT, zero_point.mT
    return _run_2d("int4_plain_mm", x, qdata, s, group_size, z, group_size)


def _int4_plain_mm_fake(x, qdata, scale, zero_point, group_size):
    _check_plain_mm(x, qdata, scale, zero_point, group_size)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


def _plain_mm_grad(ctx, grad):
    qdata, scale, zero_point = ctx.saved_tensors
    args = (grad, qdata, scale.mT, zero_point.mT, ctx.group_size)
    return torch.ops.int4q.int4_linear_backward(*args), None, None, None, None


# --- int4_bmm: [B, M, K] x [B, N, K] -> [B, M, N] -----------------------------------------------


def _check_bmm(name, x, qdata, scale, zero_point, group_size, last) -> None:
    _check_weight(qdata, scale, zero_point, group_size, 3)
    if x.ndim != 3 or x.shape[0] != qdata.shape[0]:
        raise errors.value(f"{name} must be 3-D with batch {qdata.shape[0]}", errors.dims(x.shape))
    _check_activation(name, x, qdata, last)


def _batched(op: str, x, qdata, scale, zero_point, group_size, width):
    y = x.new_empty((*x.shape[:-1], width))
    N, K = qdata.shape[1], 2 * qdata.shape[2]
    run = _kernel(op, x, scale, x.shape[1], N, K, group_size)
    for b in range(x.shape[0]):
        y[b] = run(x[b], qdata[b], scale[b], zero_point[b], group_size)
    return y


def _int4_bmm(x, qdata, scale, zero_point, group_size):
    _check_bmm("x", x, qdata, scale, zero_point, group_size, 2 * qdata.shape[-1])
    return _batched("int4_linear", x, qdata, scale, zero_point, group_size, qdata.shape[1])


def _int4_bmm_fake(x, qdata, scale, zero_point, group_size):
    _check_bmm("x", x, qdata, scale, zero_point, group_size, 2 * qdata.shape[-1])
    return x.new_empty((*x.shape[:-1], qdata.shape[1]))


def _int4_bmm_backward(grad, qdata, scale, zero_point, group_size):
    _check_bmm("grad", grad, qdata, scale, zero_point, group_size, qdata.shape[1])
    op, K = "int4_linear_backward", 2 * qdata.shape[2]
    return _batched(op, grad, qdata, scale, zero_point, group_size, K)


def _int4_bmm_backward_fake(grad, qdata, scale, zero_point, group_size):
    return grad.new_empty((*grad.shape[:-1], 2 * qdata.shape[2]))


def _bmm_grad(ctx, grad):
    args = (grad, *ctx.saved_tensors, ctx.group_size)
    return torch.ops.int4q.int4_bmm_backward(*args), None, None, None, None


# --- int4_grouped_mm: rows of x sorted by expert ------------------------------------------------


def _check_grouped(name, x, qdata, scale, zero_point, group_size, offs, last) -> None:
    _check_weight(qdata, scale, zero_point, group_size, 3)
    if x.ndim != 2:
        raise errors.value(f"{name} must be 2-D", errors.dims(x.shape))
    _check_activation(name, x, qdata, last)
    if offs.dtype != torch.int32 or offs.shape != (qdata.shape[0],):
        raise errors.value(
            f"offs must be int32 [{qdata.shape[0]}], the end row of each expert",
            f"{offs.dtype} {errors.dims(offs.shape)}",
        )


def _grouped(op: str, x, qdata, scale, zero_point, group_size, offs, width):
    y = x.new_zeros((x.shape[0], width))
    N, K = qdata.shape[1], 2 * qdata.shape[2]
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if not start <= end <= x.shape[0]:
            raise errors.value(f"offs must rise from 0 to at most {x.shape[0]}", offs.tolist())
        if end > start:
            run = _kernel(op, x, scale, end - start, N, K, group_size)
            parts = qdata[expert], scale[expert], zero_point[expert]
            y[start:end] = run(x[start:end], *parts, group_size)
        start = end
    return y


def _int4_grouped_mm(x, qdata, scale, zero_point, group_size, offs):
    K = 2 * qdata.shape[-1]
    _check_grouped("x", x, qdata, scale, zero_point, group_size, offs, K)
    args = (x, qdata, scale, zero_point, group_size, offs)
    return _grouped("int4_linear", *args, qdata.shape[1])


def _int4_grouped_mm_fake(x, qdata, scale, zero_point, group_size, offs):
    K = 2 * qdata.shape[-1]
    _check_grouped("x", x, qdata, scale, zero_point, group_size, offs, K)
    return x.new_empty((x.shape[0], qdata.shape[1]))


def _int4_grouped_mm_backward(grad, qdata, scale, zero_point, group_size, offs):
    _check_grouped("grad", grad, qdata, scale, zero_point, group_size, offs, qdata.shape[1])
    args = (grad, qdata, scale, zero_point, group_size, offs)
    return _grouped("int4_linear_backward", *args, 2 * qdata.shape[2])


def _int4_grouped_mm_backward_fake(grad, qdata, scale, zero_point, group_size, offs):
    return grad.new_empty((grad.shape[0], 2 * qdata.shape[2]))


def _save_grouped(ctx, inputs, output):
    *weight, offs = inputs
    _save_weight(ctx, weight, output)
    ctx.save_for_backward(*weight[1:4], offs)


def _grouped_grad(ctx, grad):
    *weight, offs = ctx.saved_tensors
    grad_x = torch.ops.int4q.int4_grouped_mm_backward(grad, *weight, ctx.group_size, offs)
    return grad_x, None, None, None, None, None


# --- the CPU's own packed layout ----------------------------------------------------------------


def _check_cpu_packed(x, qdata, scale_and_zero, group_size) -> None:
    N, K = qdata.shape[0], 2 * qdata.shape[1]
    if qdata.dtype != torch.uint8 or scale_and_zero.shape != (K // group_size, N, 2):
        raise errors.value(
            "a CPU-packed weight is uint8 [N, K/2] with scale_and_zero "
            f"[{K // group_size}, {N}, 2]",
            f"{qdata.dtype} and {errors.dims(scale_and_zero.shape)}",
        )
    _check_activation("x", x, qdata, K)


def _int4_cpu_packed_linear(x, qdata, scale_and_zero, group_size):
    _check_cpu_packed(x, qdata, scale_and_zero, group_size)
    args = ("int4_cpu_packed_linear", x, qdata, scale_and_zero, group_size, group_size)
    return _run_2d(*args)


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


# --- dequantisation -----------------------------------------------------------------------------


def _dequant_w4_to_bf16(w_packed, w_scale, group_size):
    _check_symmetric(w_packed, w_scale, group_size)
    return reference.dequantize_symmetric(w_packed, w_scale, group_size)


def _dequant_w4_to_bf16_fake(w_packed, w_scale, group_size):
    _check_symmetric(w_packed, w_scale, group_size)
    return w_packed.new_empty((w_packed.shape[0], 2 * w_packed.shape[1]), dtype=torch.bfloat16)


def _check_symmetric(w_packed, w_scale, group_size) -> None:
    if w_packed.dtype not in (torch.int8, torch.uint8) or w_packed.ndim != 2:
        got = f"{w_packed.dtype} {errors.dims(w_packed.shape)}"
        raise errors.type_("w_packed must be int8 [N, K/2]", got)
    if group_size <= 0 or 2 * w_packed.shape[1] % group_size:
        raise errors.value(
            "group_size must be positive and divide K",
            f"{group_size} for K {2 * w_packed.shape[1]}",
        )
    expected = (w_packed.shape[0], 2 * w_packed.shape[1] // group_size)
    if w_scale.shape != expected:
        raise errors.value(
            f"w_scale must have shape [N, n_groups] = {errors.dims(expected)}",
            errors.dims(w_scale.shape),
        )


# --- registration -------------------------------------------------------------------------------

_WEIGHT = "Tensor qdata, Tensor scale, Tensor zero_point, int group_size"


def _define(schema: str, run, fake, backward=None, save=_save_weight) -> None:
    """One op: the same Python function on every device, its fake, and its gradient to ``x``."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(f"{schema} -> Tensor")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"int4q::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"int4q::{name}", backward, setup_context=save, lib=_LIBRARY
        )


_define(
    f"int4_linear(Tensor x, {_WEIGHT}, Tensor? bias=None)",
    _int4_linear,
    _int4_linear_fake,
    _linear_grad,
)
_define(
    f"int4_linear_backward(Tensor grad, {_WEIGHT})",
    _int4_linear_backward,
    _int4_linear_backward_fake,
)
_define(f"int4_plain_mm(Tensor x, {_WEIGHT})", _int4_plain_mm, _int4_plain_mm_fake, _plain_mm_grad)
_define(f"int4_bmm(Tensor x, {_WEIGHT})", _int4_bmm, _int4_bmm_fake, _bmm_grad)
_define(f"int4_bmm_backward(Tensor grad, {_WEIGHT})", _int4_bmm_backward, _int4_bmm_backward_fake)
_define(
    f"int4_grouped_mm(Tensor x, {_WEIGHT}, Tensor offs)",
    _int4_grouped_mm,
    _int4_grouped_mm_fake,
    _grouped_grad,
    _save_grouped,
)
_define(
    f"int4_grouped_mm_backward(Tensor grad, {_WEIGHT}, Tensor offs)",
    _int4_grouped_mm_backward,
    _int4_grouped_mm_backward_fake,
)
_define(
    "int4_cpu_packed_linear(Tensor x, Tensor qdata, Tensor scale_and_zero, int group_size)",
    _int4_cpu_packed_linear,
    _int4_cpu_packed_linear_fake,
    _cpu_packed_grad,
    _save_packed,
)
_define("int4_cpu_unpack(Tensor qdata)", _int4_cpu_unpack, _int4_cpu_unpack_fake)
_define(
    "dequant_w4_to_bf16(Tensor w_packed, Tensor w_scale, int group_size)",
    _dequant_w4_to_bf16,
    _dequant_w4_to_bf16_fake,
)
