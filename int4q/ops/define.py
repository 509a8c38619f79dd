"""How an op is registered, checked and routed: shared by every file of this package."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from int4q import errors
from int4q.kernels import registry
from int4q.kernels import table as _table  # noqa: F401  (fills the registry)
from int4q.kernels.weight import Weight
from int4q.ops import autograd, cuda

LIBRARY = torch.library.Library("int4q", "DEF")
ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WEIGHT = "Tensor qdata, Tensor scale, Tensor zero_point, int group_size"
"""The parts of a weight in a schema."""


def define(
    schema: str, run, fake, backward=None, save=None, returns="Tensor", gpu=True, **derivatives
) -> None:
    """One op: the same Python function on every device, its fake, its derivatives in ``x``, and,
    with ``gpu``, its twin for one (:mod:`int4q.ops.cuda`).

    ``backward``, ``save`` and ``derivatives`` are as :func:`int4q.ops.autograd.register` takes
    them.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(f"{schema} -> {returns}")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"int4q::{name}", fake, lib=LIBRARY)
    if backward is not None:
        autograd.register(LIBRARY, name, backward, save, **derivatives)
    if gpu:
        cuda.define(LIBRARY, name, f"{schema[len(name) :]} -> {returns}", run, fake)


def count_flops(op: str, contracted_dim: int) -> None:
    """Let ``FlopCounterMode`` count ``op(x, qdata, ...)``: two a multiply-add, as a dense matmul.

    Args:
        contracted_dim: -1 where the op contracts K (two elements a byte of qdata), -2 for N.
    """

    @register_flop_formula(getattr(torch.ops.int4q, op))
    def flops(x_shape, qdata_shape, *args, out_shape=None, **kwargs) -> int:
        contracted = qdata_shape[contracted_dim] * (2 if contracted_dim == -1 else 1)
        return 2 * torch.Size(out_shape).numel() * contracted


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def kernel(
    op: str,
    x: Tensor,
    scale: Tensor,
    M: int,
    N: int,
    K: int,
    group_size: int,
    dtype=None,
    experts=1,
):
    """The function that runs ``op`` on these shapes under the preference in force.

    ``x`` says the device and, unless ``dtype`` does, the dtype of the result.
    """
    device = "cpu" if x.is_cpu else x.device.type  # (asking a device for its type is slow)
    capability = _capability(x.device.index) if device == "cuda" else None
    problem = (op, device, dtype or x.dtype, scale.dtype, M, N, K, group_size, capability)
    if experts != 1:
        problem = (*problem, experts)
    return registry.route(registry.preference(), *problem).run


def run_2d(op: str, x: Tensor, weight: Weight, *rest) -> Tensor:
    """Flatten the leading dims of ``x``, run the chosen kernel, restore them."""
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    N, K_bytes = weight.qdata.shape
    run = kernel(op, x, weight.scale, flat.shape[0], N, 2 * K_bytes, weight.group_size)
    y = run(flat, weight, *rest)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def check_weight(qdata: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, ndim: int):
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


def check_activation(name: str, x: Tensor, qdata: Tensor, last: int) -> None:
    if x.dtype not in ACTIVATION_DTYPES:
        raise errors.type_(f"{name} must be {errors.dtypes(ACTIVATION_DTYPES)}", x.dtype)
    if x.ndim == 0 or x.shape[-1] != last:
        raise errors.value(
            f"the last dim of {name} must be {last} to meet the weight", errors.dims(x.shape)
        )
    if x.device != qdata.device:
        raise errors.value(f"{name} must be on the weight's device {qdata.device}", x.device)


def check_linear(x, qdata, scale, zero_point, group_size, bias=None, act_pre_scale=None) -> None:
    check_weight(qdata, scale, zero_point, group_size, 2)
    check_activation("x", x, qdata, 2 * qdata.shape[1])
    if bias is not None and bias.shape != (qdata.shape[0],):
        raise errors.value(f"bias must have shape [{qdata.shape[0]}]", errors.dims(bias.shape))
    check_pre_scale(x, act_pre_scale)


def check_pre_scale(x: Tensor, act_pre_scale: Tensor | None) -> None:
    if act_pre_scale is not None and act_pre_scale.numel() != x.shape[-1]:
        raise errors.value(
            f"act_pre_scale must have {x.shape[-1]} entries", errors.dims(act_pre_scale.shape)
        )
