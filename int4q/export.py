"""A 4-bit checkpoint in the format of other engines.

:func:`compressed_tensors` makes a folder that vLLM serves, :func:`gguf` a file for llama.cpp. (GGUF
blocks of one weight: :func:`int4q.checkpoint.gguf.to_q4_0` and ``to_q4_1``.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4q import errors
from int4q._version import __version__
from int4q.checkpoint import compressed_tensors as ct
from int4q.checkpoint import gguf_writing, inspecting, schema
from int4q.checkpoint.plan import Job, Plan
from int4q.checkpoint.quantizing import dump
from int4q.checkpoint.source import Source
from int4q.checkpoint.stream import run
from int4q.tensor import Int4Tensor

_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""A stack of experts -> the linear layers that each of its matrices holds, along the rows."""


@dataclass(frozen=True)
class _Layer:
    """One linear layer of the result: rows of a weight, or of a matrix of a stack."""

    module: str
    entry: schema.Entry
    expert: int | None
    rows: slice

    def of(self, t: Int4Tensor) -> Int4Tensor:
        matrix = t if self.expert is None else t[self.expert]
        return matrix[self.rows]


def compressed_tensors(path: Path | str, target: Path | str) -> None:
    """Write a 4-bit checkpoint as compressed-tensors' ``pack-quantized``, weight by weight.

    Every value stays what it is: weights must be symmetric, or have zero points that are whole
    multiples of their scale (``int4q quantize --algorithm symmetric``, or what was converted from
    GPTQ or AWQ). Stacks of experts become a layer an expert, as in the checkpoints that vLLM reads.

    Args:
        path: folder of the checkpoint, as ``int4q quantize`` or ``save_pretrained`` makes it.
        target: folder to make; killed, the same call goes on where it was.

    Raises:
        ValueError: a weight that the format cannot hold, or no 4-bit checkpoint.
        FileExistsError: ``target`` exists.
    """
    source = Source(path)
    run(plan(source), Path(target))


def gguf(
    path: Path | str,
    target: Path | str,
    *,
    metadata: Path | str | None = None,
    rounded: bool = False,
) -> dict[str, str]:
    """Write a 4-bit checkpoint as one GGUF file: ``Q4_0`` and ``Q4_1`` weights, the rest as it is.

    Groups of 64 and more become several blocks of 32 with one scale. Exact are float16 scales (and
    bfloat16 ones, unless they are tiny) with zero points of 0, or whose minimum
    ``zero_point - 8 * scale`` is a float16 too: what ``int4q quantize --algorithm symmetric``
    makes, and what was converted from ``Q4_0`` and ``Q4_1``.

    Args:
        path: folder of the checkpoint, as ``int4q quantize`` or ``save_pretrained`` makes it.
        target: file to make.
        metadata: a GGUF file of the same model, whose hyperparameters and tokenizer are taken; by
            default the folder's ``metadata.gguf``, which ``int4q convert model.gguf`` leaves there.
        rounded: take the nearest that the format can hold where it cannot hold a value.

    Returns:
        Name of each tensor -> its type and, in words, how exact it is.

    Raises:
        ValueError: a weight that the format cannot hold, an architecture that ``int4q.load`` does
            not read from GGUF, no metadata or those of another model, or no 4-bit checkpoint.
        FileExistsError: ``target`` exists.
    """
    notes: dict[str, str] = {}
    said = None if metadata is None else Path(metadata)
    gguf_writing.write(
        Source(path), Path(target), notes.__setitem__, metadata=said, rounded=rounded
    )
    return notes


