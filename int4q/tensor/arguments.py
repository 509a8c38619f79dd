"""How a call of torch reaches its handler: one binding of arguments for all of them.

A handler is a Python function with the parameters of the torch function it stands for, so that
Python binds a call, by position or by keyword, as torch does. ``out=`` and the methods that work
in place are written here, once, for every handler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from int4q import errors
from int4q.tensor.base import Int4TensorBase

Handler = TypeVar("Handler", bound=Callable[..., Any])

# Other names that torch's parser takes for a parameter, and passes on as they were written.
ALIASES = {"x": "input", "a": "input", "x1": "input", "x2": "other",
           "mat_a": "input", "mat_b": "mat2"}  # fmt: skip


def overrides(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler for torch functions and methods (``torch.mm``, ``torch.Tensor.mm``) and
    for aten ops (``aten.mm.default``): ``handler(*args, **kwargs)`` under torch's names."""

    def register(handler: Handler) -> Handler:
        def call(func, types, args, kwargs):
            return _call(handler, args, kwargs) if kwargs else handler(*args)

        for function in functions:
            if isinstance(function, torch._ops.OpOverload):
                Int4TensorBase.implements(function)(call)
            else:
                Int4TensorBase.implements_torch_function(function)(call)
        return handler

    return register


def overrides_in_place(method: Any, handler: Callable[..., Tensor]) -> None:
    """Register ``method`` (``torch.Tensor.addmm_``) as ``handler``, its result copied to self."""

    @overrides(method)
    def in_place(self, *args, **kwargs):
        return self.copy_(_same_dtype(handler(self, *args, **kwargs), self))


def _call(handler: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    kwargs = {ALIASES.get(name, name): value for name, value in kwargs.items()}
    out = kwargs.pop("out", None)
    result = handler(*args, **kwargs)
    if out is None:
        return result
    if torch.is_grad_enabled() and (result.requires_grad or out.requires_grad):
        raise errors.value("out= takes no operand that requires a gradient", "one", "Drop out=")
    return torch.ops.aten.clone.out(_same_dtype(result, out), out=out)


def _same_dtype(result: Tensor, out: Tensor) -> Tensor:
    if isinstance(out, Int4TensorBase):
        raise errors.type_("the result must be written to a plain tensor", type(out).__name__)
    if out.dtype != result.dtype or out.device != result.device:
        raise errors.type_(
            f"the tensor written to must be {result.dtype} on {result.device}, as the result is",
            f"{out.dtype} on {out.device}",
        )
    return result
