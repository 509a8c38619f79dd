"""Small checkpoints, as transformers saves them, for the tests of streaming."""

from pathlib import Path

import torch


def llama(folder: Path, **more) -> Path:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, **more,
    )  # fmt: skip
    return saved(transformers.LlamaForCausalLM(config), folder)


def qwen_moe(folder: Path) -> Path:
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=64, num_experts=3,
        num_experts_per_tok=2,
    )  # fmt: skip
    return saved(transformers.Qwen3MoeForCausalLM(config), folder)


def saved(model, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
