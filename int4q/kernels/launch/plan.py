"""A plan: all that a call of one kind does on a GPU, as plain data, and its replay.

Where the C++ core is there it replays the plans of the ops (``core/launcher.cpp``, from
:meth:`Plan.words`); the Python below is the same replay, for what calls a kernel directly and
where the core was not built.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from int4q.kernels.launch import driver

ALIGN = 256
"""Bytes that every part of the scratch memory is aligned to, as the caching allocator does."""
_MAP_ALIGN = 64  # of a CUtensorMap, and so of a parameter block
_DTYPES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4,
    torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bool: 11,
    torch.bfloat16: 15, torch.float8_e4m3fn: 24,
}  # fmt: skip
"""c10::ScalarType, which ATen's C interface counts dtypes by."""


ABSOLUTE = -1


class Address(NamedTuple):
    """Memory that is known at the call only.

    Attributes:
        slot: counts the inputs, then the outputs, then the scratch memory; ``ABSOLUTE`` while a
            call is noted, which is an address as it was.
        offset: bytes from its start.
    """

    slot: int
    offset: int


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        function: a ``CUfunction``.
        grid, block, shared_bytes: as ``cuLaunchKernelEx`` takes them; ``block`` is threads.
        dependent: it may start before the kernel in front of it on the stream ends.
        parameters: the bytes of all parameters; addresses in them are filled in at the call.
        offsets: where each parameter starts in ``parameters``.
        pointers: where an address goes, and which.
        maps: where a tensor map lies, and the address that it is moved to.
    """

    function: int
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    dependent: bool
    parameters: bytes
    offsets: tuple[int, ...]
    pointers: tuple[tuple[int, Address], ...]
    maps: tuple[tuple[int, Address], ...] = ()


class View(NamedTuple):
    """A tensor over memory that is known at the call only."""

    address: Address
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Operator(NamedTuple):
    """A call of one of ATen's ops, into memory that is there."""

    name: str
    views: tuple[View, ...]


OPERATORS = {
    "mm": lambda out, a, b: torch.mm(a, b, out=out),
    "addmm": lambda out, bias, a, b: torch.addmm(bias, a, b, out=out),
    "copy": lambda out, source: out.copy_(source),
}
"""Those that a plan may hold, each with its result first."""


class Output(NamedTuple):
    """A tensor that a call returns, new memory each time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What a call does.

    Attributes:
        device: of everything.
        context: its primary ``CUcontext``.
        outputs: what is returned: one tensor, or several as a tuple; may be none.
        scratch_bytes: memory that is free again after the call.
        scratch_dtype: what it is allocated as.
        steps: in order, on the current stream.
    """

    device: torch.device
    context: int
    outputs: tuple[Output, ...]
    scratch_bytes: int
    scratch_dtype: torch.dtype
    steps: tuple[Launch | Operator, ...]

    def __call__(self, inputs: Sequence[Tensor | None]) -> Tensor | tuple[Tensor, ...] | None:
        made = [
            torch.empty_strided(o.shape, o.stride, dtype=o.dtype, device=self.device)
            for o in self.outputs
        ]
        memory = [*inputs, *made]
        if self.scratch_bytes:
            # From the caching allocator: streams never share it, and a graph keeps its own.
            size = self.scratch_bytes // self.scratch_dtype.itemsize
            memory.append(torch.empty(size, dtype=self.scratch_dtype, device=self.device))
        starts = [0 if tensor is None else tensor.data_ptr() for tensor in memory]
        if any(start & 15 for start in starts[len(inputs) :]):
            raise RuntimeError(
                "the CUDA allocator must align to 16 bytes at least, got addresses "
                f"{[hex(start) for start in starts]}"
            )
        if self.steps:
            self._run(memory, starts)
        return (made[0] if made else None) if len(made) < 2 else tuple(made)

    def _run(self, memory: Sequence[Tensor | None], starts: list[int]) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self.device.index or 0)
        runners, lock = self._runners
        with lock:
            for step in runners:
                if isinstance(step, _Runner):
                    with driver.current(self.context):  # a product may leave another one
                        step(starts, stream)
                else:
                    OPERATORS[step.name](*(_tensor(view, memory, starts) for view in step.views))

    @functools.cached_property
    def _runners(self) -> tuple[list[_Runner | Operator], threading.Lock]:
        steps = [_Runner(step) if isinstance(step, Launch) else step for step in self.steps]
        return steps, threading.Lock()

    def words(self) -> list[int]:
        """All of it as integers, in the order in which ``launcher.cpp`` reads them."""
        kind = {"cpu": 0, "cuda": 1}[self.device.type]
        scratch = self.scratch_bytes // self.scratch_dtype.itemsize
        found = [kind, self.device.index or 0, self.context]
        found += [*_sides(self.scratch_dtype, [scratch], [1]), len(self.outputs)]
        for output in self.outputs:
            found += _sides(*output)
        found.append(len(self.steps))
        for step in self.steps:
            found += _launch_words(step) if isinstance(step, Launch) else _operator_words(step)
        return found


