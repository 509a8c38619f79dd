"""``adopt``: a model that torchao quantised or loaded, with int4q's weights."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torchao.quantization import Int4Tensor as TorchAOInt4Tensor

from int4q import errors
from int4q.checkpoint import affine_quantized
from int4q.layouts import convert_weights
from int4q.tensor import Int4Tensor


def adopt(model: nn.Module) -> nn.Module:
    """Hold every 4-bit weight of torchao's as an :class:`~int4q.Int4Tensor` over the same parts.

    For models that were loaded before int4q was imported, or quantised by torchao; no part is
    copied, tied weights stay tied. A model of transformers is told what it holds: it can be saved,
    and trained with adapters, whatever made its 4-bit weights. torchao's older
    ``AffineQuantizedTensor`` of 4 bits, which it has up to 0.17, is unpacked, as exactly as
    :mod:`int4q.checkpoint.affine_quantized` says.

    Args:
        model: any module; its parameters and buffers are looked through, those of submodules too.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a weight's parts do not fit together, or are offloaded, or a group size that
            int4q does not have.
    """
    if not isinstance(model, nn.Module):
        raise errors.type_("model must be a torch.nn.Module", type(model).__name__)
    convert_weights(model, TorchAOInt4Tensor, _adopted)
    if (older := affine_quantized.tensor_class()) is not None:
        convert_weights(model, older, _unpacked)
    if "transformers.modeling_utils" in sys.modules:
        from int4q.integrations.transformers_quantizer import declare

        declare(model)
    return model


def _unpacked(t: Any) -> Tensor:
    return affine_quantized.to_int4(t) if affine_quantized.is_4bit(t) else t


def _adopted(t: TorchAOInt4Tensor) -> Int4Tensor:
    if t.is_meta:
        raise errors.value(
            "adopt takes weights that have values",
            "an offloaded one",
            "Import int4q before the model is loaded",
        )
    return Int4Tensor.from_torchao(t)
