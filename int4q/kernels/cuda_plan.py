"""What the CUDA C++ linear kernels share on the host: argument checks, copies that make odd layouts
fit, and the cache of plans.

A kernel module makes one :class:`Planner`. A call then is a dictionary lookup and the launches of
the plan found there: everything that depends on shapes, strides, dtypes and alignment only was
worked out at the first call of its kind.
"""

from collections.abc import Callable

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128, 256)
TYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The dtypes that the kernels read and the numbers that stand for them in the CUDA C++."""

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""x ``[..., K]``, qdata ``[N, K/2]``, scale and zero_point ``[n_groups, N]``, bias ``[N]`` or None,
act_pre_scale ``[K]`` or None."""


def unsupported_shape(N: int, K: int, group_size: int) -> str | None:
    """Why no kernel takes a weight of this shape; None if they do."""
    if group_size not in GROUP_SIZES:
        return f"group_size must be one of {GROUP_SIZES}, got {group_size}"
    if K <= 0 or K % group_size:
        return f"K must be a positive multiple of group_size={group_size}, got {K}"
    if max(N, K) >= 1 << 30:
        return f"N and K must be below 2 ** 30, got N={N}, K={K}"
    return None


class Planner:
    """Runs a kernel through plans that are made once.

    Args:
        title: of the kernels, for messages.
        unsupported: ``(M, N, K, group_size, x dtype, scale dtype, capability)`` -> why not, or
            None.
        make: ``(parts, group_size, *choices)`` -> a plan; called with the data pointers of the
            parts it returns the output ``[M, N]``.
    """

    def __init__(
        self, title: str, unsupported: Callable[..., str | None], make: Callable[..., Callable]
    ):
        self._title, self._unsupported, self._make = title, unsupported, make
        self._plans: dict[tuple, Callable] = {}

    def __call__(self, parts: Parts, group_size: int, symmetric: bool, *choices) -> Tensor:
        """The result for ``parts``; ``choices`` (hashable) go to ``make`` after ``symmetric``."""
        x, qdata, scale, zero_point, bias, pre_scale = parts
        pointers = (
            qdata.data_ptr(),
            scale.data_ptr(),
            zero_point.data_ptr(),
            x.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if pre_scale is None else pre_scale.data_ptr(),
        )
        key = (
            x.shape,
            x.stride(),
            x.dtype,
            x.device,
            qdata.shape,
            qdata.stride(),
            scale.shape,
            scale.stride(),
            scale.dtype,
            zero_point.stride(),
            group_size,
            None if bias is None else bias.dtype,
            None if pre_scale is None else pre_scale.dtype,
            pointers[0] & 15,
            (pointers[1] | pointers[2]) & 15,
            pointers[3] & 15,
            symmetric,
            choices,
        )
        plan = self._plans.get(key)
        if plan is not None:
            return plan(pointers)
        self._check(parts, group_size)
        fitted = _fit(parts, symmetric)
        if any(ours is not theirs for ours, theirs in zip(fitted, parts, strict=True)):
            out = self(fitted, group_size, symmetric, *choices)
            return out.view(*x.shape[:-1], qdata.shape[0])
        plan = self._plans[key] = self._make(parts, group_size, symmetric, *choices)
        return plan(pointers)

    def _check(self, parts: Parts, group_size: int) -> None:
        """Raises on arguments that no copy could make fit."""
        x, qdata, scale, zero_point, bias, pre_scale = parts
        if qdata.dtype != torch.int8:
            raise TypeError(f"qdata must be int8 (two nibbles a byte), got {qdata.dtype}")
        if qdata.dim() != 2:
            raise ValueError(f"qdata must have shape [N, K/2], got {list(qdata.shape)}")
        N, K = qdata.shape[0], qdata.shape[1] * 2
        if x.dim() < 1 or x.shape[-1] != K:
            raise ValueError(
                f"the last dimension of x must be K={K} (twice that of qdata "
                f"{list(qdata.shape)}), got x of shape {list(x.shape)}"
            )
        if not x.is_cuda:
            raise ValueError(f"x must be on a CUDA device, got {x.device}")
        capability = torch.cuda.get_device_capability(x.device)
        M = x.numel() // max(K, 1)
        if reason := self._unsupported(M, N, K, group_size, x.dtype, scale.dtype, capability):
            raise ValueError(f"{self._title} cannot do this: {reason}")
        shapes = {
            "scale": (scale, [K // group_size, N], "[n_groups, N]"),
            "zero_point": (zero_point, [K // group_size, N], "[n_groups, N]"),
            "bias": (bias, [N], "[N]"),
            "act_pre_scale": (pre_scale, [K], "[K]"),
        }
        for name, (tensor, shape, letters) in shapes.items():
            if tensor is None:
                continue
            if list(tensor.shape) != shape:
                hint = " (an [N, n_groups] tensor is passed as .mT)" if len(shape) == 2 else ""
                raise ValueError(
                    f"{name} must have shape {letters} = {shape}, got {list(tensor.shape)}{hint}"
                )
            if tensor.dtype not in TYPE_CODES:
                raise TypeError(f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}")
        if zero_point.dtype != scale.dtype:
            raise TypeError(
                f"zero_point must have scale's dtype {scale.dtype}, got {zero_point.dtype}"
            )
        named = (("qdata", qdata), *((name, entry[0]) for name, entry in shapes.items()))
        for name, tensor in named:
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _fit(parts: Parts, symmetric: bool) -> Parts:
    """The parts as a plan takes them, each the same object where it fits already: x 2-D, unit
    strides, qdata rows on 16-byte boundaries, zero_point lying as scale does."""
    x, qdata, scale, zero_point, bias, pre_scale = parts
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.reshape(-1, x.shape[-1]).contiguous()
    if qdata.stride(1) != 1 or qdata.stride(0) % 16 or qdata.data_ptr() % 16:
        qdata = qdata.clone(memory_format=torch.contiguous_format)
    if symmetric:  # scale stands in for the zero points, wherever it lies
        zero_point = scale
    elif zero_point.stride() != scale.stride():
        strides = scale.stride()
        zero_point = torch.empty_strided(
            scale.shape, strides, dtype=scale.dtype, device=scale.device
        ).copy_(zero_point)
    if bias is not None:
        bias = bias.contiguous()
    if pre_scale is not None:
        pre_scale = pre_scale.contiguous()
    return x, qdata, scale, zero_point, bias, pre_scale
