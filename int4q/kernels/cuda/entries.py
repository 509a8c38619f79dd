"""The CUDA C++ kernels as entries of the table; they are imported at their first call."""

from __future__ import annotations

import torch

from int4q.kernels.launch.lazy import lazy, module
from int4q.kernels.registry import Kernel, KernelPreference, Problem

SMALL_WEIGHT = 1 << 21
"""Elements up to which a weight counts as small: the crossovers below are others for it."""
_LARGE_N, _MEDIUM_N = 16384, 4224
_DECODE, _WARP_SPECIALISED, _EXPERTS = (
    f"{__package__}.{name}" for name in ("decode", "warp_specialised", "experts")
)


def _not_compiled() -> str | None:
    """Why CUDA C++ cannot be compiled here; without any GPU the table says what would run."""
    if not torch.cuda.is_available():
        return None
    return module("int4q.kernels.launch.nvrtc").unavailable()


def _decode_unsupported(problem: Problem) -> str | None:
    if reason := module(_DECODE).unsupported(problem):
        return reason
    if problem.M > 8 and problem.capability[0] == 9 and problem.dtype != torch.float32:
        # Measured on sm_90: from here the wgmma kernel wins on large N and on small groups.
        small = problem.N * problem.K <= SMALL_WEIGHT
        if (problem.group_size < 128 and not small) or (problem.M > 12 and problem.N > 8192):
            return f"M={problem.M}: the wgmma kernel is faster for this shape"
    return _not_compiled()


def _rounded_unsupported(problem: Problem) -> str | None:
    return module(_DECODE).unsupported_rounded(problem) or _not_compiled()


def _warp_specialised_unsupported(problem: Problem) -> str | None:
    if reason := module(_WARP_SPECIALISED).unsupported(problem):
        return reason
    M, N, group_size = problem.M, problem.N, problem.group_size
    # Measured: at 9 rows of 4096 x 4096, group 128, the decode kernel takes 0.88 of this kernel's
    # time, at 16 1.07; at 8 rows of 28672 x 4096, group 32, it takes 1.04.
    last = 7 if group_size < 64 and N >= _LARGE_N else 8
    if group_size >= 128 and N <= _MEDIUM_N and N * problem.K > SMALL_WEIGHT:
        last = 12
    if M <= last:
        return f"M={M}: the decode kernel is faster for this shape"
    return _not_compiled()


def _experts_unsupported(problem: Problem) -> str | None:
    return module(_EXPERTS).unsupported(problem) or _not_compiled()


def _kernel(name: str, unsupported, file: str, function: str = "linear", **fixed) -> Kernel:
    return Kernel(name, KernelPreference.CUDA, unsupported, lazy(file, function, **fixed))


DECODE = _kernel("cuda_decode", _decode_unsupported, _DECODE)
DECODE_INT8 = _kernel("cuda_decode_w4a8", _decode_unsupported, _DECODE, activation=torch.int8)
DECODE_ROUNDED = _kernel("cuda_decode", _rounded_unsupported, _DECODE, "linear_rounded")
WARP_SPECIALISED = _kernel(
    "cuda_warp_specialised", _warp_specialised_unsupported, _WARP_SPECIALISED
)
EXPERTS_BMM = _kernel("cuda_experts", _experts_unsupported, _EXPERTS, "int4_bmm")
EXPERTS_GROUPED = _kernel("cuda_experts", _experts_unsupported, _EXPERTS, "int4_grouped_mm")
