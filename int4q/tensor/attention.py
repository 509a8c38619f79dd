"""``nn.MultiheadAttention`` on 4-bit projections, by torch's own Python code.

Its fast path, and those of ``nn.TransformerEncoder`` and its layers, step aside for tensor
subclasses; what is left is ``F.multi_head_attention_forward``.
"""

from __future__ import annotations

from types import FunctionType

import torch.nn.functional as F

from int4q.tensor.base import Int4TensorBase

_TORCHS = F.multi_head_attention_forward

# Torch's function first asks for subclasses and hands itself to theirs, to be run with all their
# handlers off: its linear layers would then come in parts, with the weight expanded to the batch.
# The same code that does not ask leaves its linear layers to the weights.
_multi_head_attention_forward = FunctionType(
    _TORCHS.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    _TORCHS.__name__,
    _TORCHS.__defaults__,
)


@Int4TensorBase.implements_torch_function(_TORCHS)
def _attention(func, types, args, kwargs):
    return _multi_head_attention_forward(*args, **kwargs)
