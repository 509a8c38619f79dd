"""Attention of one token on a CPU.

torch's fused attention is made for prompts: there it takes up to ten times as long for a single
token in bfloat16 as two products and a softmax do. transformers' plain attention copies keys and
values for each head that shares them. Here those heads are the rows of one product.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

NAME = "int4q_one_token"
"""Of the attention among those of transformers."""
_TURNS = threading.Lock()


@contextmanager
def attention_of_one_token(model: Any) -> Iterator[None]:
    """Within, ``model`` has :func:`attention` in place of torch's fused one, if it had that."""
    config = model.config.get_text_config(decoder=True)
    with _TURNS:  # so that each thread puts back what the model was given
        before = config._attn_implementation
        if before == "sdpa":
            _register()
            config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Scaled dot-product attention, softmax in float32, as transformers calls it.

    Args:
        module: not used, nor are ``kwargs``.
        query: ``[B, H, 1, D]``.
        key: ``[B, G, L, D]``; G divides H, and head h reads key h // (H / G).
        value: ``[B, G, L, D]``.
        attention_mask: bool, broadcast to ``[B, 1, 1, L]``: what is seen.
        scaling: of the scores, ``D ** -0.5`` by default.

    Returns:
        ``[B, 1, H, D]``, and no weights.
    """
    B, H, _, D = query.shape
    rows = query.reshape(B, key.shape[1], -1, D)
    scores = (rows @ key.mT).float() * (D**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(dim=-1).to(query.dtype)
    return (weights @ value).reshape(B, 1, H, D), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
