"""A folder of safetensors files, as transformers writes them: checked, then read tensor by tensor.

Nothing is ever written to it. Of a file only the header is read until :meth:`Source.read` is
called; a tensor read is a copy in memory of its own, and the file is unmapped again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from int4q import errors
from int4q.checkpoint.schema import Spec

INDEX = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Of a safetensors header."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".h5", ".msgpack")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """On disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def spec(self) -> Spec:
        """dtype and shape."""
        return self.dtype, self.shape


class Source:
    """A checkpoint to read.

    Attributes:
        folder: holds it.
        config: what ``config.json`` says; empty where there is none.
        tensors: name -> where it lies, in the order of the files.
        metadata: of all files together.

    Raises:
        FileNotFoundError: no such folder, or no safetensors file in it.
        ValueError: a damaged file, a file or tensor that the index names and that is not there, a
            tensor that it does not name, a name twice, or a dtype that torch does not have. The
            message names it.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} must be a folder with a checkpoint in it")
        self.config: dict[str, Any] = read_json(self.folder / "config.json", missing={})
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        index = read_json(self.folder / INDEX, missing=None)
        for file in self._files(index):
            self._add(file)
        if index is not None:
            self._check(index["weight_map"])

    def stored(self, name: str) -> Stored:
        """Where a tensor lies and what it is.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.tensors:
            raise errors.value(f"{self.folder} must hold {name}", "no such tensor")
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            ValueError: the file has been damaged since it was opened first.
        """
        file = self.stored(name).file
        try:
            with safe_open(file, framework="pt") as f:
                return f.get_tensor(name).clone()
        except SafetensorError as error:
            raise ValueError(f"{file.name} is damaged at {name}: {error}") from error

    def other_files(self) -> list[Path]:
        """What belongs to the model beside weights, config and index: tokenizer, templates, ..."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file()
            and not path.name.startswith(".")
            and not path.name.endswith(_WEIGHTS)
            and path.name not in ("config.json", "README.md")
        )

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every weight file: what tells one state from another."""
        files = sorted({stored.file for stored in self.tensors.values()})
        return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]

    def _files(self, index: Any) -> list[Path]:
        if index is None:
            found = sorted(self.folder.glob("*.safetensors"))
            if not found:
                raise FileNotFoundError(
                    f"{self.folder} holds no .safetensors file. Save the model with transformers' "
                    "save_pretrained first"
                )
            return found
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise errors.value(f"{INDEX} must map names to files", type(weight_map).__name__)
        for name in weight_map.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise errors.value(f"{INDEX} must name .safetensors files beside it", repr(name))
            if not (self.folder / name).is_file():
                raise errors.value(f"{INDEX} names {name}", "no such file")
        return [self.folder / name for name in sorted(set(weight_map.values()))]

    def _add(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as f:
                self.metadata.update(f.metadata() or {})
                for name in f.keys():  # noqa: SIM118  (no mapping)
                    view = f.get_slice(name)
                    if name in self.tensors:
                        other = self.tensors[name].file.name
                        raise errors.value(f"{name} must be in one file", f"{other}, {file.name}")
                    kind = view.get_dtype()
                    if kind not in DTYPES:
                        raise errors.value(f"{file.name}: {name} must be of a known dtype", kind)
                    self.tensors[name] = Stored(file, DTYPES[kind], tuple(view.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{file.name} is damaged: {error}") from error

    def _check(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            stored = self.tensors.get(name)
            if stored is None or stored.file.name != file:
                where = "nowhere" if stored is None else stored.file.name
                raise errors.value(f"{INDEX} says that {name} is in {file}", where)
        if unknown := self.tensors.keys() - weight_map.keys():
            raise errors.value(f"{INDEX} must name every tensor", f"no {min(unknown)!r}")


def read_json(path: Path, missing: Any) -> Any:
    """What a JSON file holds, or ``missing``.

    Raises:
        ValueError: it is no JSON.
    """
    if not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} must be JSON: {error}") from error
