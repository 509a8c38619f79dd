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


def gpt2():
    import transformers

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def saved(model, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def packed(folder: Path, source: Path, method: str, symmetric: bool) -> Path:
    """The layers of a checkpoint as GPTQ, AWQ or compressed-tensors hold them, random values."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    from int4q.checkpoint import awq, foreign

    shutil.copytree(source, folder)
    told = {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
        "awq": {"quant_method": "awq", "bits": 4, "version": "gemm"},
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "strategy": "group",
                                "group_size": 32, "symmetric": symmetric},
                }
            },
        },
    }[method]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        for name in [n for n in state if "_proj" in n]:
            module = name.removesuffix("weight")
            u = (state.pop(name).float() * 100).round().clamp(-8, 7).to(torch.int8) + 8
            scale = (torch.rand(u.shape[0], u.shape[1] // 32) * 0.1 + 0.01).half()
            zero = torch.randint(1, 16, scale.shape, dtype=torch.int8)
            zero = torch.full_like(zero, 8) if symmetric else zero
            if method == "gptq":
                qzeros = foreign.pack_int32((zero - 1).T.contiguous())
                parts = {"qweight": foreign.pack_int32(u.T.contiguous().T).T, "qzeros": qzeros}
                parts |= {"scales": scale.T, "g_idx": torch.arange(u.shape[1]).int() // 32}
            elif method == "awq":
                words = [
                    foreign.pack_int32(t.T.unflatten(-1, (-1, 8))[..., list(awq.ORDER)].flatten(-2))
                    for t in (u, zero)
                ]
                parts = {"qweight": words[0], "qzeros": words[1], "scales": scale.T}
            else:
                parts = {"weight_packed": foreign.pack_int32(u), "weight_scale": scale,
                         "weight_shape": torch.tensor(u.shape)}  # fmt: skip
                if not symmetric:
                    columns = foreign.pack_int32(zero.T.contiguous())
                    parts["weight_zero_point"] = columns.T
            state |= {f"{module}{part}": t.contiguous() for part, t in parts.items()}
        save_file(state, file, {"format": "pt"})
    return folder
