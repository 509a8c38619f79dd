"""A 4-bit checkpoint as one GGUF file: llama.cpp's names, block formats and order of rows.

What a GGUF file says beside its tensors (hyperparameters, tokenizer, chat template) is not derived
here but taken as it is from another GGUF file of the same model: from ``metadata.gguf``, where
``int4q convert`` keeps what the file that it read has said, or from any that the user names.
llama.cpp's ``convert_hf_to_gguf.py --vocab-only`` writes one from a folder of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from int4q import errors
from int4q.checkpoint import gguf, gguf_output, inspecting, schema
from int4q.checkpoint.files import replaced
from int4q.checkpoint.foreign import EXACT
from int4q.checkpoint.gguf_architecture import Architecture
from int4q.checkpoint.gguf_file import GGUFFile
from int4q.checkpoint.gguf_output import METADATA, Note, Part, Progress
from int4q.checkpoint.skeleton import Recipe, recipes, skeleton
from int4q.checkpoint.source import Source
from int4q.checkpoint.workspace import sync
from int4q.tensor import Int4Tensor

_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FLOAT32 = ("ffn_gate_inp",)
"""Matrices that llama.cpp wants in float32, as it does every vector."""


def write(
    source: Source,
    target: Path,
    note: Note,
    *,
    metadata: Path | None = None,
    rounded: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a folder as the GGUF file ``target``; one parameter at a time is in memory.

    The file is there whole or not at all.

    Args:
        note: called with each tensor's name and, in words, how exact it is.
        metadata: a GGUF file to take everything but the parameters from; by default the folder's.
        rounded: take the nearest that the format can hold where it cannot hold a value.

    Raises:
        FileExistsError: ``target`` exists.
        ValueError: no metadata, or those of another model; a parameter that GGUF has no name for;
            a weight that it cannot hold.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already and is never overwritten")
    said = GGUFFile(_metadata_of(source, metadata))
    architecture = Architecture(said, torch.float32)
    parts = list(_parts(source, architecture, rounded))
    target.parent.mkdir(parents=True, exist_ok=True)
    with replaced(target) as new:
        gguf_output.write(new, said, parts, note, progress)
        sync(new)


def _metadata_of(source: Source, named: Path | None) -> Path:
    path = named or source.folder / METADATA
    if named is None and not path.is_file():
        raise errors.value(
            "a GGUF file needs hyperparameters and a tokenizer",
            f"a folder without {METADATA}",
            "Give --metadata FILE.gguf, of the same model: any file of it, or what llama.cpp's "
            "convert_hf_to_gguf.py --vocab-only writes",
        )
    return path


# --- parts ----------------------------------------------------------------------------------------


def _parts(source: Source, architecture: Architecture, rounded: bool) -> Iterator[Part]:
    """The parameters of a folder; every weight is known to be one that the file can hold."""
    entries = inspecting.weights(source)
    packed = {name for entry in entries.values() for name in entry.parts.values()}
    shapes = {name: stored.shape for name, stored in source.tensors.items() if name not in packed}
    shapes |= {name: tuple((e.attributes or {})["shape"]) for name, e in entries.items()}
    model = skeleton(source)
    _check_config(architecture, model.config)
    for parameter, recipe in recipes(model, shapes).items():
        names = architecture.names(parameter)
        if recipe.reason or not names:
            rule = f"GGUF must have a name for {parameter} ({architecture.name})"
            raise errors.value(rule, recipe.reason or "none")
        try:
            kind = _kind(source, entries, recipe, names[0], rounded)
        except ValueError as error:
            raise ValueError(f"{parameter}: {error}") from error
        shape = tuple(model.get_parameter(parameter).shape)
        for i, name in enumerate(names):
            read = partial(_read, source, entries, recipe, i, len(names))
            make = partial(_make, read, architecture, name, kind, rounded)
            yield Part(name, kind, _shape(shape, len(names)), make)


def _shape(shape: tuple[int, ...], n_parts: int) -> tuple[int, ...]:
    """In the file, of one of the tensors that make a parameter; without dims of 1, as llama.cpp."""
    if n_parts > 1:
        shape = (*shape[:-2], shape[-2] // n_parts, shape[-1])
    return shape if len(shape) != 2 or shape[0] > 1 else shape[1:]


def _kind(
    source: Source, entries: Mapping[str, schema.Entry], recipe: Recipe, name: str, rounded: bool
) -> str:
    """The type of a parameter's tensors in the file, once it is known to hold them."""
    packed = [entries[name] for name in recipe.names if name in entries]
    if not packed:
        stored = [source.tensors[name] for name in recipe.names]
        if len(stored[0].shape) < 2 or any(part in name for part in _FLOAT32):
            return "F32"
        dtypes = {s.dtype for s in stored}
        if len(dtypes) > 1 or not dtypes <= _KINDS.keys():
            raise errors.value("a plain tensor must be F32, F16 or BF16", dtypes)
        return _KINDS[dtypes.pop()]
    if len(packed) < len(recipe.names):
        raise errors.value("matrices of a stack must all have 4 bits", "some")
    small = [[source.read(e.parts[part]) for part in ("scale", "zero_point")] for e in packed]
    kind = "Q4_1" if any(bool(zero_point.any()) for _, zero_point in small) else "Q4_0"
    for scale, zero_point in small:
        gguf.halves(scale, zero_point, kind, rounded=rounded)
    return kind


