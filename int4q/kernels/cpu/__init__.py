"""CPU kernels: the compiled one on plain bytes, torch's own on packed ones, blocks for the rest."""

from int4q.kernels.cpu.entries import (
    BLOCKED,
    BLOCKED_GRADIENT,
    NATIVE,
    NATIVE_DEQUANTIZE,
    PACKED,
    UNPACKING,
)

__all__ = [
    "BLOCKED",
    "BLOCKED_GRADIENT",
    "NATIVE",
    "NATIVE_DEQUANTIZE",
    "PACKED",
    "UNPACKING",
]
