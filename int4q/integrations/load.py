"""``int4q.load``: a model and its tokenizer from a GGUF file or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def load(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.types.Device = None,
) -> tuple[nn.Module, Any]:
    """A causal language model of transformers with int4q's weights, and its tokenizer.

    The linear layers and experts of a GGUF file hold the file's own 4-bit values (Q4_0, Q4_1 and
    Q4_K, in groups of 32 with float32 scales); nothing of them is dequantised on the way. What
    the file holds in another type is dequantised to ``dtype``.

    Args:
        path: a GGUF file, or a folder that ``int4q quantize``, ``int4q convert`` or transformers
            made.
        dtype: of everything that is not 4-bit, and of the activations; by default that of the
            folder, and bfloat16 for a file.
        device: where to put the model; the CPU by default.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: a damaged file, or an architecture that cannot be read.
    """
    path = Path(path)
    model, tokenizer = _folder(path, dtype) if path.is_dir() else _gguf(path, dtype)
    return (model if device is None else model.to(device)), tokenizer


def _gguf(path: Path, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    from int4q.checkpoint.gguf_model import GGUFModel

    held = GGUFModel(path, dtype or torch.bfloat16)
    return held.model(), held.tokenizer()


def _folder(path: Path, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", **where)
    return model.eval(), AutoTokenizer.from_pretrained(path, **where)
