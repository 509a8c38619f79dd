"""``Int4WeightOnlyConfig`` and what torchao's ``quantize_`` does with it to one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm, Int4PackingFormat
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.quantization.utils import recommended_inductor_config_setter

from int4q import errors, geometry
from int4q.calibration import Calibration, apply
from int4q.coverage import (
    chosen_parameters,
    contracted_dim,
    is_put_there,
    is_sliced,
    reason_to_skip,
)
from int4q.kernels import cpu
from int4q.run import current_run, forget, full_name, say, skip
from int4q.tensor import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor
from int4q.tensor.base import Int4TensorBase

FORMATS: dict[str, type[Int4TensorBase] | None] = {
    "plain": Int4Tensor,
    "cuda_coalesced": CudaCoalescedInt4Tensor,
    "cpu_packed": CpuPackedInt4Tensor,
    "auto": None,
}
"""``int4_packing_format`` -> class; ``"auto"`` is settled by the weight's device."""
_TORCHAOS: dict[str, str] = {a.value: a for a in Int4ChooseQParamsAlgorithm}
_SMALLER = (128, 64, 32)


@dataclass
class Int4WeightOnlyConfig(AOBaseConfig):
    """Groupwise 4-bit weights, activations in their own dtype.

    Args:
        group_size: weights along the last dim that share a scale: 32, 64, 128 or 256.
        set_inductor_config: set torchao's recommended ``torch._inductor`` options when a weight is
            quantised, as torchao's own config does. They hold for the process and for every
            ``torch.compile`` after; nothing that is not compiled changes, the precision of float32
            matmuls (which older torchao sets as well) least of all. ``False`` leaves them alone.
        int4_packing_format: ``"plain"``, ``"cuda_coalesced"``, ``"cpu_packed"``, or ``"auto"``:
            the fastest of them for the device that the weight is on (``"cuda_coalesced"`` with
            ``activation_dtype=torch.int8``, which no other format has).
        int4_choose_qparams_algorithm: ``"tinygemm"`` (min-max, the default), ``"hqq"``,
            ``"search"`` (a least-squares search, by importance where :func:`int4q.quantize_` has a
            calibration), ``"gptq"`` (needs a calibration with Hessians), or ``"auto"``: the search
            with the calibration that :func:`int4q.quantize_` has or, for a model of transformers
            that takes token ids, makes from random ids; without one the search in groups of 32
            and a refit of min-max in larger ones. It implies ``group_size_fallback``.
        version: 2; there is no other.
        activation_dtype: ``torch.bfloat16`` (W4A16) or, for ``"cuda_coalesced"`` and ``"auto"``,
            ``torch.int8`` (W4A8 for up to 8 rows), or, for ``"plain"``, ``torch.float8_e4m3fn``
            (rows of activations quantised at run time, weights symmetric). ``None`` is the
            format's default: ``torch.int8`` for ``"cuda_coalesced"``, ``torch.bfloat16`` for every
            other.
        contracted_dim: the weight's dim that its matmul sums over, along which groups run: -1
            (``[.., N, K]``), -2 (``[.., K, N]``, as GPT-OSS holds its experts: the result keeps
            that shape), or ``None``: what the module declares, see :func:`contracted_dim`.
        group_size_fallback: where ``group_size`` does not divide K, take the largest of 128, 64 and
            32 that does and is smaller, and say so, instead of leaving the weight alone.

    Raises:
        ValueError: at construction, for a value none of these.

    A config written to JSON (:func:`torchao.core.config.config_to_dict`) holds torchao's fields
    only, with the format ``plain`` and torchao's default in place of an algorithm of int4q's own,
    so that a process without int4q reads it: checkpoints are always written in plain, and the
    algorithm does not show in them.
    """

    group_size: int = 128
    set_inductor_config: bool = True
    int4_packing_format: str = "plain"
    int4_choose_qparams_algorithm: str = Int4ChooseQParamsAlgorithm.TINYGEMM
    version: int = 2
    activation_dtype: torch.dtype | None = None
    contracted_dim: int | None = None
    group_size_fallback: bool = False

    def __post_init__(self) -> None:
        geometry.check_group_size(self.group_size)
        if self.version != 2:
            raise errors.value("version must be 2", self.version)
        layout = FORMATS[self.int4_packing_format]
        allowed = (layout or CudaCoalescedInt4Tensor).activation_dtypes
        if self.activation_dtype not in (None, *allowed):
            raise errors.value(
                f"activation_dtype of {self.int4_packing_format!r} must be "
                f"{errors.dtypes(allowed)}",
                self.activation_dtype,
            )
        if self._fp8 and self._algorithm != "tinygemm":
            raise errors.value(
                "float8 activations take symmetric weights, which the default algorithm makes",
                repr(self._algorithm),
            )
        if self.contracted_dim not in (None, -1, -2):
            raise errors.value("contracted_dim must be -1, -2 or None", self.contracted_dim)

    @property
    def _fp8(self) -> bool:
        return self.activation_dtype == torch.float8_e4m3fn

    def _get_format(self) -> str:
        return self._packing_format

    def _set_format(self, value: str) -> None:
        value = value.value if isinstance(value, Int4PackingFormat) else value
        if value not in FORMATS:
            raise errors.value(f"int4_packing_format must be one of {list(FORMATS)}", repr(value))
        self._packing_format = value
        # torchao's JSON encoder walks __dict__ and leaves out names with an underscore: what a
        # stock reader sees is this entry, which the property below hides from everybody else.
        self.__dict__["int4_packing_format"] = Int4PackingFormat.PLAIN

    def _get_algorithm(self) -> str:
        return _TORCHAOS.get(self._algorithm, self._algorithm)

    def _set_algorithm(self, value: str) -> None:
        value = value.value if isinstance(value, Int4ChooseQParamsAlgorithm) else value
        known = [*_TORCHAOS, *apply.ALGORITHMS]
        if value not in known:
            rule = f"int4_choose_qparams_algorithm must be one of {known}"
            raise errors.value(rule, repr(value))
        self._algorithm = value
        minmax = Int4ChooseQParamsAlgorithm.TINYGEMM  # (what a stock reader sees, as above)
        self.__dict__["int4_choose_qparams_algorithm"] = _TORCHAOS.get(value, minmax)


