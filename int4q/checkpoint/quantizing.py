"""The plan of ``int4q quantize``: a float checkpoint in, a 4-bit one out, tensor by tensor."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig

from int4q import errors, report
from int4q._version import __version__
from int4q.checkpoint import schema
from int4q.checkpoint.plan import Job, Plan
from int4q.checkpoint.skeleton import Recipe, recipes, skeleton
from int4q.checkpoint.source import Source
from int4q.config import Int4WeightOnlyConfig, quantize_tensor
from int4q.coverage import NOT_LINEAR, expert_parameters
from int4q.moe import moe_config
from int4q.quantize import quantize_
from int4q.tensor import Int4Tensor

ALGORITHMS = ("tinygemm", "search", "hqq", "auto", "symmetric")
PRESETS = ("auto", "dense", "moe")


@dataclass(frozen=True)
class Options:
    """What ``int4q quantize`` can be told.

    Attributes:
        group_size: 32, 64, 128 or 256; where it does not divide K, the largest smaller one that
            does is taken.
        algorithm: one of ``ALGORITHMS``; ``"auto"`` without a calibration, which would need the
            whole model; ``"symmetric"`` without zero points, for :mod:`int4q.export`.
        preset: ``"dense"`` takes linear layers, ``"moe"`` those and experts as
            :func:`int4q.moe_config` names them, ``"auto"`` the one that fits the architecture.
        include: regular expressions: parameters to take as well (searched for in the name).
        exclude: parameters to leave.
        device: where to quantise.
    """

    group_size: int = 128
    algorithm: str = "tinygemm"
    preset: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise errors.value(
                f"algorithm must be one of {ALGORITHMS} where weights pass one by one",
                repr(self.algorithm),
                "One that runs the model: int4q.quantize_ with a calibration",
            )
        if self.preset not in PRESETS:
            raise errors.value(f"preset must be one of {PRESETS}", repr(self.preset))
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} must be a regular expression: {error}") from None

    @property
    def symmetric(self) -> bool:
        """Whether all zero points are 0."""
        return self.algorithm == "symmetric"

    @property
    def config(self) -> Int4WeightOnlyConfig:
        """For one weight."""
        return Int4WeightOnlyConfig(
            group_size=self.group_size,
            int4_choose_qparams_algorithm="tinygemm" if self.symmetric else self.algorithm,
            group_size_fallback=True,
            set_inductor_config=False,
        )


@dataclass(frozen=True)
class Left:
    """A matrix that stays as it is.

    Attributes:
        expected: whether nobody would quantise it: an embedding, the output head, a router, or
            what ``exclude`` names.
    """

    name: str
    reason: str
    nbytes: int
    expected: bool


@dataclass(frozen=True)
class Coverage:
    """What becomes of a checkpoint's matrices, and the bytes before and after."""

    quantized: dict[str, Int4Tensor]
    left: list[Left]
    bytes_before: int
    bytes_after: int

    @property
    def bits_per_weight(self) -> float:
        """Of the quantised weights, scales included."""
        weights = sum(t.numel() for t in self.quantized.values())
        return 8 * sum(t.nbytes for t in self.quantized.values()) / max(1, weights)


def plan_quantize(source: Source, options: Options) -> tuple[Plan, Coverage]:
    """How to quantise a checkpoint.

    Which weights, in which groups, is found by :func:`int4q.quantize_` itself on a model without
    data. What it leaves is copied under the name that it has.

    Raises:
        ValueError: the source is quantised already, is not a checkpoint of its architecture, or
            ``include`` names what cannot be quantised.
    """
    if "quantization_config" in source.config or schema.is_schema(source.metadata):
        raise errors.value(
            f"{source.folder} must hold a float checkpoint",
            "a quantised one",
            "int4q convert reads those",
        )
    model = skeleton(source)
    how = recipes(model, {name: stored.shape for name, stored in source.tensors.items()})
    config = _preset(model, options)
    chosen, left = _choose(model, config, options, how)
    plan = Plan(identity=[__version__, torch.__version__, repr(options), source.stamps()])
    for name, like in chosen.items():
        plan.add(name, like, _quantizing(name, like, how[name], source, options))
    used = {name for target in chosen for name in how[target].names}
    for name in source.tensors:
        if name not in used:
            copy(plan, source, name)
    told = quantization_config(config, _kept(model, left))
    plan.files = {
        "config.json": dump({**source.config, "quantization_config": told}),
        **{path.name: path for path in source.other_files()},
    }
    before = sum(stored.nbytes for stored in source.tensors.values())
    return plan, Coverage(chosen, left, before, plan.nbytes)


def copy(plan: Plan, source: Source, name: str) -> None:
    """Plan a tensor that stays as it is."""
    stored = source.tensors[name]
    like = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
    plan.add(
        name, like, [Job(name, stored.nbytes, partial(source.read, name), lambda t: {name: t})]
    )


def quantization_config(config: AOBaseConfig, kept: Sequence[str] = ()) -> dict[str, Any]:
    """What ``save_pretrained`` writes into config.json for a model quantised with ``config``.

    Args:
        kept: names of linear layers that were not, where those are not transformers' usual ones.
    """
    from transformers import TorchAoConfig

    return TorchAoConfig(config, modules_to_not_convert=list(kept) or None).to_dict()


