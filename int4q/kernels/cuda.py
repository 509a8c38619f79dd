"""GPU kernels as entries of the table. Their modules (and Triton) are imported at first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from int4q.kernels import reference, registry, tuned
from int4q.kernels.registry import Kernel, KernelPreference, Problem

_SLICE_BYTES = 64 << 20
"""Most memory for dequantised weights at a time in the gradient."""
_SMALL_BATCH_N, _SMALL_BATCH_K = 4224, 6144
"""Up to here the CUDA small-batch kernel beats the Gluon one. Measured: 5 to 20 % faster at
4096 x 4096, 5 to 30 % slower at 4096 x 14336, 21504 x 5376 and 28672 x 4096; K interpolated."""


tuned.on_change(registry.route.cache_clear)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"int4q.kernels.{name}")


def _lazy(module: str, function: str, **fixed) -> Callable[..., Tensor]:
    def run(*arguments):
        return getattr(_module(module), function)(*arguments, **fixed)

    return run


def on_its_device(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run`` with its first tensor's device current, where Triton launches."""

    def guarded(first: Tensor, *rest):
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(first.device):
            return run(first, *rest)

    return guarded


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install int4q[cuda])"
    return None


def _triton_kernel(name: str, module: str, function: str, check: str = "unsupported") -> Kernel:
    def unsupported(problem: Problem) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if problem.device != "cuda" and not (interpreted and problem.device == "cpu"):
            return f"runs on cuda, not {problem.device}"
        return _triton_missing() or getattr(_module(module), check)(problem)

    run = on_its_device(_lazy(module, function))
    return Kernel(name, KernelPreference.TRITON, unsupported, run)


def _not_compiled() -> str | None:
    """Why CUDA C++ cannot be compiled here; without any GPU the table says what would run."""
    return _module("nvrtc").unavailable() if torch.cuda.is_available() else None


