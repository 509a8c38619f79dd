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
from int4q.kernels.weight import Weight


def _runner(op: str, x: Tensor, weight: Weight, M: int) -> Callable:
    """The kernel of ``op`` on ``M`` rows and one weight of the stack."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    shape = M, weight.N, weight.K, weight.group_size
    facts = (op, x.device.type, x.dtype, weight.scale.dtype, *shape, capability)
    return registry.route(registry.preference(), *facts).run


def _batched(op: str, x: Tensor, weight: Weight, width: int, *rest) -> Tensor:
    y = x.new_empty((*x.shape[:-1], width))
    run = _runner(op, x, weight, x.shape[1])
    for b in range(x.shape[0]):
        y[b] = run(x[b], weight.expert(b), *rest)
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


def _grouped(op: str, x: Tensor, weight: Weight, offs: Tensor, width: int, *rest) -> Tensor:
    y = x.new_zeros((x.shape[0], width))
    for expert, start, end in _ranges(offs, x.shape[0]):
        run = _runner(op, x, weight, end - start)
        y[start:end] = run(x[start:end], weight.expert(expert), *rest)
    return y


def bmm(x: Tensor, weight: Weight, act_pre_scale: Tensor | None = None) -> Tensor:
    """``x [B, M, K] * act_pre_scale [K]`` times ``[B, N, K]``: ``[B, M, N]``."""
    return _batched("int4_linear", x, weight, weight.N, None, act_pre_scale)


def bmm_backward(grad: Tensor, weight: Weight) -> Tensor:
    """``grad [B, M, N]`` times ``[B, N, K]``: ``[B, M, K]``."""
    return _batched("int4_linear_backward", grad, weight, weight.K)


def grouped_mm(
    x: Tensor, weight: Weight, offs: Tensor, act_pre_scale: Tensor | None = None
) -> Tensor:
    """Rows of ``x [T, K] * act_pre_scale [K]`` sorted by expert, times ``[E, N, K]``: ``[T, N]``.

    The rows of an expert end at its entry of ``offs [E]``.

    Raises:
        ValueError: ``offs`` does not rise from 0 to at most T.
    """
    return _grouped("int4_linear", x, weight, offs, weight.N, None, act_pre_scale)


def grouped_mm_backward(grad: Tensor, weight: Weight, offs: Tensor) -> Tensor:
    """``grad [T, N]`` times the weight of each row's expert: ``[T, K]``."""
    return _grouped("int4_linear_backward", grad, weight, offs, weight.K)
