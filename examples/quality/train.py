"""Train a small Llama from nothing on what text.py wrote, for a given time on one GPU.

python train.py build/text build/model --minutes 2.5
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, ROWS = 512, 128  # of a batch


def config(vocabulary: int) -> LlamaConfig:
    """46 million parameters, 38 of them in linear layers."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip


def learning_rate(progress: float) -> float:
    """Of the largest: up over the first 2 %, then down a cosine."""
    return min(1.0, progress / 0.02) * (
        0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    ids = torch.from_numpy(np.load(arguments.text / "train.npy").astype(np.int64))
    ids = ids.to(arguments.device)
    model = LlamaForCausalLM(config(int(ids.max()) + 1)).to(arguments.device)
    for layer in model.model.layers:
        layer.compile()
    rates = {"lr": 1.5e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), **rates, fused=True)
    begin, step, progress = None, 0, 0.0
    while progress < 1:
        starts = torch.randint(len(ids) - LENGTH, (ROWS, 1), device=ids.device)
        batch = ids[starts + torch.arange(LENGTH, device=ids.device)]
        for group in optimizer.param_groups:
            group["lr"] = rates["lr"] * learning_rate(progress)
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        begin = begin or time.monotonic()  # (after the first step, which compiles)
        if step % 20 == 0:
            shown = loss.item()  # (waits for the device, so that the clock is right)
            progress = (time.monotonic() - begin) / (60 * arguments.minutes)
        if step % 200 == 0:
            print(f"step {step} loss {shown:.3f} of the time {progress:.0%}", flush=True)
        step += 1
    tokens = step * ROWS * LENGTH
    print(f"{step} steps, {tokens / 1e6:.0f} million tokens ({tokens / len(ids):.1f} epochs)")
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
