"""``to_coalesced_`` and ``to_plain_``: the layout of every 4-bit weight of a model, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from int4q import errors, prepare
from int4q.tensor import CudaCoalescedInt4Tensor, Int4Tensor
from int4q.tensor.base import Int4TensorBase

T = TypeVar("T", bound=Tensor)


def to_coalesced_(model: nn.Module, activation_dtype: torch.dtype | None = None) -> nn.Module:
    """Hold every 4-bit weight of ``model`` as a :class:`~int4q.CudaCoalescedInt4Tensor`.

    ``qdata`` is shared with the weight before, scales and zero points are turned once; one weight
    is converted at a time. Weights of every other layout go through plain, CPU-packed ones too.
    Parameters that modules share stay shared; ``act_pre_scale`` is kept.
    A weight that is coalesced already is left alone unless its ``activation_dtype`` changes.

    Args:
        model: any module; its parameters and buffers are looked through, those of submodules too.
        activation_dtype: ``torch.int8`` (W4A8 for up to 8 rows) or ``torch.bfloat16`` (W4A16).
            ``None`` keeps what each weight has, so that a model converted from plain computes
            what it did before: W4A16.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no such ``activation_dtype``; a 4-bit weight is sharded already.
    """
    allowed = CudaCoalescedInt4Tensor.activation_dtypes
    if activation_dtype is not None and activation_dtype not in allowed:
        raise errors.value(
            f"activation_dtype must be {errors.dtypes(allowed)} or None", activation_dtype
        )

    def convert(t: Int4TensorBase) -> Int4TensorBase:
        dtype = activation_dtype or t.activation_dtype
        if isinstance(t, CudaCoalescedInt4Tensor):
            return t if t.activation_dtype == dtype else t.with_activation_dtype(dtype)
        return CudaCoalescedInt4Tensor.from_int4_tensor(t.to_int4_tensor(), dtype)

    return _convert(model, convert)


def to_plain_(model: nn.Module) -> nn.Module:
    """Hold every 4-bit weight of ``model`` as an :class:`~int4q.Int4Tensor`; the way back.

    As :func:`to_coalesced_`; plain weights run W4A16, so ``activation_dtype=torch.int8`` is lost.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a 4-bit weight is sharded already.
    """
    return _convert(model, lambda t: t if isinstance(t, Int4Tensor) else t.to_int4_tensor())


def _convert(model: nn.Module, convert: Callable[[Int4TensorBase], Int4TensorBase]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise errors.type_("model must be a torch.nn.Module", type(model).__name__)
    for name, p in model.named_parameters():
        if isinstance(p, DTensor) and isinstance(p.to_local(), Int4TensorBase):
            raise errors.value(
                "weights must be whole to be laid out anew", f"{name}, sharded", "Convert first"
            )
    with prepare.as_given(model):
        convert_weights(model, Int4TensorBase, convert)
    return model


def convert_weights(model: nn.Module, kind: type[T], convert: Callable[[T], Tensor]) -> None:
    """Put ``convert(weight)`` wherever a module holds a weight of a class; shared ones once."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for registry, name, t in _weights(model, kind):
        places.setdefault(id(t), []).append((registry, name))
    for shared in places.values():
        registry, name = shared[0]
        old = registry[name]
        with torch.no_grad():
            new: Tensor = convert(old)
        if new is old:
            continue
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        for registry, name in shared:
            registry[name] = new


def _weights(model: nn.Module, kind: type[T]) -> Iterator[tuple[dict[str, Any], str, T]]:
    """Every place that holds such a weight: the module's own dictionary, the name, the weight."""
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for name, t in registry.items():
                if isinstance(t, kind):
                    yield registry, name, t
