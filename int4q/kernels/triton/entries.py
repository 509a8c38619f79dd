"""The Triton and Gluon kernels as entries of the table; they are imported at their first call."""

from __future__ import annotations

import functools
import importlib.util
import os

from int4q.kernels import registry
from int4q.kernels.launch import record
from int4q.kernels.launch.lazy import lazy, module, on_its_device
from int4q.kernels.registry import Kernel, KernelPreference, Problem
from int4q.kernels.triton import tuned

tuned.on_change(registry.route.cache_clear)
tuned.on_change(record.clear)  # a plan was made with the tiles of its time


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install int4q[cuda])"
    return None


def _kernel(name: str, file: str, function: str = "linear", check: str = "unsupported") -> Kernel:
    """``function`` of the module ``file``, whose function ``check`` says what it cannot run."""
    path = f"{__package__}.{file}"

    def unsupported(problem: Problem) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if problem.device != "cuda" and not (interpreted and problem.device == "cpu"):
            return f"runs on cuda, not {problem.device}"
        return _missing() or getattr(module(path), check)(problem)

    return Kernel(name, KernelPreference.TRITON, unsupported, on_its_device(lazy(path, function)))


GLUON = _kernel("gluon_matmul", "gluon_matmul")
DEQUANTIZED = _kernel("triton_dequantize_cublas", "dequant", check="unsupported_linear")
INT8 = _kernel("triton_w4a8", "w4a8")
MATVEC = _kernel("triton_matvec", "matvec")
MATMUL = _kernel("triton_matmul", "matmul")
GRADIENT = _kernel("triton_dequantize_matmul", "dequant", "grad_input")
DEQUANTIZE = _kernel("triton_dequantize", "dequant", "dequantize")
FP8_ROWS = _kernel("triton_fp8_rows", "fp8", "fp8_rows")
PERMUTE = _kernel("triton_permute", "routing", "permute")
COMBINE = _kernel("triton_combine", "routing", "combine", check="unsupported_combine")

STREAM_BMM = _kernel("gluon_experts", "gluon_experts", "int4_bmm")
STREAM_GROUPED = _kernel("gluon_experts", "gluon_experts", "int4_grouped_mm")
BMM = _kernel("triton_experts", "experts", "int4_bmm")
BMM_GRADIENT = _kernel("triton_experts", "experts", "int4_bmm_backward")
GROUPED = _kernel("triton_experts", "experts", "int4_grouped_mm")
GROUPED_GRADIENT = _kernel("triton_experts", "experts", "int4_grouped_mm_backward")
