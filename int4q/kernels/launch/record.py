"""Make plans: run a call once, note what it allocates and launches, replay that from then on.

    @planned
    def linear(x, weight, group_size):  # ordinary code: choose tiles, allocate, launch
        out = x.new_empty((x.shape[0], weight.shape[0]))
        launch(kernel, programs, x, weight, out, M, N, BLOCK=64, num_warps=4)
        return out

The first call of a kind (shapes, strides, dtypes, devices and alignment of the tensors, and the
other arguments) runs ``linear`` under a :class:`Recorder`. It sees every op of ATen and every
launch; if each address that a kernel was given lies in an argument or in memory that the call
allocated, and nothing else was computed, that is the :class:`~int4q.kernels.launch.plan.Plan` of
the kind. Where no plan can be made every call runs the function: slower, the same result.

A planned function must depend on its arguments only in what tells kinds apart; tile tables count as
constants, and all plans are forgotten (:func:`clear`) when one is replaced.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from int4q.kernels.launch import driver
from int4q.kernels.launch.plan import (
    ABSOLUTE,
    ALIGN,
    Address,
    Launch,
    Operator,
    Output,
    Plan,
    View,
    run_now,
)

MAX_PLANS = 2048
"""Plans kept, here and in the C++ core each; the oldest goes first. One takes some 5 KB."""

aten = torch.ops.aten
_ALLOCATE = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default,
    aten.new_empty.default, aten.new_empty_strided.default,
}  # fmt: skip
_COPY = {aten.clone.default, aten._to_copy.default}
_RENAME = {aten._unsafe_view.default}
"""Views that their schema does not call so."""
_FACTS = {aten.promote_types.default}
"""Ops without tensors."""

_UNKNOWN = object()
_plans: dict[tuple, Plan | None] = {}
_guard = threading.Lock()
_thread = threading.local()
_forgetting: list[Callable[[], object]] = []


@functools.cache
def unavailable() -> str | None:
    """Why nothing is replayed on this machine; ``None`` where it is."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no NVIDIA device"
    return driver.unavailable()


def recorder() -> Recorder | None:
    """The one that this thread's call is under."""
    return getattr(_thread, "recorder", None)


def launch(step: Launch, index: int) -> None:
    """Run ``step``, its addresses absolute, on device ``index``, and note it."""
    run_now(step, index)
    if seen := recorder():
        seen.launch(step)


@contextmanager
def recording(inputs: Sequence[Tensor | None]) -> Iterator[Recorder]:
    """Note what the ``with`` block does to ``inputs``; none is being noted in this thread yet."""
    _thread.recorder = Recorder(inputs)
    try:
        with _thread.recorder:
            yield _thread.recorder
    finally:
        _thread.recorder = None


def clear() -> None:
    """Forget all plans, because something that calls take for constant has changed."""
    with _guard:
        _plans.clear()
    for forget in _forgetting:
        forget()


def on_clear(forget: Callable[[], object]) -> None:
    """Have ``forget`` called by :func:`clear`."""
    _forgetting.append(forget)


