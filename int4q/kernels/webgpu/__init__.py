"""``linear_q4gsw`` on any GPU through WebGPU: :class:`WebGPULinear` and its shaders."""

from int4q.kernels.webgpu.linear import COLUMNS, DECODE_MAX_ROWS, WebGPULinear, pack

__all__ = ["COLUMNS", "DECODE_MAX_ROWS", "WebGPULinear", "pack"]
