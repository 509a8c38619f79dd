"""Dequantise to a plain weight, and the matmul that does so slice by slice before cuBLAS.

For large M a bf16 GEMM spends its time in the tensor cores, and unpacking inside it only gets in
the way: writing the weight out once (read 0.5 byte, write 2 bytes an element) and calling cuBLAS
wins. The extra memory is one slice of the weight, ``SLICE_BYTES`` at most, whatever N is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from int4q.kernels import triton_launch, tuned
from int4q.kernels.tiles import DequantizeConfig
from int4q.kernels.triton_common import (
    INTERPRET,
    group_of_step,
    load_groups,
    matched_groups,
    rounded,
    spread,
    unpack_bytes,
    unsupported_anywhere,
)

SLICE_BYTES = 256 << 20
"""Most memory that :func:`linear` takes for dequantised weights at a time.

Measured on an H200: 64 MB slices cost up to 10 % (smaller GEMMs leave more of the device idle at
their ends), and dequantising the next slice beside the GEMM gains nothing.
"""


def unsupported(problem) -> str | None:
    """Why the dequantise kernel cannot run ``problem``; ``None`` where it can."""
    return unsupported_anywhere(problem)


def unsupported_linear(problem) -> str | None:
    """Why dequantise + cuBLAS is not the way for ``problem``; ``None`` where it is."""
    reason = unsupported_anywhere(problem)
    capability = problem.capability
    if reason is None and not tuned.dequantizes(problem.M, problem.N, problem.K, capability):
        start = tuned.dequantize_from_m(capability)
        reason = f"M={problem.M}: a fused kernel is faster below M={start}"
    return reason


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # int8 [N, K/2]
    scale_ptr,  # [n_groups, N] by strides
    zero_ptr,  # [n_groups, N] by strides, or unused
    out_ptr,  # [N, K] contiguous
    N, K, n_groups, stride_pn, stride_sg, stride_sn, stride_zg, stride_zn,
    GROUP_SIZE: tl.constexpr, SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr, ON_GPU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    half = K // 2
    tiles_h = tl.cdiv(half, BLOCK_H)
    pid = tl.program_id(0)
    rows = (pid // tiles_h) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = (pid % tiles_h) * BLOCK_H
    byte = start + tl.arange(0, BLOCK_H)
    row = rows.to(tl.int64)[:, None]
    source = packed_ptr + row * stride_pn + byte[None, :]
    if EVEN:
        packed = tl.load(source)
    else:
        packed = tl.load(source, mask=(rows < N)[:, None] & (byte < half)[None, :], other=0)
    low, high = unpack_bytes(packed, SIGNED, ON_GPU)

    GROUPS: tl.constexpr = max(1, BLOCK_H * 2 // GROUP_SIZE)
    WIDTH: tl.constexpr = min(BLOCK_H, GROUP_SIZE // 2)
    group = group_of_step(start // BLOCK_H, BLOCK_H * 2, GROUP_SIZE) + tl.arange(0, GROUPS)
    scale = load_groups(scale_ptr, rows, group, n_groups, N, stride_sg, stride_sn)
    scale = spread(scale.to(tl.float32), WIDTH)
    low *= scale
    high *= scale
    if HAS_ZERO:
        zero = load_groups(zero_ptr, rows, group, n_groups, N, stride_zg, stride_zn)
        zero = spread(zero.to(tl.float32), WIDTH)
        low += zero
        high += zero
    dtype = out_ptr.dtype.element_ty
    pair = tl.join(rounded(low, dtype, ON_GPU), rounded(high, dtype, ON_GPU))
    values = tl.reshape(pair, [BLOCK_N, 2 * BLOCK_H])
    k = start * 2 + tl.arange(0, 2 * BLOCK_H)
    target = out_ptr + row * K + k[None, :]
    if EVEN:
        tl.store(target, values)
    else:
        tl.store(target, values, mask=(rows < N)[:, None] & (k < K)[None, :])


def _build(call, packed, scale, zero_point, out, group_size, signed, config) -> None:
    N, K = out.shape
    if out.numel() == 0:
        return
    if packed.stride(1) != 1:
        packed = packed.contiguous()
    config = config or tuned.dequantize_config(N, K, out.device)
    block_n, block_h = config.block_n, config.block_h
    scale, zero = matched_groups(scale, zero_point)
    # No fused multiply-add: the plain result rounds q * scale before it adds the zero point.
    call.launch(
        _dequantize_kernel, triton.cdiv(N, block_n) * triton.cdiv(K // 2, block_h),
        packed, scale, zero, out,
        N, K, K // group_size, packed.stride(0), *scale.stride(), *zero.stride(),
        GROUP_SIZE=group_size, SIGNED=signed, HAS_ZERO=zero_point is not None,
        ON_GPU=not INTERPRET, BLOCK_N=block_n, BLOCK_H=block_h,
        EVEN=N % block_n == 0 and (K // 2) % block_h == 0,
        num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


def _dequantize(packed, scale, zero_point, group_size, out, signed, config=None):
    """``scale`` and ``zero_point`` are ``[n_groups, N]`` here; fills and returns ``out [N, K]``."""
    triton_launch.run(_build, (packed, scale, zero_point, out), group_size, signed, config)
    return out


def dequant_w4_to_bf16(w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """``(u - 8) * scale`` in float32, rounded once.

    Args:
        w_packed: int8 ``[N, K/2]``, offset-binary nibbles.
        w_scale: ``[N, K/group_size]``.

    Returns:
        bfloat16 ``[N, K]``.
    """
    shape = (w_packed.shape[0], w_packed.shape[1] * 2)
    out = torch.empty(shape, dtype=torch.bfloat16, device=w_packed.device)
    return _dequantize(w_packed, w_scale.mT, None, group_size, out, signed=False)


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    signed: bool = True,
    config: DequantizeConfig | None = None,
) -> Tensor:
    """``q * scale + zero_point`` in float32, rounded once to ``dtype``.

    Args:
        qdata: int8 ``[N, K/2]``; two's complement nibbles, or offset-binary with ``signed=False``.
        scale, zero_point: ``[K/group_size, N]``, any strides.
        dtype: bfloat16, float16 or float32.
        config: the tile, by default the table's.

    Returns:
        ``[N, K]``.
    """
    shape = (qdata.shape[0], qdata.shape[1] * 2)
    out = torch.empty(shape, dtype=dtype, device=qdata.device)
    return _dequantize(qdata, scale, zero_point, group_size, out, signed, config)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    # (With ``out`` autocast stays out: the dtype of the result is that of x.)
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)


def _sliced_matmul(x, packed, scale, zero_point, group_size, bias, signed) -> Tensor:
    N, K = packed.shape[0], packed.shape[1] * 2
    out = x.new_empty((x.shape[0], N))
    if x.shape[0] == 0 or N == 0:
        return out
    n_slices = -(-N * K * x.itemsize // SLICE_BYTES)
    # Equal slices in multiples of 256 rows: no slice ends in a GEMM too narrow for the device.
    step = min(N, -(-N // (n_slices * 256)) * 256)
    weight = x.new_empty((step, K))
    if step == N:
        _dequantize(packed, scale, zero_point, group_size, weight, signed)
        _product(x, weight, bias, out)
        return out
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        part = weight[: rows.stop - start]
        zero = None if zero_point is None else zero_point[:, rows]
        _dequantize(packed[rows], scale[:, rows], zero, group_size, part, signed)
        _product(x, part, None if bias is None else bias[rows], out[:, rows])
    return out


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """``int4_linear`` by dequantising slices of ``qdata`` and calling cuBLAS; for large M."""
    if act_pre_scale is not None:
        x = (x * act_pre_scale).to(x.dtype)
    return _sliced_matmul(x, qdata, scale, zero_point, group_size, bias, signed=True)


def int4_matmul(x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """``int4_matmul`` the same way."""
    return _sliced_matmul(x, w_packed, w_scale.mT, None, group_size, None, signed=False)