def _hidden(name: str) -> property:
    """A field that torchao's JSON encoder does not see: it is kept under ``_name``."""
    return property(
        lambda self: self.__dict__[f"_{name}"],
        lambda self, value: self.__dict__.__setitem__(f"_{name}", value),
        doc="As the class describes it.",
    )


# Properties put on after the dataclass decorator has read the defaults.
for _name, _property in {
    "int4_packing_format": property(
        Int4WeightOnlyConfig._get_format,
        Int4WeightOnlyConfig._set_format,
        doc="As the class describes it.",
    ),
    "int4_choose_qparams_algorithm": property(
        Int4WeightOnlyConfig._get_algorithm,
        Int4WeightOnlyConfig._set_algorithm,
        doc="As the class describes it.",
    ),
    "activation_dtype": _hidden("activation_dtype"),
    "contracted_dim": _hidden("contracted_dim"),
    "group_size_fallback": _hidden("group_size_fallback"),
}.items():
    setattr(Int4WeightOnlyConfig, _name, _property)


# --- one weight ---------------------------------------------------------------------------------


def _packed_reason(w: torch.Tensor, dim: int = -1, sliced: bool = False) -> str | None:
    """Why ``w`` cannot take the CPU-packed layout, or ``None``."""
    if sliced:
        return "its module takes slices of it"
    if w.ndim != 2:
        return f"it has {w.ndim} dims, not 2"
    if dim != -1:
        return "its groups run along dim 0, not 1"
    if w.shape[0] % (n_multiple := cpu.PACKINGS[cpu.preferred_packing()]):
        return f"N = {w.shape[0]} is not a multiple of {n_multiple}"
    if w.device.type not in ("cpu", "meta"):
        return f"it is on {w.device}"
    return None


def fastest_layout(
    w: torch.Tensor,
    activation_dtype: torch.dtype | None = None,
    dim: int = -1,
    sliced: bool = False,
) -> type[Int4TensorBase]:
    """What ``"auto"`` means for ``w``.

    Int8 activations: the one layout that has them. Else, on a CPU without int4q's compiled kernel,
    torch's layout, and plain everywhere else: the compiled kernel reads it as it is, and on an H200
    the coalesced layout was measured within 4 % of it (geometric mean over four shapes) for up to 8
    rows and 4 to 25 % slower for 16 to 64 (docs/benchmarks/h200/layouts.md).
    """
    if activation_dtype == torch.int8:
        return CudaCoalescedInt4Tensor
    packs = w.device.type == "cpu" and _packed_reason(w, dim, sliced) is None
    return CpuPackedInt4Tensor if packs and cpu.preferred_packing() == "aten" else Int4Tensor


