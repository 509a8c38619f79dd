"""The architecture of a GGUF file in transformers: its config, which tensor is which parameter.

Both are transformers' own readings of GGUF, which this adds to where they have gaps: the size of
heads and experts, Mixtral (which GGUF calls a llama), scaled rotary frequencies. What transformers
does to the *values* of a tensor (rows of llama's ``q`` and ``k`` reordered, 1 taken from gemma's
norms) is applied here to the rows of 4-bit weights, so that none is dequantised on the way; and it
is undone for tensors that go into a file.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from int4q import errors
from int4q.checkpoint import gguf_rope
from int4q.checkpoint.gguf_file import GGUFFile

_ROWS_ONLY = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor",
              "NemotronTensorProcessor", "Qwen2MoeTensorProcessor")  # fmt: skip
"""transformers' classes that change matrices in the order of their rows at most."""
_EXPERTS = re.compile(r".*layers\.(\d+)\..*experts\.(gate_up_proj|down_proj)")
_STACKS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_SIZES = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Keys that transformers does not read -> those of its configs."""
_OF_THE_FILE = {"model_type", "architectures", "tie_word_embeddings"}
"""What transformers derives from a file's tensors or its name for the architecture."""


class Architecture:
    """What the metadata of a GGUF file say.

    Attributes:
        name: as GGUF has it: ``llama``, ``qwen3moe``, ...
        config: of the model, transformers' class.
        said: what of the config the file says.

    Raises:
        ValueError: a damaged file, or an architecture that transformers does not read, or whose
            weights it rearranges in a way that 4-bit ones cannot follow.
    """

    def __init__(self, file: GGUFFile, dtype: torch.dtype):
        from transformers import AutoConfig
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        parsed = _parse(file)
        self.name = str(file.fields["general.architecture"])
        completed = _completed(parsed, file.fields, self.name)
        self.config: Any = AutoConfig.for_model(**completed)
        self.config.dtype = dtype
        gguf_rope.scale(self.config, file)
        self.said = (completed.keys() | {"rope_parameters"}) - _OF_THE_FILE
        processor: Any = TENSOR_PROCESSORS.get(self.name, TensorProcessor)
        if processor.__name__ not in _ROWS_ONLY:
            raise errors.value(
                "an architecture must keep its matrices as they are, rows apart",
                self.name,
                "Load it with transformers (which dequantises it) and call int4q.quantize_",
            )
        self._processor = processor(config=parsed)
        self._known = _name_map(self.name, self.config.num_hidden_layers)

    def names(self, parameter: str) -> tuple[str, ...]:
        """The file's names of a parameter's tensors; their rows, one after the other, are its own.

        None for what GGUF has no name for.
        """
        if experts := _EXPERTS.fullmatch(parameter):
            layer, leaf = experts.groups()
            return tuple(f"blk.{layer}.ffn_{part}_exps.weight" for part in _STACKS[leaf])
        stem, dot, kind = parameter.rpartition(".")
        theirs = self._known.get_name(stem)
        return () if theirs is None else (f"{theirs}{dot}{kind}",)

    def reordered(self, values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        """What transformers makes of a tensor's dequantised values; ``name`` is the file's."""
        processed: np.ndarray[Any, Any] = self._processor.process(values, name=name).weights
        return processed

    def order(self, n: int, name: str) -> np.ndarray[Any, Any]:
        """Int64 ``[n]``: which of a tensor's rows each row of the parameter is."""
        rows = np.arange(n).reshape(-1, 1)
        return (self.reordered(rows, name) - self._shift(n, name)).reshape(-1)

    def _shift(self, n: int, name: str) -> int:
        """What is added to every value of a tensor of ``n`` rows: -1 to gemma's norms."""
        return int(self.reordered(np.zeros((n, 1), np.int64), name).min())

    def restored(self, values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        """The inverse of :meth:`reordered`, for plain values and for bytes of 4-bit rows."""
        n = len(values)
        order, shift = np.argsort(self.order(n, name)), self._shift(n, name)
        rows = values if np.array_equal(order, np.arange(n)) else values[order]
        return rows - shift if shift else rows


def _parse(file: GGUFFile) -> dict[str, Any]:
    """transformers' config as its own reader of GGUF finds it."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        parsed: dict[str, Any] = load_gguf_checkpoint(str(file.path))["config"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file.path.name} lacks what a model needs: {error}") from error
    return parsed


def _completed(parsed: dict[str, Any], fields: dict[str, Any], name: str) -> dict[str, Any]:
    """``parsed`` with what transformers leaves out."""
    told = {ours: fields.get(f"{name}.{theirs}") for theirs, ours in _SIZES.items()}
    found = {key: value for key, value in told.items() if value is not None} | parsed
    n_experts = fields.get(f"{name}.expert_count", 0)
    if name == "llama" and n_experts:
        found["model_type"] = "mixtral"
        found["num_local_experts"] = n_experts
        found["num_experts_per_tok"] = fields.get(f"{name}.expert_used_count", n_experts)
    return found


def _name_map(architecture: str, n_layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(n for n, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(number, n_layers)
