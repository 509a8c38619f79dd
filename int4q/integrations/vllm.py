"""vLLM: ``--quantization int4q`` runs the linear layers of int4q's checkpoints on its kernels.

vLLM finds :func:`register` through the entry point ``vllm.general_plugins``. It reads what
``int4q quantize`` and ``save_pretrained`` write: for a module's ``weight`` the tensors
``_weight_qdata``, ``_weight_scale`` and ``_weight_zero_point``, which vLLM itself joins (q, k and v
to one) and shares out over ranks. Experts are not read: for those, and for vLLM's own kernels,
there is :func:`int4q.export.compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter

from int4q import errors
from int4q.config import Int4WeightOnlyConfig, fitting_group_size
from int4q.tensor import Int4Tensor

NAME = "int4q"
_QDATA, _SCALE, _ZERO = (f"_weight_{part}" for part in Int4Tensor.tensor_data_names)


class Int4QuantizationConfig(QuantizationConfig):
    """vLLM's side of a checkpoint's ``quantization_config``.

    Attributes:
        group_size: of layers whose inputs it divides; of others the largest smaller one that does.
        kept: names of modules, or how they end, that are not quantised.
    """

    def __init__(self, group_size: int, kept: list[str]):
        super().__init__()
        self.group_size, self.kept = group_size, kept

    def get_name(self) -> str:
        """What the user writes."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a CUDA device: Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside ``config.json``."""
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Takes torchao's checkpoints where the user asks for int4q."""
        return NAME if user_quant == NAME and hf_quant_cfg["quant_method"] == "torchao" else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Int4QuantizationConfig:
        """Of ``config.json``.

        Raises:
            ValueError: other than 4-bit linear layers.
        """
        told = (config.get("quant_type") or {}).get("default", {})
        kind = told.get("_type")
        if kind != Int4WeightOnlyConfig.__name__:
            raise errors.value(
                f"{NAME} serves checkpoints of {Int4WeightOnlyConfig.__name__}",
                kind,
                "int4q.export.compressed_tensors writes mixtures of experts for vLLM",
            )
        return cls(told["_data"]["group_size"], config.get("modules_to_not_convert") or [])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Of a linear layer."""
        if not isinstance(layer, LinearBase):
            return None
        joined = self.packed_modules_mapping
        if is_layer_skipped(prefix, self.kept, joined, match_mode="suffix"):
            return UnquantizedLinearMethod()
        return Int4LinearMethod(self.group_size)


@register_weight_loader_v2_supported_method
class Int4LinearMethod(LinearMethodBase):
    """One linear layer: its parts while they are loaded, then one 4-bit weight."""

    def __init__(self, group_size: int):
        self._config = Int4WeightOnlyConfig(group_size=group_size, group_size_fallback=True)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parts, of which a rank has its share.

        Raises:
            ValueError: a share of the inputs that is not whole groups.
        """
        N, K = sum(output_partition_sizes), input_size_per_partition
        group_size = fitting_group_size(self._config, input_size)
        if K % group_size:
            rule = f"each rank's inputs must be whole groups of {group_size}"
            raise errors.value(rule, K, "Use fewer ranks, or smaller groups")
        load = extra_weight_attrs["weight_loader"]

        def add(name: str, cls: Any, shape: tuple[int, int], dtype: torch.dtype, n_in: int) -> None:
            input_dim = 1 if name == _QDATA else 0
            part = cls(
                data=torch.empty(shape, dtype=dtype),
                input_dim=input_dim,
                output_dim=1 - input_dim,
                weight_loader=partial(_checked, load=load, name=name, n_in=n_in),
            )
            layer.register_parameter(name, part)

        # In float32, so that no scale is rounded, whatever its dtype.
        groups = (K // group_size, N), torch.float32, input_size // group_size
        add(_QDATA, ModelWeightParameter, (N, K // 2), torch.int8, input_size // 2)
        add(_SCALE, GroupQuantScaleParameter, *groups)
        add(_ZERO, GroupQuantScaleParameter, *groups)
        layer.int4q_dtype = params_dtype

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make the parts one weight; scales go back to the model's dtype where it holds them."""
        qdata, scale, zero = (getattr(layer, name).data for name in (_QDATA, _SCALE, _ZERO))
        narrow = [part.to(layer.int4q_dtype) for part in (scale, zero)]
        if all(torch.equal(n.float(), p) for n, p in zip(narrow, (scale, zero), strict=True)):
            scale, zero = narrow
        for name in (_QDATA, _SCALE, _ZERO):
            delattr(layer, name)
        N, K = qdata.shape[0], 2 * qdata.shape[1]
        weight = Int4Tensor(qdata, scale, zero, [1, K // scale.shape[0]], (N, K))
        layer.weight = nn.Parameter(weight, requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's product."""
        return nn.functional.linear(x, layer.weight, bias)


def _checked(
    param: Any, loaded: Tensor, *args: Any, load: Callable[..., None], name: str, n_in: int
) -> None:
    """Load a part, which must be of the planned group size: vLLM would take its first columns."""
    if loaded.shape[param.input_dim] != n_in or (loaded.dtype == torch.int8) != (name == _QDATA):
        rule = f"{name} must have {n_in} entries along dim {param.input_dim}"
        raise errors.value(rule, f"{loaded.dtype} {errors.dims(loaded.shape)}")
    load(param, loaded, *args)


def register() -> None:
    """Make ``--quantization int4q`` known; may be called again."""
    register_quantization_config(NAME)(Int4QuantizationConfig)
