"""The kernels and, as Python functions, the ops that they serve.

Each function is the ``torch.library`` op of its name (``torch.ops.int4q.<name>``): it checks its
arguments, runs the kernel that :mod:`int4q.kernels.registry` picks, traces, and passes gradients to
activations and bias. Weights take no gradient.

Two ways to hold a weight ``[N, K]`` in groups of ``group_size`` along K, even k in the low nibble:

- *signed*: ``qdata`` int8 ``[N, K/2]`` of nibbles ``q`` in -8..7, with
  ``value = q * scale + zero_point``; what the tensors hold;
- *offset binary*, symmetric: nibbles ``u`` in 0..15, with ``value = (u - 8) * scale``.

One is the other XOR 0x88 a byte (:func:`int4q.packing.signed_to_offset`).

All raise ``TypeError`` for a dtype that is not listed, and ``ValueError`` for shapes, a group size
or devices that do not fit together, or for a kernel preference that cannot be met.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dequant_w4_to_bf16(w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """``(u - 8) * scale``, computed in float32 and rounded once.

    Args:
        w_packed: int8 ``[N, K/2]``, offset-binary nibbles ``u``.
        w_scale: bfloat16 ``[N, K/group_size]``.
        group_size: weights of a row that share a scale; divides K.

    Returns:
        bfloat16 ``[N, K]``.
    """
    return torch.ops.int4q.dequant_w4_to_bf16(w_packed, w_scale, group_size)


def int4_matmul(x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """``x @ W.T`` with symmetric weights rounded to bfloat16 and float32 sums, at every M.

    Args:
        x: bfloat16 ``[M, K]``, any strides.
        w_packed: int8 ``[N, K/2]``, offset-binary nibbles.
        w_scale: bfloat16 ``[N, K/group_size]``.
        group_size: divides K.

    Returns:
        bfloat16 ``[M, N]``.
    """
    return torch.ops.int4q.int4_matmul(x, w_packed, w_scale, group_size)


def int4_matvec(x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """``x @ W.T`` for one row, the symmetric weights and the sums in float32.

    Args:
        x: bfloat16 ``[1, K]``.
        w_packed: int8 ``[N, K/2]``, offset-binary nibbles.
        w_scale: bfloat16 ``[N, K/group_size]``.
        group_size: divides K.

    Returns:
        bfloat16 ``[1, N]``.
    """
    return torch.ops.int4q.int4_matvec(x, w_packed, w_scale, group_size)


def int4_plain_mm(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    int8_activations: bool = True,
) -> Tensor:
    """``x @ W.T + bias`` on the parts of a ``CudaCoalescedInt4Tensor``, W4A8 by default.

    Per 32 elements of x: ``d = amax / 127``, rounded half to even to int8; int32 dot products. An
    element that is not finite makes its row NaN.

    Args:
        x: float32, float16, bfloat16 or float64 ``[.., K]``.
        qdata: int8 ``[N, K/2]``, signed nibbles.
        scale: float32, float16 or bfloat16 ``[N, K/group_size]``.
        zero_point: as ``scale``.
        group_size: a multiple of 32 that divides K.
        bias: ``[N]``.
        act_pre_scale: ``[K]``; multiplies x first.
        int8_activations: ``False`` leaves x in its own dtype (W4A16).

    Returns:
        ``[.., N]`` in the dtype of x.
    """
    return torch.ops.int4q.int4_plain_mm(
        x, qdata, scale, zero_point, group_size, bias, act_pre_scale, int8_activations
    )


def int4_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """``x @ W.T + bias`` on the parts of an ``Int4Tensor``, W4A16: behind ``F.linear`` on one.

    Args:
        x: float32, float16, bfloat16 or float64 ``[.., K]``.
        qdata: int8 ``[N, K/2]``, signed nibbles.
        scale: float32, float16 or bfloat16 ``[K/group_size, N]``.
        zero_point: as ``scale``.
        group_size: divides K.
        bias: ``[N]``.
        act_pre_scale: ``[K]``; multiplies x first.

    Returns:
        ``[.., N]`` in the dtype of x.
    """
    return torch.ops.int4q.int4_linear(x, qdata, scale, zero_point, group_size, bias, act_pre_scale)


def int4_bmm(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """``x[b] @ W[b].T`` on the parts of a stack of B weights.

    Args:
        x: float32, float16, bfloat16 or float64 ``[B, M, K]``.
        qdata: int8 ``[B, N, K/2]``, signed nibbles.
        scale: float32, float16 or bfloat16 ``[B, K/group_size, N]``.
        zero_point: as ``scale``.
        group_size: divides K.
        act_pre_scale: ``[K]``; multiplies x first.

    Returns:
        ``[B, M, N]`` in the dtype of x.
    """
    return torch.ops.int4q.int4_bmm(x, qdata, scale, zero_point, group_size, act_pre_scale)


def int4_grouped_mm(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    offs: Tensor,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """Rows of x, sorted by expert, each times its expert's weight: torch's ``grouped_mm``.

    Args:
        x: float32, float16, bfloat16 or float64 ``[S, K]``.
        qdata: int8 ``[E, N, K/2]``, signed nibbles.
        scale: float32, float16 or bfloat16 ``[E, K/group_size, N]``.
        zero_point: as ``scale``.
        group_size: divides K.
        offs: int32 ``[E]``, ascending: the row after the last one of each expert.
        act_pre_scale: ``[K]``; multiplies x first.

    Returns:
        ``[S, N]`` in the dtype of x.
    """
    return torch.ops.int4q.int4_grouped_mm(
        x, qdata, scale, zero_point, group_size, offs, act_pre_scale
    )


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
        weights: uint8 ``[N, K/2]``, offset-binary nibbles.
        weight_scales: float32, float16 or bfloat16 ``[K/group_size, N]``.
        group_size: weights of a row that share a scale; divides K.
        bias: float32 ``[N]``.

    Returns:
        float32 ``[.., N]``.
    """
    return torch.ops.int4q.linear_q4gsw(x, weights, weight_scales, group_size, bias)
