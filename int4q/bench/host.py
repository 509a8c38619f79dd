"""Host: what a linear layer costs the Python process, eager and in a compiled model.

A model of ``LAYERS`` linear layers runs in bfloat16, in 4 bits, and in 4 bits prepared
(:func:`int4q.prepare_for_inference_`). On a GPU nothing waits for the device: what is timed is the
host's share, which bounds a model of small layers however fast the kernels are. On a CPU the
products themselves are in it. The contenders take turns; results are checked before.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
from torch import nn

import int4q
from int4q.bench.cpu import TOLERANCE, cpu_name

LAYERS = 24
SIZES = {"cpu": (64, 576), "cuda": (1024,)}  # K = N
ROWS = {"cpu": (1, 8), "cuda": (1, 8, 32, 128, 4096)}
GROUP_SIZE = 32
MODES = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "reduce-overhead")}
ROUNDS = 30
CALLS = 10
"""Calls of the model in a round: few enough that a GPU's queue of launches never fills."""

Models = dict[str, nn.Module]


def models(size: int, device: str) -> Models:
    """The contenders, each with weights of its own."""
    bf16 = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(LAYERS)))
    for layer in bf16:
        nn.init.normal_(layer.weight, std=size**-0.5)  # activations keep their size
    bf16 = bf16.to(device, torch.bfloat16)
    int4 = copy.deepcopy(bf16)
    config = int4q.Int4WeightOnlyConfig(group_size=GROUP_SIZE, set_inductor_config=False)
    int4q.quantize_(int4, config)
    prepared = int4q.prepare_for_inference_(copy.deepcopy(int4))
    return {"bf16": bf16, "int4": int4, "prepared": prepared}


def check(contenders: Models, x: torch.Tensor) -> None:
    """``RuntimeError`` unless 4-bit results are right: a layer's, and prepared is the same bits."""
    layer = contenders["int4"][0]
    exact = x.float() @ layer.weight.dequantize(torch.float32).T
    error = ((layer(x).float() - exact).norm() / exact.norm()).item()
    if not error < TOLERANCE:
        raise RuntimeError(f"int4 at M={x.shape[0]}, K={x.shape[1]}: relative error {error:.2g}")
    if not torch.equal(contenders["prepared"](x), contenders["int4"](x)):
        raise RuntimeError(f"prepared at M={x.shape[0]}, K={x.shape[1]} differs from int4")


def microseconds(calls: dict[str, Callable[[], object]], synchronize: Callable) -> dict[str, float]:
    """Median host microseconds of one layer in each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):  # compile, plan, capture
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / (CALLS * LAYERS) * 1e6)
    synchronize()
    return {name: median(values) for name, values in times.items()}


def _as(mode: str, model: nn.Module) -> Callable:
    if mode == "eager":
        return model
    mode = "default" if mode == "compiled" else mode
    return torch.compile(model, mode=mode, dynamic=False, fullgraph=True)


@torch.no_grad()
def rows(device: str, size: int, M: int) -> list[dict]:
    """One line of the table for each way to run the models on ``M`` rows."""
    contenders = models(size, device)
    x = torch.randn(M, size, device=device, dtype=torch.bfloat16)
    check(contenders, x)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    result = []
    for mode in MODES[device]:
        torch._dynamo.reset()
        ways = {name: _as(mode, model) for name, model in contenders.items()}
        us = microseconds({n: (lambda way=way: way(x)) for n, way in ways.items()}, synchronize)
        ratio = {name: us[name] / us["bf16"] for name in us if name != "bf16"}
        result.append({"size": size, "M": M, "mode": mode, "us": us, "over_bf16": ratio})
    return result


def markdown(result: dict) -> str:
    """The table of ``result``."""
    lines = [
        f"{result['device']}; torch {result['torch']}, int4q {result['int4q']}, {result['date']}, "
        f"{result['threads']} threads.",
        "",
        f"Microseconds of host time of one of {LAYERS} linear layers without bias, bfloat16 "
        f"activations, group {GROUP_SIZE}; in brackets over bfloat16's. `prepared`: "
        "`int4q.prepare_for_inference_`.",
        "",
        "| N x K | M | mode | bf16 | int4 | prepared |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        us, over = row["us"], row["over_bf16"]
        cells = [f"{us[name]:.1f} ({over[name]:.2f})" for name in over]
        lines.append(
            f"| {row['size']} x {row['size']} | {row['M']} | {row['mode']} | {us['bf16']:.1f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def run(out: Path, device: str, threads: int | None = None, Ms: tuple[int, ...] = ()) -> dict:
    """Measure on ``device``, write ``host_<device>.json`` and ``.md`` to ``out``, print the table.

    Args:
        out: a folder, made where missing.
        device: ``"cpu"`` or ``"cuda"``.
        threads: of torch; all by default.
        Ms: rows of activations; ``ROWS`` of the device by default.
    """
    if threads:
        torch.set_num_threads(threads)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "int4q": int4q.__version__,
        "rows": [
            row
            for size in SIZES[device]
            for M in Ms or ROWS[device]
            for row in rows(device, size, M)
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"host_{device}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"host_{device}.md").write_text(markdown(result))
    print(markdown(result))
    return result
