"""CPU kernels: the compiled one on plain bytes, torch's own on packed ones, blocks for the rest."""

from int4q.kernels.cpu.entries import (
    BLOCKED,
    BLOCKED_GRADIENT,
    BLOCKED_ROUNDED,
    NATIVE,
    NATIVE_DEQUANTIZE,
    NATIVE_INT8,
    NATIVE_ROUNDED,
    PACKED,
    PACKINGS,
    UNPACKING,
    libraries,
    preferred_packing,
)

__all__ = [
    "BLOCKED",
    "BLOCKED_GRADIENT",
    "BLOCKED_ROUNDED",
    "NATIVE",
    "NATIVE_DEQUANTIZE",
    "NATIVE_INT8",
    "NATIVE_ROUNDED",
    "PACKED",
    "PACKINGS",
    "UNPACKING",
    "libraries",
    "preferred_packing",
]
