"""bitsandbytes' 4-bit checkpoints: NF4 and FP4, read as floats and quantised again.

``weight``            uint8 ``[N * K / 2, 1]``: two codes a byte, the first in the high bits
``weight.quant_map``  float32 ``[16]``: the value of each code, in -1..1
``weight.absmax``     float32 ``[n_blocks]``: scales of ``blocksize`` values each; the blocks run
                      through the whole matrix, row after row
``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``)
                      uint8: JSON with ``shape`` (N, K), ``dtype``, ``blocksize``, ``quant_type``

``value = quant_map[code] * absmax``. With double quantisation ``absmax`` is uint8 and stands for
``nested_quant_map[absmax] * nested_absmax + nested_offset``: float32 ``weight.nested_quant_map``
``[256]`` and ``weight.nested_absmax``, of ``nested_blocksize`` scales each; the JSON has the rest.

The values are no multiples of a scale: an :class:`~int4q.Int4Tensor` can only come near.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from int4q import errors
from int4q.checkpoint import foreign
from int4q.checkpoint.foreign import Foreign
from int4q.checkpoint.gptq import SCALES
from int4q.checkpoint.source import Source, Stored
from int4q.config import Int4WeightOnlyConfig, fitting_group_size, quantize_tensor
from int4q.tensor import Int4Tensor

_DTYPES = {str(d).removeprefix("torch."): d for d in SCALES}
_STATE = "quant_state.bitsandbytes__"
_NESTED = ("nested_quant_map", "nested_absmax")
_BLOCKS = tuple(1 << n for n in range(5, 13))  # 32 .. 4096


def to_float(
    state: Mapping[str, Any], packed: Tensor, quant_map: Tensor, absmax: Tensor, *nested: Tensor
) -> Tensor:
    """A weight ``[N, K]`` of the dtype that it was quantised from, as bitsandbytes gives it.

    Args:
        state: of the JSON, checked.
        packed: ``weight``.
        quant_map: the value of each code.
        absmax: a scale for each block.
        nested: with double quantisation ``nested_quant_map`` and ``nested_absmax``.
    """
    if nested:
        nested_map, nested_absmax = nested
        scales = _scaled(nested_map[absmax.int()], nested_absmax, state["nested_blocksize"])
        absmax = scales + state["nested_offset"]
    pairs = torch.cartesian_prod(quant_map, quant_map)  # of each byte, the high code's value first
    values = _scaled(pairs[packed.flatten().int()].flatten(), absmax, state["blocksize"])
    return values.view(state["shape"]).to(_DTYPES[state["dtype"]])


def _scaled(values: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """Each block of ``values`` (the last may be shorter) times its scale."""
    return values * scales.repeat_interleave(blocksize)[: values.numel()]


def weights(source: Source, group_size: int) -> Iterator[Foreign]:
    """The weights of a checkpoint, to be quantised again.

    Args:
        group_size: of the results; where it does not divide K, the largest smaller one that does.

    Raises:
        ValueError: not 4 bits, a part is missing or damaged, or a group size that does not exist.
    """
    if not source.config["quantization_config"].get("load_in_4bit"):
        raise errors.value("a bitsandbytes checkpoint must have 4 bits", "8 (load_in_8bit)")
    config = Int4WeightOnlyConfig(
        group_size=group_size, group_size_fallback=True, set_inductor_config=False
    )
    for key in source.tensors:
        name, found, kind = key.partition(f".{_STATE}")
        if not found:
            continue
        nested = f"{name}.{_NESTED[0]}" in source.tensors
        parts = ("quant_map", "absmax", *(_NESTED if nested else ()))
        stored = (name, *(f"{name}.{part}" for part in parts))
        state = _state(key, source.read(key), nested)
        _check(state, [source.stored(n) for n in stored], stored)
        size = fitting_group_size(config, state["shape"][1])
        like = foreign.like(tuple(state["shape"]), size, _DTYPES[state["dtype"]])
        fitting = replace(config, group_size=size)
        make = partial(_make, name=name, state=state, config=fitting, kind=kind)
        yield Foreign(name, (*stored, key), like, make)


def _state(key: str, t: Tensor, nested: bool) -> dict[str, Any]:
    """The JSON stored under ``key``, checked."""
    try:
        state: dict[str, Any] = json.loads(bytes(t.tolist()))
        N, K = state["shape"]
        good = type(N) is type(K) is int and N > 0 and K > 0 and N * K % 2 == 0
        good = good and state["dtype"] in _DTYPES and state["blocksize"] in _BLOCKS
        if nested:
            good = good and state["nested_blocksize"] in _BLOCKS
            good = good and math.isfinite(state["nested_offset"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        good = False
    if not good:
        raise errors.value(
            f"{key} must be JSON: the shape of a matrix, a dtype ({', '.join(_DTYPES)}), a "
            f"blocksize ({', '.join(map(str, _BLOCKS))}), and with double quantisation the same of "
            "nested_blocksize, and nested_offset",
            "something else",
        )
    return state


def _check(state: Mapping[str, Any], parts: Sequence[Stored], names: Sequence[str]) -> None:
    """Check what is stored before any of it is read."""
    N, K = state["shape"]
    n_blocks = math.ceil(N * K / state["blocksize"])
    nested = len(parts) > 3
    wanted = [
        (torch.uint8, (N * K // 2, 1)),
        (torch.float32, (16,)),
        (torch.uint8 if nested else torch.float32, (n_blocks,)),
    ]
    if nested:
        n_nested = math.ceil(n_blocks / state["nested_blocksize"])
        wanted += [(torch.float32, (256,)), (torch.float32, (n_nested,))]
    for name, stored, (dtype, shape) in zip(names, parts, wanted, strict=True):
        foreign.check(name, stored, (dtype,), shape)


def _make(
    *parts: Tensor, name: str, state: Mapping[str, Any], config: Int4WeightOnlyConfig, kind: str
) -> tuple[Int4Tensor, str]:
    *stored, _ = parts
    w = to_float(state, *stored)
    t = quantize_tensor(w, config, name).to_int4_tensor()
    off = float((t.dequantize(torch.float32) - w.float()).norm())
    share = off and off / float(w.float().norm())  # of zeros nothing is off
    return t, f"not exact: {kind} quantised again, {share:.0%} off"
