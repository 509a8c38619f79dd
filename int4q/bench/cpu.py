"""CPU: time of a linear layer in every layout against ``F.linear``, and what quantising costs.

Every figure is the median over at least ``SECONDS`` of calls. The contenders take turns of
``ROUND`` calls, so that a change in the machine's speed meets them all while each runs as it does
in a model: after itself. A result is checked before it is timed.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import int4q
from int4q import CpuPackedInt4Tensor, Int4Tensor
from int4q.kernels import registry
from int4q.kernels.cpu import native as native_cpu
from int4q.kernels.registry import Problem

SHAPES = [(4096, 4096), (8192, 2048)]  # N, K
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048]
GROUPS = [128, 32]
SECONDS = 1.0
ROUND = 10
# bf16 weights and activations, float32 sums: both sides round the output to bf16.
TOLERANCE = 1e-2


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each call, measured in turns of ``ROUND``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, call in calls.items():
            for _ in range(ROUND):
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def _kernel(op: str, M: int, N: int, K: int, group_size: int) -> str:
    bf16 = torch.bfloat16
    return registry.choose(Problem(op, "cpu", bf16, bf16, M, N, K, group_size)).name


def linear_row(M: int, N: int, K: int, group_size: int) -> dict:
    """One line of the table: milliseconds and ratios to bf16."""
    torch.manual_seed(M)
    w = (torch.randn(N, K) / K**0.5).bfloat16()
    x = torch.randn(M, K).bfloat16()
    plain = Int4Tensor.from_hp(w, [1, group_size])
    layouts = {"plain": plain, "cpu_packed": CpuPackedInt4Tensor.from_int4_tensor(plain)}
    exact = F.linear(x.float(), plain.dequantize(torch.float32))
    for name, t in layouts.items():
        error = (F.linear(x, t).float() - exact).norm() / exact.norm()
        if not error < TOLERANCE:
            raise RuntimeError(f"{name} at M={M}, N={N}, K={K}: relative error {error:.2g}")
    calls = {"bf16": lambda: F.linear(x, w)}
    calls |= {name: (lambda t=t: F.linear(x, t)) for name, t in layouts.items()}
    milliseconds = medians(calls)
    return {
        "M": M, "N": N, "K": K, "group_size": group_size, "ms": milliseconds,
        "speedup": {n: milliseconds["bf16"] / milliseconds[n] for n in layouts},
        "kernel": {
            "plain": _kernel("int4_linear", M, N, K, group_size),
            "cpu_packed": _kernel(
                "int4_linear" if layouts["cpu_packed"].packing == "rows" else
                "int4_cpu_packed_linear", M, N, K, group_size),
        },
    }  # fmt: skip


# A fresh process, so that the high-water mark of its memory is that of one call.
_QUANTIZE = """
import json, resource, sys, time, torch, int4q
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(int(sys.argv[1]))
w = torch.randn(4096, 4096, dtype=torch.bfloat16)
int4q.Int4Tensor.from_hp(w[:64], [1, 128])
before, start = peak(), time.perf_counter()
int4q.Int4Tensor.from_hp(w, [1, 128])
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak_over_weight": (peak() - before) / w.nbytes}))
"""


def quantize_row(threads: int) -> dict:
    """Seconds and peak memory (in multiples of the weight's bytes) to quantise 4096 x 4096."""
    done = subprocess.run(
        [sys.executable, "-c", _QUANTIZE, str(threads)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def markdown(result: dict) -> str:
    """The table of ``result``."""
    lines = [
        f"CPU: {result['cpu']}, {result['threads']} threads; torch {result['torch']}, "
        f"int4q {result['int4q']}, {result['date']}. Compiled kernel: {result['native']}.",
        "",
        f"Quantising 4096 x 4096 bf16: {result['quantize']['seconds']:.2f} s, peak memory above "
        f"the input {result['quantize']['peak_over_weight']:.2f} times the weight's bytes.",
        "",
        "Milliseconds, and in brackets how many times faster than `F.linear` in bf16.",
        "",
        "| N x K | group | M | bf16 | plain | cpu_packed | kernels |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["linear"]:
        cells = [f"{r['ms'][n]:.3f} ({r['speedup'][n]:.2f})" for n in ("plain", "cpu_packed")]
        lines.append(
            f"| {r['N']} x {r['K']} | {r['group_size']} | {r['M']} | {r['ms']['bf16']:.3f} | "
            f"{cells[0]} | {cells[1]} | {r['kernel']['plain']}, {r['kernel']['cpu_packed']} |"
        )
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def run(out: Path, threads: int | None = None) -> dict:
    """Measure everything, write ``cpu.json`` and ``cpu.md`` into ``out``, print the table."""
    if threads:
        torch.set_num_threads(threads)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "int4q": int4q.__version__,
        "native": native_cpu.load()[1] or "loaded",
        "quantize": quantize_row(torch.get_num_threads()),
        "linear": [
            linear_row(M, N, K, g) for N, K in SHAPES for g in GROUPS for M in ROWS
        ],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "cpu.md").write_text(markdown(result))
    print(markdown(result))
    return result