def _decode_cannot(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"runs on cuda, not {problem.device}"
    shape = problem.M, problem.N, problem.K, problem.group_size
    facts = problem.dtype, problem.scale_dtype, problem.capability
    return _module("cuda_decode").unsupported(*shape, *facts)


def _decode_unsupported(problem: Problem) -> str | None:
    if reason := _decode_cannot(problem):
        return reason
    if problem.M > 8 and problem.capability[0] == 9 and problem.dtype != torch.float32:
        # Measured on sm_90: from here the wgmma kernel wins on large N and on small groups.
        small = problem.N * problem.K <= tuned.SMALL_WEIGHT
        if (problem.group_size < 128 and not small) or (problem.M > 12 and problem.N > 8192):
            return f"M={problem.M}: the wgmma kernel is faster for this shape"
    return _not_compiled()


def _rounded_unsupported(problem: Problem) -> str | None:
    for name, dtype in (("x", problem.dtype), ("scale", problem.scale_dtype)):
        if dtype != torch.bfloat16:
            return f"{name} must be bfloat16, got {dtype}"
    return _decode_cannot(problem) or _not_compiled()


def _small_batch_unsupported(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"runs on cuda, not {problem.device}"
    M, N, K, group_size = problem.M, problem.N, problem.K, problem.group_size
    facts = problem.dtype, problem.scale_dtype, problem.capability
    if reason := _module("cuda_small_batch").unsupported(M, N, K, group_size, *facts):
        return reason
    small = N * K <= tuned.SMALL_WEIGHT
    if M <= 8 or (M <= 16 and group_size >= 128 and not small):
        return f"M={M}: the decode kernel is faster for this shape"
    if K > _SMALL_BATCH_K or (N > _SMALL_BATCH_N and not small):
        return f"N={N}, K={K}: the Gluon kernel is faster for this shape"
    return _not_compiled()


def grad_input(
    grad: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    signed: bool = True,
) -> Tensor:
    """:func:`reference.grad_input` by dequantising slices of rows, summed in float32."""
    dtype = reference.compute_dtype(grad, scale)
    N, K = qdata.shape[0], 2 * qdata.shape[1]
    step = max(1, _SLICE_BYTES // max(1, K * dtype.itemsize))
    dequantize = _module("triton_dequant").dequantize
    total = None
    for start in range(0, N, step):
        rows = slice(start, start + step)
        zero = None if zero_point is None else zero_point[:, rows]
        w = dequantize(qdata[rows], scale[:, rows], zero, group_size, dtype, signed)
        part = grad[:, rows].to(dtype) @ w
        if step >= N:
            return part.to(grad.dtype)
        total = part.float() if total is None else total.add_(part)
    return grad.new_zeros((grad.shape[0], K)) if total is None else total.to(grad.dtype)


def _q4gsw_grad(grad: Tensor, weights: Tensor, weight_scales: Tensor, group_size: int) -> Tensor:
    weight = weights.view(torch.int8), weight_scales, None, group_size
    return grad_input(grad, *weight, signed=False)


decode = Kernel(
    "cuda_decode", KernelPreference.CUDA, _decode_unsupported, _lazy("cuda_decode", "linear")
)
symmetric_decode = Kernel(
    "cuda_decode",
    KernelPreference.CUDA,
    _decode_unsupported,
    _lazy("cuda_decode", "symmetric_linear"),
)
rounded_decode = Kernel(
    "cuda_decode",
    KernelPreference.CUDA,
    _rounded_unsupported,
    _lazy("cuda_decode", "rounded_linear"),
)
decode_int8 = Kernel(
    "cuda_decode_w4a8",
    KernelPreference.CUDA,
    _decode_unsupported,
    _lazy("cuda_decode", "linear", activation=torch.int8),
)
small_batch = Kernel(
    "cuda_small_batch",
    KernelPreference.CUDA,
    _small_batch_unsupported,
    _lazy("cuda_small_batch", "linear"),
)
symmetric_small_batch = Kernel(
    "cuda_small_batch",
    KernelPreference.CUDA,
    _small_batch_unsupported,
    _lazy("cuda_small_batch", "symmetric_linear"),
)
gluon = _triton_kernel("gluon_matmul", "gluon_matmul", "int4_linear")
dequantized = _triton_kernel(
    "triton_dequantize_cublas", "triton_dequant", "linear", "unsupported_linear"
)
triton_int8 = _triton_kernel("triton_w4a8", "triton_w4a8", "linear")
matvec = _triton_kernel("triton_matvec", "triton_matvec", "int4_linear")
matmul = _triton_kernel("triton_matmul", "triton_matmul", "int4_linear")
gradient = Kernel(
    "triton_dequantize_matmul",
    KernelPreference.TRITON,
    _triton_kernel("", "triton_dequant", "dequantize").unsupported,
    on_its_device(grad_input),
)
dequantize = _triton_kernel("triton_dequantize", "triton_dequant", "dequantize")
fp8_rows = _triton_kernel("triton_fp8_rows", "triton_fp8", "fp8_rows")

symmetric_gluon = _triton_kernel("gluon_matmul", "gluon_matmul", "int4_matmul")
symmetric_dequantized = _triton_kernel(
    "triton_dequantize_cublas", "triton_dequant", "int4_matmul", "unsupported_linear"
)
symmetric_matmul = _triton_kernel("triton_matmul", "triton_matmul", "int4_matmul")
symmetric_matvec = _triton_kernel("triton_matvec", "triton_matvec", "int4_matvec")
symmetric_dequantize = _triton_kernel("triton_dequantize", "triton_dequant", "dequant_w4_to_bf16")


def _experts_unsupported(problem: Problem) -> str | None:
    return _module("cuda_experts").unsupported(problem) or _not_compiled()


decode_bmm = Kernel(
    "cuda_experts", KernelPreference.CUDA, _experts_unsupported, _lazy("cuda_experts", "int4_bmm")
)
decode_grouped = Kernel(
    "cuda_experts",
    KernelPreference.CUDA,
    _experts_unsupported,
    _lazy("cuda_experts", "int4_grouped_mm"),
)
stream_bmm = _triton_kernel("gluon_experts", "gluon_experts", "int4_bmm")
stream_grouped = _triton_kernel("gluon_experts", "gluon_experts", "int4_grouped_mm")
bmm = _triton_kernel("triton_experts", "triton_experts", "int4_bmm")
bmm_gradient = _triton_kernel("triton_experts", "triton_experts", "int4_bmm_backward")
grouped = _triton_kernel("triton_experts", "triton_experts", "int4_grouped_mm")
grouped_gradient = _triton_kernel("triton_experts", "triton_experts", "int4_grouped_mm_backward")
q4gsw_matvec = _triton_kernel("triton_matvec", "triton_matvec", "linear_q4gsw")
q4gsw_matmul = _triton_kernel("triton_matmul", "triton_matmul", "linear_q4gsw")
q4gsw_gradient = Kernel(
    gradient.name, KernelPreference.TRITON, gradient.unsupported, on_its_device(_q4gsw_grad)
)
