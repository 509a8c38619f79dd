"""Take a model whose weights were 4-bit ones off their grid, and heal it by distillation.

    python off_grid.py SOURCE build/text build/healed

Every weight of a linear layer is moved by a uniform dither of one step of its group's 16 levels;
then the model learns the next-token distributions of what it was, on ``train.npy``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

LENGTH, ROWS, STEPS, RATE = 512, 8, 400, 3e-4


@torch.no_grad()
def dither(model: torch.nn.Module, group: int) -> None:
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            groups = module.weight.data.view(-1, group)
            low, high = groups.aminmax(dim=1, keepdim=True)
            groups += (high - low) / 15 * (torch.rand_like(groups) - 0.5)


def divergence(model, teacher, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        with torch.no_grad():
            p = teacher(ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        q = model(ids, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--group", type=int, default=32, help="of the 4-bit weights it was made from"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.from_numpy(np.load(given.text / "train.npy").astype(np.int64)).to(given.device)
    teacher, model = (
        AutoModelForCausalLM.from_pretrained(given.source, dtype=torch.float32).to(given.device)
        for _ in range(2)
    )
    dither(model, given.group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (ROWS, 1), device=ids.device)
        loss = divergence(model, teacher, ids[starts + torch.arange(LENGTH, device=ids.device)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 10) * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: KL to the source {loss.item():.4f}", flush=True)
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
