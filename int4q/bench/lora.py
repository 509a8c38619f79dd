"""LoRA: memory and time of a training step, on 4-bit weights, bfloat16 ones and bitsandbytes' NF4.

Decoder layers in the shapes of Llama 3.1 8B train adapters on all of their linear layers, without
embedding and head, which no contender quantises. The bfloat16 weights are the 4-bit ones,
dequantised, so loss and gradients are compared before anything is timed. Peak memory is that of one
contender's weights and steps; the times are taken in turns. Writes ``lora_<device>.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import int4q
from int4q.bench.cpu import cpu_name
from int4q.tensor.base import Int4TensorBase

SIZES = {
    "cuda": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                 num_key_value_heads=8, num_hidden_layers=4),
    "cpu": dict(hidden_size=128, intermediate_size=256, num_attention_heads=4,
                num_key_value_heads=2, num_hidden_layers=2),
}  # fmt: skip
TOKENS = {"cuda": (512, 4096), "cpu": (32,)}
RANK = 16
ROUNDS = 7
TOLERANCE = 5e-2
"""Of loss and gradients: each layer's activations, and a contender's weights, are bfloat16."""

Step = Callable[[Tensor], Tensor]


def base_model(device: str, group_size: int) -> nn.Module:
    """The decoder layers with 4-bit weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[device], vocab_size=128, use_cache=False)
    with torch.device(device):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    int4q.quantize_(
        model, int4q.Int4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    )
    return model.requires_grad_(False)


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """``model`` with ``make(linear)`` for every linear layer that has a 4-bit weight, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and isinstance(child.weight, Int4TensorBase):
                setattr(module, name, make(child))
    return model


def bfloat16(linear: nn.Linear) -> nn.Module:
    """The same layer with its weight dequantised."""
    linear.weight = nn.Parameter(linear.weight.dequantize(), requires_grad=False)
    return linear


def nf4(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' layer, of the dequantised weight."""
    import bitsandbytes as bnb

    w, device = linear.weight.dequantize(), linear.weight.device
    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
        quant_type="nf4", device=device,
    )  # fmt: skip
    new.weight = bnb.nn.Params4bit(w.cpu(), requires_grad=False, quant_type="nf4").to(device)
    return new


CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "int4": lambda model: model,
    "bf16": lambda model: replaced(model, bfloat16),
    "bitsandbytes nf4": lambda model: replaced(model, nf4),
}


def with_adapters(name: str, model: nn.Module) -> nn.Module:
    """``model`` ready to be trained; the same adapters whatever it is."""
    import peft

    model.is_loaded_in_4bit = name.endswith("nf4")
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return model.train()


def trainer(model: nn.Module, checkpointing: bool) -> Step:
    """One step of AdamW on hidden states ``[1, T, hidden]``, which gives the loss."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs_embeds=x).last_hidden_state.float().pow(4).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def check(name: str, model: nn.Module, other: nn.Module, x: Tensor) -> None:
    """``RuntimeError`` unless loss and gradients are those of the other model."""
    loss, expected = (trainer(m, False)(x) for m in (model, other))
    grads, expected_grads = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.requires_grad])
        for m in (model, other)
    )
    error = (grads - expected_grads).norm() / expected_grads.norm()
    if not (abs(loss - expected) <= TOLERANCE * expected and error <= TOLERANCE):
        raise RuntimeError(f"{name}: loss {loss} and {expected}, gradients off by {error}")


class Memory:
    """Bytes of the GPU that were taken since this was made, at most; 0 on a CPU."""

    def __init__(self, device: str):
        self.on = device == "cuda"
        self.before = torch.cuda.memory_allocated() if self.on else 0

    def held(self) -> int:
        return torch.cuda.memory_allocated() - self.before if self.on else 0

    def peak(self, run: Callable[[], object]) -> int:
        if not self.on:
            run()
            return 0
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - self.before


def milliseconds(steps: dict[str, Step], x: Tensor, device: str) -> dict[str, float]:
    """Median of a step of each, in turns."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step(x)
            synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def run(out: Path, device: str, group_size: int = 128) -> dict:
    """Measure on ``device``, print the result and write it to ``out``.

    Needs transformers and peft; bitsandbytes is measured where it is installed.
    """
    hidden = SIZES[device]["hidden_size"]
    models, memory, held, rows = {}, {}, {}, []
    for name, make in CONTENDERS.items():
        if name.startswith("bitsandbytes") and find_spec("bitsandbytes") is None:
            continue
        memory[name] = Memory(device)
        models[name] = with_adapters(name, make(base_model(device, group_size)))
        held[name] = memory[name].held()
        if name == "bf16":
            x = torch.randn(1, 64, hidden, device=device, dtype=torch.bfloat16)
            check("int4", models["int4"], models["bf16"], x)
        peaks = {}
        for T in TOKENS[device]:
            x = torch.randn(1, T, hidden, device=device, dtype=torch.bfloat16)
            for checkpointing in (False, True):
                step = trainer(models[name], checkpointing)
                step(x)  # (what a first step alone takes is not counted)
                peaks[T, checkpointing] = memory[name].peak(lambda step=step, x=x: step(x))
        memory[name] = peaks
        for p in models[name].parameters():
            p.grad = None
    for T, checkpointing in memory["int4"]:
        x = torch.randn(1, T, hidden, device=device, dtype=torch.bfloat16)
        steps = {name: trainer(model, checkpointing) for name, model in models.items()}
        rows.append(
            {
                "tokens": T,
                "checkpointing": checkpointing,
                "peak_bytes": {name: memory[name][T, checkpointing] for name in models},
                "ms": milliseconds(steps, x, device),
            }
        )
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "versions": {n: version(n) for n in ("torch", "transformers", "peft")},
        "int4q": int4q.__version__,
        "shape": SIZES[device] | {"rank": RANK, "group_size": group_size},
        "weights_bytes": held,
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    (out / f"lora_{device}.json").write_text(text + "\n")
    print(text)
    return result
