"""A GGUF file as a transformers model with int4q's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from int4q import errors
from int4q.checkpoint import foreign, gguf, gguf_rope
from int4q.checkpoint.foreign import EXACT
from int4q.checkpoint.gguf_architecture import Architecture
from int4q.checkpoint.gguf_file import GGUFFile, GGUFTensor
from int4q.tensor import Int4Tensor


@dataclass(frozen=True)
class Item:
    """A parameter.

    Attributes:
        name: that it has in the model.
        tensors: of the file, mapped, whose rows follow one another in it.
        like: what it becomes, without data.
    """

    name: str
    tensors: tuple[GGUFTensor, ...]
    like: Tensor

    @property
    def indices(self) -> list[int | None]:
        """Of the matrices that it is made of, one by one; ``[None]`` if it is no stack."""
        return [None] if self.like.ndim < 3 else list(range(self.like.shape[0]))

    @property
    def nbytes(self) -> int:
        """In the file."""
        return sum(t.data.nbytes for t in self.tensors)


class GGUFModel:
    """What a GGUF file holds.

    Attributes:
        path: of the file.
        config: of the model, transformers' class.
        items: its parameters, in the order of the file.

    Raises:
        ValueError: a damaged file, one whose tensors are not those of its architecture, or what
            :class:`~int4q.checkpoint.gguf_architecture.Architecture` refuses.
    """

    def __init__(self, path: Path | str, dtype: torch.dtype = torch.bfloat16):
        from transformers import AutoModelForCausalLM

        self.path, self.dtype = Path(path), dtype
        file = GGUFFile(self.path)
        self.architecture = Architecture(file, dtype)
        self.config = self.architecture.config
        with torch.device("meta"):
            self.skeleton: Any = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        self.config.architectures = [type(self.skeleton).__name__]
        self.items = list(self._items(file.tensors))

    def _items(self, tensors: list[GGUFTensor]) -> Iterator[Item]:
        held = {t.name: t for t in tensors if not t.name.startswith(gguf_rope.PREFIX)}
        parameters = dict(self.skeleton.named_parameters(remove_duplicate=False))
        made: dict[str, tuple[GGUFTensor, ...]] = {}
        for name in parameters:
            names = self.architecture.names(name)
            if names and all(n in held for n in names):
                made[name] = tuple(held.pop(n) for n in names)
        for unknown in held:
            raise errors.value(f"every tensor of {self.path.name} must be known", unknown)
        found = {id(parameters[name]) for name in made}
        for name, p in parameters.items():
            if id(p) not in found:
                raise errors.value(f"{self.path.name} must hold {name}", "no such tensor")
        number = {t.name: i for i, t in enumerate(tensors)}
        for name in sorted(made, key=lambda name: number[made[name][0].name]):
            shape = _shape(made[name], name, tuple(parameters[name].shape))
            if all(map(gguf.is_4bit, made[name])):
                like: Tensor = foreign.like(shape, gguf.GROUP_SIZE, torch.float32)
            else:
                like = torch.empty(shape, dtype=self.dtype, device="meta")
            yield Item(name, made[name], like)

    def make(self, item: Item, index: int | None = None) -> tuple[Tensor, str]:
        """A parameter, or a matrix of a stack, and how exact it is, in words.

        The file's bytes are copied once.
        """
        tensors = item.tensors if index is None else [t.matrix(index) for t in item.tensors]
        made = [self._make(t, isinstance(item.like, Int4Tensor)) for t in tensors]
        how = "; ".join(dict.fromkeys(how for _, how in made))
        return (made[0][0] if len(made) == 1 else torch.cat([t for t, _ in made])), how

    def _make(self, tensor: GGUFTensor, packed: bool) -> tuple[Tensor, str]:
        kind = tensor.kind
        if not packed:
            values = self.architecture.reordered(gguf.dequantized(tensor), tensor.name)
            exact = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
            made = exact.to(self.dtype)
            how = EXACT if torch.equal(made.float(), exact) else f"rounded to {_short(self.dtype)}"
            return made, f"{kind}, {how}"
        blocks = gguf.blocks(tensor)
        order = torch.from_numpy(self.architecture.order(len(blocks), tensor.name))
        if not torch.equal(order, torch.arange(len(order))):
            blocks = blocks[order]
        weight = gguf.FROM[kind](blocks)
        return weight, f"{kind}, {gguf.exactness(weight, blocks, kind)}"

    def tokenizer(self) -> Any:
        """The file's own tokenizer."""
        from transformers import PreTrainedTokenizerFast

        folder = self.path.absolute().parent
        return PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=self.path.name)

    def model(self) -> nn.Module:
        """The model, with the file's own 4-bit values in its linear layers and experts.

        One matrix is converted at a time; what is not 4-bit is held in ``dtype``.
        """
        made = {item.name: self._whole(item) for item in self.items}
        packed = {name: t for name, t in made.items() if isinstance(t, Int4Tensor)}
        # transformers puts the rest in its places: buffers, tied weights. It would round the scales
        # of the 4-bit ones to the model's dtype, so these go in afterwards, as they are.
        cls = type(self.skeleton)
        model: nn.Module = cls.from_pretrained(
            None, config=self.config, state_dict=made, dtype=self.dtype
        )
        for name, t in packed.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(t, requires_grad=False))
        return model.eval()

    def _whole(self, item: Item) -> Tensor:
        made = [self.make(item, index)[0] for index in item.indices]
        return made[0] if item.like.ndim < 3 else torch.cat([t.unsqueeze(0) for t in made])


def _shape(
    tensors: tuple[GGUFTensor, ...], name: str, expected: tuple[int, ...]
) -> tuple[int, ...]:
    """Of the parameter ``name``, checked."""
    shapes = [t.shape for t in tensors]
    rows = sum(shape[-2] for shape in shapes) if len(shapes) > 1 else 0
    shape = (*shapes[0][:-2], rows, shapes[0][-1]) if rows else shapes[0]
    # (GGUF has no leading dim of 1.)
    if len(set(shapes)) > 1 or expected not in (shape, (1, *shape)):
        names = " and ".join(t.name for t in tensors)
        rule = f"{names} must have the shape of {name}, {errors.dims(expected)}"
        raise errors.value(rule, ", ".join(map(errors.dims, shapes)))
    return expected


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
