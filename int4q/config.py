"""``Int4WeightOnlyConfig`` and what torchao's ``quantize_`` does with it to one module."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm, Int4PackingFormat
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.quantization.utils import recommended_inductor_config_setter
from torchao.utils import TorchAOBaseTensor

from int4q import errors, geometry
from int4q.kernels import cpu
from int4q.ops import SCALE_DTYPES
from int4q.tensor import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor
from int4q.tensor.base import Int4TensorBase

FORMATS: dict[str, type[Int4TensorBase] | None] = {
    "plain": Int4Tensor,
    "cuda_coalesced": CudaCoalescedInt4Tensor,
    "cpu_packed": CpuPackedInt4Tensor,
    "auto": None,
}
"""``int4_packing_format`` -> class; ``"auto"`` is settled by the weight's device."""

SKIPPED = "_int4q_skipped"
"""Module attribute: parameter name -> why it was left as it is (:func:`int4q.summary` reads it)."""


class Int4SkipWarning(UserWarning):
    """A weight was left as it is; the message names it and says why."""


@dataclass
class Int4WeightOnlyConfig(AOBaseConfig):
    """Groupwise 4-bit weights, activations in their own dtype.

    Args:
        group_size: weights along the last dim that share a scale: 32, 64, 128 or 256.
        set_inductor_config: let torchao set its recommended ``torch._inductor`` options (and
            ``torch.set_float32_matmul_precision("high")``), as torchao's own config does.
        int4_packing_format: ``"plain"``, ``"cuda_coalesced"``, ``"cpu_packed"``, or ``"auto"``:
            the fastest of them for the device that the weight is on (``"cuda_coalesced"`` with
            ``activation_dtype=torch.int8``, which no other format has).
        int4_choose_qparams_algorithm: ``"tinygemm"`` (min-max) or ``"hqq"``.
        version: 2; there is no other.
        activation_dtype: ``torch.bfloat16`` (W4A16) or, for ``"cuda_coalesced"`` and ``"auto"``,
            ``torch.int8`` (W4A8 for up to 8 rows), or, for ``"plain"``, ``torch.float8_e4m3fn``
            (rows of activations quantised at run time, weights symmetric). ``None`` is the
            format's default: ``torch.int8`` for ``"cuda_coalesced"``, ``torch.bfloat16`` for every
            other.
        contracted_dim: the weight's dim that its matmul sums over, along which groups run: -1
            (``[.., N, K]``), -2 (``[.., K, N]``, as GPT-OSS holds its experts: the result keeps
            that shape), or ``None``: what the module declares, see :func:`contracted_dim`.

    Raises:
        ValueError: at construction, for a value none of these.

    A config written to JSON (:func:`torchao.core.config.config_to_dict`) holds torchao's fields
    only, with the format ``plain``, so that a process without int4q reads it: checkpoints are
    always written in plain.
    """

    group_size: int = 128
    set_inductor_config: bool = True
    int4_packing_format: str = "plain"
    int4_choose_qparams_algorithm: str = Int4ChooseQParamsAlgorithm.TINYGEMM
    version: int = 2
    activation_dtype: torch.dtype | None = None
    contracted_dim: int | None = None

    def __post_init__(self):
        geometry.check_group_size(self.group_size)
        if self.version != 2:
            raise errors.value("version must be 2", self.version)
        known = [a.value for a in Int4ChooseQParamsAlgorithm]
        if self.int4_choose_qparams_algorithm not in known:
            raise errors.value(
                f"int4_choose_qparams_algorithm must be one of {known}",
                repr(self.int4_choose_qparams_algorithm),
            )
        self.int4_choose_qparams_algorithm = Int4ChooseQParamsAlgorithm(
            self.int4_choose_qparams_algorithm
        )
        layout = FORMATS[self.int4_packing_format]
        allowed = (layout or CudaCoalescedInt4Tensor).activation_dtypes
        if self.activation_dtype not in (None, *allowed):
            raise errors.value(
                f"activation_dtype of {self.int4_packing_format!r} must be "
                f"{errors.dtypes(allowed)}",
                self.activation_dtype,
            )
        minmax = Int4ChooseQParamsAlgorithm.TINYGEMM
        if self._fp8 and self.int4_choose_qparams_algorithm is not minmax:
            raise errors.value(
                "float8 activations take symmetric weights, which the default algorithm makes",
                repr(self.int4_choose_qparams_algorithm.value),
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


def _hidden(name: str) -> property:
    """A field that torchao's JSON encoder does not see: it is kept under ``_name``."""
    return property(
        lambda self: self.__dict__[f"_{name}"],
        lambda self, value: self.__dict__.__setitem__(f"_{name}", value),
        doc="As the class describes it.",
    )


# Properties put on after the dataclass decorator has read the defaults.
Int4WeightOnlyConfig.int4_packing_format = property(
    Int4WeightOnlyConfig._get_format,
    Int4WeightOnlyConfig._set_format,
    doc="As the class describes it.",
)
Int4WeightOnlyConfig.activation_dtype = _hidden("activation_dtype")
Int4WeightOnlyConfig.contracted_dim = _hidden("contracted_dim")


# --- one weight ---------------------------------------------------------------------------------


_TRANSPOSED = ("transformers.models.llama4.modeling_llama4.Llama4TextExperts",)
"""Classes that hold experts as ``[E, in, out]`` and declare it nowhere."""


def contracted_dim(module: nn.Module, w: torch.Tensor) -> int:
    """The dim of a module's parameter that its matmul sums over: -1 or -2.

    -2 for stacks of experts whose module says so: ``is_transposed`` of transformers' experts
    (GPT-OSS, Aria), or a known class (Llama 4). Shapes are never looked at.
    """
    if w.ndim != 3:
        return -1
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    transposed = getattr(module, "is_transposed", False) is True or name in _TRANSPOSED
    return -2 if transposed else -1


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of the stacks of matrices that a module holds itself, ``[E, .., ..]`` with E > 1.

    A ``weight`` is none of them: that is a module's one weight, such as a convolution's.
    """
    return [
        name
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and p.shape[0] > 1 and name != "weight" and p.is_floating_point()
    ]


def reason_to_skip(w: torch.Tensor, group_size: int, dim: int = -1) -> str | None:
    """Why ``w`` cannot be quantised in groups of ``group_size`` along ``dim``, or ``None``."""
    if isinstance(w, TorchAOBaseTensor):
        return f"it is quantised already ({type(w).__name__})"
    if w.dtype not in SCALE_DTYPES:
        return f"its dtype is {w.dtype}, not {errors.dtypes(SCALE_DTYPES)}"
    if w.ndim not in (2, 3):
        return f"it has {w.ndim} dims, not 2 or 3"
    if w.shape[dim] % group_size:
        return f"K = {w.shape[dim]} is not a multiple of group_size {group_size}"
    return None


def _packed_reason(w: torch.Tensor, dim: int = -1) -> str | None:
    """Why ``w`` cannot take the CPU-packed layout, or ``None``."""
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
    w: torch.Tensor, activation_dtype: torch.dtype | None = None, dim: int = -1
) -> type[Int4TensorBase]:
    """What ``"auto"`` means for ``w``.

    Int8 activations: the one layout that has them. Else, on a CPU without int4q's compiled kernel,
    torch's layout, and plain everywhere else: the compiled kernel reads it as it is, and on an H200
    the coalesced layout was measured within 4 % of it (geometric mean over four shapes) for up to 8
    rows and 4 to 25 % slower for 16 to 64 (docs/benchmarks/h200/layouts.md).
    """
    if activation_dtype == torch.int8:
        return CudaCoalescedInt4Tensor
    packs = w.device.type == "cpu" and _packed_reason(w, dim) is None
    return CpuPackedInt4Tensor if packs and cpu.preferred_packing() == "aten" else Int4Tensor


def quantize_tensor(
    w: torch.Tensor, config: Int4WeightOnlyConfig, name: str, dim: int = -1
) -> Int4TensorBase:
    """``w`` in the layout that ``config`` asks for, of the same shape.

    Args:
        name: for messages.
        dim: along which groups run; -2 gives a tensor stored as ``[.., N, K]`` and transposed.
    """
    layout = FORMATS[config.int4_packing_format] or fastest_layout(w, config.activation_dtype, dim)
    if layout is CpuPackedInt4Tensor and (reason := _packed_reason(w, dim)):
        warnings.warn(
            f"{name} is held in the plain layout, not cpu_packed: {reason}",
            Int4SkipWarning,
            stacklevel=2,
        )
        layout = Int4Tensor
    block_size = [1] * (w.ndim - 1) + [config.group_size]
    algorithm = None if config._fp8 else config.int4_choose_qparams_algorithm.value
    try:
        new = layout.from_hp(w.transpose(dim, -1), block_size, config.activation_dtype, algorithm)
        return new if dim == -1 else new.transpose(dim, -1)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# --- one module: what torchao's quantize_ calls ---------------------------------------------------

_NAMES: ContextVar[dict[nn.Module, str] | None] = ContextVar("int4q_module_names", default=None)


@contextmanager
def named(model: nn.Module) -> Iterator[None]:
    """Let messages within the ``with`` block give the names that modules have in ``model``."""
    token = _NAMES.set({module: name for name, module in model.named_modules()})
    try:
        yield
    finally:
        _NAMES.reset(token)


def full_name(module: nn.Module, parameter_name: str) -> str:
    """The parameter's name in the model of :func:`named`."""
    name = (_NAMES.get() or {}).get(module)
    return f"{name}.{parameter_name}" if name else f"{parameter_name} of {module}"


def skip(module: nn.Module, parameter_name: str, reason: str) -> None:
    """Leave a parameter as it is: one warning, and the reason kept for :func:`int4q.summary`."""
    module.__dict__.setdefault(SKIPPED, {})[parameter_name] = reason
    message = f"{full_name(module, parameter_name)} is left as it is: {reason}"
    warnings.warn(message, Int4SkipWarning, stacklevel=3)


@register_quantize_module_handler(Int4WeightOnlyConfig)
def _quantize_module(
    module: nn.Module, config: Int4WeightOnlyConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    if config.set_inductor_config:
        recommended_inductor_config_setter()
    if parameter_name == "weight" and not hasattr(module, "weight"):
        names = expert_parameters(module)  # a module of experts, chosen by a filter or its name
    else:
        names = [parameter_name]
    if not names:
        raise errors.value("a module to quantise must have a weight or stacks of experts", module)
    for name in names:
        _quantize_parameter(module, config, name)
    return module


def _quantize_parameter(module: nn.Module, config: Int4WeightOnlyConfig, name: str) -> None:
    w = getattr(module, name, None)
    if not isinstance(w, torch.Tensor):
        raise errors.value(f"a module to quantise must have a parameter {name!r}", module)
    dim = config.contracted_dim or contracted_dim(module, w)
    if reason := reason_to_skip(w, config.group_size, dim):
        skip(module, name, reason)
        return
    new = quantize_tensor(w.detach(), config, full_name(module, name), dim)
    setattr(module, name, nn.Parameter(new, requires_grad=False))
    module.__dict__.get(SKIPPED, {}).pop(name, None)
