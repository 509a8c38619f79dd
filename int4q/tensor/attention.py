"""``nn.MultiheadAttention`` on 4-bit projections, by torch's own Python code.

Its fast path, and those of ``nn.TransformerEncoder`` and its layers, step aside for tensor
subclasses; what is left is ``F.multi_head_attention_forward``.
"""

from __future__ import annotations

from types import FunctionType

import torch.nn.functional as F

from int4q.tensor.base import Int4TensorBase

_TORCHS = F.multi_head_attention_forward

# Asked for a tensor subclass, torch's function runs itself with all handlers of subclasses off.
# Its linear layers would be taken apart below them, where a batch of activations expands the weight.
# The same code that does not ask leaves them to the weights.
_multi_head_attention_forward = FunctionType(
    _TORCHS.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    _TORCHS.__name__,
    _TORCHS.__defaults__,
)


@Int4TensorBase.implements_torch_function(_TORCHS)
def _attention(func, types, args, kwargs):
    return _multi_head_attention_forward(*args, **kwargs)
