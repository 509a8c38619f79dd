"""The model that a checkpoint is of, without its data: which tensors make which parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from int4q import errors
from int4q.checkpoint.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """How a parameter comes of the tensors of a checkpoint.

    Attributes:
        matrices: names of tensors. One list for each matrix of a stack (one list in all for any
            other parameter); the tensors of a list are concatenated along their rows.
        stacked: whether the lists are the matrices of a stack.
        reason: why the parameter cannot be made tensor by tensor, or ``None``.
    """

    matrices: list[list[str]]
    stacked: bool = False
    reason: str | None = None

    @property
    def names(self) -> list[str]:
        """Of all tensors that it takes."""
        return [name for names in self.matrices for name in names]


def skeleton(source: Source) -> PreTrainedModel:
    """The model of ``config.json``'s architecture, on the device ``meta``.

    Raises:
        ValueError: transformers has no such architecture.
    """
    import transformers

    names = source.config.get("architectures") or [None]
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise errors.value(
            "config.json must name an architecture of transformers",
            names[0],
            "Models with code of their own are not run here: load one with transformers and call "
            "int4q.quantize_",
        )
    config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True)
    config.quantization_config = None
    with torch.device("meta"):
        model: PreTrainedModel = cls._from_config(config, dtype=config.dtype or torch.float32)
    return model.eval()


def recipes(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Recipe]:
    """Parameter -> how it comes of a checkpoint's tensors; transformers' own names and conversions.

    Args:
        shapes: of the checkpoint's tensors, by name.

    Raises:
        ValueError: a parameter that nothing in the checkpoint makes, or of another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    state = model.state_dict()
    taken: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if target in state:
            taken.setdefault(target, {}).setdefault(pattern, []).append(name)
    found = {}
    for target, by in taken.items():
        converter = next((by_pattern[p] for p in by if p is not None), None)
        found[target] = _recipe(by, converter)
    _check(model, shapes, found)
    return found


def _recipe(by: dict[str | None, list[str]], converter: Any) -> Recipe:
    if converter is None:
        return Recipe([names for names in by.values()])
    steps = [(type(op).__name__, op.__dict__.get("dim")) for op in converter.operations]
    # In the order of the converter's patterns: gate before up.
    columns = [by[p] for p in converter.source_patterns if p in by]
    names = [name for column in columns for name in column]
    if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        if len({len(column) for column in columns}) == 1:
            return Recipe([list(row) for row in zip(*columns, strict=True)], stacked=True)
    made = ", ".join(step for step, _ in steps)
    return Recipe([names], reason=f"transformers makes it of others by {made}")


def _check(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], found: dict[str, Recipe]
) -> None:
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made = {id(parameters[name]) for name in found if name in parameters}
    for name, p in parameters.items():
        recipe = found.get(name)
        if recipe is None:
            if id(p) not in made and not any(pattern.search(name) for pattern in ignored):
                raise errors.value(f"the checkpoint must hold {name}", "no such tensor")
        elif recipe.reason is None:
            shape = _shape(shapes, recipe)
            if shape != tuple(p.shape):
                rule = f"{recipe.names[0]} must make {name} of shape {errors.dims(p.shape)}"
                raise errors.value(rule, errors.dims(shape))


def _shape(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> tuple[int, ...]:
    """What a recipe makes; ``()`` if its tensors do not fit together."""
    kinds = {tuple(shapes[name] for name in names) for names in recipe.matrices}
    if len(kinds) != 1:
        return ()
    (parts,) = kinds
    if len(parts) == 1 and not recipe.stacked:
        return parts[0]
    if any(len(part) != 2 or part[1] != parts[0][1] for part in parts):
        return ()
    matrix = sum(part[0] for part in parts), parts[0][1]
    return (len(recipe.matrices), *matrix) if recipe.stacked else matrix
