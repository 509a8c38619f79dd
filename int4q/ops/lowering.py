"""What ``torch.compile`` runs in place of the ops: ``int4q::cpu_linear``, on a GPU their twins.

The ops' derivatives are Python, and so are their kernels on a CPU. In a graph that Inductor
compiles (an AOTInductor package too) the arguments are checked and the gradients taken already, so
the op that has a kernel in C++ does.
Exported programs keep the ops.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._inductor import decomposition  # (torchao imports it anyway)
from torch.compiler import config as compiler

from int4q._version import __version__
from int4q.kernels import cpu, registry
from int4q.kernels.core import library
from int4q.kernels.cpu import core
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight
from int4q.ops import (  # noqa: F401  (their ops are below)
    cuda,
    experts,
    fp8,
    q4gsw,
    routing,
    symmetric,
)
from int4q.ops.linear import turned

_MANY_ROWS = 1 << 20
_SAME = {cpu.NATIVE, cpu.NATIVE_ROUNDED, cpu.BLOCKED, cpu.BLOCKED_ROUNDED}
"""Kernels of the table that ``cpu_linear`` is the same as."""


def _lowered(
    op: str,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    rows: tuple[int, ...] = (1, _MANY_ROWS),
):
    """``cpu_linear`` where it is what the registry picks for any number of rows (in ``rows``)."""
    facts = weight.N, weight.K, weight.group_size
    problems = [Problem(op, x.device.type, x.dtype, weight.scale.dtype, M, *facts) for M in rows]
    if any(core.unsupported(p) is not None or registry.choose(p) not in _SAME for p in problems):
        return NotImplemented
    return core.linear(x, weight, bias, act_pre_scale, rounded=op == "int4_matmul")


def _replace(op: torch._ops.OpOverload):
    """Let Inductor run the decorated function in place of ``op``, or ``op`` where it declines."""

    def register(function):
        @decomposition.register_decomposition(op)
        @functools.wraps(function)
        def replacement(*args, **kwargs):
            twin = cuda.twin(op) if args[0].is_cuda else None
            result = (twin or function)(*args, **kwargs)
            if result is NotImplemented:
                _keep(op)
            return result

        return replacement

    return register


def _keep(op: torch._ops.OpOverload) -> None:
    """Inductor refuses to call an op that has a decomposition unless it is told to."""
    from torch._inductor import lowering  # slow to import, and imported by now

    if op not in lowering.lowerings:
        lowering.make_fallback(op, warn=False, override_decomp=True)


@_replace(torch.ops.int4q.int4_linear.default)
def _int4_linear(x, qdata, scale, zero_point, group_size, bias=None, act_pre_scale=None):
    weight = Weight(qdata, scale, zero_point, group_size)
    return _lowered("int4_linear", x, weight, bias, act_pre_scale)


@_replace(torch.ops.int4q.int4_plain_mm.default)
def _int4_plain_mm(
    x, qdata, scale, zero_point, group_size, bias=None, act_pre_scale=None, int8_activations=True
):
    if int8_activations:
        return NotImplemented
    weight = Weight(qdata, *turned(scale, zero_point), group_size)
    return _lowered("int4_plain_mm_w4a16", x, weight, bias, act_pre_scale)


@_replace(torch.ops.int4q.int4_matmul.default)
def _int4_matmul(x, w_packed, w_scale, group_size):
    weight = Weight(w_packed, w_scale.mT, None, group_size, signed=False)
    return _lowered("int4_matmul", x, weight)


@_replace(torch.ops.int4q.int4_matvec.default)
def _int4_matvec(x, w_packed, w_scale, group_size):
    weight = Weight(w_packed, w_scale.mT, None, group_size, signed=False)
    return _lowered("int4_matvec", x, weight, rows=(1,))


@_replace(torch.ops.int4q.linear_q4gsw.default)
def _linear_q4gsw(x, weights, weight_scales, group_size, bias=None):
    weight = Weight(weights, weight_scales, None, group_size, signed=False)
    return _lowered("linear_q4gsw", x, weight, bias)


def _as_it_is(*args, **kwargs):
    return NotImplemented


_OPAQUE = (
    "int4_bmm", "int4_grouped_mm", "experts_permute", "experts_combine", "int4_linear_fp8",
    "fp8_rows", "dequant_w4_to_bf16",
)  # fmt: skip
for _name in _OPAQUE:
    _replace(getattr(torch.ops.int4q, _name).default)(_as_it_is)

decomposition.fast_random_decomps.cache_clear()  # a copy of the table, if it was made already
# Compiled graphs that torch keeps on disk call what this process has, or has not.
compiler.cache_key_tag += f" int4q {__version__} {library.load()[1]} {core.load()[1]}"
