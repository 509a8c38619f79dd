"""transformers: ``experts_implementation="int4q"``, a mixture of experts on 4-bit weights.

Importing this module registers the implementation (:func:`register` does it again)::

    import int4q.integrations.transformers
    model.set_experts_implementation("int4q")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from int4q.ops import experts_combine, experts_permute
from int4q.prepare import EXPERTS, Parts, in_use
from int4q.tensor.base import Int4TensorBase
from int4q.tensor.matmul_ops import grouped_along_groups, grouped_mm

NAME = EXPERTS


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """All experts of a layer: sort the tokens by expert, two grouped matmuls, weigh and add up.

    Nothing waits for the device, no shape depends on its data, and no atomics add: it compiles
    in one graph, is captured by CUDA graphs, and repeats bit for bit.

    Args:
        self: a module under transformers' ``use_experts_implementation``, with ``gate_up_proj``
            (``up_proj`` without a gate) and ``down_proj``, ``[E, out, in]`` or, if
            ``is_transposed``, ``[E, in, out]``; 4-bit weights and plain ones.
        hidden_states: ``[T, H]``.
        top_k_index: int64 ``[T, top_k]``; ``E`` and above stand for an expert held elsewhere.
        top_k_weights: ``[T, top_k]``.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.
    """
    if top_k_weights.shape != top_k_index.shape:  # [T, E], as some routers of 5.0 give them
        top_k_weights = top_k_weights.gather(1, top_k_index)
    E = self.down_proj.shape[0]
    token, offs, position, expert = experts_permute(top_k_index, E)
    has_gate = getattr(self, "has_gate", True)
    x = hidden_states.index_select(0, token)
    y = _grouped_linear(self, "gate_up_proj" if has_gate else "up_proj", x, offs, expert)
    y = self._apply_gate(y) if has_gate else self.act_fn(y)
    y = _grouped_linear(self, "down_proj", y, offs, expert)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = experts_combine(y, position, top_k_index, top_k_weights, E)
    return y.to(hidden_states.dtype)


def _grouped_linear(self: nn.Module, name: str, x: Tensor, offs: Tensor, expert: Tensor) -> Tensor:
    """Rows of ``x [S, in]``, sorted by expert, times their experts' weights, plus their biases."""
    w = in_use(self, name)
    if isinstance(w, Parts) or _as_stored(w, 1 if self.is_transposed else 2):
        y = grouped_along_groups(x, w, offs)
    else:
        w = w if self.is_transposed else w.transpose(-2, -1)
        if isinstance(w, Int4TensorBase):
            y = grouped_mm(x, w, offs)
        else:  # a layer that was left as it is
            y = getattr(moe, "_grouped_mm", torch._grouped_mm)(x, w, offs=offs)
    return y + getattr(self, f"{name}_bias").index_select(0, expert) if self.has_bias else y


def _as_stored(w: Tensor, contracted_dim: int) -> bool:
    """Whether eager code may take the parts of ``w``: a transposed tensor costs more to make than
    the product. (Compiled code sees the tensor's ops.)"""
    return (
        isinstance(w, Int4TensorBase)
        and w.grouped_dim == contracted_dim
        and not torch.compiler.is_compiling()
    )


def _fallback(func, types, args, kwargs):
    x, w, offs = (*args, *kwargs.values())
    return grouped_mm(x, w, offs)


def register() -> None:
    """Make ``experts_implementation="int4q"`` known to transformers.

    Also lets its ``"grouped_mm"`` run 4-bit experts where it takes an op of its own in place of
    torch's (compiled, with another dtype than bfloat16).
    """
    moe.ExpertsInterface.register(NAME, experts_forward)
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    for layout in Int4TensorBase.__subclasses__() if fallback else ():
        layout.implements(fallback.default)(_fallback)  # a class has copied its base's table


register()
