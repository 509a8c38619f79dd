"""Products with a weight that is dequantised one cache-sized block of rows at a time: any CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from int4q.kernels import reference
from int4q.kernels.cpu import native
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight

BLOCK_ELEMENTS = 1 << 20
"""A dequantised block fits in a core's L2 (2 MiB in bfloat16)."""


def _blocks(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """``(rows, their weights in dtype)``, block by block.

    The compiled kernel writes all of them to one buffer: a new one each costs more in page faults
    than the kernel takes.
    """
    N, K = weight.N, weight.K
    facts = dtype, weight.scale.dtype, 0, N, K, weight.group_size
    compiled = native.unsupported_dequantize(Problem("dequantize", "cpu", *facts)) is None
    step = max(1, BLOCK_ELEMENTS // max(K, 1))
    buffer = torch.empty((min(step, N), K), dtype=dtype) if compiled else None
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        part = weight.rows(rows)
        if compiled:
            yield rows, native.dequantize(part, dtype, buffer[: rows.stop - start])
        else:
            yield rows, reference.dequantize(part, dtype)


def _multiplied_in(dtype: torch.dtype) -> torch.dtype:
    """Float32 for what torch multiplies more slowly on this CPU: float16 (up to a hundred times,
    without float16 arithmetic), and bfloat16 where it is emulated."""
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not native.has_fast_bf16())
    return torch.float32 if slow else dtype


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`reference.linear`; weights are rounded to ``dtype``, where it is given.

    For bfloat16 ``x`` they are rounded to bfloat16 in any case, as tiles do.
    """
    wider = reference.compute_dtype(x, weight.scale)
    product = _multiplied_in(dtype or (x.dtype if x.dtype == torch.bfloat16 else wider))
    xc = reference.pre_scaled(x, act_pre_scale).to(product)
    y = x.new_empty((x.shape[0], weight.N))
    for rows, w in _blocks(weight, dtype or product):
        y[:, rows] = F.linear(xc, w.to(product), None if bias is None else bias[rows].to(product))
    return y


def linear_rounded(x: Tensor, weight: Weight) -> Tensor:
    """:func:`reference.linear_rounded`."""
    return linear(x, weight, dtype=x.dtype)


def grad_input(grad: Tensor, weight: Weight) -> Tensor:
    """:func:`reference.grad_input`, summed over the blocks in float32."""
    dtype = _multiplied_in(reference.compute_dtype(grad, weight.scale))
    wide = torch.promote_types(dtype, torch.float32)
    total = grad.new_zeros((grad.shape[0], weight.K), dtype=wide)
    for rows, w in _blocks(weight, dtype):
        total += grad[:, rows].to(dtype) @ w
    return total.to(grad.dtype)
