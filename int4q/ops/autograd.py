"""Derivatives of the ops: reverse mode, forward mode and ``vmap``, in any nesting.

``torch.library.register_autograd`` knows reverse mode only: a forward-mode derivative through it
is 0 without a word, and the transforms of ``torch.func`` refuse it. Here an op gets a kernel of
its own for the Autograd key, written as torch's own C++ formulas work: the dispatcher calls it
once for each level of transforms, and it records a node of that level.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from int4q import errors


def in_forward_mode() -> bool:
    """Whether an operand may carry a tangent at this level (a compiled ``torch.func.jvp`` opens
    no level that Python knows of, but it is on top of the stack of transforms)."""
    top = torch._C._functorch.peek_interpreter_stack()
    jvp = torch._C._functorch.TransformType.Jvp
    return forward_ad._current_level >= 0 or (top is not None and top.key() == jvp)


def register(
    library: torch.library.Library,
    name: str,
    backward,
    save,
    jvp=None,
    any_lead: bool = False,
    also: str = "bias",
) -> None:
    """Derivatives of the op ``int4q::name``.

    Args:
        backward: ``(ctx, *grads)`` to a gradient, or None, for each argument of the schema.
        save: ``(ctx, inputs, output)``, what ``backward`` needs.
        jvp: ``(inputs, tangents)`` to the tangent of the output; by default that of an op
            linear in its first argument and its bias: the op itself on their tangents.
        also: name of the one argument beside the first that has derivatives.
        any_lead: the first argument may have any leading dims, so ``vmap`` adds one.
    """
    op = getattr(torch.ops.int4q, name).default
    arguments = op._schema.arguments
    defaults = tuple(a.default_value for a in arguments)
    jvp = jvp or linear_jvp(op)

    class Derivative(_SingleLevelFunction):
        @staticmethod
        def forward(*args):
            *args, keyset = args
            if torch._C._functorch.peek_interpreter_stack() is None:
                return below(keyset, *args)
            # The levels below this one record too, and ``forward`` runs without gradients.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return below(keyset, *args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            inputs = inputs[:-1]
            save(ctx, inputs, output)
            ctx.set_materialize_grads(False)  # an operand without a tangent has None
            ctx.inputs = inputs if in_forward_mode() else None

        @staticmethod
        def backward(ctx, *grads):
            if grads[0] is None:
                return (None,) * (len(arguments) + 1)
            return *backward(ctx, *grads), None

        @staticmethod
        def jvp(ctx, *tangents):
            inputs, ctx.inputs = ctx.inputs, None
            _check_tangents(name, arguments, tangents, also)
            return jvp(inputs, tangents)

    Derivative.__name__ = f"{name}_derivative"

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def autograd(keyset, *args):
        args = (*args, *defaults[len(args) :])  # the dispatcher drops those at their default
        if in_forward_mode() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with enable_single_level_autograd_function():
                return Derivative.apply(*args, keyset)
        return below(keyset, *args)

    library.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"int4q::{name}", _batching_rule(op, any_lead), lib=library)


def linear_jvp(op) -> Callable:
    """The tangent of an op linear in its first argument and, where it has one, its bias."""
    names = [a.name for a in op._schema.arguments]
    bias = names.index("bias") if "bias" in names else None

    def jvp(inputs, tangents):
        x, *rest = inputs
        tangent = torch.zeros_like(x) if tangents[0] is None else tangents[0]
        if bias is not None:
            rest[bias - 1] = tangents[bias]
        return op(tangent, *rest)

    return jvp


def _check_tangents(name: str, arguments, tangents, also: str) -> None:
    for argument, tangent in zip(arguments[1:], tangents[1:], strict=False):
        if isinstance(tangent, Tensor) and argument.name != also:
            raise errors.value(
                f"int4q::{name} has derivatives in {arguments[0].name} and {also} only",
                f"a tangent of {argument.name}",
                "Use the dequantised weight",
            )


def _batching_rule(op, any_lead: bool) -> Callable:
    """``vmap``: more leading dims of the activation where nothing else is batched; else a loop."""

    def rule(info, in_dims, *args):
        x, *rest = args
        if any_lead and all(d is None for d in in_dims[1:]):
            return op(x.movedim(in_dims[0], 0), *rest), 0
        one_by_one = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(one_by_one[0], Tensor):
            return torch.stack(one_by_one), 0
        return tuple(map(torch.stack, zip(*one_by_one, strict=True))), 0

    return rule