def dump(config: Mapping[str, Any]) -> bytes:
    """JSON as transformers writes ``config.json``."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


# --- which ----------------------------------------------------------------------------------------


def _preset(model: nn.Module, options: Options) -> AOBaseConfig:
    moe = options.preset == "moe" or (
        options.preset == "auto" and any(map(expert_parameters, model.modules()))
    )
    return moe_config(options.config) if moe else options.config


def _choose(
    model: nn.Module, config: AOBaseConfig, options: Options, how: Mapping[str, Recipe]
) -> tuple[dict[str, Int4Tensor], list[Left]]:
    """Parameter -> what it becomes, without data; and every matrix that stays."""
    before = {name: p for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the coverage says it all
        quantize_(model, _min_max(config))
        if options.include:
            wanted = _matching(options.include, before)
            quantize_(model, _min_max(options.config), partial(_is_wanted, wanted=wanted))
    for pattern in (*options.include, *options.exclude):
        if not _matching([pattern], before):
            raise errors.value("--include and --exclude must find parameters", repr(pattern))
    seen = report.summary(model, show=False)
    excluded = _matching(options.exclude, before)
    chosen: dict[str, Int4Tensor] = {}
    t: Any
    left = []
    reasons = {w.name: w.reason or "" for w in seen.skipped if w.tied_to is None}
    for w in seen.quantized:
        t = model.get_parameter(w.name)
        if reason := _reason(w.name, excluded, how):
            reasons[w.name] = reason
        elif w.tied_to is None:
            chosen[w.name] = t
    for name, reason in reasons.items():
        nbytes = before[name].numel() * before[name].element_size()
        left.append(Left(name, reason, nbytes, _expected(model, name, reason)))
    if options.include and (missed := _matching(options.include, before) - chosen.keys()):
        name = min(missed)
        raise errors.value(
            f"what --include names must be quantisable, but {name} is not",
            reasons.get(name, "no matrix"),
        )
    return chosen, left


def _min_max(config: AOBaseConfig) -> AOBaseConfig:
    """``config`` with the algorithm that computes least: shapes are all that is wanted."""
    if isinstance(config, Int4WeightOnlyConfig):
        return replace(config, int4_choose_qparams_algorithm="tinygemm")
    return type(config)({name: c and _min_max(c) for name, c in config.fqn_to_config.items()})


def _matching(patterns: Sequence[str], names: Mapping[str, Any]) -> set[str]:
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def _is_wanted(module: nn.Module, name: str, *, wanted: set[str]) -> bool:
    return f"{name}.weight" in wanted and not isinstance(module.weight, Int4Tensor)


def _reason(name: str, excluded: set[str], how: Mapping[str, Recipe]) -> str | None:
    """Why a weight that could be quantised is not."""
    if name in excluded:
        return _EXCLUDED
    if name not in how:
        return "tied to another parameter"
    return how[name].reason


_EXCLUDED = "named by --exclude"
_HEADS = "the model's output head", "tied to"


def _kept(model: nn.Module, left: Sequence[Left]) -> list[str]:
    """Linear layers that transformers is to be told of: none unless some were excluded."""
    if not any(item.reason == _EXCLUDED for item in left):
        return []
    modules = [item.name.removesuffix(".weight") for item in left if item.name.endswith(".weight")]
    return [name for name in modules if isinstance(model.get_submodule(name), nn.Linear)]


def _expected(model: nn.Module, name: str, reason: str) -> bool:
    """Whether a model is usually served with this matrix as it is."""
    module = model.get_submodule(name.rpartition(".")[0])
    router = re.search(r"(^|\.)(gate|router|shared_expert_gate)\.weight$", name)
    return (
        reason.startswith((_EXCLUDED, *_HEADS))
        or router is not None
        or (reason == NOT_LINEAR and not isinstance(module, nn.Linear))
        or name.endswith("lm_head.weight")
    )


# --- one weight -----------------------------------------------------------------------------------


def _quantizing(
    name: str, like: Int4Tensor, recipe: Recipe, source: Source, options: Options
) -> list[Job]:
    return [
        Job(
            f"{name}[{i}]" if recipe.stacked else name,
            sum(source.tensors[n].nbytes for n in names),
            partial(_read, source, names),
            partial(_quantize, name=name, like=like, options=options),
            i if recipe.stacked else None,
        )
        for i, names in enumerate(recipe.matrices)
    ]


def _read(source: Source, names: Sequence[str]) -> Tensor:
    parts = [source.read(name) for name in names]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _quantize(w: Tensor, *, name: str, like: Int4Tensor, options: Options) -> dict[str, Tensor]:
    """The parts of a weight, under their stored names."""
    w = w.to(options.device).to(like.dtype)
    dim = like.grouped_dim - like.ndim  # -2 of what is stored as [in, out]
    if options.symmetric:
        block_size = [1] * (w.ndim - 1) + [like.group_size]
        rows = Int4Tensor.from_hp(w.transpose(dim, -1), block_size, algorithm="symmetric")
        made: Tensor = rows.transpose(dim, -1)
    else:
        made = quantize_tensor(w, replace(options.config, group_size=like.group_size), name, dim)
    return schema.flatten(name, made)[0]
