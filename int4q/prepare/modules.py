"""A prepared module: what it holds, how it is made and put back, and its forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from int4q.coverage import contracted_dim, conv1d, expert_parameters
from int4q.prepare.fused import LINK, Link
from int4q.prepare.parts import parts_of
from int4q.tensor.base import Int4TensorBase
from int4q.tensor.matmul_ops import added, linear_along_groups

EXPERTS = "int4q"
"""The experts implementation of transformers that reads prepared stacks."""
HELD = "_int4q_held"
"""Module attribute: name -> the 4-bit parameter that a prepared module keeps back."""


@contextmanager
def as_given(model: nn.Module) -> Iterator[None]:
    """The prepared modules of ``model`` as they were, within the ``with`` block."""
    modules = prepared(model)
    for module in modules:
        release(module)
    try:
        yield
    finally:
        for module in modules:
            hold(module)


def prepared(model: nn.Module) -> list[Prepared]:
    """The prepared ones among the modules of ``model``."""
    return [module for module in model.modules() if isinstance(module, Prepared)]


def in_use(module: nn.Module, name: str) -> Any:
    """What a product takes for the parameter ``name``: its :class:`Parts` in compiled code."""
    if torch.compiler.is_compiling() and _is_held(module, name):
        return getattr(module, f"{name}_parts")
    return getattr(module, name)


def _is_held(module: nn.Module, name: str) -> bool:
    """False also for a weight that was put into ``_parameters`` itself (``functional_call``)."""
    return isinstance(module, Prepared) and module._parameters[name] is None


# --- a prepared module ----------------------------------------------------------------------------


class Prepared(nn.Module):
    """Mixed into the class of a prepared module, which stays an instance of what it was."""

    _given: Any
    """The class before."""
    reads_parts = False
    """Whether it is a linear layer with the forward of one, which :mod:`~.fused` can fuse."""
    _int4q_fused: Link | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get(HELD, ()):
            with as_given(self):
                setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__[HELD]:
            with as_given(self):
                delattr(self, name)
        else:
            super().__delattr__(name)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return _as_given(self, "_apply", *args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _as_given(self, "_save_to_state_dict", *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _as_given(self, "_load_from_state_dict", *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles hold the parameter once, and are prepared as they are built."""
        with as_given(self):
            state = {**self.__dict__, "_parameters": dict(self._parameters)}
            state["_modules"] = dict(self._modules)
        state.pop(LINK, None)  # (what calls the layers has the group)
        return _empty, (self._given, tuple(self.__dict__[HELD])), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        _become(self, self._given)
        self.__setstate__(state)
        hold(self)


def _as_given(module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    with as_given(module):
        return getattr(module, method)(*args, **kwargs)


def hold(module: nn.Module) -> dict[str, str]:
    """Prepare one module; returns why 4-bit weights of it stay as they are, by name."""
    registered = {**module._buffers, **module._parameters}
    weights = {name: w for name, w in registered.items() if isinstance(w, Int4TensorBase)}
    reasons = {name: _reason_left(module, name, w) for name, w in weights.items()}
    held = {name: weights[name] for name, reason in reasons.items() if reason is None}
    for name, w in held.items():
        w._is_held = True
        module.add_module(f"{name}_parts", parts_of(w).train(module.training))
    if held:
        module.__dict__[HELD] = held
        given: Any = type(module)
        _become(module, _prepared_class(given, tuple(held)))
    for name in held:
        module._parameters[name] = None  # its place in the order of parameters
    if link := module.__dict__.get(LINK):
        link[0].join() if held else link[0].part()
    return {name: reason for name, reason in reasons.items() if reason is not None}


def release(module: Prepared) -> None:
    """Undo :func:`hold`."""
    held = module.__dict__[HELD]
    for name, w in held.items():
        w.__dict__.pop("_is_held", None)  # (of a tied weight once only)
        if module._parameters[name] is None:
            module._parameters[name] = w
    _become(module, module._given)
    for name in held:
        del module._modules[f"{name}_parts"]
    del module.__dict__[HELD]


def _become(module: Any, cls: type[nn.Module]) -> None:
    module.__class__ = cls


def _reason_left(module: nn.Module, name: str, w: Int4TensorBase) -> str | None:
    if name not in module._parameters:
        return "a buffer"
    if isinstance(module, nn.Embedding):
        return "an embedding reads single rows, which no op does"
    if "forward" in module.__dict__:
        return "the forward of its module was replaced (accelerate's hooks do that)"
    if name in expert_parameters(module):
        experts = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if experts != EXPERTS:
            return f"experts need set_experts_implementation({EXPERTS!r}) first, not {experts!r}"
    elif name != "weight" or _forward(type(module)) is None:
        return f"{type(module).__name__} has a forward of its own"
    if w.grouped_dim != w.ndim + contracted_dim(module, w):
        return "its groups do not run along the dim that is summed over"
    return None


# --- its class ------------------------------------------------------------------------------------


@functools.cache
def _prepared_class(cls: Any, names: tuple[str, ...]) -> type[Prepared]:
    namespace: dict[str, Any] = {"_given": cls, **{name: _parameter(name) for name in names}}
    if forward := _forward(cls):
        namespace["forward"] = forward
        namespace["reads_parts"] = forward is _linear_forward
    return type(f"Prepared{cls.__name__}", (Prepared, cls), namespace)


def _empty(cls: Any, names: tuple[str, ...]) -> nn.Module:
    prepared = _prepared_class(cls, names)
    return prepared.__new__(prepared)


def _parameter(name: str) -> property:
    def read(self: Prepared) -> Any:
        return self.__dict__[HELD][name] if _is_held(self, name) else self._parameters[name]

    return property(read)


def _forward(cls: Any) -> Callable[..., Tensor] | None:
    """The prepared forward of a class whose own is that of a linear layer, else ``None``."""
    if cls.forward is nn.Linear.forward:
        return _linear_forward
    known: Any = conv1d(cls)
    return _conv1d_forward if known is not None and cls.forward is known.forward else None


def _weight(module: Any, x: Tensor) -> Any:
    """What a linear layer's product takes for its weight.

    ``None`` where the forward before is to run: with a weight that was put into ``_parameters``
    itself, and for torch's functions to be overridden by ``x`` or a mode. (Compiled code is traced
    under a mode of the tracer's own.)
    """
    if module._parameters["weight"] is not None:
        return None
    if torch.compiler.is_compiling():
        return module.weight_parts
    return None if has_torch_function_unary(x) else module.__dict__[HELD]["weight"]


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    w = _weight(self, input)
    if w is None:
        return nn.Linear.forward(self, input)
    link = self._int4q_fused
    if link is not None and link[0].is_open and link[0].weight is not None:
        return link[0].product(link[1], input)
    registered = self._parameters  # (a module is slow to find what is registered by its name)
    bias = registered["bias"] if "bias" in registered else self.bias
    return linear_along_groups(input, w, bias)


def _conv1d_forward(self: Any, x: Tensor) -> Tensor:
    w = _weight(self, x)
    if w is None:
        known: Any = conv1d(type(self))
        return known.forward(self, x)
    return added(self.bias, linear_along_groups(x, w))