def planned(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` from its plan, where there is one.

    Args:
        run: takes tensors, tuples with tensors in them, ``None`` and hashable facts; returns
            tensors that it allocated.
    """

    @functools.wraps(run)
    def call(*args: Any, **facts: Any) -> Any:
        if recorder() is not None or unavailable() is not None:
            return run(*args, **facts)
        tensors: list[Tensor] = []
        key: list[Any] = [run, *facts]
        _kind((*args, *facts.values()), key, tensors)
        pointers = [tensor.data_ptr() for tensor in tensors]
        if any(pointer & 15 for pointer in pointers):
            key += [pointer & 15 for pointer in pointers]
        return _call(tuple(key), tensors, functools.partial(run, *args, **facts))

    return call


def _kind(arguments: Sequence[Any], key: list[Any], tensors: list[Tensor]) -> None:
    """Put what tells kinds apart into ``key``, and the tensors into ``tensors``."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            key += argument.shape, argument.stride(), argument.dtype, argument.get_device()
        elif isinstance(argument, tuple):
            _kind(argument, key, tensors)
        else:
            key.append(argument)


def _call(key: tuple, tensors: list[Tensor], run: Callable[[], Any]) -> Any:
    known = _plans.get(key, _UNKNOWN)
    if isinstance(known, Plan):
        return known(tensors)
    if known is None:
        return run()
    with recording(tensors) as seen:
        result = run()
    plan = seen.plan(result)
    with _guard:
        while len(_plans) >= MAX_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan
    return result


class Recorder(TorchDispatchMode):
    """Notes what a call does, until something that a plan cannot hold.

    Attributes:
        inputs: the tensors that a replay is given; ``None`` for one that is not there.
        reason: why there is no plan, or ``None``.
    """

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        self.inputs = inputs
        self.reason: str | None = None
        self._allocated: list[Tensor] = []
        self._kept: list[Tensor] = []  # as long as they live no two allocations share an address
        self._steps: list[Launch | Operator] = []  # their addresses are absolute, in no slot

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # composite ops arrive whole, to be taken apart here
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func in _ALLOCATE:
            self._allocated.append(result)
        elif func in _COPY:
            self._allocated.append(result)
            self._operator("copy", result, args[0])
        elif func is aten.mm.out:
            self._operator("mm", result, *args)
        elif func is aten.addmm.out and len(args) == 3 and set(kwargs) == {"out"}:
            self._operator("addmm", result, *args)
        elif not func.is_view and func not in _RENAME | _FACTS:
            self.fail(f"{func} is no part of a plan")
        return result

    def fail(self, reason: str) -> None:
        """There will be no plan."""
        self.reason = self.reason or reason

    def launch(self, step: Launch) -> None:
        """A kernel was launched; the addresses of ``step`` are absolute."""
        self._steps.append(step)

    def _operator(self, name: str, *tensors: Tensor) -> None:
        self._kept += tensors
        if any(t.device != tensors[0].device for t in tensors):
            self.fail(f"{name} of two devices is no part of a plan")
        addresses = (Address(ABSOLUTE, t.data_ptr()) for t in tensors)
        sides = ((t.dtype, tuple(t.shape), t.stride()) for t in tensors)
        views = tuple(View(a, *side) for a, side in zip(addresses, sides, strict=True))
        self._steps.append(Operator(name, views))

    # --- afterwards -------------------------------------------------------------------------------

    def plan(self, result: Any) -> Plan | None:
        """The plan of a call that returned ``result``, or ``None``; :attr:`reason` says why."""
        returned = [] if result is None else [result] if isinstance(result, Tensor) else [*result]
        device = next((t.device for t in (*returned, *self.inputs) if t is not None), None)
        places, scratch_bytes = self._places(returned)
        if device is None:
            return None
        steps = [self._placed(step, places) for step in self._steps]
        if self.reason is not None:
            return None
        outputs = (Output(t.dtype, tuple(t.shape), t.stride()) for t in returned)
        context = driver.context(device.index or 0) if steps else 0
        scratch = scratch_bytes, _scratch_dtype(steps, len(self.inputs) + len(returned))
        return Plan(device, context, tuple(outputs), *scratch, tuple(steps))

    def _places(self, returned: Sequence[Tensor]) -> tuple[list[tuple[int, int, Address]], int]:
        """``(start, end, address of the start)`` of all memory, and the size of the scratch."""
        places = []
        for slot, tensor in enumerate(self.inputs):
            if tensor is not None and tensor.numel():
                start = tensor.data_ptr()
                places.append((start, start + _extent(tensor), Address(slot, 0)))
        outputs = {}
        for slot, tensor in enumerate(returned, len(self.inputs)):
            if not tensor.is_contiguous():
                self.fail("a result is not contiguous")
            elif tensor.numel():
                outputs[tensor.data_ptr(), _extent(tensor)] = slot
        size, slot = 0, len(self.inputs) + len(returned)
        for tensor in self._allocated:
            start, extent = tensor.data_ptr(), _extent(tensor)
            if (start, extent) in outputs:
                places.append((start, start + extent, Address(outputs.pop((start, extent)), 0)))
            elif extent:
                places.append((start, start + extent, Address(slot, size)))
                size += math.ceil(extent / ALIGN) * ALIGN
        if outputs:
            self.fail("a result was not allocated by the call")
        return places, size

    def _placed(self, step: Launch | Operator, places: list) -> Launch | Operator:
        def place(address: Address) -> Address:
            found = [(p[2], address.offset - p[0]) for p in places if p[0] <= address.offset < p[1]]
            if len(found) != 1:
                self.fail(f"an address lies in {len(found)} tensors that the call knows")
                return address
            (slot, start), offset = found[0]
            return Address(slot, start + offset)

        if isinstance(step, Operator):
            views = (view._replace(address=place(view.address)) for view in step.views)
            return step._replace(views=tuple(views))
        pointers = tuple((at, place(address)) for at, address in step.pointers)
        maps = tuple((at, place(address)) for at, address in step.maps)
        return step._replace(pointers=pointers, maps=maps)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.numel() == 0:
        return 0
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in sides) + 1) * tensor.itemsize


def _scratch_dtype(steps: Sequence[Launch | Operator], slot: int) -> torch.dtype:
    """That of ATen's operands in the scratch memory: a view of the same dtype costs less."""
    views = (view for step in steps if isinstance(step, Operator) for view in step.views)
    return next((view.dtype for view in views if view.address.slot == slot), torch.uint8)