def run_now(step: Launch, index: int) -> None:
    """Run a launch whose addresses are absolute, in no slot, on device ``index``."""
    with driver.current(driver.context(index)):
        _Runner(step)([0], torch._C._cuda_getCurrentRawStream(index))


def _sides(dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    return [_DTYPES[dtype], dtype.itemsize, len(shape), *shape, *stride]


def _launch_words(step: Launch) -> list[int]:
    block = step.parameters + bytes(-len(step.parameters) % 8)
    found = [0, step.function, *step.grid, step.block, step.shared_bytes, int(step.dependent)]
    found += [len(block) // 8, *struct.unpack(f"={len(block) // 8}q", block)]
    found += [len(step.offsets), *step.offsets]
    for places in (step.pointers, step.maps):
        found.append(len(places))
        for at, address in places:
            found += [at, *address]
    return found


def _operator_words(step: Operator) -> list[int]:
    found = [1, list(OPERATORS).index(step.name), len(step.views)]
    for view in step.views:
        found += [*view.address, *_sides(*view[1:])]
    return found


def _tensor(view: View, memory: Sequence[Tensor | None], starts: Sequence[int]) -> Tensor:
    slot, offset = view.address
    base = memory[slot]
    if base is None:
        raise RuntimeError(f"a plan reads the input {slot}, which is not there")
    storage, empty = base.untyped_storage(), torch.empty(0, dtype=view.dtype, device=base.device)
    start = starts[slot] - storage.data_ptr() + offset
    return empty.set_(storage, start // empty.itemsize, view.shape, view.stride)


class _Runner:
    """A launch in the form that the driver takes; the caller serialises its calls."""

    def __init__(self, step: Launch):
        self._config = driver.LaunchConfig(
            grid=step.grid, block=(step.block, 1, 1), shared_bytes=step.shared_bytes
        )
        if step.dependent:
            self._attribute = driver.LaunchAttribute(id=driver.PROGRAMMATIC_SERIALIZATION, value=1)
            self._config.attributes = ctypes.pointer(self._attribute)
            self._config.attribute_count = 1
        self._memory = ctypes.create_string_buffer(len(step.parameters) + _MAP_ALIGN)
        base = ctypes.addressof(self._memory)
        base += -base % _MAP_ALIGN
        ctypes.memmove(base, step.parameters, len(step.parameters))
        places = (base + offset for offset in step.offsets)
        self._parameters = (ctypes.c_void_p * len(step.offsets))(*places)
        self._pointers = [(ctypes.c_uint64.from_address(base + at), a) for at, a in step.pointers]
        self._maps = [(ctypes.c_void_p(base + at), a) for at, a in step.maps]
        self._function = ctypes.c_void_p(step.function)

    def __call__(self, starts: Sequence[int], stream: int) -> None:
        for place, (slot, offset) in self._pointers:
            place.value = starts[slot] + offset
        for box, (slot, offset) in self._maps:
            address = ctypes.c_void_p(starts[slot] + offset)
            driver.call("cuTensorMapReplaceAddress", box, address)
        self._config.stream = stream
        config = ctypes.byref(self._config)
        driver.call("cuLaunchKernelEx", config, self._function, self._parameters, None)
