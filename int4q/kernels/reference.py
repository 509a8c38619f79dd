"""Plain torch, any device: the definition of right for every op.

Weights here are parts: ``qdata`` int8 ``[N, K/2]`` (signed nibbles), ``scale`` and
``zero_point`` indexed ``[n_groups, N]`` with any strides, ``value = q * scale + zero_point``.
Nothing here is in a hurry; what is fast lives beside it and is tested against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from int4q.packing import offset_to_signed, unpack_nibbles

INT8_BLOCK = 32
"""Activation elements that share one int8 scale in W4A8."""
FP8_MAX = 448.0
"""Largest finite value of float8 e4m3."""
FP8_SMALLEST_AMAX = 1e-12
"""What the largest element of a row counts at least, so that a row of zeros has a scale."""


def dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """``q * scale + zero_point`` in float32 (float64 for that dtype), rounded once.

    Args:
        qdata: int8 ``[..., N, K/2]``.
        scale: ``[..., n_groups, N]``.
        zero_point: as ``scale``.
        group_size: elements along K that share a scale.
        dtype: of the result.

    Returns:
        ``[..., N, K]``.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    q = unpack_nibbles(qdata).to(compute).unflatten(-1, (-1, group_size))
    s = scale.transpose(-1, -2).to(compute).unsqueeze(-1)
    z = zero_point.transpose(-1, -2).to(compute).unsqueeze(-1)
    return (q * s + z).flatten(-2).to(dtype)


def compute_dtype(x: Tensor, scale: Tensor) -> torch.dtype:
    """What a matmul runs in: the wider of activation and scale, so neither is rounded."""
    return torch.promote_types(x.dtype, scale.dtype)


def pre_scaled(x: Tensor, act_pre_scale: Tensor | None) -> Tensor:
    """``x * act_pre_scale`` in ``x``'s dtype; ``x`` where there is no scale."""
    return x if act_pre_scale is None else x * act_pre_scale.reshape(-1).to(x.dtype)


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """``(x * act_pre_scale) [M, K] @ W.T + bias``, the weight dequantised to the compute dtype.

    Returns:
        ``[M, N]`` in ``x.dtype``.
    """
    dtype = compute_dtype(x, scale)
    w = dequantize(qdata, scale, zero_point, group_size, dtype)
    y = F.linear(
        pre_scaled(x, act_pre_scale).to(dtype), w, None if bias is None else bias.to(dtype)
    )
    return y.to(x.dtype)


