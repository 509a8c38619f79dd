"""Rows of an activation in float8 e4m3, the scale of the activation included, in one kernel.

The rounding to e4m3 is arithmetic on float32, so it runs on every GPU (Triton has the type from
sm89 only) and under the interpreter, and gives what torch's cast gives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from int4q.kernels.launch.record import planned
from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.reference import FP8_MAX, FP8_SMALLEST_AMAX, fp8_values_dtype
from int4q.kernels.triton.common import FLOATS, INTERPRET, rounded


def unsupported(problem) -> str | None:
    """Why this kernel cannot run ``problem``; ``None`` where it can."""
    if problem.device != "cuda" and not INTERPRET:
        return f"Triton kernels run on cuda (or under TRITON_INTERPRET=1), not on {problem.device}"
    if problem.dtype not in FLOATS:
        return f"activation dtype must be bfloat16, float16 or float32, not {problem.dtype}"
    return None


@triton.jit
def to_e4m3(value):
    """float32 ``value``, at most 448 in size, to the nearest e4m3 value, ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000  # 3 bits of mantissa stay
    # Below 2^-6 e4m3 counts in steps of 2^-9, as float32 does next to 1.5 * 2^14.
    small = (value + 24576.0) - 24576.0
    return tl.where(tl.abs(value) < 0.015625, small, normal.to(tl.float32, bitcast=True))


@triton.jit
def _load(x_ptr, pre_scale_ptr, k, K, stride_xk, HAS_PRE_SCALE: tl.constexpr, ON_GPU: tl.constexpr):
    x = tl.load(x_ptr + k.to(tl.int64) * stride_xk, mask=k < K, other=0.0)
    if HAS_PRE_SCALE:
        factor = tl.load(pre_scale_ptr + k, mask=k < K, other=0.0)
        product = x.to(tl.float32) * factor.to(tl.float32)
        x = rounded(product, x_ptr.dtype.element_ty, ON_GPU)
    return x.to(tl.float32)


@triton.jit
def _fp8_rows_kernel(
    x_ptr,  # [M, K] by strides
    pre_scale_ptr,  # [K] in x's dtype, or unused
    values_ptr,  # [M, K] contiguous
    rows_ptr,  # float32 [M]
    K, stride_xm, stride_xk,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, HAS_PRE_SCALE: tl.constexpr,
    ON_GPU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = _load(x_ptr, pre_scale_ptr, k, K, stride_xk, HAS_PRE_SCALE, ON_GPU)
        largest = tl.maximum(largest, tl.abs(x))
    amax = tl.maximum(tl.max(largest, axis=0), SMALLEST)
    full = tl.full([1], LARGEST, tl.float32)
    inverse = tl.div_rn(full, amax + tl.zeros([1], tl.float32))
    tl.store(rows_ptr + row + tl.arange(0, 1), tl.div_rn(amax + tl.zeros([1], tl.float32), full))
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = _load(x_ptr, pre_scale_ptr, k, K, stride_xk, HAS_PRE_SCALE, ON_GPU)
        value = to_e4m3(tl.minimum(tl.maximum(x * inverse, -LARGEST), LARGEST))
        value = tl.where(x == x, value, x)  # the clamp drops NaN
        tl.store(values_ptr + row * K + k, value.to(values_ptr.dtype.element_ty), mask=k < K)


@planned
def fp8_rows(x: Tensor, act_pre_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`reference.fp8_rows`, bit for bit.

    Args:
        x: ``[M, K]`` bfloat16, float16 or float32, any strides.
        act_pre_scale: ``[K]``.

    Returns:
        ``values [M, K]`` and ``rows [M, 1]``.
    """
    M, K = x.shape
    values = torch.empty((M, K), dtype=fp8_values_dtype(x.dtype), device=x.device)
    rows = torch.empty((M, 1), dtype=torch.float32, device=x.device)
    if M == 0:
        return values, rows
    factor = x if act_pre_scale is None else act_pre_scale.reshape(-1).to(x.dtype).contiguous()
    block = min(triton.next_power_of_2(K), 4096)
    # No fused multiply-add: x * inverse is rounded before it is rounded to e4m3.
    launch(
        _fp8_rows_kernel, M, x, factor, values, rows, K, *x.stride(),
        LARGEST=FP8_MAX, SMALLEST=FP8_SMALLEST_AMAX, HAS_PRE_SCALE=act_pre_scale is not None,
        ON_GPU=not INTERPRET, BLOCK=block, num_warps=8 if block >= 2048 else 4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return values, rows
