"""Ops on symmetric weights in offset binary: ``value = (u - 8) * scale``."""

from __future__ import annotations

import torch

from int4q import errors
from int4q.kernels import reference
from int4q.ops.define import define


def _dequant_w4_to_bf16(w_packed, w_scale, group_size):
    _check_symmetric(w_packed, w_scale, group_size)
    return reference.dequantize_symmetric(w_packed, w_scale, group_size)


def _dequant_w4_to_bf16_fake(w_packed, w_scale, group_size):
    _check_symmetric(w_packed, w_scale, group_size)
    return w_packed.new_empty((w_packed.shape[0], 2 * w_packed.shape[1]), dtype=torch.bfloat16)


def _check_symmetric(w_packed, w_scale, group_size) -> None:
    if w_packed.dtype not in (torch.int8, torch.uint8) or w_packed.ndim != 2:
        got = f"{w_packed.dtype} {errors.dims(w_packed.shape)}"
        raise errors.type_("w_packed must be int8 [N, K/2]", got)
    if group_size <= 0 or 2 * w_packed.shape[1] % group_size:
        raise errors.value(
            "group_size must be positive and divide K",
            f"{group_size} for K {2 * w_packed.shape[1]}",
        )
    expected = (w_packed.shape[0], 2 * w_packed.shape[1] // group_size)
    if w_scale.shape != expected:
        raise errors.value(
            f"w_scale must have shape [N, n_groups] = {errors.dims(expected)}",
            errors.dims(w_scale.shape),
        )


define(
    "dequant_w4_to_bf16(Tensor w_packed, Tensor w_scale, int group_size)",
    _dequant_w4_to_bf16,
    _dequant_w4_to_bf16_fake,
)
