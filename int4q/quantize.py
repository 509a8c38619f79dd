"""``quantize_``: a whole model, with a default filter that keeps what should be kept."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torchao.quantization as torchao_quantization
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER
from torchao.utils import TorchAOBaseTensor

from int4q import errors
from int4q.calibration import Calibration, calibrate
from int4q.calibration.apply import ALGORITHMS
from int4q.calibration.data import takes_random_ids
from int4q.config import Int4WeightOnlyConfig
from int4q.coverage import (
    Place,
    contracted_dim,
    expert_parameters,
    is_source,
    linear_parameters,
    matrices,
    places,
    reason_computed,
    reason_left,
)
from int4q.run import Run, full_name, reasons, run_on, skip

AFTERWARDS: list[Callable[[nn.Module], object]] = []
"""Called with each model that :func:`quantize_` has been through; integrations add to it."""


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    device: torch.types.Device = None,
    *,
    calibration: Calibration | None = None,
) -> None:
    """torchao's ``quantize_``, in place, with a default filter that keeps what should be kept.

    Args:
        model: any module; weights of its linear layers are replaced.
        config: :class:`Int4WeightOnlyConfig`, any other torchao config, or
            ``torchao.quantization.FqnToConfig`` (by module or parameter name; 3-D expert
            parameters go this way).
        filter_fn: ``(module, name) -> bool``. By default every linear layer (``nn.Linear``,
            ``nn.MultiheadAttention``, transformers' ``Conv1D``) except the output head of a
            transformers model and weights tied to an embedding. A module without a ``weight`` that
            it accepts has its stacks of experts quantised. Not to be given together with
            ``FqnToConfig``.
        device: move each module here before quantising it.
        calibration: what :func:`int4q.calibrate` gathered of this model, for the algorithms
            ``"search"``, ``"gptq"`` and ``"auto"``. A weight that it has nothing on is quantised
            without, which a warning says.

    Tied weights stay tied: one 4-bit parameter that all of them share. Whatever chose them, weights
    being trained among frozen ones and those of adapters (LoRA and what else peft has) stay as they
    are, as do weights that are computed from others (parametrizations, ``weight_norm``, pruning).

    What is left alone is named in an :class:`Int4SkipWarning`, one a reason. By default that is
    every other matrix (embeddings, convolutions, experts, ...); with a filter or names, what the
    choice includes; with a ``FqnToConfig`` that has entries of ``None``, as
    :func:`int4q.moe_config` has, linear layers and experts that it does not name as well.

    Raises:
        TypeError: ``calibration`` is none.
        ValueError: a weight holds NaN or Inf (the message names it), ``"gptq"`` without Hessians,
            or a calibration that no config uses or that is of another model.
    """
    configs = _configs(config)
    if calibration is not None:
        _check_calibration(calibration, model, configs)
    elif any(_is_auto(c) for c in configs) and takes_random_ids(model):
        calibration = calibrate(model)
    with run_on(model, calibration) as run:
        if filter_fn is None and not isinstance(config, FqnToConfig):
            _quantize_linear_layers(model, config, device, run)
        else:
            shared = [held for held in places(model).values() if len(held) > 1]
            torchao_quantization.quantize_(model, config, filter_fn, device)
            _report_untied(shared, run)
            if isinstance(config, FqnToConfig):
                _report_unnamed(model, config)
        run.warn()
    for call in AFTERWARDS:
        call(model)


def _configs(config: AOBaseConfig) -> list[AOBaseConfig | None]:
    return list(config.fqn_to_config.values()) if isinstance(config, FqnToConfig) else [config]


def _is_auto(config: AOBaseConfig | None) -> bool:
    return (
        isinstance(config, Int4WeightOnlyConfig) and config.int4_choose_qparams_algorithm == "auto"
    )


def _check_calibration(
    calibration: Calibration, model: nn.Module, configs: list[AOBaseConfig | None]
) -> None:
    if not isinstance(calibration, Calibration):
        raise errors.type_(
            "calibration must be what int4q.calibrate returns", type(calibration).__name__
        )
    used = [c.int4_choose_qparams_algorithm for c in configs if isinstance(c, Int4WeightOnlyConfig)]
    if not set(used) & set(ALGORITHMS):
        rule = f"a calibration is for int4_choose_qparams_algorithm {list(ALGORITHMS)}"
        raise errors.value(rule, [str(getattr(a, "value", a)) for a in used] or "another config")
    if not calibration.keys() & {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }:
        raise errors.value(
            "the calibration must be of this model",
            f"names such as {next(iter(calibration), None)!r}",
        )


# --- the default filter ---------------------------------------------------------------------------


def _quantize_linear_layers(
    model: nn.Module, config: AOBaseConfig, device: torch.types.Device, run: Run
) -> None:
    selected = _select(model, run)
    if not isinstance(config, Int4WeightOnlyConfig):  # it knows nn.Linear and no other
        linear = {module for module, _ in selected if isinstance(module, nn.Linear)}
        for module, name in selected:
            if module not in linear:
                skip(module, name, f"{type(config).__name__} takes nn.Linear only")
        torchao_quantization.quantize_(model, config, lambda module, _: module in linear, device)
        return
    handler = _QUANTIZE_CONFIG_HANDLER[type(config)]
    for module, name in selected:
        if device is not None:
            module.to(device)
        handler(module, config, parameter_name=name)
    if device is not None:
        model.to(device)


def _select(model: nn.Module, run: Run) -> list[Place]:
    """Places of the weights of linear layers to quantise; every other matrix is reported."""
    kept = _kept(model)
    selected = []
    for module in model.modules():
        for name in linear_parameters(module):
            w = getattr(module, name)
            if reason := run.protected.get(id(w)) or reason_computed(module, name):
                skip(module, name, reason)
            elif reason := kept.get((module, name)):
                skip(module, name, f"{reason}; pass filter_fn to quantise it")
            else:
                selected.append((module, name))
    for module, name, p in matrices(model):
        if not (
            name in linear_parameters(module)
            or isinstance(p, TorchAOBaseTensor)
            or is_source(module, name)  # (of a computed weight, which is named above)
        ):
            skip(module, name, run.protected.get(id(p)) or reason_left(module, name))
    return selected


def _kept(model: nn.Module) -> dict[Place, str]:
    """Places of linear weights that the default filter leaves alone, with the reason.

    Those are the output head of a transformers model (``get_output_embeddings()``) and what shares
    its weight with anything else than a linear layer that contracts the same dim: quantising one
    end would untie it.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept = {(head, "weight"): "the model's output head"} if isinstance(head, nn.Module) else {}
    for shared in places(model).values():
        if len(shared) == 1:
            continue
        for place in shared:
            if other := next((o for o in shared if not _alike(place, o)), None):
                kind = "the embedding " if isinstance(other[0], nn.Embedding) else ""
                kept[place] = f"tied to {kind}{_owner(*other)!r}"
            elif (head, "weight") in shared:
                kept[place] = "tied to the model's output head"
    return kept


def _alike(a: Place, b: Place) -> bool:
    """Whether both places are weights of linear layers that contract the same dim."""
    dims = [contracted_dim(m, getattr(m, n)) for m, n in (a, b) if n in linear_parameters(m)]
    return len(dims) == 2 and dims[0] == dims[1]


def _owner(module: nn.Module, name: str) -> str:
    return full_name(module, name).removesuffix(".weight")


# --- what a choice leaves out ---------------------------------------------------------------------


def _report_untied(shared: list[list[Place]], run: Run) -> None:
    """Name the weights whose tied partner alone was chosen."""
    for held in shared:
        for module, name in held:
            w = module._parameters.get(name)
            if w is not None and (new := run.made.get(w)) is not None:
                other = next(full_name(m, n) for m, n in held if m._parameters.get(n) is new)
                reason = f"tied to {other}, which was chosen alone: they are two weights now"
                skip(module, name, reason)


def _report_unnamed(model: nn.Module, config: FqnToConfig) -> None:
    """Name what the patterns of ``config`` could not say: computed weights, which are no parameters
    to torchao, and, where ``None`` says what is to stay, weights that no pattern fits."""
    complete = None in config.fqn_to_config.values()
    for module in model.modules():
        for name in (*linear_parameters(module), *expert_parameters(module)):
            if isinstance(getattr(module, name), TorchAOBaseTensor) or name in reasons(module):
                continue
            if _is_named(config, module, name):
                if reason := reason_computed(module, name):
                    skip(module, name, reason)
            elif complete:
                skip(module, name, "the config does not name it")


def _is_named(config: FqnToConfig, module: nn.Module, name: str) -> bool:
    """Whether a key of ``config`` is, or as a pattern fits, a parameter or its module."""
    parameter = full_name(module, name)
    both = parameter, parameter.rpartition(".")[0]
    patterns = [key[3:] for key in config.fqn_to_config if key.startswith("re:")]
    return (
        any(key in config.fqn_to_config for key in both)
        or any(re.fullmatch(pattern, key) for pattern in patterns for key in both)
        or ("_default" in config.fqn_to_config and isinstance(module, nn.Linear))
    )
