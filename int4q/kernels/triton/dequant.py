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

from int4q.kernels.launch.record import planned
from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton import tuned
from int4q.kernels.triton.common import (
    INTERPRET,
    group_of_step,
    has_launch_overlap,
    load_groups,
    matched_groups,
    rounded,
    spread,
    unpack_bytes,
    unsupported_anywhere,
    wait_for_producer,
)
from int4q.kernels.triton.tiles import DequantizeConfig
from int4q.kernels.weight import Weight

SLICE_BYTES = 256 << 20
"""Most memory that :func:`linear` and :func:`grad_input` take for dequantised weights at a time.

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
    PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    wait_for_producer(PDL)  # which may write the parts, or read what out was before
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


@planned
def dequantize_into(weight: Weight, out: Tensor, config: DequantizeConfig | None = None) -> None:
    """:func:`dequantize` into ``out [N, K]``, contiguous, of the dtype wanted."""
    packed, scale, zero_point, group_size, signed = weight
    N, K = out.shape
    if out.numel() == 0:
        return
    if packed.stride(1) != 1:
        packed = packed.contiguous()
    config = config or tuned.dequantize_config(N, K, out.device)
    block_n, block_h = config.block_n, config.block_h
    scale, zero = matched_groups(scale, zero_point)
    pdl = has_launch_overlap(out.device)
    # No fused multiply-add: the plain result rounds q * scale before it adds the zero point.
    launch(
        _dequantize_kernel, triton.cdiv(N, block_n) * triton.cdiv(K // 2, block_h),
        packed, scale, zero, out,
        N, K, K // group_size, packed.stride(0), *scale.stride(), *zero.stride(),
        GROUP_SIZE=group_size, SIGNED=signed, HAS_ZERO=zero_point is not None,
        ON_GPU=not INTERPRET, PDL=pdl, BLOCK_N=block_n, BLOCK_H=block_h,
        EVEN=N % block_n == 0 and (K // 2) % block_h == 0,
        num_warps=config.num_warps, launch_pdl=pdl, enable_fp_fusion=False,
    )  # fmt: skip


@planned
def dequantize(
    weight: Weight, dtype: torch.dtype, config: DequantizeConfig | None = None
) -> Tensor:
    """``q * scale + zero_point`` in float32, rounded once to ``dtype``.

    Args:
        dtype: bfloat16, float16 or float32.
        config: the tile, by default the table's.

    Returns:
        ``[N, K]``.
    """
    out = torch.empty((weight.N, weight.K), dtype=dtype, device=weight.qdata.device)
    dequantize_into(weight, out, config)
    return out


def _product(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    # (With ``out`` autocast stays out: the dtype of the result is that of x.)
    if bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, w.t(), out=out)


@planned
def linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, act_pre_scale: Tensor | None = None
) -> Tensor:
    """``(x * act_pre_scale) @ W.T + bias`` by dequantising slices of rows and calling cuBLAS.

    For large M. Weights are rounded to the dtype of x.
    """
    if act_pre_scale is not None:
        x = (x * act_pre_scale).to(x.dtype)
    N, K = weight.N, weight.K
    out = x.new_empty((x.shape[0], N))
    if out.numel() == 0:
        return out
    n_slices = -(-N * K * x.itemsize // SLICE_BYTES)
    # Equal slices in multiples of 256 rows: no slice ends in a GEMM too narrow for the device.
    step = min(N, -(-N // (n_slices * 256)) * 256)
    scratch = x.new_empty((step, K))
    if step == N:
        dequantize_into(weight, scratch)
        _product(x, scratch, bias, out)
        return out
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        part = scratch[: rows.stop - start]
        dequantize_into(weight.rows(rows), part)
        _product(x, part, None if bias is None else bias[rows], out[:, rows])
    return out


@planned
def grad_input(grad: Tensor, weight: Weight) -> Tensor:
    """``grad [M, N] @ W`` by dequantising slices of columns and calling cuBLAS: ``[M, K]``.

    (Slices of rows would each give a part of every sum.)
    """
    N, K = weight.N, weight.K
    dtype = torch.promote_types(grad.dtype, weight.scale.dtype)
    wide = grad.to(dtype)
    out = wide.new_empty((wide.shape[0], K))
    unit = -(-256 // weight.group_size) * weight.group_size
    step = min(K, max(1, SLICE_BYTES // max(1, N * unit * dtype.itemsize)) * unit)
    scratch = wide.new_empty(N * step)
    for start in range(0, K, max(1, step)):
        columns = slice(start, min(start + step, K))
        part = scratch[: N * (columns.stop - start)].view(N, columns.stop - start)
        dequantize_into(weight.columns(columns), part)
        torch.mm(wide, part, out=out[:, columns])
    return out.to(grad.dtype)
