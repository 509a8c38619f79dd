"""``linear_q4gsw`` on any GPU through WebGPU: :class:`WebGPULinear` and its shaders."""

from int4q.kernels.webgpu.linear import WebGPULinear

__all__ = ["WebGPULinear"]
