"""CPU: a linear layer's time against ``F.linear`` in bfloat16 and against the read bandwidth.

The bandwidth is measured in the same run: ``torch.sum`` over ``READ_BYTES``, the best of some. Each
contender's calls rotate over copies of its weight that no cache holds together; the contenders take
turns of ``ROUND`` calls, so that a change in the machine's speed meets them all. Times are medians
over at least ``SECONDS`` each. A result is checked before it is timed. Every instruction set is
measured in a process of its own, with torch and oneDNN held to the same one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import int4q
from int4q import Int4Tensor
from int4q.bench import cpu_report
from int4q.kernels import registry
from int4q.kernels.cpu import native as native_cpu
from int4q.kernels.registry import Problem

SHAPES = [(4096, 14336), (576, 576)]  # N, K
ROWS = [1, 2, 4, 8, 16, 32, 128]
GROUPS = [128, 32]
ISAS = {
    "best": {},
    "avx_vnni": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
"""Values of INT4Q_CPU_ISA (but for the best) and what holds torch and oneDNN to the same."""
SECONDS = 0.3
ROUND = 10
COLD_BYTES = 160 << 20
"""Copies of a weight hold at least this much, several times a last-level cache."""
READ_BYTES = 512 << 20
# bf16 weights and activations, float32 sums: both sides round the output to bf16.
TOLERANCE = 1e-2


def read_bandwidth() -> float:
    """Bytes a second that torch's threads read from memory."""
    data = torch.ones(READ_BYTES // 4, dtype=torch.int32)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        data.sum(dtype=torch.int32)
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


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
                if time.perf_counter() > end:
                    break
    return {name: median(values) for name, values in times.items()}


def _kernel(M: int, N: int, K: int, group_size: int) -> str:
    bf16 = torch.bfloat16
    return registry.choose(Problem("int4_linear", "cpu", bf16, bf16, M, N, K, group_size)).name


def _rotating(x: torch.Tensor, weight: torch.Tensor, nbytes: int) -> Callable[[], object]:
    """``F.linear`` with one copy of ``weight`` after the other."""
    copies = [weight, *(weight.clone() for _ in range(COLD_BYTES // nbytes))]
    turns = itertools.cycle(copies)
    return lambda: F.linear(x, next(turns))


def layers(N: int, K: int, group_size: int, bandwidth: float) -> list[dict[str, Any]]:
    """Lines of the table, one for each of ``ROWS``."""
    torch.manual_seed(0)
    w = (torch.randn(N, K) / K**0.5).bfloat16()
    plain = Int4Tensor.from_hp(w, [1, group_size])
    nbytes = sum(t.nbytes for t in (plain.qdata, plain.scale, plain.zero_point))
    return [_line(M, w, plain, group_size, nbytes, bandwidth) for M in ROWS]


def _line(
    M: int, w: torch.Tensor, plain: Any, group_size: int, nbytes: int, bandwidth: float
) -> dict[str, Any]:
    N, K = w.shape
    x = torch.randn(M, K).bfloat16()
    exact = F.linear(x.float(), plain.dequantize(torch.float32))
    error = (F.linear(x, plain).float() - exact).norm() / exact.norm()
    if not error < TOLERANCE:
        raise RuntimeError(f"M={M}, N={N}, K={K}: relative error {error:.2g}")
    calls = {"bf16": _rotating(x, w, w.nbytes), "int4": _rotating(x, plain, nbytes)}
    milliseconds = medians(calls)
    return {
        "M": M, "N": N, "K": K, "group_size": group_size, "ms": milliseconds,
        "speedup": milliseconds["bf16"] / milliseconds["int4"],
        "of_ceiling": nbytes / bandwidth * 1e3 / milliseconds["int4"],
        "kernel": _kernel(M, N, K, group_size),
    }  # fmt: skip


def measure(threads: int) -> dict[str, Any]:
    """All layers with so many threads, in this process."""
    torch.set_num_threads(threads)
    bandwidth = read_bandwidth()
    sizes = [(N, K, group) for N, K in SHAPES for group in GROUPS if K % group == 0]
    linear = [line for size in sizes for line in layers(*size, bandwidth)]
    return {
        "threads": threads,
        "isa": os.environ.get("INT4Q_CPU_ISA", "best"),
        "read_gb_s": bandwidth / 1e9,
        "linear": linear,
    }


def _in_process(threads: int, isa: str) -> dict[str, Any]:
    held = ISAS[isa] if isa == "best" else {**ISAS[isa], "INT4Q_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-m", "int4q.bench.cpu", str(threads)],
        env={**os.environ, **held}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


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


def quantize_row(threads: int) -> dict[str, float]:
    """Seconds and peak memory (in multiples of the weight's bytes) to quantise 4096 x 4096."""
    done = subprocess.run(
        [sys.executable, "-c", _QUANTIZE, str(threads)], capture_output=True, text=True, check=True
    )
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def cpu_name() -> str:
    """Of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def run(out: Path, threads: int | None = None) -> dict[str, Any]:
    """Measure everything, write ``cpu.json``, ``.md`` and ``.png`` into ``out``, print the table.

    The best instruction set with one thread and with ``threads`` (torch's by default), the others
    with ``threads``.
    """
    threads = threads or torch.get_num_threads()
    settings = [(threads, isa) for isa in ISAS] + [(1, "best")] * (threads > 1)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "int4q": int4q.__version__,
        "native": native_cpu.load()[1] or "loaded",
        "quantize": quantize_row(threads),
        "runs": [_in_process(*setting) for setting in settings],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "cpu.md").write_text(cpu_report.markdown(result))
    cpu_report.plot(result, out / "cpu.png")
    print(cpu_report.markdown(result))
    return result


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
