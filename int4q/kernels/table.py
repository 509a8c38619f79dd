"""The table of kernels: every op, its implementations, fastest first.

A kernel runs where its own conditions allow; ``int4q.kernels.registry.explain`` prints why each
one does or does not for a given problem.
"""

from __future__ import annotations

from int4q.kernels import cpu, reference
from int4q.kernels.registry import Kernel, KernelPreference, Problem, register

INT8_MAX_M = 8
"""Rows up to which ``int4_plain_mm`` quantises the activations to int8."""


def _always(problem: Problem) -> None:
    return None


def _above_int8_rows(problem: Problem) -> str | None:
    if problem.M <= INT8_MAX_M:
        return None
    return f"int8 activations serve up to {INT8_MAX_M} rows; more run W4A16"


def _reference(run) -> Kernel:
    return Kernel("reference", KernelPreference.TORCH, _always, run)


register("int4_linear", cpu.native, cpu.blocked, _reference(reference.linear))
register("int4_linear_backward", cpu.blocked_grad, _reference(reference.grad_input))
register(
    "int4_plain_mm",
    Kernel("reference_w4a8", KernelPreference.TORCH, _above_int8_rows, reference.linear_int8),
    cpu.native,
    cpu.blocked,
    _reference(reference.linear),
)
register("int4_cpu_packed_linear", cpu.packed, cpu.unpacking)
register(
    "int4_matmul",
    cpu.native_symmetric,
    cpu.blocked_symmetric,
    _reference(reference.matmul_symmetric),
)
register("int4_matvec", cpu.native_symmetric, _reference(reference.matvec_symmetric))
register("dequant_w4_to_bf16", _reference(reference.dequantize_symmetric))
