"""One row of activations: weights stay in float32, nothing of them is rounded.

Each program takes BLOCK_N rows of the weight and walks all of K, so no second pass is needed.
Within a group ``sum (q*s + z) * x = s * sum q*x + z * sum x``, exact in the same arithmetic and
one multiply-add a weight cheaper.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from int4q.kernels.launch.record import planned
from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton import tuned
from int4q.kernels.triton.common import (
    INTERPRET,
    group_of_step,
    load_groups,
    matched_groups,
    rounded,
    spread,
    unpack_bytes,
    unsupported_anywhere,
    with_bias,
)
from int4q.kernels.triton.tiles import MatvecConfig
from int4q.kernels.weight import Weight


def unsupported(problem) -> str | None:
    """Why this kernel cannot run ``problem``; ``None`` where it can."""
    if problem.M > 1:
        return f"takes one row of activations, not M={problem.M}"
    return unsupported_anywhere(problem)


@triton.jit
def _matvec_kernel(
    x_ptr,  # [K] by stride
    pre_scale_ptr,  # [K] or unused
    packed_ptr,  # int8 [N, K/2]
    scale_ptr,  # [n_groups, N] by strides
    zero_ptr,  # [n_groups, N] by strides, or unused
    bias_ptr,  # [N] or unused
    out_ptr,  # [N]
    N, K, n_groups, stride_xk, stride_pn, stride_sg, stride_sn, stride_zg, stride_zn,
    GROUP_SIZE: tl.constexpr, SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PRE_SCALE: tl.constexpr, ON_GPU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    half = K // 2
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = rows.to(tl.int64)[:, None]
    GROUPS: tl.constexpr = max(1, BLOCK_H * 2 // GROUP_SIZE)
    WIDTH: tl.constexpr = min(BLOCK_H, GROUP_SIZE // 2)
    acc = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in range(0, half, BLOCK_H):
        byte = start + tl.arange(0, BLOCK_H)
        inside = (rows < N)[:, None] & (byte < half)[None, :]
        packed = tl.load(packed_ptr + row * stride_pn + byte[None, :], mask=inside, other=0)
        group = group_of_step(start // BLOCK_H, BLOCK_H * 2, GROUP_SIZE) + tl.arange(0, GROUPS)
        scale = load_groups(scale_ptr, rows, group, n_groups, N, stride_sg, stride_sn)
        k = byte[:, None] * 2 + tl.arange(0, 2)[None, :]
        x = tl.load(x_ptr + k.to(tl.int64) * stride_xk, mask=k < K, other=0.0).to(tl.float32)
        if HAS_PRE_SCALE:
            factor = tl.load(pre_scale_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            x = rounded(x * factor, x_ptr.dtype.element_ty, ON_GPU).to(tl.float32)
        even, odd = tl.split(x)
        low, high = unpack_bytes(packed, SIGNED, ON_GPU)
        dot = low * even[None, :] + high * odd[None, :]
        acc += dot * spread(scale.to(tl.float32), WIDTH)
        if HAS_ZERO:
            zero = load_groups(zero_ptr, rows, group, n_groups, N, stride_zg, stride_zn)
            acc += (even + odd)[None, :] * spread(zero.to(tl.float32), WIDTH)
    total = with_bias(tl.sum(acc, axis=1)[:, None], bias_ptr, rows, N, HAS_BIAS)
    y = rounded(tl.reshape(total, [BLOCK_N]), out_ptr.dtype.element_ty, ON_GPU)
    tl.store(out_ptr + rows, y, mask=rows < N)


@planned
def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    config: MatvecConfig | None = None,
) -> Tensor:
    """``(x * act_pre_scale) @ W.T + bias`` for one row (M is 1); weights in float32.

    Args:
        x: ``[M, K]`` bfloat16, float16 or float32, any strides.
        bias: ``[N]``.
        act_pre_scale: ``[K]``.
        config: the tile, by default the table's.

    Returns:
        ``[M, N]`` in the dtype of x.
    """
    packed, scale, zero_point, group_size, signed = weight
    N, K = packed.shape[0], x.shape[1]
    out = x.new_empty((x.shape[0], N))
    if out.numel() == 0:
        return out
    if packed.stride(1) != 1:
        packed = packed.contiguous()
    config = config or tuned.matvec_config(N, K, x.device)
    scale, zero = matched_groups(scale, zero_point)
    launch(
        _matvec_kernel, triton.cdiv(N, config.block_n),
        x, x if act_pre_scale is None else act_pre_scale.contiguous(), packed, scale, zero,
        x if bias is None else bias.contiguous(), out,
        N, K, K // group_size, x.stride(1), packed.stride(0), *scale.stride(), *zero.stride(),
        GROUP_SIZE=group_size, SIGNED=signed, HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None, HAS_PRE_SCALE=act_pre_scale is not None,
        ON_GPU=not INTERPRET, BLOCK_N=config.block_n, BLOCK_H=config.block_h,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out
