"""GGUF files, written by the package ``gguf``: tensors one by one, metadata of another file."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from int4q.checkpoint import gguf, gguf_rope
from int4q.checkpoint.foreign import EXACT
from int4q.checkpoint.gguf_file import GGUFFile, GGUFTensor

METADATA = "metadata.gguf"
"""In a folder: a GGUF file without parameters."""
_OURS = ("general.architecture", "general.alignment", "general.file_type",
         "general.quantization_version")  # fmt: skip
"""Keys that are not copied."""

Note = Callable[[str, str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """A tensor to be written.

    Attributes:
        name: in the file.
        kind: GGUF's name of its type.
        shape: the last dim innermost.
        make: its bytes, uint8 ``[.., bytes of a row]``, and how exact they are, in words.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], tuple[np.ndarray[Any, Any], str]]

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """Of what :attr:`make` gives."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return (*self.shape[:-1], self.shape[-1] // values * nbytes)


def metadata(path: Path) -> bytes:
    """A GGUF file with everything that ``path`` holds but parameters."""
    said = GGUFFile(path)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / METADATA
        write(made, said, [], lambda name, how: None, None)
        return made.read_bytes()


def write(
    path: Path, said: GGUFFile, parts: list[Part], note: Note, progress: Progress | None
) -> None:
    """Write a file.

    Args:
        said: where everything beside ``parts`` comes from: its metadata, and those of its tensors
            that are no parameters.
        note: called with each tensor's name and, in words, how exact it is.
        progress: called with bytes done and in all.
    """
    from gguf import GGMLQuantizationType

    parts = [*parts, *(_copied(t) for t in said.tensors if t.name.startswith(gguf_rope.PREFIX))]
    writer = _writer(path, said, [part.kind for part in parts])
    for part in parts:
        shape, kind = part.bytes_shape, GGMLQuantizationType[part.kind]
        writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), math.prod(shape), kind)
    done, total = 0, sum(math.prod(part.bytes_shape) for part in parts)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            data, how = part.make()
            writer.write_tensor_data(data)
            note(part.name, how)
            done += data.nbytes
            if progress:
                progress(done, total)


def _writer(path: Path, said: GGUFFile, kinds: list[str]) -> Any:
    """With the metadata of ``said``; what they say of its own tensors is made anew."""
    from gguf import GGML_QUANT_VERSION, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, str(said.fields["general.architecture"]))
    for field in GGUFReader(said.path).fields.values():
        value = field.contents()
        if field.name.startswith(("GGUF.", "split.")) or field.name in _OURS or value == []:
            continue
        kind, *inner = field.types
        of = inner[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=of)
    most = max(gguf.TO, key=kinds.count)
    if most in kinds:
        writer.add_file_type(LlamaFileType[f"MOSTLY_{most}"])
        writer.add_quantization_version(GGML_QUANT_VERSION)
    return writer


def _copied(tensor: GGUFTensor) -> Part:
    data = tensor.data.reshape(*tensor.shape[:-1], -1)
    return Part(tensor.name, tensor.kind, tensor.shape, lambda: (data, f"{tensor.kind}, {EXACT}"))
