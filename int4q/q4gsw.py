"""Weights of ``linear_q4gsw``: made from an ``nn.Linear`` or a symmetric weight tensor, and back.

packed = q4gsw.from_linear(layer, group_size=32)
y = int4q.kernels.linear_q4gsw(x, *packed)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from int4q import errors, qparams
from int4q.kernels import reference
from int4q.kernels.weight import Weight
from int4q.packing import offset_to_signed, signed_to_offset, symmetric_parts
from int4q.tensor import Int4Tensor
from int4q.tensor.base import Int4TensorBase


class Q4gsw(NamedTuple):
    """The arguments of ``linear_q4gsw`` after ``x``, in its order.

    Attributes:
        weights: uint8 ``[N, K/2]``, offset-binary nibbles (``u = q + 8``), even k low.
        weight_scales: ``[K/group_size, N]``; ``W[n, k] = (u[n, k] - 8) * scale``.
        group_size: weights of a row that share a scale.
        bias: float32 ``[N]`` or ``None``.
    """

    weights: Tensor
    weight_scales: Tensor
    group_size: int
    bias: Tensor | None = None


@torch.no_grad()
def from_weight(weight: Tensor, group_size: int, bias: Tensor | None = None) -> Q4gsw:
    """Quantise ``weight [N, K]`` symmetrically: ``scale = max(|w|) / 7`` in each group.

    Raises:
        ValueError: K is no multiple of ``group_size``, or NaN or Inf in ``weight``.
    """
    if weight.ndim != 2:
        raise errors.value("weight must have 2 dims, [N, K]", errors.dims(weight.shape))
    if group_size <= 0 or weight.shape[1] % group_size:
        raise errors.value(
            "group_size must be positive and divide K", f"{group_size} for K {weight.shape[1]}"
        )
    qdata, scale, _ = qparams.quantize(weight, group_size, "symmetric")
    packed = signed_to_offset(qdata).view(torch.uint8)
    return Q4gsw(packed, scale.mT.contiguous(), group_size, _float32(bias))


def from_linear(linear: nn.Linear, group_size: int = 32) -> Q4gsw:
    """Quantise the weight of an ``nn.Linear``; its bias goes along, in float32.

    Raises:
        TypeError: the layer's weight is quantised already (see :func:`from_int4_tensor`).
        ValueError: K is no multiple of ``group_size``, or NaN or Inf in the weight.
    """
    if isinstance(linear.weight, Int4TensorBase):
        raise errors.type_(
            "the weight of linear must be a plain tensor",
            type(linear.weight).__name__,
            "Use from_int4_tensor(linear.weight, linear.bias)",
        )
    return from_weight(linear.weight, group_size, linear.bias)


@torch.no_grad()
def to_linear(packed: Q4gsw) -> nn.Linear:
    """A float32 ``nn.Linear`` that holds the dequantised weight."""
    N, K = packed.weights.shape[0], 2 * packed.weights.shape[1]
    linear = nn.Linear(K, N, bias=packed.bias is not None, device="meta")
    parts = packed.weights.view(torch.int8), packed.weight_scales, None, packed.group_size
    weight = Weight(*parts, signed=False)
    linear.weight = nn.Parameter(reference.dequantize(weight, torch.float32))
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.clone())
    return linear


@torch.no_grad()
def from_int4_tensor(t: Int4TensorBase, bias: Tensor | None = None) -> Q4gsw:
    """The same values as ``t``, a symmetric 4-bit weight ``[N, K]`` of any layout.

    Raises:
        TypeError: ``t`` is no 4-bit weight of int4q.
        ValueError: a zero point is not 0, ``t`` is a stack or transposed, or has an
            ``act_pre_scale``, which the op cannot hold.
    """
    return Q4gsw(*symmetric_parts(t), _float32(bias))


@torch.no_grad()
def to_int4_tensor(packed: Q4gsw) -> Int4Tensor:
    """An ``Int4Tensor`` with the same values (its zero points are 0); the bias stays behind.

    Raises:
        ValueError: a group size that the tensor does not have (8 and 16, among others).
    """
    qdata = offset_to_signed(packed.weights).view(torch.int8)
    scale = packed.weight_scales
    shape = qdata.shape[0], 2 * qdata.shape[1]
    return Int4Tensor(qdata, scale, torch.zeros_like(scale), [1, packed.group_size], shape)


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()
