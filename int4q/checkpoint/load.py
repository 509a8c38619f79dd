"""``int4q.load``: a model and its tokenizer from a file or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from int4q.checkpoint.gguf_model import GGUFModel


def load(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.types.Device = None,
) -> tuple[nn.Module, Any]:
    """A causal language model of transformers, and its tokenizer.

    The linear layers of a GGUF file hold the file's own 4-bit values (Q4_0, Q4_1 and Q4_K, in
    groups of 32 with float32 scales); nothing of them is dequantised on the way. What the file
    holds in another type is dequantised to ``dtype``.

    Args:
        path: a GGUF file.
        dtype: of everything that is not 4-bit, and of the activations.
        device: where to put the model; the CPU by default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or an architecture that cannot be read.
    """
    held = GGUFModel(path, dtype)
    model = held.model()
    return (model if device is None else model.to(device)), held.tokenizer()
