"""Repeat Triton launches without Triton's Python: written once, run once, then replayed.

    def build(call, x, weight, group_size):  # ordinary code: choose tiles, allocate, launch
        out = call.result((x.shape[0], weight.shape[0]))
        call.launch(kernel, programs, x, weight, out, M, N, BLOCK=64, num_warps=4)

    y = run(build, (x, weight), group_size)

The first call of a kind (shapes, strides, dtypes, devices and alignment of the inputs, and the
other arguments) runs ``build``, and so compiles and launches in Triton's own way. What it launched
is kept as a plan: the loaded function, its grid, and its arguments, with every pointer traced back
to an input or to memory that ``call`` gave out. The next call of that kind allocates the same
memory, fills in the addresses and hands the plan to the driver.

A builder must depend on its arguments only in what tells kinds apart; tile tables count as
constants, and plans are forgotten when one is replaced. Where a plan cannot be made (an input had
to be copied first, a Triton whose internals are not known here, no NVIDIA device, the interpreter),
every call runs ``build``: slower, the same result. :func:`unavailable` says why.

Triton's launch hooks see the first call of a kind only.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
import threading
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from int4q.kernels.launch import nvrtc

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's CPU interpreter runs the kernels (fixed when Triton is first imported)."""
KNOWN_TRITON = ("3.6",)
"""Versions of Triton whose calling convention for compiled kernels is the one replayed here."""
MAX_PLANS = 2048
"""Plans kept; the oldest goes first. One takes some 5 KB."""

_ALIGN = 256  # of every part of the scratch memory, as the caching allocator does
_INTEGERS = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
    "i64": ctypes.c_int64, "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
}  # fmt: skip

_plans: dict[tuple, _Plan] = {}
_guard = threading.Lock()


@functools.cache
def unavailable() -> str | None:
    """Why launches are not replayed on this machine; ``None`` where they are."""
    if INTERPRET:
        return "Triton's interpreter runs the kernels"
    if ".".join(triton.__version__.split(".")[:2]) not in KNOWN_TRITON:
        return f"Triton must be one of {KNOWN_TRITON} to be replayed, got {triton.__version__}"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no NVIDIA device"
    return nvrtc.driver_unavailable()


def run(build: Callable[..., None], inputs: Sequence[Tensor | None], *facts) -> Tensor | None:
    """``build(call, *inputs, *facts)``, from its plan where there is one.

    Args:
        build: allocates and launches through its first argument, a :class:`Call`.
        inputs: tensors that kernels read or write, ``None`` for one that is not there (never the
            first).
        facts: hashable arguments.

    Returns:
        What ``build`` took from ``call.result``, else ``None``.
    """
    key = [build, facts]
    pointers, bits = [], 0
    for tensor in inputs:
        if tensor is None:
            key.append(None)
            pointers.append(0)
        else:
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            bits |= pointer
            key += tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()
    if bits & 15:
        key += [pointer & 15 for pointer in pointers]
    key = tuple(key)
    plan = _plans.get(key)
    if plan is not None:
        return plan(inputs[0], pointers)
    call = Call(inputs)
    build(call, *call.inputs, *facts)
    if call.replayable:
        plan = _Plan(call, inputs[0].device)
        with _guard:
            while len(_plans) >= MAX_PLANS:
                del _plans[next(iter(_plans))]
            _plans[key] = plan
    return call.output


def clear() -> None:
    """Forget all plans, because something that builders take for constant has changed."""
    with _guard:
        _plans.clear()


class Call:
    """One run of a builder: gives out memory, launches, and notes both.

    Attributes:
        inputs: as given; a tensor that stands at two places is told apart by a view of it.
        output: what :meth:`result` gave out.
        replayable: whether every tensor of every launch is known, so that a plan can be made.
    """

    def __init__(self, inputs: Sequence[Tensor | None] = ()):
        self.slots: dict[int, int] = {}
        self.inputs = []
        for tensor in inputs:
            if tensor is not None and id(tensor) in self.slots:
                tensor = tensor.detach()
            if tensor is not None:
                self.slots[id(tensor)] = len(self.inputs)
            self.inputs.append(tensor)
        self.output: Tensor | None = None
        self.scratch: list[Tensor] = []
        self.steps: list[_Step] = []
        self.replayable = unavailable() is None
        self._kept: list[Tensor] = []  # ids stay unique as long as what they name lives

    def result(self, shape: Sequence[int]) -> Tensor:
        """Memory for what the call returns, with the dtype and on the device of its first input."""
        if self.output is not None:
            raise RuntimeError("a builder may take one result")
        first = self.inputs[0]
        self.output = torch.empty(shape, dtype=first.dtype, device=first.device)
        self.slots[id(self.output)] = len(self.inputs)
        return self.output

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that is free again when the call's launches have run."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.slots[id(tensor)] = len(self.inputs) + 1 + len(self.scratch)
        self.scratch.append(tensor)
        return tensor

    def view(self, view: Tensor, base: Tensor) -> Tensor:
        """``view``, known as ``base`` if it is no copy of it: the address says so."""
        slot = self.slots.get(id(base))
        if slot is not None and view.data_ptr() == base.data_ptr():
            self.slots[id(view)] = slot
            self._kept.append(view)
        return view

    def launch(self, kernel, programs: int, *args, **options) -> None:
        """``kernel[(programs,)](*args, **options)``; ``args`` are all that are no constexpr."""
        compiled = kernel[(programs,)](*args, **options)
        step = _Step(compiled, programs, args)
        self.replayable = self.replayable and step.replayable(self.slots)
        self.steps.append(step)


