"""The CUDA driver, opened when it is first needed: calls, errors, contexts."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARY = "libcuda.so.1"


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@functools.cache
def library() -> ctypes.CDLL:
    """The driver.

    Raises:
        OSError: there is none.
    """
    return ctypes.CDLL(LIBRARY)


def unavailable() -> str | None:
    """The reason why the driver cannot be called; ``None`` if it can."""
    try:
        library()
    except OSError as error:
        return str(error)
    return None


def check(status: int, what: str) -> None:
    """Raises RuntimeError with the driver's own text where ``status`` is an error."""
    if status:
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(
            f"{what} failed: CUDA driver error {status} ({(text.value or b'unknown').decode()})"
        )


def call(name: str, *arguments) -> None:
    """Calls a function of the driver; raises RuntimeError with its text on an error."""
    check(getattr(library(), name)(*arguments), name)


@functools.cache
def context(index: int) -> int:
    """The primary context of device ``index``, which torch uses."""
    handle, device = ctypes.c_void_p(), ctypes.c_int()
    call("cuDeviceGet", ctypes.byref(device), index)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), device)
    return handle.value or 0


@contextmanager
def current(wanted: int) -> Iterator[None]:
    """A context made the calling thread's current one; a thread new to CUDA has none."""
    before = ctypes.c_void_p()
    call("cuCtxGetCurrent", ctypes.byref(before))
    if before.value == wanted:
        yield
        return
    call("cuCtxSetCurrent", ctypes.c_void_p(wanted))
    try:
        yield
    finally:
        call("cuCtxSetCurrent", before)
