"""``linear_q4gsw`` on any GPU through WebGPU (the ``wgpu`` package): WGSL shaders, no CUDA.

    layer = WebGPULinear.from_int4(weight)     # uploads once
    y = layer(x)                               # NumPy array or CPU tensor, float32

The shaders lie beside this file and are the ones that a browser runs (``examples/webgpu``); what
:func:`pack` makes is what they read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from int4q import errors
from int4q.kernels.webgpu.device import Gpu, default_gpu
from int4q.packing import symmetric_parts

DECODE_MAX_ROWS = 8
"""Rows up to which the decode shader runs (it reads the weight once a row)."""
BLOCK_K = 32
"""K is padded to a multiple of this, N to ``COLUMNS``, which a decode workgroup computes."""
COLUMNS = 8
_TILE = 64
_PLANS = 4
_PLAN_BYTES = 32 << 20
"""The last ``_PLANS`` row counts keep their buffers, if these take no more than this."""
_SMALL_GROUPS = (8, 16)
PRECISIONS = ("float32", "float16")


@dataclass(frozen=True)
class Packed:
    """A weight as the shaders read it, padded with zeros (``u = 8``) to whole blocks.

    Attributes:
        weights: uint8 ``[N8, K32/2]``, offset-binary nibbles.
        scales: float32 or float16 ``[K32/group_size, N8]``.
        bias: float32 ``[N8]``, 0 where the layer has none.
        columns: N, without padding.
        inner: K, without padding.
        group_size: k that share a scale.
    """

    weights: np.ndarray
    scales: np.ndarray
    bias: np.ndarray
    columns: int
    inner: int
    group_size: int


def pack(
    weights: Tensor,
    weight_scales: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    scale_dtype: type = np.float32,
) -> Packed:
    """The parts of ``linear_q4gsw``, checked and padded.

    Args:
        weights: uint8 ``[N, K/2]``.
        weight_scales: ``[K/group_size, N]``.
        group_size: 8, 16, or a multiple of 32.
        bias: ``[N]``.

    Raises:
        TypeError, ValueError: as ``linear_q4gsw``, or a group size that the shaders do not have.
    """
    _check_group_size(group_size)
    row = torch.empty((0, 2 * weights.shape[-1]), device="meta")
    parts = (t if t is None else t.detach().to("meta") for t in (weights, weight_scales, bias))
    meta_weights, meta_scales, meta_bias = parts
    torch.ops.int4q.linear_q4gsw(row, meta_weights, meta_scales, group_size, meta_bias)
    N, K = weights.shape[0], 2 * weights.shape[1]
    if N == 0 or K == 0:
        raise errors.value("a weight on WebGPU needs N and K of 1 or more", f"N {N}, K {K}")
    tall, wide = -N % COLUMNS, -K % BLOCK_K
    scales = weight_scales.detach().cpu().float().numpy().astype(scale_dtype)
    no_bias = np.zeros(N, np.float32)
    given = no_bias if bias is None else bias.detach().cpu().numpy()
    return Packed(
        np.pad(weights.cpu().numpy(), ((0, tall), (0, wide // 2)), constant_values=0x88),
        np.pad(scales, ((0, -(-(K + wide) // group_size) - K // group_size), (0, tall))),
        np.pad(given, (0, tall)),
        N,
        K,
        group_size,
    )


def _check_group_size(group_size: int) -> None:
    if group_size not in _SMALL_GROUPS and (group_size <= 0 or group_size % BLOCK_K):
        raise errors.value("group_size on WebGPU must be 8, 16 or a multiple of 32", group_size)


@dataclass(frozen=True)
class _Chunk:
    """Columns ``[start, start + columns)`` of a weight, in buffers that the adapter can bind."""

    start: int
    columns: int
    padded_columns: int
    buffers: tuple


@dataclass(frozen=True)
class _Plan:
    """Buffers and bind groups for one number of rows; ``steps`` are (chunk, y, bind group)."""

    rows: int
    x: object
    steps: tuple


class WebGPULinear:
    """A 4-bit linear layer whose weight stays on a WebGPU adapter.

    The weight is uploaded once, in chunks of columns where a buffer would pass the adapter's
    limits. Sums are float32. With ``precision="float32"`` nothing is rounded below that: float16
    scales are stored as such where the adapter computes in float16 (they are exact), all others in
    float32. ``precision="float16"`` (needs ``shader-f16``) rounds scales to float16 and, for
    more than ``DECODE_MAX_ROWS`` rows, activations and weights on the way into shared memory:
    outputs are within 4e-3 of their root mean square (2e-3 seen), and |x| must stay under 65504.

    Args:
        weights: as ``linear_q4gsw`` takes them.
        weight_scales: as ``linear_q4gsw`` takes them.
        group_size: 8, 16 or a multiple of 32.
        bias: as ``linear_q4gsw`` takes it.
        gpu: the adapter; the default one otherwise.
        precision: ``"float32"`` or ``"float16"``.
        max_bytes: of one buffer, when less than the adapter allows is wanted.

    Raises:
        ValueError: there is no adapter, ``shader-f16`` is missing, or the weight has so large a K
            that 8 columns pass the adapter's limit, which the message names.
    """

    def __init__(
        self,
        weights: Tensor,
        weight_scales: Tensor,
        group_size: int,
        bias: Tensor | None = None,
        *,
        gpu: Gpu | None = None,
        precision: str = "float32",
        max_bytes: int | None = None,
    ):
        if precision not in PRECISIONS:
            raise errors.value(f"precision must be one of {PRECISIONS}", repr(precision))
        self.gpu = gpu = gpu or default_gpu()
        if precision == "float16" and not gpu.has_f16:
            raise errors.value(
                "precision='float16' needs an adapter with shader-f16", gpu.name, "Use 'float32'"
            )
        half = gpu.has_f16 and (precision == "float16" or weight_scales.dtype == torch.float16)
        self.scale = "f16" if half else "f32"
        self.tile = "f16" if precision == "float16" else "f32"
        self.max_bytes = min(gpu.max_bytes, max_bytes or gpu.max_bytes)
        parts = weights, weight_scales, group_size, bias
        packed = pack(*parts, np.float16 if half else np.float32)
        self.out_features, self.in_features = packed.columns, packed.inner
        self.group_size = group_size
        self.padded_k = 2 * packed.weights.shape[1]
        self._chunks = [self._upload(packed, *span) for span in self._spans(packed)]
        self._plans: OrderedDict[int, _Plan] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def from_int4(cls, weight, bias: Tensor | None = None, **options) -> WebGPULinear:
        """From a symmetric 4-bit weight tensor ``[N, K]`` of any layout.

        Raises:
            TypeError, ValueError: ``weight`` is none, or has zero points
                (see :func:`int4q.packing.symmetric_parts`).
        """
        bias = None if bias is None else bias.detach().float()
        return cls(*symmetric_parts(weight), bias, **options)

    def __call__(self, x):
        """``x @ W.T + bias``.

        Args:
            x: float32 ``[.., K]``, a NumPy array or a CPU tensor, any strides.

        Returns:
            float32 ``[.., N]``, of the same kind.

        Raises:
            TypeError: another dtype or kind.
            ValueError: the last dim is not K.
        """
        array = self._as_array(x)
        flat = array.reshape(-1, self.in_features)
        y = np.empty((flat.shape[0], self.out_features), np.float32)
        step = self._rows_at_a_time()
        for start in range(0, flat.shape[0], step):
            with self._lock:  # calls share buffers
                self._run(flat[start : start + step], y[start : start + step])
        y = y.reshape(*array.shape[:-1], self.out_features)
        return torch.from_numpy(y) if isinstance(x, Tensor) else y

    @property
    def nbytes(self) -> int:
        """Bytes of the weight on the adapter."""
        return sum(buffer.size for chunk in self._chunks for buffer in chunk.buffers)

    # --- a call ------------------------------------------------------------------------------

    def _as_array(self, x) -> np.ndarray:
        if isinstance(x, Tensor):
            if x.device.type != "cpu":
                raise errors.value("x must be on cpu", x.device, "Call x.cpu()")
            if x.requires_grad and torch.is_grad_enabled():
                raise errors.value(
                    "x must not require a gradient, which WebGPU does not compute",
                    "one that does",
                    "Call under torch.no_grad()",
                )
            x = x.detach()
            dtype, array = x.dtype, x.numpy() if x.dtype == torch.float32 else None
        elif isinstance(x, np.ndarray):
            dtype, array = x.dtype, x if x.dtype == np.float32 else None
        else:
            raise errors.type_("x must be a NumPy array or a CPU tensor", type(x).__name__)
        if array is None:
            raise errors.type_("x must be float32", dtype)
        if array.ndim == 0 or array.shape[-1] != self.in_features:
            raise errors.value(
                f"the last dim of x must be {self.in_features} to meet the weight",
                errors.dims(array.shape),
            )
        return array

    def _rows_at_a_time(self) -> int:
        widest = max(chunk.columns for chunk in self._chunks)
        fits = self.max_bytes // (4 * max(self.padded_k, widest))
        return min(fits, self.gpu.max_workgroups * _TILE)

    def _run(self, x: np.ndarray, y: np.ndarray) -> None:
        plan = self.plan(x.shape[0])
        padded = np.zeros((x.shape[0], self.padded_k), np.float32)
        padded[:, : self.in_features] = x
        queue = self.gpu.device.queue
        queue.write_buffer(plan.x, 0, padded)
        encoder = self.gpu.device.create_command_encoder()
        work = encoder.begin_compute_pass()
        self.encode(work, plan)
        work.end()
        queue.submit([encoder.finish()])
        for chunk, result, _ in plan.steps:
            part = np.frombuffer(queue.read_buffer(result), np.float32)
            y[:, chunk.start : chunk.start + chunk.columns] = part.reshape(-1, chunk.columns)

    def plan(self, rows: int) -> _Plan:
        """Buffers for ``rows`` rows; those of the last few row counts are kept, if small."""
        if rows in self._plans:
            self._plans.move_to_end(rows)
            return self._plans[rows]
        gpu = self.gpu
        x = gpu.buffer(size=4 * rows * self.padded_k)
        steps = []
        for chunk in self._chunks:
            y = gpu.buffer(size=4 * rows * chunk.columns)
            steps.append((chunk, y, self.bind(chunk, rows, x, y)))
        plan = _Plan(rows, x, tuple(steps))
        if x.size + sum(y.size for _, y, _ in steps) <= _PLAN_BYTES:
            self._plans[rows] = plan
        if len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return plan

    def bind(self, chunk: _Chunk, rows: int, x, y):
        """The bind group of one chunk of columns, with x and y in these buffers."""
        facts = rows, chunk.columns, chunk.padded_columns, self.padded_k // BLOCK_K
        shape = self.gpu.uniform(np.array(facts, np.uint32))
        return self.gpu.bind_group((x, *chunk.buffers, y, shape))

    def encode(self, work, plan: _Plan) -> None:
        """Add this layer's dispatches to a compute pass: ``plan.x`` in, each step's y out."""
        decode = plan.rows <= DECODE_MAX_ROWS
        shader = "q4gsw_decode" if decode else "q4gsw_prefill"
        work.set_pipeline(self.gpu.pipeline(shader, self.group_size, self.scale, self.tile))
        for chunk, _, group in plan.steps:
            work.set_bind_group(0, group)
            if decode:
                work.dispatch_workgroups(chunk.padded_columns // COLUMNS, plan.rows)
            else:
                tiles = -(-chunk.columns // _TILE), -(-plan.rows // _TILE)
                work.dispatch_workgroups(*tiles)

    # --- the weight --------------------------------------------------------------------------

    def _spans(self, packed: Packed) -> list[tuple[int, int]]:
        """Ranges of padded columns whose buffers (weights, scales, y of a row) can be bound."""
        width = packed.weights.shape[1], packed.scales.shape[0] * packed.scales.itemsize, 4
        fits = self.max_bytes // max(width) // COLUMNS * COLUMNS
        if fits == 0 or 4 * self.padded_k > self.max_bytes:
            raise errors.value(
                f"{COLUMNS} columns of the weight and a row of x must fit the adapter's "
                f"max-storage-buffer-binding-size and max-buffer-size of {self.max_bytes} bytes",
                f"{max(COLUMNS * max(width), 4 * self.padded_k)} bytes for K {packed.inner}",
            )
        fits = min(fits, self.gpu.max_workgroups * COLUMNS)
        total = packed.bias.size
        return [(start, min(start + fits, total)) for start in range(0, total, fits)]

    def _upload(self, packed: Packed, start: int, stop: int) -> _Chunk:
        weights = np.ascontiguousarray(packed.weights[start:stop])
        scales = np.ascontiguousarray(packed.scales[:, start:stop])
        bias = np.ascontiguousarray(packed.bias[start:stop])
        buffers = tuple(self.gpu.buffer(part) for part in (weights, scales, bias))
        return _Chunk(start, min(stop, packed.columns) - start, stop - start, buffers)
