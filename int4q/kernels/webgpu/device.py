"""A WebGPU device as the kernels need it: its limits, and pipelines compiled once.

``wgpu`` (wgpu-native: Vulkan, Metal, Direct3D 12) is optional and imported at first use.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib import resources

from int4q import errors

_LIMITS = ("max-storage-buffer-binding-size", "max-buffer-size")
_FEATURES = ("shader-f16", "timestamp-query")
INSTALL = "pip install int4q[webgpu]"


class Gpu:
    """One adapter, opened with the largest buffers it allows.

    Attributes:
        device: the ``wgpu.GPUDevice``.
        name: what the adapter calls itself.
        software: it runs on the CPU.
        has_f16: shaders may compute in float16.
        max_bytes: of one buffer and of one binding to a shader.
        max_workgroups: in one dimension of a dispatch.
    """

    def __init__(self, adapter):
        limits = {name: adapter.limits[name] for name in _LIMITS}
        features = [name for name in _FEATURES if name in adapter.features]
        self.device = adapter.request_device_sync(
            required_features=features, required_limits=limits
        )
        info = adapter.info
        self.name = f"{info['device']} ({info['backend_type']})"
        self.software = info["adapter_type"] == "CPU"
        self.has_f16 = "shader-f16" in features
        self.has_timestamps = "timestamp-query" in features
        self.max_bytes = min(limits.values())
        self.max_workgroups = self.device.limits["max-compute-workgroups-per-dimension"]
        self._pipelines: dict[tuple, object] = {}

    def pipeline(self, shader: str, group_size: int, scale: str, tile: str):
        """The compute pipeline of ``<shader>.wgsl`` for one class of shapes, compiled once.

        Args:
            group_size: of the weight, a constant in the shader.
            scale: ``"f32"`` or ``"f16"``, how scales are stored.
            tile: ``"f32"`` or ``"f16"``, how shared memory holds both operands.
        """
        key = shader, group_size, scale, tile
        if key not in self._pipelines:
            module = self.device.create_shader_module(code=source(shader, scale, tile))
            self._pipelines[key] = self.device.create_compute_pipeline(
                layout=self._layout,
                compute={
                    "module": module,
                    "entry_point": "main",
                    "constants": {"GROUP_SIZE": group_size},
                },
            )
        return self._pipelines[key]

    @functools.cached_property
    def bindings(self):
        """The bind group layout that all shaders share: x, weights, scales, bias, y, shape."""
        import wgpu

        kinds = ["read-only-storage"] * 4 + ["storage", "uniform"]
        return self.device.create_bind_group_layout(
            entries=[
                {"binding": i, "visibility": wgpu.ShaderStage.COMPUTE, "buffer": {"type": kind}}
                for i, kind in enumerate(kinds)
            ]
        )

    def bind_group(self, buffers):
        """``buffers`` in the order of :attr:`bindings`, each as a whole."""
        entries = [
            {"binding": i, "resource": {"buffer": buffer, "offset": 0, "size": buffer.size}}
            for i, buffer in enumerate(buffers)
        ]
        return self.device.create_bind_group(layout=self.bindings, entries=entries)

    @functools.cached_property
    def _layout(self):
        return self.device.create_pipeline_layout(bind_group_layouts=[self.bindings])

    def buffer(self, data=None, size: int = 0):
        """A storage buffer with ``data`` in it, or of ``size`` bytes."""
        import wgpu

        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
        if data is None:
            return self.device.create_buffer(size=size, usage=usage)
        return self.device.create_buffer_with_data(data=data, usage=usage)

    def uniform(self, data):
        """A uniform buffer with ``data`` in it."""
        import wgpu

        return self.device.create_buffer_with_data(data=data, usage=wgpu.BufferUsage.UNIFORM)


def source(shader: str, scale: str = "f32", tile: str = "f32") -> str:
    """The text of ``<shader>.wgsl`` after the lines that choose its types."""
    enable = "enable f16;\n" if "f16" in (scale, tile) else ""
    text = (resources.files("int4q.kernels.webgpu") / f"{shader}.wgsl").read_text()
    return f"{enable}alias Scale = {scale};\nalias Tile = {tile};\n{text}"


@functools.cache
def _adapter():
    """The adapter to use, or ``None``, and then the reason."""
    if importlib.util.find_spec("wgpu") is None:
        return None, f"wgpu is not installed ({INSTALL})"
    import wgpu

    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except RuntimeError as error:
        return None, f"no WebGPU adapter: {error}"
    if adapter is None or adapter.info["backend_type"] == "OpenGL":
        return None, (
            "no WebGPU adapter on Vulkan, Metal or Direct3D 12 (on Linux without a GPU the package "
            "mesa-vulkan-drivers has a software one)"
        )
    return adapter, None


def unavailable() -> str | None:
    """Why there is no WebGPU here, or ``None``."""
    return _adapter()[1]


@functools.cache
def default_gpu() -> Gpu:
    """The fastest adapter of this machine, opened once.

    Raises:
        ValueError: there is none, or ``wgpu`` is not installed; the message says which.
    """
    adapter, reason = _adapter()
    if adapter is None:
        raise errors.value("WebGPU needs wgpu and an adapter", reason)
    return Gpu(adapter)
