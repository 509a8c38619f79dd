"""``int4q::cpu_linear``: the CPU product behind every op on a plain weight, as an op of its own.

It exists so that it can have a kernel in C++ (``core/cpu_linear.cpp``, on torch's stable ABI),
which costs a fraction of a Python kernel's host time and runs where there is no Python. The ops
that users call stay what they are: their checks, their derivatives and the registry lead here
(:func:`linear`), and ``torch.compile`` puts this op in their place (:mod:`int4q.ops.lowering`).
The Python kernel below is the definition, and what runs where the library was not built.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from int4q.kernels import reference, registry
from int4q.kernels.core import library
from int4q.kernels.cpu import blocked, native
from int4q.kernels.cpu.native import Product
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight

_LIBRARY = torch.library.Library("int4q", "FRAGMENT")


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The core, its kernel registered, or ``None`` and the reason why not; settled once."""
    core, reason = library.load()
    if core is None:
        return None, reason
    few_rows = Problem("int4_linear", "cpu", torch.float32, torch.float32, 1, 32, 32, 32)
    if reason := native.unsupported(few_rows):
        return None, reason
    if core.int4q_core_register(0):
        return None, f"torch {torch.__version__} did not take the C++ core's kernel"
    return core, None


def unsupported(problem: Problem) -> str | None:
    """Why the C++ kernel cannot run ``problem`` (for any M), or ``None``."""
    if problem.dtype not in native.DECODE_MAX_M:
        return f"takes bfloat16, float16 and float32 activations, not {problem.dtype}"
    if registry.preference() not in library.CPU_PREFERENCES:
        return f"every kernel on a CPU is torch's, not {registry.preference().value}'s"
    return load()[1] or native.unsupported_weight(problem)


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    rounded: bool = False,
) -> Tensor:
    """``(x * act_pre_scale) @ W.T + bias`` by the op.

    Args:
        x: bfloat16, float16 or float32 ``[.., K]``, any strides.
        weight: ``[N, K]``, one that :func:`native.unsupported_weight` has nothing against; its
            bytes may be uint8 too.
        bias: ``[N]``.
        act_pre_scale: ``[K]``.
        rounded: weights are rounded to ``x``'s dtype, bfloat16; they have no zero points.

    Returns:
        ``[.., N]`` in ``x.dtype``.
    """
    limits = native.decode_max_m(x.dtype), native.TILES_MIN_M
    y: Tensor = _OP._op(x, *weight, bias, act_pre_scale, rounded, *limits)  # (less a frame)
    return y


def _cpu_linear(
    x, qdata, scale, zero_point, group_size, signed, bias, act_pre_scale, rounded, *limits
):
    """The compiled kernels where they are fastest, blocks for the rest; NaN and Inf as in torch.

    The limits on M are for where :mod:`native` does not say them.
    """
    weight = Weight(qdata.view(torch.int8), scale, zero_point, group_size, signed)
    flat = reference.pre_scaled(x, act_pre_scale).reshape(-1, x.shape[-1])
    by_blocks = functools.partial(blocked.linear, weight=weight, bias=bias)
    product = Product.BF16 if rounded else Product.EXACT
    facts = x.dtype, scale.dtype, flat.shape[0], weight.N, weight.K, group_size
    if native.unsupported(Problem("int4_linear", "cpu", *facts), product) is None:
        exact = functools.partial(by_blocks, dtype=reference.compute_dtype(x, scale))
        y = native.linear(flat, weight, bias, product, exact)
    else:
        y = by_blocks(flat, dtype=x.dtype if rounded else None)
    return y.view(*x.shape[:-1], weight.N)


def _fake(x, qdata, *rest):
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


_LIBRARY.define(
    "cpu_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, int group_size, "
    "bool signed, Tensor? bias, Tensor? act_pre_scale, bool rounded, int decode_max_m, "
    "int tiles_min_m) -> Tensor"
)
_LIBRARY.impl("cpu_linear", _cpu_linear, "CompositeExplicitAutograd")
torch.library.register_fake("int4q::cpu_linear", _fake, lib=_LIBRARY)
_OP = torch.ops.int4q.cpu_linear.default
load()
