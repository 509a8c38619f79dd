"""CPU kernels: the compiled one on plain bytes, torch's own on packed ones, blocks for the rest.

None builds a dequantised copy of a large weight: the first two read 4-bit data, the blocked one
holds one cache-sized block of rows at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from int4q.kernels import aten_packed, native_cpu, reference
from int4q.kernels.registry import Kernel, KernelPreference, Problem
from int4q.packing import offset_to_signed

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Rows of a batch up to which torch's int4 kernel beats dequantising blocks: its time grows with
# M (it re-reads the weight's registers every four rows), the blocks' hardly does.
_PACKED_MAX_M = 64
# A dequantised block fits in a core's L2 (elements; 2 MiB in bfloat16).
_BLOCK_ELEMENTS = 1 << 20

PACKINGS = {"rows": 1, "aten": aten_packed.N_MULTIPLE}
"""Layouts of a CPU-packed weight -> what N must be a multiple of."""


def preferred_packing() -> str:
    """``"rows"`` where int4q's compiled kernel runs on this machine, else ``"aten"``."""
    bf16 = torch.bfloat16
    return "rows" if native_cpu.unsupported(1, 64, 64, 64, bf16, bf16) is None else "aten"


def _on_cpu(problem: Problem) -> str | None:
    return None if problem.device == "cpu" else f"runs on cpu, not {problem.device}"


def packed_unsupported(problem: Problem) -> str | None:
    """Why torch's CPU int4 kernel cannot run ``problem``, or ``None``."""
    if reason := _on_cpu(problem):
        return reason
    if problem.dtype not in _FLOATS:
        return f"takes float32, float16 and bfloat16 activations, not {problem.dtype}"
    if problem.N % aten_packed.N_MULTIPLE:
        return f"N must be a multiple of {aten_packed.N_MULTIPLE}, not {problem.N}"
    if problem.M > _PACKED_MAX_M:
        return f"slower than blocks above M = {_PACKED_MAX_M}"
    return None


def packed_linear(x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
    """``x [M, K]`` times a weight in torch's CPU layout.

    Args:
        packed: uint8 ``[N, K/2]``, see :mod:`int4q.kernels.aten_packed`.
        scale_and_zero: ``[n_groups, N, 2]``; the product runs in the wider of its dtype and
            ``x``'s, so neither is rounded.

    Returns:
        ``[M, N]`` in ``x.dtype``.
    """
    dtype = reference.compute_dtype(x, scale_and_zero)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.to(dtype).contiguous(), packed, group_size, scale_and_zero.to(dtype)
    )
    return y.to(x.dtype)


def _dequantize_unsupported(problem: Problem) -> str | None:
    if reason := _on_cpu(problem):
        return reason
    if problem.dtype not in _FLOATS:
        return f"writes float32, float16 and bfloat16, not {problem.dtype}"
    shape = 1, problem.N, problem.K, problem.group_size
    return native_cpu.unsupported(*shape, problem.dtype, problem.scale_dtype)


def _native_dequantize(qdata: Tensor, *rest) -> Tensor:
    return native_cpu.dequantize(_whole_rows(qdata), *rest)


def _reference_dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    offset_binary: bool,
) -> Tensor:
    qdata = offset_to_signed(qdata) if offset_binary else qdata
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    return reference.dequantize(qdata, scale, zero_point, group_size, dtype)