def _read(
    source: Source, entries: Mapping[str, schema.Entry], recipe: Recipe, part: int, n_parts: int
) -> Tensor:
    """A parameter, or the rows of it that make one of several tensors."""

    def read(name: str) -> Tensor:
        return inspecting.read(source, entries[name]) if name in entries else source.read(name)

    matrices = [torch.cat([read(name) for name in names]) for names in recipe.matrices]
    t = torch.cat([m.unsqueeze(0) for m in matrices]) if recipe.stacked else matrices[0]
    return t if n_parts == 1 else t.chunk(n_parts, dim=-2)[part]


def _make(
    read: Callable[[], Tensor], architecture: Architecture, name: str, kind: str, rounded: bool
) -> tuple[np.ndarray[Any, Any], str]:
    t, how = read(), EXACT
    if isinstance(t, Int4Tensor):
        blocks = gguf.TO[kind](t, rounded=rounded)
        how = _nearness(t, blocks, kind) if rounded else EXACT
        values = blocks.flatten(-2)
    else:
        values = t.float() if kind == "F32" else t.contiguous().view(torch.uint8)
    restored = np.ascontiguousarray(architecture.restored(values.numpy(), name))
    return restored.view(np.uint8), f"{kind}, {how}"


def _nearness(t: Int4Tensor, blocks: Tensor, kind: str) -> str:
    exact = t.dequantize(torch.float32)
    off = float((gguf.FROM[kind](blocks).dequantize() - exact).norm())
    return f"rounded, {off / float(exact.norm()):.2%} off" if off else EXACT


def _check_config(architecture: Architecture, config: Any) -> None:
    """Raise unless the file's hyperparameters are the model's."""
    said = {key: getattr(architecture.config, key, None) for key in sorted(architecture.said)}
    for key, theirs, ours in _differences(said, config.to_dict()):
        raise errors.value(f"the metadata must be of this model: {key} is {ours}", theirs)


def _differences(
    said: Mapping[str, Any], held: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Key, and what both say, wherever both say something and not the same."""
    for key, theirs in said.items():
        ours = held.get(key)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            yield from _differences(theirs, ours)
        elif isinstance(theirs, float) and isinstance(ours, float):
            if not math.isclose(theirs, ours, rel_tol=1e-6):  # (GGUF holds float32)
                yield key, theirs, ours
        elif not isinstance(theirs, list) and None not in (theirs, ours) and theirs != ours:
            yield key, theirs, ours
