"""A GGUF file as a transformers model: its config, its tokenizer, which tensor is which parameter.

All three are transformers' own readings of GGUF. What transformers does to the *values* of a tensor
(rows of llama's ``q`` and ``k`` reordered, 1 taken from gemma's norms) is applied here to the rows
of 4-bit weights, so that none is dequantised on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from int4q import errors
from int4q.checkpoint import foreign, gguf
from int4q.checkpoint.foreign import EXACT
from int4q.checkpoint.gguf_file import GGUFFile, GGUFTensor
from int4q.tensor import Int4Tensor

_ROWS_ONLY = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor",
              "NemotronTensorProcessor")  # fmt: skip
"""transformers' classes that change matrices in the order of their rows at most."""


@dataclass(frozen=True)
class Item:
    """A tensor of the file.

    Attributes:
        name: of the parameter.
        tensor: in the file, mapped.
        like: what it becomes, without data.
    """

    name: str
    tensor: GGUFTensor
    like: Tensor


class GGUFModel:
    """What a GGUF file holds.

    Attributes:
        path: of the file.
        config: of the model, transformers' class.
        items: its tensors, in the order of the file.

    Raises:
        ValueError: a damaged file, or an architecture that transformers does not read, or whose
            weights it rearranges in a way that 4-bit ones cannot follow.
    """

    def __init__(self, path: Path | str, dtype: torch.dtype = torch.bfloat16):
        from transformers import AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.path, self.dtype = Path(path), dtype
        file = GGUFFile(self.path)
        self._parsed = _parse(self.path)
        self.config = _config(self._parsed["config"], dtype)
        with torch.device("meta"):
            self.skeleton: Any = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        self.config.architectures = [type(self.skeleton).__name__]
        self.architecture = file.fields["general.architecture"]
        processor: Any = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        if processor.__name__ not in _ROWS_ONLY:
            raise errors.value(
                "an architecture must keep its matrices as they are, rows apart",
                self.architecture,
                "Load it with transformers (which dequantises it) and call int4q.quantize_",
            )
        self._processor = processor(config=self._parsed["config"])
        self.items = list(self._items(file.tensors))

    def _items(self, tensors: list[GGUFTensor]) -> Iterator[Item]:
        parameters = dict(self.skeleton.named_parameters(remove_duplicate=False))
        names = self._names(parameters)
        missing = {id(p): name for name, p in reversed(parameters.items())}
        for tensor in tensors:
            if tensor.name.startswith("rope_"):
                continue  # computed from the config
            name = names.get(tensor.name)
            if name is None:
                raise errors.value(f"every tensor of {self.path.name} must be known", tensor.name)
            if tensor.shape != (expected := tuple(parameters[name].shape)):
                rule = f"{tensor.name} must have the shape of {name}, {errors.dims(expected)}"
                raise errors.value(rule, errors.dims(tensor.shape))
            missing.pop(id(parameters[name]), None)
            if gguf.is_4bit(tensor):
                like: Tensor = foreign.like(tensor.shape, gguf.GROUP_SIZE, torch.float32)
            else:
                like = torch.empty(tensor.shape, dtype=self.dtype, device="meta")
            yield Item(name, tensor, like)
        for name in missing.values():
            raise errors.value(f"{self.path.name} must hold {name}", "no such tensor")

    def _names(self, parameters: Iterable[str]) -> dict[str, str]:
        """The file's name of a tensor -> the parameter's."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        number = next(n for n, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        known = get_tensor_name_map(number, self.config.num_hidden_layers)
        found = {}
        for name in parameters:
            stem, dot, kind = name.rpartition(".")
            if (theirs := known.get_name(stem)) is not None:
                found[f"{theirs}{dot}{kind}"] = name
        return found

    def make(self, item: Item) -> tuple[Tensor, str]:
        """A parameter, and how exact it is, in words; the file's bytes are copied once."""
        kind = item.tensor.kind
        if not gguf.is_4bit(item.tensor):
            values = self.reordered(gguf.dequantized(item.tensor), item.tensor.name)
            exact = torch.from_numpy(np.array(values, dtype=np.float32))
            made = exact.to(self.dtype)
            how = EXACT if torch.equal(made.float(), exact) else f"rounded to {_short(self.dtype)}"
            return made, f"{kind}, {how}"
        blocks = gguf.blocks(item.tensor)
        rows = np.arange(len(blocks)).reshape(-1, 1)
        order = self.reordered(rows, item.tensor.name).reshape(-1)
        if not np.array_equal(order, rows.reshape(-1)):
            blocks = blocks[torch.from_numpy(np.ascontiguousarray(order))]
        weight = gguf.FROM[kind](blocks)
        return weight, f"{kind}, {gguf.exactness(weight, blocks, kind)}"

    def reordered(self, values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        """What transformers makes of a tensor's dequantised values; ``name`` is the file's."""
        processed: np.ndarray[Any, Any] = self._processor.process(values, name=name).weights
        return processed

    def tokenizer(self) -> Any:
        """The file's own tokenizer."""
        from transformers import PreTrainedTokenizerFast

        folder = self.path.absolute().parent
        return PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=self.path.name)

    def model(self) -> nn.Module:
        """The model, with the file's own 4-bit values in its linear layers.

        One tensor is converted at a time; what is not 4-bit is held in ``dtype``.
        """
        made = {item.name: self.make(item)[0] for item in self.items}
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


def _parse(path: Path) -> dict[str, Any]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        parsed: dict[str, Any] = load_gguf_checkpoint(str(path))
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path.name} lacks what a model needs: {error}") from error
    return parsed


def _config(fields: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(**fields)
    config.dtype = dtype
    return config


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
