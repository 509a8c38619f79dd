"""Time and memory of search and GPTQ on one GPU, for the shapes of an 8-billion Llama's block.

    python speed.py --json build/speed.json

Each of the seven layers of one block is quantised as it would be in the model; 32 such blocks are
the sum, times 32 (nothing else of a model runs). Weights bfloat16, 8,192 tokens.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from int4q import gptq, qparams

SHAPES = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip
BLOCKS, TOKENS = 32, 8192


def timed(function) -> tuple[float, float]:
    """Seconds, and GiB at most beside what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated(), time.monotonic()
    function()
    torch.cuda.synchronize()
    seconds = time.monotonic() - begin
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for K in sorted({K for _, K in SHAPES.values()}):
        x = torch.randn(TOKENS, K, device="cuda") @ torch.randn(K, K, device="cuda") / K**0.5
        x *= torch.logspace(-1, 1, K, device="cuda")[torch.randperm(K, device="cuda")]
        results[f"hessian {K}"], _ = timed(lambda x=x: x.T @ x)
        hessian = x.T @ x / TOKENS
        for name, (N, own) in SHAPES.items():
            if own != K:
                continue
            w = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02
            tokens, importance = torch.tensor(TOKENS), hessian.diagonal()
            for group in given.groups:
                calls = {
                    "search": lambda: qparams.quantize(w, group, "search", importance),  # noqa: B023
                    "gptq": lambda: gptq.quantize(w, group, hessian, tokens),  # noqa: B023
                }
                for algorithm, call in calls.items():
                    if name == "q":
                        call()  # (libraries are loaded)
                    got = timed(call)
                    results[f"{algorithm} {group} {name}"] = got
                    print(
                        f"{algorithm} {group} {name} [{N}, {K}]: {got[0]:.2f} s, {got[1]:.2f} GiB",
                        flush=True,
                    )
    for algorithm in ("search", "gptq"):
        for group in given.groups:
            block = sum(results[f"{algorithm} {group} {name}"][0] for name in SHAPES)
            most = max(results[f"{algorithm} {group} {name}"][1] for name in SHAPES)
            line = f"{algorithm} {group}: a block {block:.2f} s, {BLOCKS} of them"
            print(f"{line} {block * BLOCKS:.0f} s; {most:.2f} GiB at most")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
