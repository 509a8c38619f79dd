"""Quantise small mixtures of experts, generate with them, save, reload, compare bit for bit.

Qwen3-MoE and Mixtral, randomly initialised from transformers' own configs: no download.

    python examples/quantize_moe.py [--group-size 32]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched

import torch
import transformers
from torch import Tensor

import int4q
import int4q.integrations.transformers  # noqa: F401  (registers experts_implementation="int4q")
from int4q import Int4WeightOnlyConfig, moe_config, quantize_

COMMON = dict(
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
)
CONFIGS = {
    "Qwen3-MoE": transformers.Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=192, num_experts=32, num_experts_per_tok=4
    ),
    "Mixtral": transformers.MixtralConfig(
        **COMMON, intermediate_size=384, num_local_experts=8, num_experts_per_tok=2
    ),
}
PROMPT = torch.arange(24).view(2, 12) * 37 % COMMON["vocab_size"]


def new_model(config, seed: int) -> transformers.PreTrainedModel:
    """The model of ``config`` with random bfloat16 weights."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def logits(model, implementation: str = "int4q") -> Tensor:
    """float32 ``[2, 12, vocab]`` of the prompt, under an experts implementation."""
    model.set_experts_implementation(implementation)
    return model(PROMPT).logits.float()


def generate(model) -> Tensor:
    """Greedy continuation of the prompt, ``[2, 12 + 16]``."""
    mask, length = torch.ones_like(PROMPT), dict(max_new_tokens=16, do_sample=False)
    return model.generate(PROMPT, attention_mask=mask, pad_token_id=0, **length)


def difference(a: Tensor, b: Tensor) -> str:
    return f"{100 * (a - b).norm() / b.norm():.1f} %"


def run(name: str, config, group_size: int, folder: Path) -> None:
    """The whole way of one model; raises ``SystemExit`` where a reload differs."""
    model = new_model(config, seed=0)
    before = logits(model, "grouped_mm")
    quantize_(model, moe_config(Int4WeightOnlyConfig(group_size=group_size)))
    report = int4q.summary(model, show=False)
    experts = [w for w in report.quantized if len(w.shape) == 3]
    print(
        f"{name}: {len(report.quantized)} weights in 4 bits, {len(experts)} of them stacks of "
        f"experts; {report.bytes_before / 1e6:.1f} -> {report.bytes_after / 1e6:.1f} MB"
    )
    for w in experts[:2]:
        print(f"  {w.name}  {list(w.shape)}, {w.bits_per_weight:.2f} bits a weight")
    print(f"  left: {', '.join(w.name for w in report.skipped)}")

    after = logits(model)
    print(f"  4 bits change the logits of these random weights by {difference(after, before)}")
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        other = logits(model, implementation)
        print(
            f"  experts_implementation={implementation!r}: {difference(other, after)} from 'int4q'"
        )

    path = folder / f"{name}.pt"
    torch.save(model.state_dict(), path)
    reloaded = new_model(config, seed=1)  # other weights, all of which the file replaces
    reloaded.load_state_dict(torch.load(path, weights_only=True), assign=True)
    model.set_experts_implementation("int4q")
    same_logits = torch.equal(logits(reloaded), after)
    if not same_logits or not torch.equal(generate(reloaded), generate(model)):
        sys.exit(f"{name}: the reloaded model differs")
    print(f"  saved ({path.stat().st_size / 1e6:.1f} MB), reloaded: equal bit for bit\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group-size", type=int, default=32, choices=(32, 64))
    group_size = parser.parse_args(arguments).group_size
    with tempfile.TemporaryDirectory() as folder:
        for name, config in CONFIGS.items():
            run(name, config, group_size, Path(folder))


if __name__ == "__main__":
    main()