def plan(source: Source) -> Plan:
    """How to make compressed-tensors' folder."""
    weights = inspecting.weights(source)
    layers = [layer for entry in weights.values() for layer in _layers(entry)]
    small = {name: _small_parts(source, entry) for name, entry in weights.items()}
    symmetric = not any(bool(zero.any()) for _, zero in small.values())
    made = Plan(identity=[__version__, "compressed-tensors", source.stamps()])
    for layer in layers:
        dtype = _narrowest(small[layer.entry.name][0])
        parts = {part: _meta(source, stored) for part, stored in layer.entry.parts.items()}
        like: Any = schema.unflatten(layer.entry, parts)
        one = layer.of(like)
        made.stored[layer.module] = _named(layer.module, _like(one, dtype, symmetric))
        read = partial(_read, source, layer)
        make = partial(_make, module=layer.module, dtype=dtype, symmetric=symmetric)
        made.jobs.append(Job(layer.module, one.nbytes, read, make))
    used = {stored for entry in weights.values() for stored in entry.parts.values()}
    for name in source.tensors.keys() - used:
        stored = source.tensors[name]
        made.stored[name] = {name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")}
        made.jobs.append(Job(name, stored.nbytes, partial(source.read, name), partial(_copy, name)))
    ignored = [
        name.removesuffix(".weight")
        for name, stored in source.tensors.items()
        if name not in used and name.endswith(".weight") and len(stored.shape) == 2
    ]
    told = _config(layers, symmetric, ignored)
    made.files = {
        "config.json": dump({**source.config, "quantization_config": told}),
        **{path.name: path for path in source.other_files()},
    }
    return made


def _layers(entry: schema.Entry) -> Iterator[_Layer]:
    shape = (entry.attributes or {})["shape"]
    owner, _, leaf = entry.name.rpartition(".")
    if len(shape) == 2 and leaf == "weight":
        yield _Layer(owner, entry, None, slice(None))
        return
    if len(shape) != 3 or leaf not in _FUSED:
        rule = "compressed-tensors takes linear layers and experts (gate_up_proj, down_proj)"
        raise errors.value(rule, entry.name)
    parts = _FUSED[leaf]
    rows = shape[1] // len(parts)
    for expert in range(shape[0]):
        for i, part in enumerate(parts):
            of_part = slice(i * rows, (i + 1) * rows)
            yield _Layer(f"{owner}.{expert}.{part}", entry, expert, of_part)


def _small_parts(source: Source, entry: schema.Entry) -> tuple[Tensor, Tensor]:
    return source.read(entry.parts["scale"]), source.read(entry.parts["zero_point"])


def _narrowest(scale: Tensor) -> torch.dtype:
    """The 16-bit dtype that holds float32 scales exactly, if one does."""
    if scale.dtype != torch.float32:
        return scale.dtype
    halves = (torch.bfloat16, torch.float16)
    return next((d for d in halves if torch.equal(scale.to(d).float(), scale)), scale.dtype)


def _meta(source: Source, name: str) -> Tensor:
    stored = source.tensors[name]
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def _like(t: Int4Tensor, dtype: torch.dtype, symmetric: bool) -> dict[str, Tensor]:
    N, K = t.shape
    n_groups = K // t.group_size
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight_packed": ((N, K // 8), torch.int32),
        "weight_scale": ((N, n_groups), dtype),
        "weight_shape": ((2,), torch.int64),
    }
    if not symmetric:
        shapes["weight_zero_point"] = ((-(-N // 8), n_groups), torch.int32)
    return {part: torch.empty(s, dtype=d, device="meta") for part, (s, d) in shapes.items()}


def _named(module: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{part}": t for part, t in parts.items()}


def _read(source: Source, layer: _Layer) -> Int4Tensor:
    return layer.of(inspecting.read(source, layer.entry))


def _make(t: Int4Tensor, *, module: str, dtype: torch.dtype, symmetric: bool) -> dict[str, Tensor]:
    try:
        parts = ct.from_int4(t, symmetric=symmetric)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from error
    parts["weight_scale"] = parts["weight_scale"].to(dtype)
    return _named(module, parts)


def _copy(name: str, t: Tensor) -> dict[str, Tensor]:
    return {name: t}


def _config(layers: list[_Layer], symmetric: bool, ignored: list[str]) -> dict[str, Any]:
    """``quantization_config``: one group of layers for each group size."""
    by_size: dict[int, list[str]] = {}
    for layer in layers:
        by_size.setdefault(max((layer.entry.attributes or {})["block_size"]), []).append(
            layer.module
        )
    groups = {}
    for i, (size, modules) in enumerate(sorted(by_size.items())):
        names = [f"re:^{re.escape(module)}$" for module in modules]
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(by_size) == 1 else names,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group",
                "group_size": size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": ct.FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }
