"""Stacks of weights one expert at a time: any device, through the kernels of a single weight.

What a CPU runs, and the definition of right for the kernels that take a whole stack. The grouped
products read ``offs`` on the host, so on a GPU they are a fallback only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from int4q import errors
from int4q.kernels import registry


def _runner(op: str, x: Tensor, qdata: Tensor, scale: Tensor, M: int, group_size: int) -> Callable:
    """The kernel of ``op`` on ``M`` rows and one weight of the stack."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    N, K = qdata.shape[1], 2 * qdata.shape[2]
    facts = (op, x.device.type, x.dtype, scale.dtype, M, N, K, group_size, capability)
    return registry.route(registry.preference(), *facts).run


def _batched(op: str, x, qdata, scale, zero_point, group_size, width: int, *rest) -> Tensor:
    y = x.new_empty((*x.shape[:-1], width))
    run = _runner(op, x, qdata, scale, x.shape[1], group_size)
    for b in range(x.shape[0]):
        y[b] = run(x[b], qdata[b], scale[b], zero_point[b], group_size, *rest)
    return y


def _ranges(offs: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """``(expert, first row, end row)`` of every expert that has rows."""
    start, ends = 0, offs.tolist()
    for expert, end in enumerate(ends):
        if not start <= end <= rows:
            raise errors.value(f"offs must rise from 0 to at most {rows}", ends)
        if end > start:
            yield expert, start, end
        start = end


def _grouped(op: str, x, qdata, scale, zero_point, group_size, offs, width: int, *rest) -> Tensor:
    y = x.new_zeros((x.shape[0], width))
    for expert, start, end in _ranges(offs, x.shape[0]):
        run = _runner(op, x, qdata, scale, end - start, group_size)
        parts = qdata[expert], scale[expert], zero_point[expert]
        y[start:end] = run(x[start:end], *parts, group_size, *rest)
    return y


def bmm(x, qdata, scale, zero_point, group_size, act_pre_scale=None) -> Tensor:
    """``x [B, M, K] * act_pre_scale [K]`` times ``[B, N, K]``: ``[B, M, N]``."""
    rest = qdata.shape[1], None, act_pre_scale
    return _batched("int4_linear", x, qdata, scale, zero_point, group_size, *rest)


def bmm_backward(grad, qdata, scale, zero_point, group_size) -> Tensor:
    """``grad [B, M, N]`` times ``[B, N, K]``: ``[B, M, K]``."""
    K = 2 * qdata.shape[2]
    return _batched("int4_linear_backward", grad, qdata, scale, zero_point, group_size, K)


def grouped_mm(x, qdata, scale, zero_point, group_size, offs, act_pre_scale=None) -> Tensor:
    """Rows of ``x [T, K] * act_pre_scale [K]`` sorted by expert, times ``[E, N, K]``: ``[T, N]``.

    The rows of an expert end at its entry of ``offs [E]``.

    Raises:
        ValueError: ``offs`` does not rise from 0 to at most T.
    """
    args = (x, qdata, scale, zero_point, group_size, offs)
    return _grouped("int4_linear", *args, qdata.shape[1], None, act_pre_scale)


def grouped_mm_backward(grad, qdata, scale, zero_point, group_size, offs) -> Tensor:
    """``grad [T, N]`` times the weight of each row's expert: ``[T, K]``."""
    args = (grad, qdata, scale, zero_point, group_size, offs)
    return _grouped("int4_linear_backward", *args, 2 * qdata.shape[2])
