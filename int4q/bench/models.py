"""The models of ``int4q bench generate``, and the ways to hold their weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import int4q

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-8b": ("LlamaConfig", dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", dict(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, max_position_embeddings=8192,
    )),
    "tiny": ("LlamaConfig", dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1000, max_position_embeddings=8192,
    )),
}  # fmt: skip
"""Name -> transformers' configuration class and the published sizes; the weights are random."""


def load(model: str, layers: int | None, device: str) -> Any:
    """A preset with random weights, made on the device, or the model in a folder; bfloat16."""
    import transformers

    kwargs = {} if layers is None else {"num_hidden_layers": layers}
    if model in PRESETS:
        name, sizes = PRESETS[model]
        config = getattr(transformers, name)(**{**sizes, **kwargs})
        torch.manual_seed(0)
        with torch.device(device):
            loaded = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            Path(model), dtype=torch.bfloat16, **kwargs
        ).to(device)
    # Only so many tokens asked for are made, whatever a model of random weights says.
    loaded.generation_config.eos_token_id = None
    return loaded.eval().requires_grad_(False)


@dataclass(frozen=True)
class Contender:
    """One way to hold a model's weights.

    Attributes:
        name: row of the table.
        make: from the model in bfloat16, in place.
        after: name of the contender whose model it is made of, by default bfloat16's.
        needs: module that must be importable.
        is_peer: it is another library's; an error of it is noted, and others run.
    """

    name: str
    make: Callable[[Any], Any]
    after: str | None = None
    needs: str = "torch"
    is_peer: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, or ``None``."""
        if importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None


def contenders(groups: tuple[int, ...], device: str) -> list[Contender]:
    """bfloat16; int4q's plain weights, prepared, fused, for each group size; the peers."""
    found = [Contender("bf16", lambda model: model)]
    for group in groups:
        name = f"int4 g{group}"
        found += [
            Contender(name, lambda model, group=group: _int4(model, group)),
            Contender(f"{name} prepared", int4q.prepare_for_inference_, after=name),
            Contender(
                f"{name} fused",
                lambda model: int4q.prepare_for_inference_(model, fuse=True),
                after=f"{name} prepared",
            ),
        ]
    if device == "cuda":
        found += [
            Contender("torchao tinygemm", _torchao("tile_packed_to_4d"), is_peer=True),
            Contender("torchao plain", _torchao("plain"), needs="mslk", is_peer=True),
            Contender("bitsandbytes nf4", _bitsandbytes, needs="bitsandbytes", is_peer=True),
        ]
    return found


def _int4(model: Any, group: int) -> Any:
    config = int4q.Int4WeightOnlyConfig(group_size=group, set_inductor_config=False)
    if any(hasattr(module, "gate_up_proj") for module in model.modules()):
        importlib.import_module("int4q.integrations.transformers")  # which registers "int4q"
        model.set_experts_implementation("int4q")
        int4q.quantize_(model, int4q.moe_config(config))
    else:
        int4q.quantize_(model, config)
    return model


def _in_layers(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


def _torchao(packing: str) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        config = Int4WeightOnlyConfig(
            group_size=128, int4_packing_format=packing, set_inductor_config=False
        )
        quantize_(model, config, _in_layers)
        return model

    return make


def _bitsandbytes(model: Any) -> Any:
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if _in_layers(layer, name):
            N, K, device = layer.out_features, layer.in_features, layer.weight.device
            packed = bnb.nn.Linear4bit(
                K, N, layer.bias is not None, torch.bfloat16, quant_type="nf4", device="meta"
            )
            packed.weight = bnb.nn.Params4bit(layer.weight.data, False, quant_type="nf4")
            packed.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed.to(device))
    return model
