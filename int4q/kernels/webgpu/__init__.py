"""``linear_q4gsw`` on any GPU through WebGPU: :class:`WebGPULinear` and its shaders."""

from int4q.kernels.webgpu.linear import (
    BLOCK_K,
    COLUMNS,
    DECODE_MAX_ROWS,
    Packed,
    WebGPULinear,
    pack,
)

__all__ = ["BLOCK_K", "COLUMNS", "DECODE_MAX_ROWS", "Packed", "WebGPULinear", "pack"]