def quantize_tensor(
    w: torch.Tensor,
    config: Int4WeightOnlyConfig,
    name: str,
    dim: int = -1,
    sliced: bool = False,
    calibration: Calibration | None = None,
) -> Int4TensorBase:
    """``w`` in the layout that ``config`` asks for, of the same shape.

    Args:
        name: in the model that ``calibration`` is of, and for messages.
        dim: along which groups run; -2 gives a tensor stored as ``[.., N, K]`` and transposed.
        sliced: whether rows of it are used on their own, which not every layout can do.
        calibration: what is known of the inputs, for the algorithms that use it.
    """
    layout = FORMATS[config.int4_packing_format]
    layout = layout or fastest_layout(w, config.activation_dtype, dim, sliced)
    if layout is CpuPackedInt4Tensor and (reason := _packed_reason(w, dim, sliced)):
        say(name, f"held in the plain layout, not cpu_packed: {reason}")
        layout = Int4Tensor
    group_size = fitting_group_size(config, w.shape[dim])
    if group_size != config.group_size:
        say(name, f"in smaller groups, as group_size {config.group_size} does not divide K")
    block_size = [1] * (w.ndim - 1) + [group_size]
    algorithm = config._algorithm
    stored, dtype = w.transpose(dim, -1), config.activation_dtype
    try:
        if algorithm in apply.ALGORITHMS:
            *parts, note = apply.quantize(stored, group_size, algorithm, calibration, name)
            new = _assemble(layout, parts, block_size, stored.shape, dtype)
            if note:
                say(name, note)
        else:
            new = layout.from_hp(stored, block_size, dtype, None if config._fp8 else algorithm)
        return new if dim == -1 else new.transpose(dim, -1)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _assemble(
    layout: type[Int4TensorBase],
    parts: Sequence[torch.Tensor],
    block_size: list[int],
    shape: torch.Size,
    activation_dtype: torch.dtype | None,
) -> Int4TensorBase:
    """A weight from ``qdata``, and ``scale`` and ``zero_point`` ``[.., N, n_groups]``."""
    qdata, scale, zero_point = parts
    turned = scale.mT.contiguous(), zero_point.mT.contiguous()
    plain = Int4Tensor(qdata, *turned, block_size, shape)
    if layout is CudaCoalescedInt4Tensor:
        return CudaCoalescedInt4Tensor.from_int4_tensor(plain, activation_dtype)
    return layout.from_int4_tensor(plain)


def fitting_group_size(config: Int4WeightOnlyConfig, K: int) -> int:
    """``group_size``, or with a fallback the largest smaller one that divides ``K``, if any."""
    if K % config.group_size == 0 or not (
        config.group_size_fallback or config._algorithm == "auto"
    ):
        return config.group_size
    smaller = (g for g in _SMALLER if g < config.group_size and K % g == 0)
    return next(smaller, config.group_size)


# --- one module: what torchao's quantize_ calls ---------------------------------------------------


def _set_inductor_options() -> None:
    """torchao's recommended options, without the float32 precision that some versions also set."""
    precision = torch.get_float32_matmul_precision()
    recommended_inductor_config_setter()
    torch.set_float32_matmul_precision(precision)


@register_quantize_module_handler(Int4WeightOnlyConfig)
def _quantize_module(
    module: nn.Module, config: Int4WeightOnlyConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    if config.set_inductor_config:
        _set_inductor_options()
    explicit = parameter_name != "weight"
    names = [parameter_name] if explicit else chosen_parameters(module)
    if not names:
        raise errors.value("a module to quantise must have a weight or stacks of experts", module)
    for name in names:
        _quantize_parameter(module, config, name)
    if isinstance(module, nn.MultiheadAttention) and not explicit:
        # torchao looks for nothing inside a module that its filter took.
        _quantize_parameter(module.out_proj, config, "weight")
    return module


def _quantize_parameter(module: nn.Module, config: Int4WeightOnlyConfig, name: str) -> None:
    w = getattr(module, name, None)
    if not isinstance(w, torch.Tensor):
        raise errors.value(f"a module to quantise must have a parameter {name!r}", module)
    run = current_run()
    new = run.made.get(w) if run else None
    if new is None:
        dim = config.contracted_dim or contracted_dim(module, w)
        reason = run.protected.get(id(w)) if run else None
        K = w.shape[dim] if w.ndim > 1 else 0
        group_size = fitting_group_size(config, K)
        if reason := reason or reason_to_skip(module, name, group_size, dim):
            skip(module, name, reason)
            if is_put_there(module, name):  # and must not be lost to the state dict
                setattr(module, name, nn.Parameter(w.detach(), requires_grad=False))
            return
        sliced, calibration = is_sliced(module, name), run.calibration if run else None
        full = full_name(module, name)
        new = quantize_tensor(w.detach(), config, full, dim, sliced, calibration)
        new = nn.Parameter(new, requires_grad=False)
        if run:
            run.made[w] = new
    setattr(module, name, new)
    forget(module, name)
