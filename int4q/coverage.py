"""Which parameters of a model multiply activations, and why others stay as they are.

Everything here looks at one module, or at a model as it stands; nothing is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList
from torchao.utils import TorchAOBaseTensor

from int4q import errors
from int4q.ops import SCALE_DTYPES

Place = tuple[nn.Module, str]
"""Where a parameter is held: the module and the parameter's own name."""

_CONV1D = "transformers.pytorch_utils.Conv1D"
_TRANSPOSED = ("transformers.models.llama4.modeling_llama4.Llama4TextExperts",)
"""Classes that hold experts as ``[E, in, out]`` and declare it nowhere."""
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Weights that ``nn.MultiheadAttention`` holds itself; those of one instance are not ``None``."""

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_READ_AS_BYTES = "torch's recurrent kernels read the bytes themselves"

NOT_LINEAR = "not the weight of a linear layer"


def _base(cls: type, *names: str) -> type | None:
    """``cls`` or the class it derives from that has one of the qualified names: imports nothing."""
    return next((c for c in cls.__mro__ if f"{c.__module__}.{c.__qualname__}" in names), None)


def _is_a(module: nn.Module, *names: str) -> bool:
    """Whether the module's class is, or derives from, one of a qualified name."""
    return _base(type(module), *names) is not None


def conv1d(cls: type) -> type | None:
    """transformers' ``Conv1D`` if ``cls`` is it or derives from it, else ``None``."""
    return _base(cls, _CONV1D)


