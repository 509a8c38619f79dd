"""Which kernel runs: a table of kernels an op, and a pure function that reads it.

A :class:`Problem` is what the choice may depend on, and nothing else, so routing is tested
without any device. A :class:`Kernel` says with ``unsupported(problem)`` why it cannot run, or
``None``. The table of an op is ordered, measured-fastest first; the kernel's own conditions
hold the crossovers.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from int4q import errors


class SlowKernelWarning(UserWarning):
    """A large weight meets a kernel that is slower than the dense product it stands for."""


class KernelPreference(str, enum.Enum):
    """Which family of kernels may run; ``AUTO`` takes the fastest that supports the problem."""

    AUTO = "auto"
    TORCH = "torch"
    TRITON = "triton"
    CUDA = "cuda"
    FBGEMM = "fbgemm"


@dataclass(frozen=True)
class Problem:
    """One call, reduced to the facts that routing may use.

    Attributes:
        op: name of the op, e.g. ``"int4_linear"``.
        device: device type, e.g. ``"cpu"``.
        dtype: dtype of the activations (and of the result).
        scale_dtype: dtype of scale and zero_point.
        M, N, K: rows of the activation, out features, in features.
        group_size: weights that share a scale.
        capability: CUDA compute capability, ``None`` elsewhere.
        experts: weights in the stack; M is then the rows of all of them together.
    """

    op: str
    device: str
    dtype: torch.dtype
    scale_dtype: torch.dtype
    M: int
    N: int
    K: int
    group_size: int
    capability: tuple[int, int] | None = None
    experts: int = 1


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        name: unique in its op's table, e.g. ``"cpu_blocked"``.
        backend: the preference that selects it.
        unsupported: ``problem -> reason`` why it cannot run, ``None`` where it can.
        run: the implementation; its arguments are the op's.
        slow: ``problem -> reason`` why it takes a multiple of the time of the dense product,
            ``None`` where it does not. Routing a large weight to it warns once for each reason.
    """

    name: str
    backend: KernelPreference
    unsupported: Callable[[Problem], str | None]
    run: Callable[..., torch.Tensor]
    slow: Callable[[Problem], str | None] = lambda problem: None

    def __post_init__(self) -> None:
        if self.backend is KernelPreference.AUTO:
            raise errors.value("a kernel belongs to one backend", self.backend)


SLOW_BYTES = 1 << 20
"""Bytes of ``qdata`` (of one weight) from which a slow kernel is worth a warning."""
_TABLES: dict[str, tuple[Kernel, ...]] = {}
_PREFERENCE: ContextVar[KernelPreference] = ContextVar(
    "int4q_kernel_preference", default=KernelPreference.AUTO
)
_WATCHERS: list[Callable[[KernelPreference], None]] = []


def register(op: str, *kernels: Kernel) -> None:
    """Set the table of ``op``, fastest first. Names must be unique."""
    names = [kernel.name for kernel in kernels]
    if len(set(names)) != len(names):
        raise errors.value(f"kernel names of {op} must be unique", names)
    _TABLES[op] = kernels
    route.cache_clear()


def kernels(op: str) -> tuple[Kernel, ...]:
    """The table of ``op``, in the order in which it is tried."""
    if op not in _TABLES:
        raise errors.value(f"op must be one of {sorted(_TABLES)}", repr(op))
    return _TABLES[op]


def choose(problem: Problem, preference: KernelPreference = KernelPreference.AUTO) -> Kernel:
    """The first kernel of ``problem.op``'s table that supports it under ``preference``.

    Raises:
        ValueError: none does; the message holds every kernel's reason.
    """
    reasons = []
    for kernel in kernels(problem.op):
        if preference not in (KernelPreference.AUTO, kernel.backend):
            continue
        reason = kernel.unsupported(problem)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    listed = "; ".join(reasons) or f"{problem.op} has no {preference.value} kernel in this build"
    raise errors.value(
        f"no kernel for preference {preference.value!r} runs this problem ({listed})", problem
    )


@functools.lru_cache(maxsize=4096)
def route(preference: KernelPreference, *facts: Any) -> Kernel:
    """:func:`choose` on the fields of a :class:`Problem`; a repeated call builds nothing.

    Warns with :class:`SlowKernelWarning` where the kernel is slow for this problem.
    """
    problem = Problem(*facts)
    kernel = choose(problem, preference)
    reason = kernel.slow(problem)
    if reason is not None and problem.M and problem.N * problem.K // 2 >= SLOW_BYTES:
        _warn_slow(problem.op, kernel.name, problem.device, reason)
    return kernel


@functools.cache
def _warn_slow(op: str, kernel: str, device: str, reason: str) -> None:
    warnings.warn(
        f"{op} runs on {device} by {kernel}, slower than a dense product: {reason}",
        SlowKernelWarning,
        stacklevel=2,
    )


def explain(problem: Problem) -> list[tuple[str, str, str | None]]:
    """``(name, backend, reason or None)`` for every kernel of the op, in table order."""
    return [(k.name, k.backend.value, k.unsupported(problem)) for k in kernels(problem.op)]


def of_no_product(preference: KernelPreference) -> KernelPreference:
    """For an op that is no product: a backend that has only products leaves it free."""
    free = preference not in (KernelPreference.TORCH, KernelPreference.TRITON)
    return KernelPreference.AUTO if free else preference


def preference() -> KernelPreference:
    """The preference in force in this context."""
    return _PREFERENCE.get()


@contextlib.contextmanager
def kernel_preference(choice: KernelPreference | str) -> Iterator[None]:
    """Run the ``with`` block under one :class:`KernelPreference` (this thread or task only).

    Raises:
        ValueError: ``choice`` is none of them.
    """
    try:
        choice = KernelPreference(choice)
    except ValueError:
        known = [p.value for p in KernelPreference]
        raise errors.value(f"kernel preference must be one of {known}", repr(choice)) from None
    token = _PREFERENCE.set(choice)
    _tell_watchers()
    try:
        yield
    finally:
        _PREFERENCE.reset(token)
        _tell_watchers()


def watch(watcher: Callable[[KernelPreference], None]) -> None:
    """Call ``watcher`` with the preference in force in this thread, whenever it changes.

    For what runs without Python and cannot ask :func:`preference`.
    """
    _WATCHERS.append(watcher)


def _tell_watchers() -> None:
    for watcher in _WATCHERS:
        watcher(preference())
