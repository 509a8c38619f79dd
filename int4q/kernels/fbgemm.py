"""fbgemm-gpu-genai's int4 kernels on the plain bytes, where asked for.

The plain layout is fbgemm's: ``qdata`` int8 ``[N, K/2]``, scale and zero point ``[n_groups, N]``,
each one block of memory. Nothing is copied or repaired here: what fbgemm cannot read is refused, as
it would compute something else. It was measured slower than the kernels beside it at every
shape, so the table has it last.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from int4q import errors
from int4q.kernels import fp8, reference
from int4q.kernels.registry import Kernel, KernelPreference, Problem
from int4q.kernels.weight import Weight

SMALLEST_GROUP = {torch.bfloat16: 64, torch.float8_e4m3fn: 128}
"""Activation -> smallest right group: the depth of a K tile, which takes its scales from one row.

A smaller one gives wrong numbers without an error (bfloat16, group 32: 50 to 54 % off) or a
CUTLASS error (float8, group 64).
"""
N_MULTIPLE = 8
"""Elements of a 16-byte access to results; others end in an illegal instruction."""


@functools.cache
def _missing() -> str | None:
    """Why fbgemm cannot be used in this process, or ``None``; imports it."""
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return "fbgemm-gpu-genai is not installed (pip install int4q[cuda])"
    try:
        importlib.import_module("fbgemm_gpu.experimental.gen_ai")  # registers the ops
    except (ImportError, OSError) as error:
        return f"fbgemm-gpu-genai does not load: {error}"
    return None


def _unsupported(problem: Problem, activation: torch.dtype) -> str | None:
    if problem.device != "cuda":
        return f"runs on cuda, not {problem.device}"
    if problem.capability != (9, 0):
        return f"is built for compute capability 9.0, this device has {problem.capability}"
    if activation is torch.bfloat16 and problem.dtype is not activation:
        return f"takes bfloat16 activations, not {problem.dtype}"
    smallest = SMALLEST_GROUP[activation]
    if problem.group_size < smallest:
        return f"is wrong below group_size {smallest}, got {problem.group_size}"
    if problem.N % N_MULTIPLE:
        return f"N must be a multiple of {N_MULTIPLE}, not {problem.N}"
    # Without any GPU the table still says what would run on one.
    return _missing() if torch.cuda.is_available() else None


def unsupported(problem: Problem) -> str | None:
    """Why fbgemm's bfloat16 kernels cannot run ``problem``; ``None`` where they can."""
    if problem.scale_dtype is torch.float16:
        return "takes bfloat16 and float32 scales, not torch.float16"
    return _unsupported(problem, torch.bfloat16)


def unsupported_fp8(problem: Problem) -> str | None:
    """Why fbgemm's float8 kernel cannot run ``problem``; ``None`` where it can."""
    return _unsupported(problem, torch.float8_e4m3fn)


def check_contiguous(**parts: Tensor) -> None:
    """``ValueError`` for a tensor that is not one block of memory in its own order."""
    for name, t in parts.items():
        if not t.is_contiguous():
            raise errors.value(
                f"fbgemm reads {name} as one contiguous block",
                f"shape {errors.dims(t.shape)} with strides {errors.dims(t.stride())}",
                "Call .contiguous() on the weight once (on x: before the call), or use another "
                "kernel preference",
            )


def linear(x: Tensor, weight: Weight, bias=None, act_pre_scale=None) -> Tensor:
    """``x [M, K] @ W.T`` by ``bf16i4bf16_rowwise``: weights rounded to bfloat16.

    Raises:
        ValueError: a part is not contiguous.
    """
    x = reference.pre_scaled(x, act_pre_scale)
    qdata, scale, zero_point = weight[:3]
    check_contiguous(x=x, qdata=qdata, scale=scale, zero_point=zero_point)
    if x.shape[0] == 0:
        return x.new_empty((0, weight.N))
    y = torch.ops.fbgemm.bf16i4bf16_rowwise(x, qdata, scale, zero_point)
    return y if bias is None else y + bias.to(y.dtype)


def bmm(x: Tensor, weight: Weight, act_pre_scale=None) -> Tensor:
    """``x [B, M, K] * act_pre_scale`` times a stack, by ``bf16i4bf16_rowwise_batched``.

    That op counts groups in the first dim of scales ``[B * n_groups, N]``; given the tensor's own
    ``[B, n_groups, N]`` it takes all of K for one group (42 to 49 % off, no error).

    Raises:
        ValueError: a part is not contiguous.
    """
    x = reference.pre_scaled(x, act_pre_scale)
    qdata, scale, zero_point = weight[:3]
    check_contiguous(x=x, qdata=qdata, scale=scale, zero_point=zero_point)
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], weight.N))
    groups = scale.flatten(0, 1), zero_point.flatten(0, 1)
    return torch.ops.fbgemm.bf16i4bf16_rowwise_batched(x, qdata, *groups)


def linear_fp8(x: Tensor, weight: Weight, bias=None, act_pre_scale=None) -> Tensor:
    """:func:`reference.linear_fp8` by ``f8i4bf16_rowwise``, which rounds weights to e4m3 too.

    That costs 2.7 to 3.4 % of the result, as much again as the activation's own rounding.

    Raises:
        ValueError: a part is not contiguous.
    """
    qdata, scale, zero_point = weight[:3]
    check_contiguous(qdata=qdata, scale=scale, zero_point=zero_point)
    values, rows = fp8.quantize_rows(x, act_pre_scale, KernelPreference.FBGEMM)
    values = values.to(torch.float8_e4m3fn)
    y = torch.ops.fbgemm.f8i4bf16_rowwise(values, qdata, rows.view(-1), scale, zero_point)
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(x.dtype)


ROWWISE = Kernel("fbgemm_rowwise", KernelPreference.FBGEMM, unsupported, linear)
ROWWISE_BATCHED = Kernel("fbgemm_rowwise_batched", KernelPreference.FBGEMM, unsupported, bmm)
ROWWISE_FP8 = Kernel("fbgemm_rowwise_fp8", KernelPreference.FBGEMM, unsupported_fp8, linear_fp8)