def _row_blocks(N: int, K: int) -> list[slice]:
    rows = max(1, _BLOCK_ELEMENTS // max(K, 1))
    return [slice(n, min(n + rows, N)) for n in range(0, N, rows)]


def _dequantized_blocks(
    dtype: torch.dtype,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    offset_binary: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """``(rows, their weights in dtype)``, block by block.

    The compiled kernel writes all of them to one buffer: a new one each costs more in page faults
    than the kernel takes.
    """
    N, K = qdata.shape[0], 2 * qdata.shape[1]
    problem = Problem("dequantize", "cpu", dtype, scale.dtype, 0, N, K, group_size)
    native = _dequantize_unsupported(problem) is None
    blocks = _row_blocks(N, K)
    buffer = torch.empty((blocks[0].stop, K), dtype=dtype) if native else None
    for rows in blocks:
        part = qdata[rows], scale[:, rows], None if zero_point is None else zero_point[:, rows]
        how = group_size, dtype, offset_binary
        if native:
            yield rows, _native_dequantize(*part, *how, buffer[: rows.stop - rows.start])
        else:
            yield rows, _reference_dequantize(*part, *how)


def _product_dtype(x: Tensor, scale: Tensor) -> torch.dtype:
    """What blocks are multiplied in: float32 for float16, which torch multiplies up to a hundred
    times as slowly on a CPU without float16 arithmetic."""
    dtype = reference.compute_dtype(x, scale)
    return torch.float32 if dtype == torch.float16 else dtype


def blocked_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    offset_binary: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`reference.linear`, dequantising one block of weight rows at a time, to ``dtype``."""
    dtype = dtype or _product_dtype(x, scale)
    xc = reference.pre_scaled(x, act_pre_scale).to(dtype)
    y = x.new_empty((x.shape[0], qdata.shape[0]))
    weight = qdata, scale, zero_point, group_size, offset_binary
    for rows, w in _dequantized_blocks(dtype, *weight):
        y[:, rows] = F.linear(xc, w, None if bias is None else bias[rows].to(dtype))
    return y


def blocked_grad_input(
    grad: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    offset_binary: bool = False,
) -> Tensor:
    """:func:`reference.grad_input`, one block of weight rows at a time, summed in float32."""
    dtype = _product_dtype(grad, scale)
    K = 2 * qdata.shape[1]
    total = grad.new_zeros((grad.shape[0], K), dtype=torch.promote_types(dtype, torch.float32))
    weight = qdata, scale, zero_point, group_size, offset_binary
    for rows, w in _dequantized_blocks(dtype, *weight):
        total += grad[:, rows].to(dtype) @ w
    return total.to(grad.dtype)


def _packed_blocks(packed: Tensor) -> list[slice]:
    block = aten_packed.block_rows()
    step = max(block, _BLOCK_ELEMENTS // max(2 * packed.shape[1], 1) // block * block)
    return [slice(n, n + step) for n in range(0, packed.shape[0], step)]


def unpacking_linear(x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
    """:func:`packed_linear` for many rows: unpack and dequantise block by block, then matmul."""
    y = x.new_empty((x.shape[0], packed.shape[0]))
    for rows in _packed_blocks(packed):
        scale, zero_point = scale_and_zero[:, rows].unbind(-1)
        qdata = aten_packed.unpack(packed[rows])
        y[:, rows] = blocked_linear(x, qdata, scale, zero_point, group_size)
    return y


def _whole_rows(qdata: Tensor) -> Tensor:
    """The compiled kernel reads rows byte after byte; only an exotic view is laid out otherwise."""
    return qdata if qdata.stride(-1) == 1 else qdata.contiguous()


def native_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    offset_binary: bool = False,
) -> Tensor:
    """:func:`native_cpu.linear` on a weight of any strides; NaN and Inf in ``x`` as in torch."""
    x = reference.pre_scaled(x, act_pre_scale)
    weight = _whole_rows(qdata), scale, zero_point, group_size, bias

    def by_blocks(rows: Tensor) -> Tensor:
        return blocked_linear(rows, *weight, offset_binary=offset_binary)

    return native_cpu.linear(x, *weight, offset_binary, out_of_range_rows=by_blocks)


def native_linear_int8(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """:func:`reference.linear_int8` by the compiled kernel."""
    weight = _whole_rows(qdata), scale, zero_point, group_size, bias
    scaled = x.float() if act_pre_scale is None else x.float() * act_pre_scale.reshape(-1).float()

    def by_reference(rows: Tensor) -> Tensor:
        return reference.linear_int8(rows, *weight)

    product = native_cpu.Product.INT8
    y = native_cpu.linear(scaled, *weight, product=product, out_of_range_rows=by_reference)
    return y.to(x.dtype)


def native_matmul(x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """:func:`reference.matmul_symmetric` by the compiled kernel."""
    weight = _whole_rows(w_packed), w_scale.mT, None, group_size
    return native_cpu.linear(x, *weight, offset_binary=True, product=native_cpu.Product.BF16)


def blocked_matmul(x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """:func:`reference.matmul_symmetric`, one block of weight rows at a time."""
    weight = w_packed, w_scale.mT, None, group_size
    return blocked_linear(x, *weight, offset_binary=True, dtype=torch.bfloat16)


def native_matvec(x: Tensor, w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    """:func:`reference.matvec_symmetric` by the compiled kernel."""
    return native_linear(x, w_packed, w_scale.mT, None, group_size, offset_binary=True)


def _dequantize_symmetric(w_packed: Tensor, w_scale: Tensor, group_size: int) -> Tensor:
    weight = w_packed, w_scale.mT, None, group_size
    return _native_dequantize(*weight, torch.bfloat16, True)


def _q4gsw(run):
    """An affine kernel as ``linear_q4gsw``: offset-binary uint8, no zero points."""

    def linear_q4gsw(x, weights, weight_scales, group_size, bias=None) -> Tensor:
        weight = weights.view(torch.int8), weight_scales, None, group_size
        return run(x, *weight, bias, offset_binary=True)

    return linear_q4gsw


def _q4gsw_grad(grad: Tensor, weights: Tensor, weight_scales: Tensor, group_size: int) -> Tensor:
    weight = weights.view(torch.int8), weight_scales, None, group_size
    return blocked_grad_input(grad, *weight, offset_binary=True)


def _native_unsupported(
    problem: Problem, product: native_cpu.Product = native_cpu.Product.EXACT
) -> str | None:
    weight = problem.N, problem.K, problem.group_size
    dtypes = problem.dtype, problem.scale_dtype
    return _on_cpu(problem) or native_cpu.unsupported(problem.M, *weight, *dtypes, product)


def _int8_unsupported(problem: Problem) -> str | None:
    in_float32 = dataclasses.replace(problem, dtype=torch.float32)
    return _native_unsupported(in_float32, native_cpu.Product.INT8)


def _matmul_unsupported(problem: Problem) -> str | None:
    return _native_unsupported(problem, native_cpu.Product.BF16)


def _blocks_slow(problem: Problem) -> str | None:
    """Blocks cost little beside their product, unless torch has to unpack them."""
    reason = _dequantize_unsupported(problem)
    few_rows = dataclasses.replace(problem, M=1)
    if reason and problem.op == "int4_linear" and packed_unsupported(few_rows) is None:
        return f'{reason}; int4_packing_format="cpu_packed" is faster up to M = {_PACKED_MAX_M}'
    return reason


def _unpacking_slow(problem: Problem) -> str:
    return f"{packed_unsupported(problem)}, which unpacks the weight at every call"


def _torch_kernel(name: str, unsupported, run, slow=lambda problem: None) -> Kernel:
    return Kernel(name, KernelPreference.TORCH, unsupported, run, slow)


native = _torch_kernel("cpu_native", _native_unsupported, native_linear)
native_int8 = _torch_kernel("cpu_native_w4a8", _int8_unsupported, native_linear_int8)
native_symmetric = _torch_kernel("cpu_native", _matmul_unsupported, native_matmul)
native_symmetric_matvec = _torch_kernel("cpu_native", _native_unsupported, native_matvec)
native_q4gsw = _torch_kernel("cpu_native", _native_unsupported, _q4gsw(native_linear))
native_dequantize = _torch_kernel("cpu_native", _dequantize_unsupported, _native_dequantize)
native_symmetric_dequantize = _torch_kernel(
    "cpu_native", _dequantize_unsupported, _dequantize_symmetric
)
blocked = _torch_kernel("cpu_blocked", _on_cpu, blocked_linear, _blocks_slow)
blocked_symmetric = _torch_kernel("cpu_blocked", _on_cpu, blocked_matmul, _blocks_slow)
blocked_q4gsw = _torch_kernel("cpu_blocked", _on_cpu, _q4gsw(blocked_linear), _blocks_slow)
blocked_grad = _torch_kernel("cpu_blocked", _on_cpu, blocked_grad_input, _blocks_slow)
blocked_q4gsw_grad = _torch_kernel("cpu_blocked", _on_cpu, _q4gsw_grad, _blocks_slow)
packed = _torch_kernel("aten_int4pack", packed_unsupported, packed_linear)
unpacking = _torch_kernel("unpack_blocks", _on_cpu, unpacking_linear, _unpacking_slow)
