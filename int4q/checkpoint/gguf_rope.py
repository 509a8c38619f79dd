"""Scaled rotary frequencies of a GGUF file, which transformers' reading of it leaves out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from int4q import errors
from int4q.checkpoint import gguf
from int4q.checkpoint.gguf_file import GGUFFile

PREFIX = "rope_"
"""How the names of tensors start that hold factors of frequencies: they are no parameters."""
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""As in every llama from 3.1 on, but for the factor."""


def scale(config: Any, file: GGUFFile) -> None:
    """Give a config of transformers the scaling that a file has.

    Raises:
        ValueError: a scaling other than linear, yarn and llama 3's.
    """
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return  # no rotary embedding
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type", "default") != "default":
        return  # transformers knows the architecture's own
    prefix = f"{file.fields['general.architecture']}.rope.scaling."
    told = {k.removeprefix(prefix): v for k, v in file.fields.items() if k.startswith(prefix)}
    kind = told.get("type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": told["factor"]}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = told["original_context_length"]
    elif kind != "none":
        raise errors.value("rotary frequencies must be scaled linearly or by yarn", kind)
    for tensor in file.tensors:
        if tensor.name.startswith(PREFIX):
            factors = gguf.dequantized(tensor)
            if (factors != 1).any():
                _take_factors(config, rope, tensor.name, factors)


def _take_factors(
    config: Any, rope: dict[str, Any], name: str, factors: np.ndarray[Any, Any]
) -> None:
    """Llama 3's scaling, if these are the factors that it divides the frequencies by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope |= {**_LLAMA3, "factor": float(factors.max())}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -torch.arange(0, 1, 1 / len(scaled), dtype=torch.float64)
    if len(factors) != len(scaled) or not np.allclose(plain / scaled, factors, rtol=1e-4, atol=0):
        raise errors.value(f"{name} must be llama 3's factors of the frequencies", "others")
