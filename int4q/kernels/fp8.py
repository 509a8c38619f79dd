"""Float8 activations: one scale a row, and the W4A16 kernels on what is left.

A row of the activation becomes ``values * scale`` with ``values`` in float8 e4m3. bfloat16 holds
every e4m3 value exactly, so any W4A16 kernel multiplies them as they are, and the row's scale
goes onto its result: no GEMM of its own. ``reference.fp8_rows`` defines the arithmetic; the product
rounds where the W4A16 kernel does (its result to bfloat16), and once more after the scale.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from int4q.kernels import registry
from int4q.kernels.reference import fp8_values_dtype
from int4q.kernels.registry import Kernel, KernelPreference, Problem

ROWS = "fp8_rows"
"""The op that quantises rows, in the table of kernels."""


def quantize_rows(
    x: Tensor, act_pre_scale: Tensor | None, preference: KernelPreference
) -> tuple[Tensor, Tensor]:
    """:func:`reference.fp8_rows` of ``x [M, K]``, by Triton where it runs."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    facts = (ROWS, x.device.type, x.dtype, x.dtype, x.shape[0], 0, x.shape[1], 0, capability)
    return registry.route(registry.of_no_product(preference), *facts).run(x, act_pre_scale)


def scaled_back(y: Tensor, rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y [M, N] * rows [M, 1] + bias`` in float32, rounded once to ``dtype``."""
    y = y * rows
    return (y if bias is None else y + bias).to(dtype)


def on_fp8_rows(kernel: Kernel) -> Kernel:
    """An ``int4_linear`` kernel as one that quantises its activation to float8 first."""

    def plain(problem: Problem) -> Problem:
        return replace(problem, op="int4_linear", dtype=fp8_values_dtype(problem.dtype))

    def run(x, weight, bias=None, act_pre_scale=None) -> Tensor:
        values, rows = quantize_rows(x, act_pre_scale, kernel.backend)
        return scaled_back(kernel.run(values, weight, None, None), rows, bias, x.dtype)

    return replace(
        kernel,
        name=f"fp8_rows+{kernel.name}",
        unsupported=lambda problem: kernel.unsupported(plain(problem)),
        run=run,
        slow=lambda problem: kernel.slow(plain(problem)),
    )
