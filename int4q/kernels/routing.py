"""Tokens to experts and back: the order of rows that a grouped product takes, and the weighted sum.

The definitions in plain torch, and the choice of a kernel. Row ``s = t * top_k + j`` of a layer's
``S = T * top_k`` rows is token t at its j-th expert. Experts numbered ``n_experts`` and above are
held elsewhere: their rows come last, no group has them, and they add nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4q.kernels import registry

PERMUTE = "experts_permute"
COMBINE = "experts_combine"
"""The two ops in the table of kernels."""


def permute(top_k_index: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort rows by expert, stably.

    Args:
        top_k_index: integers ``[T, top_k]``.

    Returns:
        int32, by sorted row: its token ``[S]``; the end row of each expert ``[n_experts]``; the
        sorted row of each ``s``, ``[S]``; the expert of each sorted row, at most
        ``n_experts - 1``, ``[S]``.
    """
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    number = torch.arange(n_experts, device=expert.device)
    offs = torch.searchsorted(expert, number, right=True, out_int32=True)
    position = torch.empty_like(order, dtype=torch.int32)
    position[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    token = (order // top_k_index.shape[1]).int()
    return token, offs, position, expert.clamp(max=n_experts - 1).int()


def combine(
    y: Tensor, position: Tensor, top_k_index: Tensor, top_k_weights: Tensor, n_experts: int
) -> Tensor:
    """``out[t] = sum_j top_k_weights[t, j] * y[position[t * top_k + j]]``, at least in float32.

    Args:
        y: ``[S, H]``, sorted as :func:`permute` says.
        position: its third result.
        top_k_index: ``[T, top_k]``.
        top_k_weights: ``[T, top_k]``.

    Returns:
        ``[T, H]`` in the dtype of ``y``.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    here = (top_k_index < n_experts).unsqueeze(-1)
    rows = y[position].unflatten(0, top_k_index.shape).to(dtype)
    weighted = (rows * top_k_weights.unsqueeze(-1).to(dtype)).where(here, 0)
    return weighted.sum(1).to(y.dtype)


def run(op: str, x: Tensor, S: int, *rest: object) -> object:
    """``op`` with ``x`` as its first argument, by Triton where it runs."""
    facts = op, x.device.type, x.dtype, x.dtype, S, 0, 0, 0, None
    return registry.route(registry.of_no_product(registry.preference()), *facts).run(x, *rest)
