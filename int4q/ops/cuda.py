"""The ops on a GPU through the C++ core: a twin of each that the core runs from plans.

``int4q::cuda_NAME`` has the schema of ``int4q::NAME`` and no derivatives: it is what runs where
nothing is left to do but the work, in compiled graphs and below a tensor whose call the dispatcher
would add nothing to. Its kernel for a GPU is the core's; a call of a kind that the core has no plan
of goes to ``int4q::plan_NAME``, which is the op's Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from int4q.kernels import registry
from int4q.kernels.core import library
from int4q.kernels.registry import KernelPreference

_LETTERS = {"Tensor": "T", "Optional[Tensor]": "O", "int": "i", "bool": "i"}
_twins: dict[str, torch._ops.OpOverload] = {}


def define(namespace: torch.library.Library, name: str, schema: str, run: Any, fake: Any) -> None:
    """The twin of the op ``name``, where the core is there.

    Args:
        schema: from its opening parenthesis on.
        run: the op's Python.
    """
    core = library.load()[0]
    if core is None:
        return
    arguments, outputs = _signature(name)
    twin, planner = f"cuda_{name}", f"plan_{name}"
    for one in (twin, planner):
        namespace.define(one + schema)
    torch.library.register_fake(f"int4q::{twin}", fake, lib=namespace)
    namespace.impl(name, _on_gpu(name, run), "CUDA")
    namespace.impl(twin, run, "CompositeExplicitAutograd")
    namespace.impl(twin, torch.library.fallthrough_kernel, "Autograd")
    plan = library.planning(core, run, arguments, outputs)
    namespace.impl(planner, plan, "CompositeExplicitAutograd")
    library.launcher(core, twin, f"int4q::{planner}", arguments)
    _twins[name] = getattr(torch.ops.int4q, twin).default


def _on_gpu(name: str, python: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        return run(name, *args) if by_core() else python(*args)

    return kernel


def _signature(name: str) -> tuple[str, int]:
    schema = getattr(torch.ops.int4q, name).default._schema
    return "".join(_LETTERS[str(a.type)] for a in schema.arguments), len(schema.returns)


def twin(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """The twin of ``op`` where it runs on this machine's GPU, else ``None``."""
    return None if library.unavailable() else _twins[op._schema.name.removeprefix("int4q::")]


def by_core() -> bool:
    """Whether plans are right here: they are made under no preference.

    (The core is told of one too, but per thread; a context may be taken to another thread.)
    """
    return library.unavailable() is None and registry.preference() is KernelPreference.AUTO


def run(name: str, *args: Any) -> Any:
    """The twin of the op ``name``, for where :func:`by_core` and :func:`dispatches_nothing`."""
    try:
        return _twins[name]._op(*args)  # (what calling it does, less a frame of Python)
    except RuntimeError as error:
        raise library.cause(error) from None


def dispatches_nothing(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the dispatcher would add nothing to ``linear(x, w, bias)``: no gradient, no tracing.

    Then a caller whose weight is checked already may run the kernel directly, which halves the
    host time of a small layer.
    """
    return (
        type(x) is Tensor
        and not (
            is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        )
        and forward_ad._current_level < 0
        and not is_compiling()
        and _len_torch_dispatch_stack() == 0
        and peek_interpreter_stack() is None
        and _get_tracing_state() is None
    )
