"""Linear layers that read the same activation, run as one product of their weights together.

Which layers do is read from the source of the module that calls them (:mod:`~.source`). The shares
of a product last for that module's ``forward`` and go only to calls with the very tensor that was
multiplied, so a layer that is called by other code, or with something else, multiplies by itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from int4q.prepare.parts import Parts, parts_of
from int4q.prepare.source import calls_of_one_input
from int4q.tensor.base import Int4TensorBase
from int4q.tensor.cpu_packed_int4_tensor import CpuPackedInt4Tensor
from int4q.tensor.matmul_ops import linear_along_groups

LINK = "_int4q_fused"
"""Module attribute: of a layer, its group and its place there; of their module, all its groups."""

Link = tuple["Fused", int]


class Fused:
    """Layers whose weights lie one below the other in one tensor, of which each holds its rows.

    Args:
        layers: prepared linear layers; :func:`reason_apart` has nothing against them.
    """

    layers: tuple[Any, ...] = ()
    weight: Any = None
    """``[N of all layers, K]``; ``None`` while the layers' weights do not fit together."""
    parts: Parts
    is_open = False
    """Whether the module that calls the layers is at it."""

    def __init__(self, layers: tuple[Any, ...]):
        self.layers = layers
        self._joined: list[Tensor] = []
        self._shares: tuple[Tensor, list[Tensor | None]] | None = None
        self.join()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def join(self) -> None:
        """Have the layers' weights in one tensor: after loading, moving and casting, again."""
        weights = [layer.weight for layer in self.layers]
        if self._joined and all(map(_is, _tensors(weights), self._joined)):
            return
        self.weight, self._joined = None, []
        if reason_apart(self.layers):
            return
        self.rows = [w.shape[0] for w in weights]
        weight: Any = torch.cat(weights)
        for layer, w, rows in zip(self.layers, weights, weight.split(self.rows), strict=True):
            for name, part in rows.data_tensors().items():
                setattr(w, name, part)
            layer.weight_parts.take(w)
        self.weight, self.parts, self._joined = weight, parts_of(weight), _tensors(weights)
        for i, layer in enumerate(self.layers):
            layer.__dict__[LINK] = self, i

    def part(self) -> None:
        """Leave the layers to themselves: one of them has another kind of weight now."""
        self.weight, self._joined = None, []
        for layer in self.layers:
            layer.__dict__.pop(LINK, None)

    def product(self, i: int, x: Tensor) -> Tensor:
        """``x [.., K]`` times the weight of layer ``i`` plus its bias: ``[.., N]``, a view.

        The first layer of the group to be called computes it for all.
        """
        shares = self._shares
        if shares is None or shares[0] is not x or shares[1][i] is None:
            w: Any = self.parts if torch.compiler.is_compiling() else self.weight
            y = linear_along_groups(x, w, self._bias())
            # Nobody has y: what is done in place to one share is nothing to the others.
            shares = x, list(torch.unsafe_split_with_sizes(y, self.rows, -1))
        share: Any = shares[1][i]
        shares[1][i] = None
        self._shares = None if all(s is None for s in shares[1]) else shares
        return share

    def _bias(self) -> Tensor | None:
        biases = [layer.bias for layer in self.layers]
        given = next((b for b in biases if b is not None), None)
        if given is None:
            return None
        pairs = zip(self.rows, biases, strict=True)
        return torch.cat([given.new_zeros(N) if b is None else b for N, b in pairs])


def _tensors(weights: list[Any]) -> list[Tensor]:
    held = (w.data_tensors().values() if isinstance(w, Int4TensorBase) else [w] for w in weights)
    return [t for tensors in held for t in tensors]


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b


def reason_apart(layers: tuple[Any, ...]) -> str | None:
    """Why the weights of prepared layers cannot lie in one tensor, or ``None``."""
    weights = [layer.weight for layer in layers]
    if not all(isinstance(w, Int4TensorBase) and w._is_held for w in weights):
        return "not all of them are prepared"
    first = weights[0]
    if any(isinstance(w, CpuPackedInt4Tensor) for w in weights):
        return "CPU-packed weights keep their shape"
    if len({id(w) for w in weights}) < len(weights):
        return "they share one weight"
    for what in ("device", "dtype", "block_size", "activation_dtype"):
        if any(getattr(w, what) != getattr(first, what) for w in weights):
            return f"they differ in {what}"
    if any(type(w) is not type(first) for w in weights):
        return "they differ in layout"
    if not all(_equal(w.act_pre_scale, first.act_pre_scale) for w in weights):
        return "they differ in act_pre_scale"
    biases = [layer.bias for layer in layers]
    if any(b is not None and b.shape != w.shape[:1] for b, w in zip(biases, weights, strict=True)):
        return "a bias is not one number an out feature"
    return None


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and not a.is_meta and torch.equal(a, b))


# --- the module that calls the layers -------------------------------------------------------------


class Fusing(nn.Module):
    """Mixed into the class of a module some of whose layers are fused."""

    _given: Any
    """The class before."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles are fused as they are built, after the layers."""
        state = dict(self.__dict__)
        return _empty, (self._given,), {**state, LINK: state.pop(LINK)}


@functools.cache
def _fusing_class(cls: Any) -> type[Fusing]:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        groups = self._int4q_fused
        for group in groups:
            group.is_open = True
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            for group in groups:
                group.is_open, group._shares = False, None

    return type(f"Fusing{cls.__name__}", (Fusing, cls), {"_given": cls, "forward": forward})


def _empty(cls: Any) -> nn.Module:
    fusing = _fusing_class(cls)
    return fusing.__new__(fusing)


def fuse(module: Any) -> dict[tuple[str, ...], str]:
    """Fuse the prepared layers of ``module`` that it calls with one activation.

    Returns:
        Names of layers that read the same activation and stay apart, with the reason.
    """
    apart, groups = {}, []
    cls: Any = type(module)
    for names in calls_of_one_input(cls) if "forward" not in module.__dict__ else ():
        for run in _runs(module, names):
            layers = tuple(run.values())
            reason = "a layer is called elsewhere too" if _linked(layers) else reason_apart(layers)
            if reason is None:
                groups.append(Fused(layers))
            else:
                apart[tuple(run)] = reason
    if groups:
        module.__class__ = _fusing_class(cls)
        module.__dict__[LINK] = groups
    return apart


def unfuse(module: Any) -> None:
    """Undo :func:`fuse`; the layers' weights stay where they lie."""
    for group in module.__dict__.pop(LINK):
        group.part()
    module.__class__ = module._given


def _linked(layers: tuple[Any, ...]) -> bool:
    return any(LINK in layer.__dict__ for layer in layers)


def _runs(module: nn.Module, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Those of the children that are prepared linear layers, by two or more.

    A child that is not a linear layer at all may change its input in place: it ends a run.
    """
    runs: list[dict[str, Any]] = [{}]
    for name in names:
        child = getattr(module, name, None)
        child = getattr(child, "base_layer", child)  # below peft's adapters
        if not isinstance(child, nn.Linear):
            runs.append({})
        elif getattr(child, "reads_parts", False):
            runs[-1][name] = child
    return [run for run in runs if len(run) > 1]
