"""What the kernels of plans were loaded from, for processes that load them again."""

from __future__ import annotations

from typing import NamedTuple


class Image(NamedTuple):
    """A kernel in a binary.

    Attributes:
        binary: what ``cuModuleLoadData`` takes.
        name: of the kernel in it.
    """

    binary: bytes
    name: str


_images: dict[int, Image] = {}


def note(function: int, binary: bytes, name: str) -> None:
    """The ``CUfunction`` was loaded from ``binary``."""
    _images[function] = Image(binary, name)


def image(function: int) -> Image:
    """That of a ``CUfunction`` which was noted."""
    return _images[function]
