"""What is in the files of a checkpoint: mapped, checked, and read tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4q import errors
from int4q.checkpoint import schema
from int4q.checkpoint.seal import Seal, unseal, verify

PathLike = str | os.PathLike[str]
WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"


@dataclass(frozen=True)
class Contents:
    """The tensors of one checkpoint, in one file or several.

    Attributes:
        entries: name in the state dict -> what the metadata say of it.
        stored: stored name -> tensor, mapped from its file: no byte of it is read yet.
        tied: name -> the name of the same tensor among ``entries``.
        crc32: stored name -> checksum, of files that have a seal.
    """

    entries: dict[str, schema.Entry]
    stored: dict[str, Tensor]
    tied: dict[str, str]
    crc32: dict[str, int]

    @classmethod
    def of(cls, path: PathLike) -> Contents:
        """The contents of a file, or of the files of a folder, once their headers are checked.

        Raises:
            ValueError: a file is damaged, incomplete, or of another schema or version.
        """
        metadata: dict[str, str] = {}
        contents = cls({}, {}, {}, {})
        for file in _files(Path(path)):
            try:
                contents._add(*_mapped(file), metadata)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
        try:
            contents._describe(schema.entries(metadata, contents.stored))
            schema.check(contents.entries.values(), specs(contents.stored))
            _check_ties(contents.tied, contents.entries)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return contents

    def _add(
        self, stored: dict[str, Tensor], header: dict[str, str], metadata: dict[str, str]
    ) -> None:
        """Take in one file; ``metadata`` are those of the files before."""
        if both := stored.keys() & self.stored.keys():
            raise errors.value("a tensor must be in one file", f"{min(both)} in two")
        seal = unseal(header, specs(stored)) or Seal({}, {})
        header = {name: text for name, text in header.items() if name != schema.SEAL}
        if metadata and header != metadata:
            raise errors.value("the files of a checkpoint must have the same metadata", "others")
        metadata.update(header)
        self.stored.update(stored)
        self.tied.update(seal.tied)
        self.crc32.update(seal.crc32)

    def _describe(self, entries: dict[str, schema.Entry]) -> None:
        """Take in what the metadata say, without the tied names whose tensors are not stored."""
        for name, entry in entries.items():
            if self.stored.keys() & entry.parts.values():
                self.entries[name] = entry

    def read(self, name: str, device: torch.types.Device = "cpu", checksums: bool = True) -> Tensor:
        """The tensor of an entry on ``device``.

        Raises:
            ValueError: its bytes are not those that were written.
        """
        entry = self.entries[name]
        parts = {}
        for part, stored in entry.parts.items():
            t = self.stored[stored]
            if checksums and stored in self.crc32:
                verify(stored, t, self.crc32[stored])
            parts[part] = t.to(device)
        return schema.unflatten(entry, parts)


def specs(stored: Mapping[str, Tensor]) -> dict[str, schema.Spec]:
    """dtype and shape of each tensor."""
    return {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()}


def _mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, mapped, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            stored = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError) as error:  # (a dtype that torch does not have)
        raise errors.value("a checkpoint must be a safetensors file", error) from error
    if not schema.is_schema(metadata):
        raise errors.value(
            f"the metadata of a checkpoint must have {schema.NAMES!r}",
            sorted(metadata or ())[:5],
            "A file of plain tensors is read by safetensors.torch.load_file",
        )
    return stored, metadata


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint that is one itself or a folder of them."""
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if not index.exists():
        return [path / WHOLE]
    names: list[Any] | None
    try:
        names = list(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = None
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise errors.value(f"{index} must have a weight_map of tensors to file names", "none")
    return [path / name for name in sorted(set(names))]


def _check_ties(tied: Mapping[str, str], entries: Mapping[str, schema.Entry]) -> None:
    for name, other in tied.items():
        if name in entries or other not in entries:
            raise errors.value("a tied name must stand for a tensor of the file", f"{name!r}")
