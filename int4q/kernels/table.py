"""The table of kernels: every op, its implementations, fastest first.

A kernel runs where its own conditions allow (they hold the crossovers);
``int4q.kernels.registry.explain`` prints why each one does or does not for a given problem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from int4q.kernels import cpu, cuda, fbgemm, fp8, reference, routing, stack, triton
from int4q.kernels.registry import Kernel, KernelPreference, Problem, register

INT8_MAX_M = 8
"""Rows up to which ``int4_plain_mm`` quantises the activations to int8."""


def _up_to_int8_rows(kernel: Kernel) -> Kernel:
    def unsupported(problem: Problem) -> str | None:
        if problem.M > INT8_MAX_M:
            return f"int8 activations serve up to {INT8_MAX_M} rows; more run W4A16"
        return kernel.unsupported(problem)

    return dataclasses.replace(kernel, unsupported=unsupported)


def _reference(run: Callable[..., Any], name: str = "reference") -> Kernel:
    return Kernel(
        name,
        KernelPreference.TORCH,
        lambda problem: None,
        run,
        lambda problem: "plain torch dequantises the whole weight at every call",
    )


def _plain(run: Callable[..., Any]) -> Kernel:
    """What torch's own ops do well, without a weight."""
    return Kernel("torch", KernelPreference.TORCH, lambda problem: None, run)


def _one_by_one(run: Callable[..., Any]) -> Kernel:
    """A stack's weights one after the other, each routed (and, where slow, named) by itself."""
    return Kernel("one_by_one", KernelPreference.TORCH, lambda problem: None, run)


W4A16 = (
    cuda.WARP_SPECIALISED,
    cuda.DECODE,
    triton.GLUON,
    triton.DEQUANTIZED,
    triton.MATVEC,
    triton.MATMUL,
    cpu.NATIVE,
    cpu.BLOCKED,
    _reference(reference.linear),
)

# fbgemm comes after the reference, which never refuses: it runs where it is asked for only.
register("int4_linear", *W4A16, fbgemm.ROWWISE)
register("int4_linear_fp8", *(fp8.on_fp8_rows(kernel) for kernel in W4A16), fbgemm.ROWWISE_FP8)
register(fp8.ROWS, triton.FP8_ROWS, _reference(reference.fp8_rows))
register(
    "int4_plain_mm",
    _up_to_int8_rows(cuda.DECODE_INT8),
    _up_to_int8_rows(triton.INT8),
    _up_to_int8_rows(cpu.NATIVE_INT8),
    _up_to_int8_rows(_reference(reference.linear_int8, "reference_w4a8")),
    *W4A16,
)
# A weight whose scales are [N, n_groups] has tables of its own: what reads [n_groups, N] only (or
# would have to copy) must never be in one of them.
register("int4_plain_mm_w4a16", *W4A16)
register(
    "int4_linear_backward",
    triton.GRADIENT,
    cpu.BLOCKED_GRADIENT,
    _reference(reference.grad_input),
)

# Stacks of weights. One weight after the other is the reference; each is routed as int4_linear is.
register(
    "int4_bmm",
    cuda.EXPERTS_BMM,
    triton.STREAM_BMM,
    triton.BMM,
    _one_by_one(stack.bmm),
    fbgemm.ROWWISE_BATCHED,
)
register("int4_bmm_backward", triton.BMM_GRADIENT, _one_by_one(stack.bmm_backward))
register(
    "int4_grouped_mm",
    cuda.EXPERTS_GROUPED,
    triton.STREAM_GROUPED,
    triton.GROUPED,
    _one_by_one(stack.grouped_mm),
    Kernel("fbgemm_one_by_one", KernelPreference.FBGEMM, fbgemm.unsupported, stack.grouped_mm),
)
register(
    "int4_grouped_mm_backward",
    triton.GROUPED_GRADIENT,
    _one_by_one(stack.grouped_mm_backward),
)
register(routing.PERMUTE, triton.PERMUTE, _plain(routing.permute))
register(routing.COMBINE, triton.COMBINE, _plain(routing.combine))

register("int4_cpu_packed_linear", cpu.PACKED, cpu.UNPACKING)
register(
    "dequantize",
    triton.DEQUANTIZE,
    cpu.NATIVE_DEQUANTIZE,
    _reference(reference.dequantize),
)

# Symmetric weights in offset binary. The first op rounds them to bfloat16, the others do not.
register(
    "int4_matmul",
    cuda.DECODE_ROUNDED,
    cuda.WARP_SPECIALISED,
    triton.GLUON,
    triton.DEQUANTIZED,
    triton.MATMUL,
    cpu.NATIVE_ROUNDED,
    cpu.BLOCKED_ROUNDED,
    _reference(reference.linear_rounded),
)
register(
    "int4_matvec",
    cuda.DECODE,
    triton.MATVEC,
    cpu.NATIVE,
    _reference(reference.linear_float32),
)
register(
    "dequant_w4_to_bf16",
    triton.DEQUANTIZE,
    cpu.NATIVE_DEQUANTIZE,
    _reference(reference.dequantize),
)
register(
    "linear_q4gsw",
    triton.MATVEC,
    triton.MATMUL,
    cpu.NATIVE,
    cpu.BLOCKED,
    _reference(reference.linear),
)
register(
    "linear_q4gsw_backward",
    triton.GRADIENT,
    cpu.BLOCKED_GRADIENT,
    _reference(reference.grad_input),
)
