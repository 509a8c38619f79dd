"""``linear_q4gsw`` on every backend of this machine: errors against the golden, and times.

    python -m int4q.bench.q4gsw [--backends cpu cuda webgpu] [--heavy] [--json FILE]

A time is the median of whole calls: for CUDA with x and y on the device, for WebGPU with x in and
y out through host memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from int4q.bench import q4gsw_sweep as sweep
from int4q.kernels import linear_q4gsw
from int4q.kernels.webgpu import WebGPULinear
from int4q.kernels.webgpu import device as webgpu_device

CALLS = 5
LONG_SECONDS = 2.0
"""A call that takes longer is timed once."""


def _on(device: str, config: sweep.Config) -> Callable[[], Tensor]:
    x = sweep.ramp(config.M, config.K).to(device)
    parts = [t.to(device) if isinstance(t, Tensor) else t for t in sweep.weight(config)]

    def call() -> Tensor:
        y = linear_q4gsw(x, *parts)
        if device == "cuda":
            torch.cuda.synchronize()
        return y

    return call


def _on_webgpu(config: sweep.Config, precision: str = "float32") -> Callable[[], Tensor]:
    layer = WebGPULinear(*sweep.weight(config), precision=precision)
    x = sweep.ramp(config.M, config.K)
    return lambda: layer(x)


BACKENDS: dict[str, Callable[[sweep.Config], Callable[[], Tensor]]] = {
    "cpu": lambda config: _on("cpu", config),
    "cuda": lambda config: _on("cuda", config),
    "webgpu": _on_webgpu,
    "webgpu-f16": lambda config: _on_webgpu(config, "float16"),
}


def available() -> list[str]:
    """The backends that this machine has; float16 on WebGPU only when asked for."""
    found = ["cpu"]
    found += ["cuda"] if torch.cuda.is_available() else []
    return found + (["webgpu"] if webgpu_device.unavailable() is None else [])


def measure(config: sweep.Config, backend: str) -> dict:
    """Errors and milliseconds of one row on one backend."""
    call = BACKENDS[backend](config)
    absolute, relative = sweep.errors(config, call())
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if times[0] > LONG_SECONDS:
            break
    within = relative <= config.tolerance or backend == "webgpu-f16"
    return {"absolute": absolute, "relative": relative, "ms": 1e3 * median(times),
            "within": within}  # fmt: skip


def device_name(backend: str) -> str:
    """What ran."""
    if backend == "cuda":
        return torch.cuda.get_device_name()
    if backend == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    return webgpu_device.default_gpu().name


def run(backends: list[str], heavy: bool) -> dict:
    """All rows on all backends, printed as they come."""
    result: dict = {
        "torch": torch.__version__,
        "devices": {b: device_name(b) for b in backends},
        "rows": [],
    }
    software = "webgpu" in backends and webgpu_device.default_gpu().software
    for config in sweep.CONFIGS:
        if config.heavy and not heavy:
            continue
        row = {"name": config.name, "M": config.M, "K": config.K, "N": config.N,
               "group_size": config.group_size, "tolerance": config.tolerance}  # fmt: skip
        for backend in backends:
            on_software = software and backend.startswith("webgpu")
            if heavy or not sweep.is_heavy(config, on_software):
                row[backend] = measure(config, backend)
                print(config.name, backend, row[backend], flush=True)
        sweep.weight.cache_clear()
        sweep.golden.cache_clear()
        result["rows"].append(row)
    return result


def markdown(result: dict) -> str:
    """A line a row: largest error absolute / over the golden's root mean square, milliseconds."""
    names = list(result["devices"])
    lines = ["; ".join(f"{b}: {d}" for b, d in result["devices"].items()), ""]
    lines += ["| row | M x K -> N | group | tolerance | " + " | ".join(names) + " |"]
    lines += ["|---" * (4 + len(names)) + "|"]
    for row in result["rows"]:
        cells = [row["name"], f"{row['M']} x {row['K']} -> {row['N']}", str(row["group_size"]),
                 f"{row['tolerance']:.0e}"]  # fmt: skip
        for name in names:
            got = row.get(name)
            cells.append(
                f"{got['absolute']:.1e} / {got['relative']:.1e}, {got['ms']:.3g} ms" if got else "-"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=available())
    parser.add_argument("--heavy", action="store_true", help="the heavy rows too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.backends, arguments.heavy)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    wrong = [r["name"] for r in result["rows"] for b in arguments.backends
             if b in r and not r[b]["within"]]  # fmt: skip
    if wrong:
        raise SystemExit(f"over the tolerance: {wrong}")


if __name__ == "__main__":
    main()