class _Step:
    """One launch: a compiled kernel, its grid and its arguments."""

    def __init__(self, compiled, programs: int, args: tuple):
        self.compiled, self.programs, self.args = compiled, programs, args

    def replayable(self, slots: dict[int, int]) -> bool:
        """Whether the driver needs nothing that a plan does not know."""
        facts = self.compiled.metadata
        plain = (facts.num_ctas, facts.launch_cooperative_grid) == (1, False)
        no_scratch = not (facts.global_scratch_size or facts.profile_scratch_size)
        tensors = (arg if isinstance(arg, Tensor) else arg.base for arg in self.args if _holds(arg))
        return plain and no_scratch and all(id(tensor) in slots for tensor in tensors)

    def parameters(self, slots: dict[int, int], addresses: Sequence) -> tuple[list, list]:
        """The kernel's parameters in order, and ``(map, address)`` of each tensor map among them.

        Args:
            addresses: a ``c_void_p`` for every slot; pointer parameters *are* these objects.
        """
        types = list(self.compiled.src.signature.values())
        layouts = iter(getattr(self.compiled.metadata, "tensordesc_meta", None) or ())
        found, maps = [], []
        for kind, arg in zip(types, self.args, strict=False):
            if kind == "constexpr":  # a value that Triton compiled in, such as 1
                continue
            if isinstance(arg, Tensor):
                found.append(addresses[slots[id(arg)]])
            elif _holds(arg):
                box = tensor_map(arg, next(layouts))
                maps.append((ctypes.byref(box), addresses[slots[id(arg.base)]]))
                sizes = map(ctypes.c_int32, arg.shape)
                found += [box, *sizes, *map(ctypes.c_int64, arg.strides)]
            else:
                found.append(_INTEGERS[kind](arg))
        nothing = ctypes.c_void_p(0)  # Triton's own scratch memories, unused
        return [*found, nothing, nothing], maps


class _Plan:
    """The launches of one kind of call; threads take turns."""

    def __init__(self, call: Call, device: torch.device):
        self._result = None if call.output is None else tuple(call.output.shape)
        self._index = device.index
        self._offsets, self._scratch_bytes = [], 0
        for tensor in call.scratch:
            self._offsets.append(self._scratch_bytes)
            self._scratch_bytes += math.ceil(tensor.nbytes / _ALIGN) * _ALIGN
        count = len(call.inputs) + 1 + len(call.scratch)
        self._buffer = (ctypes.c_void_p * count)()
        self._pack = struct.Struct(f"={count}Q").pack_into
        self._lock = threading.Lock()
        size = ctypes.sizeof(ctypes.c_void_p)
        addresses = [ctypes.c_void_p.from_buffer(self._buffer, size * i) for i in range(count)]
        self._launches, self._maps = [], []
        for step in call.steps:
            params, maps = step.parameters(call.slots, addresses)
            facts = step.compiled.metadata
            self._maps += maps
            function = ctypes.c_void_p(step.compiled.function)
            shape = step.programs, 32 * facts.num_warps, facts.shared
            launch = nvrtc.Launch(function, self._index, *shape, params, facts.launch_pdl)
            self._launches.append(launch)

    def __call__(self, first: Tensor, pointers: list[int]) -> Tensor | None:
        out, start = None, 0
        if self._result is not None:
            out = first.new_empty(self._result)
            start = out.data_ptr()
        pointers.append(start)
        if self._scratch_bytes:
            # From the caching allocator: streams never share it, and a graph keeps its own.
            scratch = first.new_empty(self._scratch_bytes // first.itemsize)
            base = scratch.data_ptr()
            start |= base
            pointers += [base + offset for offset in self._offsets]
        if start & 15:
            raise RuntimeError(
                "the CUDA allocator must align to 16 bytes at least, got addresses "
                f"{[hex(pointer) for pointer in pointers]}"
            )
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        with self._lock:
            self._pack(self._buffer, 0, *pointers)
            for box, address in self._maps:
                nvrtc.driver_call("cuTensorMapReplaceAddress", box, address)
            for launch in self._launches:
                launch(stream)
        return out


# --- tensor maps ------------------------------------------------------------------------------


def _holds(arg) -> bool:
    """Whether ``arg`` is a tensor or a descriptor of one."""
    return isinstance(arg, Tensor) or hasattr(arg, "base")


_MAP_BYTES, _MAP_ALIGN = 128, 64
_PROMOTE_TO_128_BYTES = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B


def tensor_map(descriptor, layout: dict) -> ctypes.Array:
    """The driver's form (a ``CUtensorMap``) of a host descriptor, as Triton encodes it.

    Args:
        descriptor: has ``base``, ``shape`` and ``strides`` (elements, the last one 1).
        layout: its entry in the compiled kernel's ``tensordesc_meta``.
    """
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if descriptor.padding != "zero" or layout["fp4_padded"]:
        raise RuntimeError("only plain zero-padded tensor maps can be replayed")
    memory = (ctypes.c_char * (_MAP_BYTES + _MAP_ALIGN))()
    shift = -ctypes.addressof(memory) % _MAP_ALIGN
    box = (ctypes.c_char * _MAP_BYTES).from_buffer(memory, shift)
    rank, size = len(descriptor.shape), layout["elem_size"]
    strides = [size * stride for stride in descriptor.strides[:-1]]
    nvrtc.driver_call(
        "cuTensorMapEncodeTiled",
        box,
        TMA_DTYPE_DEVICE_TO_HOST[layout["elem_type"]],
        rank,
        ctypes.c_void_p(descriptor.base.data_ptr()),
        (ctypes.c_uint64 * rank)(*reversed(descriptor.shape)),
        (ctypes.c_uint64 * rank)(*reversed(strides)),
        (ctypes.c_uint32 * rank)(*reversed(layout["block_size"])),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,  # not interleaved
        layout["swizzle"],
        _PROMOTE_TO_128_BYTES,
        0,  # zeros outside
    )
    return box
