"""transformers' quantizer for torchao checkpoints, which gives and takes int4q's weights.

Registered in transformers' table by being imported; :mod:`int4q` does that as soon as transformers
is imported. What it adds to the one of transformers:

* 4-bit weights of a checkpoint are loaded as :class:`~int4q.Int4Tensor`, with their parts checked;
* a model is saved from any layout, after it was loaded, offloaded, or quantised by
  :func:`int4q.quantize_`, and again, with the same bits, under the names that its modules have;
* adapters on top of it may be trained.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import FqnToConfig
from torchao.utils import TorchAOBaseTensor
from transformers.integrations.torchao import TorchAoDeserialize
from transformers.quantizers import auto
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import TorchAoConfig

from int4q import errors, prepare, quantize
from int4q.checkpoint import schema
from int4q.config import Int4WeightOnlyConfig
from int4q.coverage import is_matrix
from int4q.integrations.transformers_shards import Shards
from int4q.layouts import convert_weights
from int4q.tensor.base import Int4TensorBase

_NO_LINEAR = (nn.Embedding, nn.modules.conv._ConvNd)
TAGS = ["int4q", "torchao", "4-bit"]
"""Of the model's card on the Hub."""


class Int4Config(TorchAoConfig):  # type: ignore[misc]  # no types
    """transformers' config of torchao, of a model that has int4q's weights."""

    def get_apply_tensor_subclass(self) -> Int4WeightOnlyConfig:
        """What peft makes a linear layer 4-bit again with, once an adapter is merged into it."""
        named = getattr(self.quant_type, "fqn_to_config", {"": self.quant_type})
        sizes = [c.group_size for c in named.values() if hasattr(c, "group_size")]
        return Int4WeightOnlyConfig(
            group_size=sizes[-1], group_size_fallback=True, set_inductor_config=False
        )


def _as(cls: type[TorchAoConfig], config: TorchAoConfig) -> TorchAoConfig:
    """The same settings in another class."""
    return cls(
        config.quant_type,
        config.modules_to_not_convert,
        config.include_input_output_embeddings,
        config.untie_embedding_weights,
    )


class Int4Quantizer(TorchAoHfQuantizer):
    """transformers' quantizer for torchao's tensors, 4-bit ones as int4q's."""

    derived = False
    """Whether the config was read from the weights (see :func:`declare`)."""
    _trainable = False
    shards: Shards | None = None
    """Of the model that is being loaded."""

    def __init__(self, quantization_config: TorchAoConfig, **kwargs: Any):
        if isinstance(quantization_config, Int4Config):  # of another model, to be applied to this
            quantization_config = _as(TorchAoConfig, quantization_config)
        super().__init__(quantization_config, **kwargs)

    @property
    def is_trainable(self) -> bool:
        """Adapters on 4-bit weights train: gradients pass through to the activations."""
        return self._trainable or super().is_trainable

    def get_weight_conversions(self) -> list[Any]:
        """As transformers', with 4-bit weights as int4q's."""
        conversions = super().get_weight_conversions()
        for conversion in conversions:
            conversion.operations = [_Deserialize(self)]
        return conversions

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        described = getattr(self, "metadata", {})
        self.shards = Shards(model, {name for name in described if _is_int4(described[name])})
        try:
            model.get_input_embeddings()
        except NotImplementedError:  # of several (CLIP's); each quantised weight is compared to it
            model.get_input_embeddings = lambda: None

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.__dict__.pop("get_input_embeddings", None)
        if self.shards is not None:
            self.shards.finish()
            self.shards = None
        self._trainable = _has_weights(model)
        if self._trainable:
            self.quantization_config = _as(Int4Config, self.quantization_config)
            model.config.quantization_config = self.quantization_config
            model.add_model_tags(TAGS)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """What ``model.dequantize()`` of transformers does: every 4-bit weight in ``dtype``."""
        prepare.unprepare_(model)
        convert_weights(model, Int4TensorBase, lambda t: t.dequantize(dtype))
        return model

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[Any, dict[str, str]]:
        """The plain tensors to save, and the metadata of each file.

        Quantised experts have no way back to the names and shapes that another library gave them,
        so transformers' conversions to those are switched off, for everything in the model.
        """
        model._weight_conversions = []
        stored: dict[str, Tensor] = {}
        described: dict[str, str] = {}
        for name, t in _saved(model):
            if isinstance(t, TorchAOBaseTensor) and not isinstance(t, Int4TensorBase):
                parts, others = flatten_tensor_state_dict({name: t})
                described[name] = others[name]
            else:
                parts, described[name] = schema.flatten(name, t)
            stored |= parts
        return stored, schema.metadata(described)


