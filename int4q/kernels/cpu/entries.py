"""CPU kernels: the compiled one on plain bytes, torch's own on packed ones, blocks for the rest.

None builds a dequantised copy of a large weight: the first two read 4-bit data, the blocked one
holds one cache-sized block of rows at a time.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from int4q.kernels import reference
from int4q.kernels.cpu import aten_packed
from int4q.kernels.cpu import native as native_cpu
from int4q.kernels.registry import Kernel, KernelPreference, Problem
from int4q.kernels.weight import Weight
from int4q.packing import offset_to_signed

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Rows of a batch up to which torch's int4 kernel beats dequantising blocks: its time grows with
# M (it re-reads the weight's registers every four rows), the blocks' hardly does.
_PACKED_MAX_M = 64
# A dequantised block fits in a core's L2 (elements; 2 MiB in bfloat16).
_BLOCK_ELEMENTS = 1 << 20
# A weight smaller than this is not worth a warning about its speed (bytes of qdata).
_ANNOUNCE_BYTES = 1 << 20

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
        packed: uint8 ``[N, K/2]``, see :mod:`int4q.kernels.cpu.aten_packed`.
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


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    offset_binary: bool = False,
) -> Tensor:
    """:func:`reference.dequantize` for a 2-D weight, by the compiled kernel where it runs.

    Without a zero point the weight is symmetric; ``offset_binary`` nibbles are ``q + 8``.
    """
    N, K = qdata.shape[0], 2 * qdata.shape[1]
    problem = Problem("dequantize", "cpu", dtype, scale.dtype, 0, N, K, group_size)
    if _dequantize_unsupported(problem) is None:
        return _native_dequantize(qdata, scale, zero_point, group_size, dtype, offset_binary)
    qdata = offset_to_signed(qdata) if offset_binary else qdata
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    return reference.dequantize(Weight(qdata, scale, zero_point, group_size), dtype)


def _row_blocks(N: int, K: int) -> list[slice]:
    rows = max(1, _BLOCK_ELEMENTS // max(K, 1))
    return [slice(n, min(n + rows, N)) for n in range(0, N, rows)]


def blocked_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    offset_binary: bool = False,
) -> Tensor:
    """:func:`reference.linear`, dequantising one block of weight rows at a time."""
    dtype = reference.compute_dtype(x, scale)
    xc = reference.pre_scaled(x, act_pre_scale).to(dtype)
    y = x.new_empty((x.shape[0], qdata.shape[0]))
    for rows in _row_blocks(qdata.shape[0], x.shape[1]):
        w = _dequantized_rows(rows, qdata, scale, zero_point, group_size, dtype, offset_binary)
        y[:, rows] = F.linear(xc, w, None if bias is None else bias[rows].to(dtype))
    return y


def _dequantized_rows(rows: slice, qdata, scale, zero_point, *rest) -> Tensor:
    zero_point = None if zero_point is None else zero_point[:, rows]
    return dequantize(qdata[rows], scale[:, rows], zero_point, *rest)


def blocked_grad_input(
    grad: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    offset_binary: bool = False,
) -> Tensor:
    """:func:`reference.grad_input`, one block of weight rows at a time, summed in float32."""
    dtype = reference.compute_dtype(grad, scale)
    K = 2 * qdata.shape[1]
    total = grad.new_zeros((grad.shape[0], K), dtype=torch.promote_types(dtype, torch.float32))
    for rows in _row_blocks(qdata.shape[0], K):
        w = _dequantized_rows(rows, qdata, scale, zero_point, group_size, dtype, offset_binary)
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
    """:func:`native_cpu.linear` on a weight of any strides."""
    x = reference.pre_scaled(x, act_pre_scale)
    rest = scale, zero_point, group_size, bias, offset_binary
    return native_cpu.linear(x, _whole_rows(qdata), *rest)


def _native_unsupported(problem: Problem) -> str | None:
    return _on_cpu(problem) or native_cpu.unsupported(
        problem.M, problem.N, problem.K, problem.group_size, problem.dtype, problem.scale_dtype
    )


def _announced_blocked_linear(x: Tensor, qdata: Tensor, *rest) -> Tensor:
    if x.shape[0] <= native_cpu.DECODE_MAX_M and qdata.numel() >= _ANNOUNCE_BYTES:
        problem = (x.shape[0], qdata.shape[0], x.shape[1], rest[2], x.dtype, rest[0].dtype)
        _announce(native_cpu.unsupported(*problem) or "its kernel was not chosen")
    return blocked_linear(x, qdata, *rest)


@functools.cache
def _announce(reason: str) -> None:
    warnings.warn(
        f"plain 4-bit weights run on a slow path on this CPU: {reason}; "
        'int4_packing_format="cpu_packed" is faster here',
        stacklevel=2,
    )


def _bridge(run):
    def bridged(x, w, bias=None, act_pre_scale=None):
        return run(
            x, w.qdata, w.scale, w.zero_point, w.group_size, bias, act_pre_scale, not w.signed
        )

    return bridged


def _bridge_grad(g, w):
    return blocked_grad_input(g, w.qdata, w.scale, w.zero_point, w.group_size, not w.signed)


def _bridge_dq(w, dtype):
    return _native_dequantize(w.qdata, w.scale, w.zero_point, w.group_size, dtype, not w.signed)


def _bridge_blocked(x, w, bias=None, act_pre_scale=None):
    return _announced_blocked_linear(
        x, w.qdata, w.scale, w.zero_point, w.group_size, bias, act_pre_scale, not w.signed
    )


_T = KernelPreference.TORCH
NATIVE = Kernel("cpu_native", _T, _native_unsupported, _bridge(native_linear))
NATIVE_DEQUANTIZE = Kernel("cpu_native", _T, _dequantize_unsupported, _bridge_dq)
BLOCKED = Kernel("cpu_blocked", _T, _on_cpu, _bridge_blocked)
BLOCKED_GRADIENT = Kernel("cpu_blocked", _T, _on_cpu, _bridge_grad)
PACKED = Kernel("aten_int4pack", _T, packed_unsupported, packed_linear)
UNPACKING = Kernel("unpack_blocks", _T, _on_cpu, unpacking_linear)
