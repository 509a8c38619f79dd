"""Reading a GGUF file: every length checked against the file before it is believed.

(The package ``gguf`` has a reader too; it trusts the counts it reads, so that a damaged file can
keep it busy for ever.)
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from int4q import errors

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}  # fmt: skip
"""GGUF's number of a value's type -> struct format."""
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4
_VERSIONS = (2, 3)


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        kind: GGUF's name of its type: ``Q4_1``, ``F32``, ...
        shape: logical, the last dim innermost as in torch (GGUF lists it the other way round).
        data: its bytes, uint8 ``[rows, bytes of a row]``, mapped from the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any]

    def matrix(self, index: int) -> GGUFTensor:
        """One of a stack ``[E, N, K]``."""
        _, N, _ = self.shape
        rows = slice(index * N, (index + 1) * N)
        return GGUFTensor(self.name, self.kind, self.shape[1:], self.data[rows])


class GGUFFile:
    """What a file holds, mapped into memory and not read.

    Attributes:
        fields: its metadata.
        tensors: in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or no GGUF file of version 2 or 3.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} must be a GGUF file")
        if self.path.stat().st_size < 24:
            raise errors.value(f"{self.path.name} must be a GGUF file", "fewer than 24 bytes")
        self._bytes = np.memmap(self.path, mode="r").view(np.ndarray)
        self._at = 0
        try:
            self._read()
        except (ValueError, UnicodeDecodeError, struct.error) as error:
            raise ValueError(f"{self.path.name} is damaged, or no GGUF file: {error}") from error

    def _read(self) -> None:
        if (magic := bytes(self._take(4))) != b"GGUF":
            raise errors.value("the file must start with GGUF", magic)
        if (version := self._number("<I")) not in _VERSIONS:
            raise errors.value(f"the version must be one of {_VERSIONS}", version)
        n_tensors, n_fields = self._count(24), self._count(13)
        self.fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self._string()
            if key in self.fields:
                raise errors.value("every key must be there once", repr(key))
            self.fields[key] = self._value(self._number("<I"))
        entries = [self._entry() for _ in range(n_tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise errors.value("general.alignment must be a power of two", alignment)
        start = -(-self._at // alignment) * alignment
        self.tensors = [self._tensor(start, *entry) for entry in entries]
        self._check(start, entries)

    def _check(self, start: int, entries: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        names = [t.name for t in self.tensors]
        if len(set(names)) < len(names):
            raise errors.value("every tensor must be there once", "a name twice")
        spans = sorted((e[3], t.data.size) for e, t in zip(entries, self.tensors, strict=True))
        for (at, size), (following, _) in zip(spans, spans[1:], strict=False):
            if at + size > following:
                raise errors.value("tensors must not overlap", f"two at {start + following}")

    # --- pieces, each of which moves on -----------------------------------------------------------

    def _take(self, n: int) -> np.ndarray[Any, Any]:
        if n > len(self._bytes) - self._at:
            raise errors.value("a length must fit the file", f"{n} bytes at {self._at}")
        self._at += n
        return self._bytes[self._at - n : self._at]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)).tobytes())[0]

    def _count(self, least: int) -> int:
        """How many things of ``least`` bytes or more follow."""
        n: int = self._number("<Q")
        if n * least > len(self._bytes) - self._at:
            raise errors.value("a count must fit the file", f"{n} at {self._at}")
        return n

    def _string(self) -> str:
        return bytes(self._take(self._number("<Q"))).decode()

    def _value(self, kind: int, nested: bool = False) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or nested:
            raise errors.value("a value must be a number, a string or an array of those", kind)
        kind = self._number("<I")
        if kind in _SCALARS:
            form = _SCALARS[kind]
            n = self._count(struct.calcsize(form))
            return np.frombuffer(self._take(n * struct.calcsize(form)), form).tolist()
        return [self._value(kind, nested=True) for _ in range(self._count(8))]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, offset."""
        name, n_dims = self._string(), self._number("<I")
        if n_dims > _MOST_DIMS:
            raise errors.value(f"{name} must have up to {_MOST_DIMS} dims", n_dims)
        shape = tuple(self._number("<Q") for _ in range(n_dims))[::-1]
        return name, shape, self._number("<I"), self._number("<Q")

    def _tensor(
        self, start: int, name: str, shape: tuple[int, ...], number: int, offset: int
    ) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise errors.value(f"{name} must be of a known type", number) from None
        values, nbytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % values:
            rule = f"the last dim of {name} must be a multiple of {values} ({kind.name})"
            raise errors.value(rule, errors.dims(shape))
        row = shape[-1] // values * nbytes
        self._at = start + offset
        data = self._take(math.prod(shape[:-1]) * row)
        return GGUFTensor(name, kind.name, shape, data.reshape(-1, row))
