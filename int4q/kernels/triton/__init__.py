"""Triton and Gluon kernels: NVIDIA GPUs from sm_80, and Triton's interpreter on a CPU."""

from int4q.kernels.triton.entries import (
    BMM,
    BMM_GRADIENT,
    COMBINE,
    DEQUANTIZE,
    DEQUANTIZED,
    FP8_ROWS,
    GLUON,
    GRADIENT,
    GROUPED,
    GROUPED_GRADIENT,
    INT8,
    MATMUL,
    MATVEC,
    PERMUTE,
    STREAM_BMM,
    STREAM_GROUPED,
)

__all__ = [
    "BMM",
    "BMM_GRADIENT",
    "COMBINE",
    "DEQUANTIZE",
    "DEQUANTIZED",
    "FP8_ROWS",
    "GLUON",
    "GRADIENT",
    "GROUPED",
    "GROUPED_GRADIENT",
    "INT8",
    "MATMUL",
    "MATVEC",
    "PERMUTE",
    "STREAM_BMM",
    "STREAM_GROUPED",
]