def grad_input(
    grad: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, group_size: int
) -> Tensor:
    """``grad [M, N] @ W``: what :func:`linear` passes back to ``x``; ``[M, K]``."""
    dtype = compute_dtype(grad, scale)
    w = dequantize(qdata, scale, zero_point, group_size, dtype)
    return (grad.to(dtype) @ w).to(grad.dtype)


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per 32 elements: ``d = amax / 127``, ``xq = round_half_to_even(x / d)``.

    Args:
        x: floating ``[M, K]``, K a multiple of 32.

    Returns:
        ``xq`` int8 ``[M, K/32, 32]`` and ``d`` float32 ``[M, K/32]``. Where d rounds to 0 all xq
        are 0; a block with NaN or Inf in it has ``d = NaN`` (so its row's result is NaN) and xq 0.
    """
    blocks = x.float().unflatten(-1, (-1, INT8_BLOCK))
    amax = blocks.abs().amax(dim=-1)
    # A tensor, because torch divides by a number by multiplying with its inverse.
    d = amax / torch.full_like(amax, 127.0)
    live = (d > 0) & amax.isfinite()
    ratio = blocks / torch.where(live, d, 1.0).unsqueeze(-1)
    ratio = torch.where(live.unsqueeze(-1), ratio, 0.0).clamp(-127, 127)
    return ratio.round().to(torch.int8), torch.where(amax.isfinite(), d, torch.nan)


def int8_dots(xq: Tensor, qdata: Tensor) -> Tensor:
    """The integer sums of W4A8: ``sum_k xq[m, b, k] * q[n, b, k]`` over blocks ``b`` of 32.

    Args:
        xq: int8 ``[M, K/32, 32]``.
        qdata: int8 ``[N, K/2]``.

    Returns:
        int32 ``[M, K/32, N]``.
    """
    q = unpack_nibbles(qdata).unflatten(-1, (-1, INT8_BLOCK))
    # float32 holds these sums exactly: |xq * q| summed over 32 stays under 2^24.
    return torch.einsum("mbk,nbk->mbn", xq.float(), q.float()).to(torch.int32)


def linear_int8(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """W4A8: int32 dot products of int8 activations and 4-bit weights, scaled in float32.

    ``y[m, n] = sum_b d[m, b] * (scale[g, n] * dot[m, b, n] + zero_point[g, n] * sum(xq[m, b]))``
    over blocks ``b`` of 32, ``g = 32 * b // group_size``; plus ``bias [N]``. ``act_pre_scale [K]``
    multiplies x in float32, before it is quantised.

    Returns:
        ``[M, N]`` in ``x.dtype``.
    """
    scaled = x if act_pre_scale is None else x.float() * act_pre_scale.reshape(-1).float()
    xq, d = quantize_activation(scaled)
    dot = int8_dots(xq, qdata).float()
    total = xq.sum(dim=-1, dtype=torch.int32).float()
    per_group = group_size // INT8_BLOCK
    s = scale.float().repeat_interleave(per_group, dim=0)
    z = zero_point.float().repeat_interleave(per_group, dim=0)
    y = (d.unsqueeze(-1) * (dot * s + total.unsqueeze(-1) * z)).sum(dim=1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def fp8_values_dtype(dtype: torch.dtype) -> torch.dtype:
    """What holds the e4m3 values of an activation of ``dtype``; both hold them exactly."""
    return torch.float32 if dtype in (torch.float32, torch.float64) else torch.bfloat16


def fp8_rows(x: Tensor, act_pre_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A row of ``x * act_pre_scale`` as ``values * rows``, values in float8 e4m3.

    In float32, with ``amax = max(|x|, 1e-12)`` a row: ``values = e4m3(x * (448 / amax))``, to
    nearest even, and ``rows = amax / 448``.

    Args:
        x: floating ``[M, K]``, K at least 1.
        act_pre_scale: ``[K]``; the product is rounded to x's dtype first.

    Returns:
        ``values [M, K]`` in :func:`fp8_values_dtype`, and ``rows`` float32 ``[M, 1]``.
    """
    dtype = fp8_values_dtype(x.dtype)
    x = pre_scaled(x, act_pre_scale).float()
    amax = x.abs().amax(dim=-1, keepdim=True).clamp(min=FP8_SMALLEST_AMAX)
    # Tensors on both sides: torch may divide by a number through its rounded reciprocal.
    largest = torch.full_like(amax, FP8_MAX)
    values = (x * (largest / amax)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return values.to(dtype), amax / largest


def linear_fp8(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """``rows * (values @ W.T) + bias`` with :func:`fp8_rows` and the weight in float32.

    Returns:
        ``[M, N]`` in ``x.dtype``.
    """
    values, rows = fp8_rows(x, act_pre_scale)
    w = dequantize(qdata, scale, zero_point, group_size, torch.float32)
    y = F.linear(values.float(), w) * rows
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _symmetric_values(w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """float32 ``[N, K]``: ``(u - 8) * scale``."""
    q = unpack_nibbles(offset_to_signed(w_packed)).float().unflatten(-1, (-1, group_size))
    return (q * w_scale.float().unsqueeze(-1)).flatten(-2)


def dequantize_symmetric(w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """``(u - 8) * scale`` in float32, rounded once to bfloat16.

    Args:
        w_packed: int8 ``[N, K/2]``, offset-binary nibbles ``u``.
        w_scale: ``[N, K/group_size]``.

    Returns:
        bfloat16 ``[N, K]``.
    """
    return _symmetric_values(w_packed, w_scale, group_size).to(torch.bfloat16)


def linear_q4gsw(
    x: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """``x [M, K] @ W.T + bias`` in ``x.dtype`` with ``W = (u - 8) * scale`` in float32.

    Args:
        weights: uint8 ``[N, K/2]``, offset-binary nibbles ``u``.
        weight_scales: ``[K/group_size, N]``.
    """
    return F.linear(x, _q4gsw_values(weights, weight_scales, group_size, x.dtype), bias)


def linear_q4gsw_grad(
    grad: Tensor, weights: Tensor, weight_scales: Tensor, group_size: int
) -> Tensor:
    """``grad [M, N] @ W``: what :func:`linear_q4gsw` passes back to ``x``; ``[M, K]``."""
    return grad @ _q4gsw_values(weights, weight_scales, group_size, grad.dtype)


def _q4gsw_values(
    weights: Tensor, weight_scales: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    return _symmetric_values(weights.view(torch.int8), weight_scales.mT, group_size).to(dtype)


def matmul_symmetric(x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """``x [M, K] @ W.T`` with weights rounded to bfloat16 and float32 sums; ``[M, N]``."""
    w = dequantize_symmetric(w_packed, w_scale, group_size)
    return F.linear(x.float(), w.float()).to(x.dtype)


def matvec_symmetric(x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """``x [1, K] @ W.T`` with weights and sums in float32; ``[1, N]``."""
    return F.linear(x.float(), _symmetric_values(w_packed, w_scale, group_size)).to(x.dtype)
