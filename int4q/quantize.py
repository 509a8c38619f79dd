"""``quantize_``: a whole model, with a default filter that keeps what should be kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torchao.quantization as torchao_quantization
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.utils import TorchAOBaseTensor

from int4q.config import SKIPPED, Int4SkipWarning, expert_parameters, full_name, named, skip


def kept_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Linear modules that the default filter leaves alone, with the reason.

    Those are the output head of a transformers model (``get_output_embeddings()``) and, in any
    model, a Linear that shares its weight with an Embedding: quantising one end would untie it.
    """
    embeddings = {
        id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept = {}
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        if (tied := embeddings.get(id(module.weight))) is not None:
            kept[module] = f"its weight is tied to the embedding {tied!r}"
        elif module is head:
            kept[module] = "it is the model's output head"
    return kept


def _report_experts(model: nn.Module) -> None:
    """One warning for all experts that the default filter does not reach; each has its reason."""
    left = []
    for module in model.modules():
        for name in expert_parameters(module):
            if not isinstance(getattr(module, name), TorchAOBaseTensor):
                reason = "it is a stack of experts; int4q.moe_config() quantises those"
                module.__dict__.setdefault(SKIPPED, {})[name] = reason
                left.append(full_name(module, name))
    if left:
        others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        message = f"{left[0]}{others} is left as it is: a stack of experts needs int4q.moe_config()"
        warnings.warn(message, Int4SkipWarning, stacklevel=3)


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.types.Device = None,
) -> None:
    """torchao's ``quantize_``, in place, with a default filter that keeps what should be kept.

    Args:
        model: any module; its ``nn.Linear`` weights are replaced.
        config: :class:`Int4WeightOnlyConfig`, any other torchao config, or
            ``torchao.quantization.FqnToConfig`` (by module or parameter name; 3-D expert
            parameters go this way).
        filter_fn: ``(module, name) -> bool``. By default every ``nn.Linear`` except the output
            head of a transformers model and weights tied to an embedding; each one left out is
            named in an :class:`Int4SkipWarning`, as are experts held as 3-D parameters. A module
            without a ``weight`` that it accepts has its stacks of experts quantised. Not to be
            given together with ``FqnToConfig``.
        device: move each module here before quantising it.

    Raises:
        ValueError: a weight holds NaN or Inf (the message names it).
    """
    with named(model):
        if filter_fn is None and not isinstance(config, FqnToConfig):
            kept = kept_modules(model)
            for module, reason in kept.items():
                skip(module, "weight", f"{reason}; pass filter_fn to quantise it")
            _report_experts(model)

            def filter_fn(module: nn.Module, name: str) -> bool:
                return isinstance(module, nn.Linear) and module not in kept

        torchao_quantization.quantize_(model, config, filter_fn, device)