class _Deserialize(TorchAoDeserialize):  # type: ignore[misc]  # no types
    """One weight of a checkpoint from its parts, as they are stored."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        name = kwargs["full_layer_name"]
        described = getattr(self.hf_quantizer, "metadata", {}).get(name, "")
        if not _is_int4(described):
            return super().convert(input_dict, **kwargs)
        entry = schema.entry(name, described)
        prefix = schema.stored_name(name.rpartition(".")[2], "")
        parts = {key.removeprefix(prefix): tensors[0] for key, tensors in input_dict.items()}
        if parts.keys() != entry.parts.keys():
            raise errors.value(f"{name} must have the parts {sorted(entry.parts)}", sorted(parts))
        return {name: self.hf_quantizer.shards.cut(name, schema.unflatten(entry, parts))}


def _is_int4(described: str) -> bool:
    """Whether this is what a checkpoint's metadata says of a 4-bit weight."""
    return f'"{schema.INT4}"' in described


def _saved(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The state dict, whole: offloaded weights from where they are, shards from every rank; tied
    4-bit ones once."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    state = model.state_dict()
    for name, t in state.items():
        source = state.get(model.all_tied_weights_keys.get(name))
        if isinstance(t, Int4TensorBase) and _share(t, source):
            continue
        t = t.full_tensor() if isinstance(t, DTensor) else t
        yield name, load_offloaded_parameter(model, name) if t.is_meta else t


def _share(t: Int4TensorBase, other: Any) -> bool:
    return isinstance(other, Int4TensorBase) and t.qdata.data_ptr() == other.qdata.data_ptr()


# --- a model that quantize_ has been through ------------------------------------------------------


def declare(model: nn.Module) -> None:
    """Tell transformers that its models in ``model`` are quantised, if they hold 4-bit weights.

    ``save_pretrained`` and ``Trainer`` ask ``model.hf_quantizer``; ``config.quantization_config``
    is what a reader of the checkpoint gets. A quantizer that ``from_pretrained`` chose is replaced
    by int4q's, its config kept. (``model.is_quantized``, which refuses ``.half()`` and the like,
    is left to ``from_pretrained``.)
    """
    for outermost in _pretrained(model):
        if not _has_weights(outermost):
            continue
        given = getattr(outermost, "hf_quantizer", None)
        if given is None or getattr(given, "derived", False):
            quantizer = Int4Quantizer(config_of(outermost), pre_quantized=True)
            quantizer.derived = True
        elif isinstance(given, TorchAoHfQuantizer):
            quantizer = Int4Quantizer(given.quantization_config, pre_quantized=True)
        else:
            continue  # another library's, which knows its own weights
        outermost.hf_quantizer = quantizer
        outermost.quantization_method = quantizer.quantization_config.quant_method
        quantizer.postprocess_model(outermost)


def config_of(model: nn.Module) -> TorchAoConfig:
    """What made the 4-bit weights of ``model``, read from them, and what it left alone.

    One config where linear layers of one group size are all there is; otherwise patterns name the
    weights. ``modules_to_not_convert`` names the modules whose matrix was left, routers and the
    output head for example, but for embeddings and convolutions.
    """
    sizes: dict[str, int] = {}
    kept = set()
    linear = True
    for module_name, module in model.named_modules():
        for name, p in _named(module):
            if isinstance(p, Int4TensorBase):
                sizes[f"{module_name}.{name}".lstrip(".")] = p.group_size
                linear = linear and isinstance(module, nn.Linear)
            elif is_matrix(module, name, p) and not isinstance(module, _NO_LINEAR):
                kept.add(module_name)
    config = _config(sizes, plain=linear and len(set(sizes.values())) == 1)
    return TorchAoConfig(config, modules_to_not_convert=sorted(kept))


def _config(sizes: dict[str, int], plain: bool) -> Any:
    """A config for weights of these names and group sizes; exact names come before patterns."""
    if plain:
        return Int4WeightOnlyConfig(group_size=next(iter(sizes.values())))
    alike: dict[str, Counter[int]] = {}
    for name, size in sizes.items():
        alike.setdefault(_pattern(name), Counter())[size] += 1
    common = {pattern: found.most_common(1)[0][0] for pattern, found in alike.items()}
    exact = {name: size for name, size in sizes.items() if size != common[_pattern(name)]}
    keys = {**exact, **common}.items()
    return FqnToConfig(OrderedDict((k, Int4WeightOnlyConfig(group_size=size)) for k, size in keys))


def _pattern(name: str) -> str:
    """``layers.0.experts.up_proj`` -> ``re:layers\\.\\d+\\.experts\\.up_proj``."""
    return "re:" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))


def _pretrained(model: nn.Module) -> Iterator[Any]:
    """The models of transformers in ``model`` that are in no other one."""
    modeling = sys.modules.get("transformers.modeling_utils")  # (without it there is none)
    inner: set[nn.Module] = set()
    for module in model.modules() if modeling else ():
        if isinstance(module, modeling.PreTrainedModel) and module not in inner:
            inner |= set(module.modules())
            yield module


def _has_weights(model: nn.Module) -> bool:
    return any(isinstance(p, Int4TensorBase) for m in model.modules() for _, p in _named(m))


def _named(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's own parameters; those that a prepared one keeps back as well."""
    for name, p in module._parameters.items():
        p = getattr(module, name) if p is None else p
        if p is not None:
            yield name, p.to_local() if isinstance(p, DTensor) else p


auto.AUTO_QUANTIZER_MAPPING["torchao"] = Int4Quantizer
quantize.AFTERWARDS.append(declare)
