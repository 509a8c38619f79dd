"""CUDA C++ kernels, compiled at run time: NVIDIA GPUs from sm_80."""

from int4q.kernels.cuda.entries import (
    DECODE,
    DECODE_INT8,
    DECODE_ROUNDED,
    EXPERTS_BMM,
    EXPERTS_GROUPED,
    WARP_SPECIALISED,
)

__all__ = [
    "DECODE",
    "DECODE_INT8",
    "DECODE_ROUNDED",
    "EXPERTS_BMM",
    "EXPERTS_GROUPED",
    "WARP_SPECIALISED",
]
