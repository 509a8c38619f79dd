"""The CPU kernels as entries of the table.

None builds a dequantised copy of a large weight: the compiled ones and torch's own read 4-bit data,
the blocked ones hold one cache-sized block of rows at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from int4q.kernels import reference
from int4q.kernels.cpu import aten_packed, blocked, core, native
from int4q.kernels.cpu.native import Product
from int4q.kernels.registry import Kernel, KernelPreference, Problem
from int4q.kernels.weight import Weight

PACKINGS = {"rows": 1, "aten": aten_packed.N_MULTIPLE}
"""Layouts of a CPU-packed weight -> what N must be a multiple of."""


def libraries() -> dict[str, str | None]:
    """The compiled libraries, each with the reason why it is not in use, or ``None``."""
    return {"CPU kernels": native.load()[1], "C++ core": core.load()[1]}


def preferred_packing() -> str:
    """``"rows"`` where int4q's compiled kernel runs on this machine, else ``"aten"``."""
    bf16 = torch.bfloat16
    problem = Problem("int4_linear", "cpu", bf16, bf16, 1, 64, 64, 64)
    return "rows" if native.unsupported(problem) is None else "aten"


def _linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, act_pre_scale: Tensor | None = None
) -> Tensor:
    """:func:`native.linear`; NaN and Inf in ``x`` as in torch."""
    if core.load()[0] is not None:
        return core.linear(x, weight, bias, act_pre_scale)
    exact = reference.compute_dtype(x, weight.scale)
    by_blocks = partial(blocked.linear, weight=weight, bias=bias, dtype=exact)
    x = reference.pre_scaled(x, act_pre_scale)
    return native.linear(x, weight, bias, out_of_range_rows=by_blocks)


def _linear_int8(
    x: Tensor, weight: Weight, bias: Tensor | None = None, act_pre_scale: Tensor | None = None
) -> Tensor:
    """:func:`reference.linear_int8` by the compiled kernel."""
    scaled = x.float() if act_pre_scale is None else x.float() * act_pre_scale.reshape(-1).float()
    by_reference = partial(reference.linear_int8, weight=weight, bias=bias)
    return native.linear(scaled, weight, bias, Product.INT8, by_reference).to(x.dtype)


def _linear_rounded(x: Tensor, weight: Weight) -> Tensor:
    """:func:`reference.linear_rounded` by the compiled kernel."""
    if core.load()[0] is not None:
        return core.linear(x, weight, rounded=True)
    return native.linear(x, weight, product=Product.BF16)


def _int8_unsupported(problem: Problem) -> str | None:
    in_float32 = dataclasses.replace(problem, dtype=torch.float32)
    return native.unsupported(in_float32, Product.INT8)


def _on_cpu(problem: Problem) -> str | None:
    return None if problem.device == "cpu" else f"runs on cpu, not {problem.device}"


def _blocks_slow(problem: Problem) -> str | None:
    """Blocks cost little beside their product, unless torch has to unpack them."""
    reason = native.unsupported_dequantize(problem)
    few_rows = dataclasses.replace(problem, M=1)
    if reason and problem.op == "int4_linear" and aten_packed.unsupported(few_rows) is None:
        faster = f'int4_packing_format="cpu_packed" is faster up to M = {aten_packed.MAX_M}'
        return f"{reason}; {faster}"
    return reason


def _unpacking_slow(problem: Problem) -> str:
    return f"{aten_packed.unsupported(problem)}, which unpacks the weight at every call"


def _kernel(name: str, unsupported: Callable, run: Callable, **slow: Callable) -> Kernel:
    return Kernel(name, KernelPreference.TORCH, unsupported, run, **slow)


NATIVE = _kernel("cpu_native", native.unsupported, _linear)
NATIVE_INT8 = _kernel("cpu_native_w4a8", _int8_unsupported, _linear_int8)
NATIVE_ROUNDED = _kernel(
    "cpu_native", partial(native.unsupported, product=Product.BF16), _linear_rounded
)
NATIVE_DEQUANTIZE = _kernel("cpu_native", native.unsupported_dequantize, native.dequantize)
BLOCKED = _kernel("cpu_blocked", _on_cpu, blocked.linear, slow=_blocks_slow)
BLOCKED_ROUNDED = _kernel("cpu_blocked", _on_cpu, blocked.linear_rounded, slow=_blocks_slow)
BLOCKED_GRADIENT = _kernel("cpu_blocked", _on_cpu, blocked.grad_input, slow=_blocks_slow)
PACKED = _kernel("aten_int4pack", aten_packed.unsupported, aten_packed.linear)
UNPACKING = _kernel("unpack_blocks", _on_cpu, aten_packed.unpacking_linear, slow=_unpacking_slow)
