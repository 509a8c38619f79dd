"""The plan of ``int4q convert``: somebody else's 4-bit checkpoint in, one of int4q's schema out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4q import errors
from int4q._version import __version__
from int4q.checkpoint import awq, bitsandbytes, compressed_tensors, gguf_output, gptq, schema
from int4q.checkpoint.foreign import Foreign
from int4q.checkpoint.gguf_model import GGUFModel
from int4q.checkpoint.plan import Job, Plan
from int4q.checkpoint.quantizing import copy, dump, quantization_config
from int4q.checkpoint.skeleton import Recipe, recipes, skeleton
from int4q.checkpoint.source import Source
from int4q.config import Int4WeightOnlyConfig
from int4q.tensor import Int4Tensor

Note = Callable[[str, str], None]
"""Called with a tensor's name and, in words, how exact it is."""
FORMATS: dict[str, Callable[[Source], Iterator[Foreign]]] = {
    "gptq": gptq.weights,
    "awq": awq.weights,
    "compressed-tensors": compressed_tensors.weights,
}
"""``quant_method`` of config.json -> what finds the weights."""
_PARTS = (*gptq.PARTS, "g_idx", "weight_packed", "weight_scale", "weight_zero_point",
          "weight_shape", "weight_g_idx", "input_scale")  # fmt: skip
_REFUSED = {
    "bitsandbytes": "its values are no multiples of a scale: --requantize GROUP_SIZE comes near",
    "torchao": "it is what int4q writes: int4q.load or transformers read it as it is",
    **dict.fromkeys(FORMATS, "its values are kept without --requantize"),
}


def plan_gguf(path: Path, note: Note, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """How to turn a GGUF file into a folder.

    Args:
        dtype: of everything that is not 4-bit.

    Raises:
        ValueError: as :class:`int4q.checkpoint.gguf_model.GGUFModel` does.
    """
    model = GGUFModel(path, dtype)
    stat = path.stat()
    plan = Plan(identity=[__version__, path.name, stat.st_size, stat.st_mtime_ns, str(dtype)])

    def make(name: str, made: tuple[Tensor, str], index: int | None) -> Mapping[str, Tensor]:
        note(name if index is None else f"{name}[{index}]", made[1])
        return schema.flatten(name, made[0])[0]

    for item in model.items:
        jobs = [
            Job(
                f"{item.name}[{i}]",
                item.nbytes // len(item.indices),
                partial(model.make, item, i),
                partial(make, item.name, index=i),
                i,
            )
            for i in item.indices
        ]
        plan.add(item.name, item.like, jobs)
    told = quantization_config(_config(item.like for item in model.items))
    plan.files = {
        "config.json": dump({**model.config.to_dict(), "quantization_config": told}),
        gguf_output.METADATA: gguf_output.metadata(path),
        **_saved(model.tokenizer()),
    }
    return plan


def plan_folder(source: Source, note: Note, requantize: int | None = None) -> Plan:
    """How to turn a checkpoint of one of ``FORMATS`` into int4q's schema.

    Args:
        requantize: instead, turn bitsandbytes' values, which cannot be held exactly, into groups
            of this size.

    Raises:
        ValueError: another format, or one that cannot be held exactly; the message says why.
    """
    method = source.config.get("quantization_config", {}).get("quant_method")
    formats, kind = FORMATS, ", or be a GGUF file"
    if requantize is not None:
        again = partial(bitsandbytes.weights, group_size=requantize)
        formats, kind = {"bitsandbytes": again}, " to be quantised again"
    if method not in formats:
        raise errors.value(
            f"{source.folder} must hold {', '.join(formats)}{kind}",
            method or "a float checkpoint",
            _REFUSED.get(method, "int4q quantize reads float checkpoints"),
        )
    found = {weight.name: weight for weight in formats[method](source)}
    plan = Plan(identity=[__version__, torch.__version__, requantize, source.stamps()])
    made = {weight.name.removesuffix("weight") for weight in found.values()}
    stored = {part for weight in found.values() for part in weight.stored}
    plain = [n for n in source.tensors if n not in stored and not _is_part(n, made)]
    shapes = {name: tuple(weight.like.shape) for name, weight in found.items()}
    shapes |= {name: source.tensors[name].shape for name in plain}
    for target, recipe in recipes(skeleton(source), shapes).items():
        if recipe.names[0] in found:
            _add(plan, source, target, recipe, found, note)
    for name in plain:
        copy(plan, source, name)
    told = quantization_config(_config(weight.like for weight in found.values()))
    plan.files = {
        "config.json": dump({**source.config, "quantization_config": told}),
        **{path.name: path for path in source.other_files()},
    }
    return plan


def _is_part(name: str, modules: set[str]) -> bool:
    module, dot, part = name.rpartition(".")
    return part in _PARTS and f"{module}{dot}" in modules


def _add(
    plan: Plan,
    source: Source,
    target: str,
    recipe: Recipe,
    found: Mapping[str, Foreign],
    note: Note,
) -> None:
    """A 4-bit parameter: one weight, or the rows and matrices that transformers makes it of."""
    if recipe.reason:
        raise errors.value(f"{target} must be made of rows of others", recipe.reason)
    likes = [[found[name].like for name in names] for names in recipe.matrices]
    if len({t.dtype for matrix in likes for t in matrix}) > 1:
        raise errors.value(
            f"the weights of {target} must all be symmetric or all have zero points", "both"
        )
    like = _joined(likes[0])
    if recipe.stacked:
        like = torch.cat([like.unsqueeze(0)] * len(likes))

    def read(names: list[str]) -> list[list[Tensor]]:
        return [[source.read(part) for part in found[name].stored] for name in names]

    def make(names: list[str], read: list[list[Tensor]]) -> Mapping[str, Tensor]:
        made = []
        for name, parts in zip(names, read, strict=True):
            weight, how = found[name].make(*parts)
            note(name, how)
            made.append(weight)
        return schema.flatten(target, _joined(made))[0]

    jobs = []
    for i, names in enumerate(recipe.matrices):
        nbytes = sum(source.tensors[part].nbytes for n in names for part in found[n].stored)
        index = i if recipe.stacked else None
        jobs.append(
            Job(f"{target}[{i}]", nbytes, partial(read, names), partial(make, names), index)
        )
    plan.add(target, like, jobs)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(tuple(weights))


def _config(likes: Any) -> Int4WeightOnlyConfig:
    sizes = [t.group_size for t in likes if isinstance(t, Int4Tensor)]
    group_size = max(set(sizes), key=sizes.count) if sizes else 128
    return Int4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)


def _saved(tokenizer: Any) -> dict[str, bytes | Path]:
    """The files of a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
