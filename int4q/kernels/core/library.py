"""Load the C++ core, and what Python says to it: the preference in force, plans, errors.

``cpu_linear`` (:mod:`int4q.kernels.cpu.core`) is its op for a CPU. On a GPU it replays plans of the
ops (:func:`launcher`); what has no plan yet comes back to Python.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from int4q._version import __version__
from int4q.kernels import registry
from int4q.kernels.launch import driver, record
from int4q.kernels.registry import KernelPreference

SWITCH = "INT4Q_CORE"
"""Environment variable; ``0`` leaves the core unused."""
CPU_PREFERENCES = (KernelPreference.AUTO, KernelPreference.TORCH)
"""Those that kernels on a CPU meet. Compiled graphs call the core's under others too."""
_errors = threading.local()


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or ``None`` and the reason why not; settled once."""
    if os.environ.get(SWITCH) == "0":
        return None, f"switched off by {SWITCH}=0"
    found = sorted(Path(__file__).parent.glob("_int4_core*.so"))
    if not found:
        return None, (
            "the C++ core was not built (pip install --no-build-isolation, with torch and a C++ "
            "compiler)"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        library.int4q_core_version.restype = ctypes.c_char_p
        version = library.int4q_core_version().decode()
    except (OSError, AttributeError) as error:
        return None, f"the C++ core did not load: {error} (install int4q again)"
    if version != __version__:
        reason = f"the C++ core is of version {version}, not {__version__}"
        return None, f"{reason} (install int4q again)"
    registry.watch(functools.partial(_prefer, library))
    record.on_clear(library.int4q_core_clear)
    return library, None


def _prefer(library: ctypes.CDLL, choice: KernelPreference) -> None:
    none = choice is KernelPreference.AUTO
    library.int4q_core_prefer(int(none), int(choice not in CPU_PREFERENCES))


@functools.cache
def unavailable() -> str | None:
    """Why the core replays nothing on this machine's GPU; ``None`` where it does."""
    library, reason = load()
    if library is None:
        return reason
    if reason := record.unavailable():
        return reason
    return open_driver(library, driver.LIBRARY, "libtorch_cuda.so")


def open_driver(library: ctypes.CDLL, cuda: str, torch_cuda: str) -> str | None:
    """Let the core call the CUDA driver; a reason where it cannot."""
    if library.int4q_core_open(cuda.encode(), torch_cuda.encode()):
        return f"the C++ core did not find all that it needs in {cuda} and {torch_cuda}"
    return None


# --- ops that the core runs from plans ------------------------------------------------------------


class Launcher(NamedTuple):
    """An op of the core, as :func:`launcher` takes it."""

    name: str
    arguments: str
    dispatch_key: str


launchers: list[Launcher] = []
"""By the number that the core has for the op."""


def launcher(
    library: ctypes.CDLL, name: str, planner: str, arguments: str, dispatch_key: str = "CUDA"
) -> None:
    """Have the core run the op ``int4q::name`` from plans.

    Args:
        planner: an op of the same schema, with its namespace, that :func:`planning` made.
        arguments: a letter for each: T a tensor, O an optional one, i a number.
    """
    names = (name, planner, arguments, dispatch_key)
    if library.int4q_core_register_launcher(*(text.encode() for text in names)):
        raise RuntimeError(f"torch {torch.__version__} did not take the C++ core's {name}")
    launchers.append(Launcher(name, arguments, dispatch_key))


def planning(library: ctypes.CDLL, run: Callable[..., Any], arguments: str, outputs: int):
    """``run`` as the core calls it: what it does is noted, and its errors are kept for later.

    An exception would lose its type and its text on the way through the core (:func:`cause`).
    """

    def planner(*args: Any) -> Any:
        try:
            if not library.int4q_core_pending() or record.recorder() is not None:
                return run(*args)
            inputs = [a for a, letter in zip(args, arguments, strict=False) if letter != "i"]
            inputs += [None] * (len(arguments.replace("i", "")) - len(inputs))
            with record.recording(inputs) as seen:
                result = run(*args)
            plan = seen.plan(result)
            if plan is not None:
                words = plan.words()
                library.int4q_core_keep((ctypes.c_int64 * len(words))(*words), len(words))
            return result
        except Exception as error:
            _errors.last = error.with_traceback(None)  # which would keep tensors alive
            library.int4q_core_fail(str(error).encode())
            nothing: Tensor = args[0].new_empty(0)
            return (nothing,) * outputs if outputs > 1 else nothing

    return planner


def cause(error: RuntimeError) -> Exception:
    """What an op's planner raised, of an error that came through the core."""
    raised: Exception | None = _errors.__dict__.pop("last", None)
    mine = raised is not None and str(raised) in str(error)  # not one that nobody asked for
    return raised if mine else error
