"""The kernels and, as Python functions, the ops that they serve."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_q4gsw(
    x: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """``x @ W.T + bias`` with 4-bit groupwise symmetric weights and float32 activations.

    ``W[n, k] = (u[n, k] - 8) * weight_scales[k // group_size, n]``; nothing is rounded below
    float32. The gradient reaches ``x`` and ``bias``.

    Args:
        x: float32 ``[.., K]``, any strides.
        weights: uint8 ``[N, K/2]``: nibbles ``u`` in 0..15, even k low.
        weight_scales: float32, float16 or bfloat16 ``[K/group_size, N]``.
        group_size: weights of a row that share a scale; divides K.
        bias: float32 ``[N]``.

    Returns:
        float32 ``[.., N]``.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes or devices that do not fit together.
    """
    return torch.ops.int4q.linear_q4gsw(x, weights, weight_scales, group_size, bias)