def linear_parameters(module: nn.Module) -> list[str]:
    """Names of the weights of a linear layer: what the default filter of ``quantize_`` takes.

    ``nn.Linear``, transformers' ``Conv1D``, and the input projections of
    ``nn.MultiheadAttention``, which it holds as parameters of its own.
    """
    if isinstance(module, nn.Linear) or _is_a(module, _CONV1D):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in _PROJECTIONS if getattr(module, name, None) is not None]
    return []


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of the stacks of matrices that a module holds itself, ``[E, .., ..]`` with E > 1.

    A ``weight`` is none of them: that is a module's one weight, such as a convolution's.
    """
    return [
        name
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and p.shape[0] > 1 and name != "weight" and p.is_floating_point()
    ]


def contracted_dim(module: nn.Module, w: torch.Tensor) -> int:
    """The dim of a module's parameter that its matmul sums over: -1 or -2.

    -2 for transformers' ``Conv1D`` (``[in, out]``) and for stacks of experts whose module says
    so: ``is_transposed`` of transformers' experts (GPT-OSS, Aria), or a known class (Llama 4).
    Shapes are never looked at.
    """
    if w.ndim != 3:
        return -2 if _is_a(module, _CONV1D) else -1
    transposed = getattr(module, "is_transposed", False) is True or _is_a(module, *_TRANSPOSED)
    return -2 if transposed else -1


def chosen_parameters(module: nn.Module) -> list[str]:
    """Names of the weights that a filter means when it takes a module."""
    if hasattr(module, "weight"):
        return ["weight"]
    if isinstance(module, _RECURRENT):  # (each is refused, with the reason)
        return [name for name, p in module.named_parameters(recurse=False) if p.ndim == 2]
    return linear_parameters(module) or expert_parameters(module)


def is_sliced(module: nn.Module, name: str) -> bool:
    """Whether a module uses parts of a weight: attention that is not all on one input does."""
    return isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight"


# --- why not --------------------------------------------------------------------------------------


def reason_to_skip(module: nn.Module, name: str, group_size: int, dim: int = -1) -> str | None:
    """Why a module's weight cannot be 4-bit in groups of ``group_size`` along ``dim``, or ``None``.

    The weight is an attribute of the module; as a computed one it need not be a parameter.
    """
    w = getattr(module, name)
    local = w.to_local() if isinstance(w, DTensor) else w
    if isinstance(local, TorchAOBaseTensor):
        return f"quantised already ({type(local).__name__})"
    if local is not w:
        return "sharded (a DTensor); quantise the model before it is sharded"
    if reason := reason_computed(module, name) or _reason_of_kind(module):
        return reason
    if w.dtype not in SCALE_DTYPES:
        return f"dtype {w.dtype} is not {errors.dtypes(SCALE_DTYPES)}"
    if w.ndim not in (2, 3):
        return f"{w.ndim} dims are not 2 or 3"
    if w.shape[dim] % group_size:
        return f"K = {w.shape[dim]} is not a multiple of group_size {group_size}"
    return None


def reason_computed(module: nn.Module, name: str) -> str | None:
    """Why a weight that is no parameter of its own cannot be quantised, or ``None``."""
    if name in module._parameters or is_put_there(module, name):
        return None
    return (
        "computed from other parameters (a parametrization, weight_norm, spectral_norm, pruning); "
        "make it permanent first"
    )


def is_put_there(module: nn.Module, name: str) -> bool:
    """Whether a plain tensor stands where the parameter was, as peft leaves a merged weight; what
    hooks compute before each call (weight_norm, pruning) stands there too, beside its sources."""
    sources = any(source.startswith(f"{name}_") for source in module._parameters)
    return name in module.__dict__ and not sources


def is_source(module: nn.Module, name: str) -> bool:
    """Whether another weight is computed from a parameter: ``weight_orig``, ``weight_v``, ..."""
    computed = [n for n in linear_parameters(module) if reason_computed(module, n)]
    return isinstance(module, ParametrizationList) or name.startswith(
        tuple(f"{n}_" for n in computed)
    )


def _reason_of_kind(module: nn.Module) -> str | None:
    """Why no weight of a module of this kind can be a tensor subclass."""
    if isinstance(module, _RECURRENT):
        return _READ_AS_BYTES
    if isinstance(module, nn.modules.conv._ConvNd):
        return "the weight of a convolution"
    return None


def reason_left(module: nn.Module, name: str) -> str:
    """Why the default filter does not take a parameter, where nothing more is known about it."""
    if name in linear_parameters(module):
        return "not selected"
    if is_source(module, name):
        return "a weight is computed from it"
    if isinstance(module, _RECURRENT):
        return _READ_AS_BYTES
    if name in expert_parameters(module):
        return "a stack of experts; int4q.moe_config() quantises those"
    return NOT_LINEAR


# --- a whole model --------------------------------------------------------------------------------


def is_matrix(module: nn.Module, name: str, p: torch.Tensor) -> bool:
    """Whether a parameter is worth a word: two dims or more that are not 1, and no bias."""
    if not p.is_floating_point() or p.ndim < 2:
        return False
    several = sum(size != 1 for size in p.shape) > 1 and not name.endswith("bias")
    return several or name in linear_parameters(module)


def matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every place of a matrix or a stack of them, tied ones at each place."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and is_matrix(module, name, p):
                yield module, name, p


def places(model: nn.Module) -> dict[int, list[Place]]:
    """``id(parameter)`` -> the places that share it."""
    found: dict[int, list[Place]] = {}
    for module, name, p in matrices(model):
        found.setdefault(id(p), []).append((module, name))
    return found


def protected(model: nn.Module, names: dict[nn.Module, str]) -> dict[int, str]:
    """``id(parameter)`` -> why ``quantize_`` never takes it: in training, or an adapter's.

    Quantising freezes a weight. So where the linear layers of a model are partly frozen, those that
    are not are what is being trained; where none is frozen, the model is just new.

    Args:
        names: of the modules of ``model``.
    """
    linear = [p for m, n, p in matrices(model) if n in linear_parameters(m)]
    linear = [p for p in linear if not isinstance(p, TorchAOBaseTensor)]
    reasons = {}
    if not all(p.requires_grad for p in linear):
        reason = "in training, unlike the frozen weights of the model; freeze it to quantise it"
        reasons = {id(p): reason for _, _, p in matrices(model) if p.requires_grad}
    for p in _adapters(model, names):
        reasons[id(p)] = "an adapter's; merge the adapter first to quantise it"
    return reasons


_ADAPTER = re.compile(r"(^|\.)lora(_|[A-Z]|\.|$)")
"""A part of a name that says LoRA: ``lora_A``, ``lora_embedding_B``, ``lora_down``, ``lora``."""


def _adapters(model: nn.Module, names: dict[nn.Module, str]) -> Iterator[nn.Parameter]:
    """Parameters of adapters: what peft's layer classes list as theirs, and LoRA's by name."""
    for module in model.modules():
        for attribute in getattr(type(module), "adapter_layer_names", ()):
            held = getattr(module, attribute, None)
            if isinstance(held, nn.Module):
                yield from held.parameters()
            elif isinstance(held, nn.Parameter):
                yield held
    for module, name, p in matrices(model):
        if _ADAPTER.search(f"{names[module]}.{name}"):
            yield p
