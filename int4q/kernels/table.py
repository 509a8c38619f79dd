"""The table of kernels: every op, its implementations, fastest first.

A kernel runs where its own conditions allow (they hold the crossovers);
``int4q.kernels.registry.explain`` prints why each one does or does not for a given problem.
"""

from __future__ import annotations

from int4q.kernels import cpu, cuda, fbgemm, fp8, reference, stack
from int4q.kernels.registry import Kernel, KernelPreference, Problem, register

INT8_MAX_M = 8
"""Rows up to which ``int4_plain_mm`` quantises the activations to int8."""


def _up_to_int8_rows(kernel: Kernel) -> Kernel:
    def unsupported(problem: Problem) -> str | None:
        if problem.M > INT8_MAX_M:
            return f"int8 activations serve up to {INT8_MAX_M} rows; more run W4A16"
        return kernel.unsupported(problem)

    return Kernel(kernel.name, kernel.backend, unsupported, kernel.run)


def _reference(run, name: str = "reference") -> Kernel:
    return Kernel(name, KernelPreference.TORCH, lambda problem: None, run)


W4A16 = (
    cuda.small_batch,
    cuda.decode,
    cuda.gluon,
    cuda.dequantized,
    cuda.matvec,
    cuda.matmul,
    cpu.native,
    cpu.blocked,
    _reference(reference.linear),
)

# fbgemm comes after the reference, which never refuses: it runs where it is asked for only.
register("int4_linear", *W4A16, fbgemm.rowwise)
register("int4_linear_fp8", *(fp8.on_fp8_rows(kernel) for kernel in W4A16), fbgemm.rowwise_fp8)
register(fp8.ROWS, cuda.fp8_rows, _reference(reference.fp8_rows))
register(
    "int4_plain_mm",
    _up_to_int8_rows(cuda.decode_int8),
    _up_to_int8_rows(cuda.triton_int8),
    _up_to_int8_rows(_reference(reference.linear_int8, "reference_w4a8")),
    *W4A16,
)
# A weight whose scales are [N, n_groups] has tables of its own: what reads [n_groups, N] only (or
# would have to copy) must never be in one of them.
register("int4_plain_mm_w4a16", *W4A16)
register(
    "int4_linear_backward",
    cuda.gradient,
    cpu.blocked_grad,
    _reference(reference.grad_input),
)

# Stacks of weights. One weight after the other is the reference; each is routed as int4_linear is.
ONE_BY_ONE = "one_by_one"
register(
    "int4_bmm",
    cuda.decode_bmm,
    cuda.stream_bmm,
    cuda.bmm,
    _reference(stack.bmm, ONE_BY_ONE),
    fbgemm.rowwise_batched,
)
register("int4_bmm_backward", cuda.bmm_gradient, _reference(stack.bmm_backward, ONE_BY_ONE))
register(
    "int4_grouped_mm",
    cuda.decode_grouped,
    cuda.stream_grouped,
    cuda.grouped,
    _reference(stack.grouped_mm, ONE_BY_ONE),
    Kernel("fbgemm_" + ONE_BY_ONE, KernelPreference.FBGEMM, fbgemm.unsupported, stack.grouped_mm),
)
register(
    "int4_grouped_mm_backward",
    cuda.grouped_gradient,
    _reference(stack.grouped_mm_backward, ONE_BY_ONE),
)

register("int4_cpu_packed_linear", cpu.packed, cpu.unpacking)
register("dequantize", cuda.dequantize, cpu.native_dequantize, _reference(reference.dequantize))
register(
    "int4_matmul",
    cuda.rounded_decode,
    cuda.symmetric_small_batch,
    cuda.symmetric_gluon,
    cuda.symmetric_dequantized,
    cuda.symmetric_matmul,
    cpu.native_symmetric,
    cpu.blocked_symmetric,
    _reference(reference.matmul_symmetric),
)
register(
    "int4_matvec",
    cuda.symmetric_decode,
    cuda.symmetric_matvec,
    cpu.native_symmetric,
    _reference(reference.matvec_symmetric),
)
register(
    "dequant_w4_to_bf16",
    cuda.symmetric_dequantize,
    _reference(reference.dequantize_symmetric),
)
register(
    "linear_q4gsw",
    cuda.q4gsw_matvec,
    cuda.q4gsw_matmul,
    cpu.native_q4gsw,
    cpu.blocked_q4gsw,
    _reference(reference.linear_q4gsw),
)
register(
    "linear_q4gsw_backward",
    cuda.q4gsw_gradient,
    cpu.blocked_q4gsw_grad,
    _reference(reference.linear_q4gsw_grad),
)
