"""Every 4-bit weight beside the original: the signal-to-noise ratio of it and of its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int4q.tensor.base import Int4TensorBase


@dataclass(frozen=True)
class Layer:
    """One 4-bit weight.

    Attributes:
        name: of the parameter.
        weight_sqnr: ``|w|^2 / |w - v|^2`` in dB, v the quantised weight.
        output_sqnr: the same of the layer's outputs, for the inputs that it has in the original;
            ``None`` for what is no ``nn.Linear`` or was not called.
    """

    name: str
    weight_sqnr: float
    output_sqnr: float | None = None


def compare_layers(
    model: nn.Module, reference: nn.Module, run: Callable[[nn.Module], Any]
) -> list[Layer]:
    """The :class:`Layer` of every 4-bit weight of ``model`` that ``reference`` has in full.

    Args:
        model: quantised.
        reference: the original; its parameters have the same names.
        run: called with ``reference`` once, to give its layers inputs.
    """
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, Int4TensorBase)}
    found: dict[str, float] = {}
    handles = []
    for name in weights:
        owner = reference.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Linear):
            hook = _output_hook(weights[name], name, found)
            handles.append(owner.register_forward_hook(hook))
    try:
        with torch.no_grad():
            run(reference)
    finally:
        for handle in handles:
            handle.remove()
    originals = dict(reference.named_parameters(remove_duplicate=False))
    layers = []
    for name, weight in weights.items():
        w = originals[name].detach()
        noise = weight.dequantize().to(w.device) - w
        layers.append(Layer(name, _decibels(w, noise), found.get(name)))
    return layers


def _output_hook(weight: Int4TensorBase, name: str, found: dict[str, float]) -> Any:
    def compare(module: nn.Linear, arguments: tuple[Any, ...], y: Tensor) -> None:
        v = weight.dequantize().to(y.device, y.dtype)
        found[name] = _decibels(y, F.linear(arguments[0], v, module.bias) - y)

    return compare


def _decibels(signal: Tensor, noise: Tensor) -> float:
    power, error = (t.float().square().sum(dtype=torch.float64).item() for t in (signal, noise))
    return 10 * math.log10(power / error) if power and error else math.inf if power else math.nan
