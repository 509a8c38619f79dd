"""Plans in a file, from which a process without Python runs the ops on a GPU (``saved.cpp``)."""

from __future__ import annotations

import ctypes
import os
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from int4q._version import __version__
from int4q.kernels.core import library
from int4q.kernels.launch import images

_MAGIC = b"i4qplan1"


class PlansWarning(UserWarning):
    """Some calls will not run without Python."""


def save_plans(path: str | os.PathLike) -> None:
    """Save what a process without Python needs to make the calls that were made here so far.

    A compiled or exported graph on a GPU calls ops whose kernels are compiled and planned, in
    Python, at the first call of a kind: shapes, strides, dtypes, device and alignment (to 16 bytes)
    of the arguments. The file holds the plans and the kernels of every such call of this process. A
    C++ program hands it to ``int4q_core_load`` of the C++ core, then runs an AOTInductor package.

    Args:
        path: of the file, replaced as a whole. It serves GPUs of this one's architecture, and this
            version of int4q.

    Raises:
        RuntimeError: the C++ core does not run, or it holds no plans; the message says why.

    Warns:
        PlansWarning: ops of which some calls run in Python only.
    """
    core, reason = library.load()
    if core is None or (reason := library.unavailable()):
        raise RuntimeError(f"plans are made where the C++ core runs: {reason}")
    functions, without, plans = _export(core)
    if not plans[0]:
        raise RuntimeError(
            "there are no plans to save: make the calls first, each with the shapes that the "
            "program will have"
        )
    if without:
        names = sorted(library.launchers[number].name for number in without)
        warnings.warn(f"some calls of {names} need Python", PlansWarning, stacklevel=2)
    _replace(Path(path), [_MAGIC, _text(__version__), *_ops(), *_kernels(functions), _words(plans)])


def _export(core: ctypes.CDLL) -> tuple[list[int], list[int], list[int]]:
    """The functions in the plans, the numbers of ops with calls that have none, the plans."""
    room, words = 0, (ctypes.c_int64 * 0)()
    while (size := core.int4q_core_export(words, ctypes.c_int64(room))) > room:
        room, words = size, (ctypes.c_int64 * size)()
    at, lists = 0, []
    for _ in range(2):
        start, at = at + 1, at + 1 + words[at]
        lists.append(words[start:at])
    return *lists, words[at:size]


def _ops() -> Iterable[bytes]:
    yield _words([len(library.launchers)])
    for number, op in enumerate(library.launchers):
        schema = getattr(torch.ops.int4q, op.name).default._schema
        yield _words([number])
        yield from map(_text, (op.name, op.arguments, op.dispatch_key))
        yield _text(str(schema).removeprefix("int4q::"))


def _kernels(functions: list[int]) -> Iterable[bytes]:
    found = {function: images.image(function) for function in functions}
    binaries = {image.binary: None for image in found.values()}
    order = {binary: i for i, binary in enumerate(binaries)}
    yield _words([len(order)])
    yield from map(_text, order)
    yield _words([len(found)])
    for function, image in found.items():
        yield _words([function, order[image.binary]]) + _text(image.name)


def _words(values: list[int]) -> bytes:
    return struct.pack(f"={len(values)}q", *values)


def _text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return _words([len(value)]) + value + bytes(-len(value) % 8)


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file as a whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            file.writelines(parts)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
