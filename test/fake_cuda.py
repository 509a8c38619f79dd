"""The stand-in for the CUDA driver, and kernels for it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from int4q.kernels.core import library
from int4q.kernels.launch import driver, images, record
from int4q.kernels.launch.plan import ABSOLUTE, Address, Launch


class Seen(NamedTuple):
    """A launch as the driver met it."""

    grid: str
    block: str
    shared: str
    stream: str
    context: str
    attributes: str
    parameters: tuple[bytes, ...]


class Fake:
    """The driver."""

    def __init__(self, path: Path):
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_log.restype = ctypes.c_char_p
        self._functions: list[ctypes.Array] = []

    def function(self, *sizes: int) -> int:
        """A kernel with parameters of so many bytes."""
        words = (ctypes.c_int64 * (len(sizes) + 1))(len(sizes), *sizes)
        self._functions.append(words)
        images.note(ctypes.addressof(words), bytes(words), "kernel")
        return ctypes.addressof(words)

    def take(self) -> list[Seen]:
        """The launches since the last time."""
        seen = as_seen(self.library.fake_log().decode())
        self.library.fake_clear()
        return seen


def as_seen(log: str) -> list[Seen]:
    """The launches of the driver's log."""
    parts = [line.split("|") for line in log.splitlines()]
    return [Seen(*p[:6], tuple(map(bytes.fromhex, p[6:]))) for p in parts]


def launch(function: int, tensors, *numbers: int, grid=(6, 1, 1), dependent=False, box=None):
    """Launch a kernel that takes addresses, then int32s, then a tensor map of ``box``."""
    block = bytes(8 * len(tensors)) + b"".join(n.to_bytes(4, "little") for n in numbers)
    offsets = [8 * i for i in range(len(tensors))]
    offsets += [8 * len(tensors) + 4 * i for i in range(len(numbers))]
    there = [(i, t) for i, t in enumerate(tensors) if t is not None]
    pointers = [(8 * i, Address(ABSOLUTE, t.data_ptr())) for i, t in there]
    maps = []
    if box is not None:
        block += bytes(-len(block) % 64)
        maps.append((len(block), Address(ABSOLUTE, box.data_ptr())))
        offsets.append(len(block))
        block += bytes(range(128))
    places = tuple(offsets), tuple(pointers), tuple(maps)
    record.launch(Launch(function, grid, 128, 1024, dependent, block, *places), 0)


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory):
    """The driver, built; for the session."""
    compiler = shutil.which("gcc") or pytest.skip("no gcc")
    path = tmp_path_factory.mktemp("fake") / "libcuda.so"
    source = Path(__file__).with_name("fake_cuda.c")
    command = [compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(path), "-lpthread"]
    subprocess.run(command, check=True)
    return Fake(path)


@pytest.fixture
def fake(fake_driver, monkeypatch):
    """The driver in the place of CUDA's, for Python and for the core; tensors are on the CPU."""
    core = library.load()[0]
    caches = driver.library, driver.context, library.unavailable
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(driver, "LIBRARY", fake_driver.path)
    monkeypatch.setattr(record, "unavailable", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 0x42 + i, raising=False)
    if core is not None:
        assert library.open_driver(core, fake_driver.path, fake_driver.path) is None
    record.clear()
    fake_driver.take()
    yield fake_driver
    record.clear()
    for cache in caches:
        cache.cache_clear()
    monkeypatch.undo()
    library.unavailable()  # opens the real one again
