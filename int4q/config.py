"""``Int4WeightOnlyConfig`` and what torchao's ``quantize_`` does with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torchao.quantization as torchao_quantization
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
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
            ``torch.int8`` (W4A8 for up to 8 rows). ``None`` is the format's default: ``torch.int8``
            for ``"cuda_coalesced"``, ``torch.bfloat16`` for every other.

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

    def _get_activation_dtype(self) -> torch.dtype | None:
        return self._activation_dtype

    def _set_activation_dtype(self, value: torch.dtype | None) -> None:
        self._activation_dtype = value


# Properties put on after the dataclass decorator has read the defaults.
Int4WeightOnlyConfig.int4_packing_format = property(
    Int4WeightOnlyConfig._get_format, Int4WeightOnlyConfig._set_format
)
Int4WeightOnlyConfig.activation_dtype = property(
    Int4WeightOnlyConfig._get_activation_dtype, Int4WeightOnlyConfig._set_activation_dtype
)


# --- one weight ---------------------------------------------------------------------------------


def reason_to_skip(w: torch.Tensor, group_size: int) -> str | None:
    """Why ``w`` cannot be quantised in groups of ``group_size``, or ``None``."""
    if isinstance(w, TorchAOBaseTensor):
        return f"it is quantised already ({type(w).__name__})"
    if w.dtype not in SCALE_DTYPES:
        return f"its dtype is {w.dtype}, not {errors.dtypes(SCALE_DTYPES)}"
    if w.ndim not in (2, 3):
        return f"it has {w.ndim} dims, not 2 or 3"
    if w.shape[-1] % group_size:
        return f"K = {w.shape[-1]} is not a multiple of group_size {group_size}"
    return None


def _packed_reason(w: torch.Tensor) -> str | None:
    """Why ``w`` cannot take the CPU-packed layout, or ``None``."""
    if w.ndim != 2:
        return f"it has {w.ndim} dims, not 2"
    if w.shape[0] % (n_multiple := cpu.PACKINGS[cpu.preferred_packing()]):
        return f"N = {w.shape[0]} is not a multiple of {n_multiple}"
    if w.device.type not in ("cpu", "meta"):
        return f"it is on {w.device}"
    return None


def fastest_layout(
    w: torch.Tensor, activation_dtype: torch.dtype | None = None
) -> type[Int4TensorBase]:
    """What ``"auto"`` means for ``w``.

    Int8 activations: the one layout that has them. Else, on a CPU without int4q's compiled kernel,
    torch's layout, and plain everywhere else: the compiled kernel reads it as it is, and on an H200
    the coalesced layout was measured within 4 % of it (geometric mean over four shapes) for up to 8
    rows and 4 to 25 % slower for 16 to 64 (docs/benchmarks/h200/layouts.md).
    """
    if activation_dtype == torch.int8:
        return CudaCoalescedInt4Tensor
    packs = w.device.type == "cpu" and _packed_reason(w) is None
    return CpuPackedInt4Tensor if packs and cpu.preferred_packing() == "aten" else Int4Tensor


def quantize_tensor(w: torch.Tensor, config: Int4WeightOnlyConfig, name: str) -> Int4TensorBase:
    """``w`` in the layout that ``config`` asks for; ``name`` is for messages."""
    layout = FORMATS[config.int4_packing_format] or fastest_layout(w, config.activation_dtype)
    if layout is CpuPackedInt4Tensor and (reason := _packed_reason(w)):
        warnings.warn(
            f"{name} is held in the plain layout, not cpu_packed: {reason}",
            Int4SkipWarning,
            stacklevel=2,
        )
        layout = Int4Tensor
    block_size = [1] * (w.ndim - 1) + [config.group_size]
    algorithm = config.int4_choose_qparams_algorithm.value
    try:
        return layout.from_hp(w, block_size, config.activation_dtype, algorithm)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# --- one module: what torchao's quantize_ calls ---------------------------------------------------

_NAMES: ContextVar[dict[nn.Module, str] | None] = ContextVar("int4q_module_names", default=None)


@contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    token = _NAMES.set({module: name for name, module in model.named_modules()})
    try:
        yield
    finally:
        _NAMES.reset(token)


def _name(module: nn.Module, parameter_name: str) -> str:
    name = (_NAMES.get() or {}).get(module)
    return f"{name}.{parameter_name}" if name else f"{parameter_name} of {module}"


def skip(module: nn.Module, parameter_name: str, reason: str) -> None:
    """Leave a parameter as it is: one warning, and the reason kept for :func:`int4q.summary`."""
    module.__dict__.setdefault(SKIPPED, {})[parameter_name] = reason
    message = f"{_name(module, parameter_name)} is left as it is: {reason}"
    warnings.warn(message, Int4SkipWarning, stacklevel=3)


@register_quantize_module_handler(Int4WeightOnlyConfig)
def _quantize_module(
    module: nn.Module, config: Int4WeightOnlyConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    if config.set_inductor_config:
        recommended_inductor_config_setter()
    w = getattr(module, parameter_name, None)
    if not isinstance(w, torch.Tensor):
        raise errors.value(f"a module to quantise must have a parameter {parameter_name!r}", module)
    if reason := reason_to_skip(w, config.group_size):
        skip(module, parameter_name, reason)
        return module
    new = quantize_tensor(w.detach(), config, _name(module, parameter_name))
    setattr(module, parameter_name, nn.Parameter(new, requires_grad=False))
    module.__dict__.get(SKIPPED, {}).pop(parameter_name, None)
    return module


# --- a whole model ------------------------------------------------------------------------------


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
            named in an :class:`Int4SkipWarning`. Not to be given together with ``FqnToConfig``.
        device: move each module here before quantising it.

    Raises:
        ValueError: a weight holds NaN or Inf (the message names it).
    """
    with _named(model):
        if filter_fn is None and not isinstance(config, FqnToConfig):
            kept = kept_modules(model)
            for module, reason in kept.items():
                skip(module, "weight", f"{reason}; pass filter_fn to quantise it")

            def filter_fn(module: nn.Module, name: str) -> bool:
                return isinstance(module, nn.Linear) and module not in kept

        torchao_quantization.quantize_(model, config, filter_fn, device)
