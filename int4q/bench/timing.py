"""GPU time of one call: CUDA-graph replays that rotate over copies of the weight (cold L2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from statistics import median

import torch

from int4q._version import __version__

COLD_BYTES = 160 << 20
"""The copies of a weight that calls rotate over hold at least this much, 2.5 times an H200's L2."""
REPLAYS = 7
_GRAPH_CALLS = 24
_LONG_US = 3000.0


def machine() -> dict[str, str]:
    """What a GPU result says of where it was measured: date, GPU and versions."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "int4q": __version__,
    }


def copies(weight_bytes: int) -> int:
    """How many copies of a weight keep the L2 cache cold: at least ``COLD_BYTES`` together."""
    return max(2, math.ceil(COLD_BYTES / max(1, weight_bytes)))


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, in microseconds.

    Args:
        calls: the same work on different copies of the weight; all are captured, in turn, into
            one CUDA graph, which is replayed ``REPLAYS`` times.
    """
    once = _seconds(calls[:1]) * 1e6
    count = len(calls) if once > _LONG_US else max(len(calls), _GRAPH_CALLS)
    count = min(count, 4) if once > _LONG_US else math.ceil(count / len(calls)) * len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS if once <= _LONG_US else 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return median(times)


def _seconds(calls: Sequence[Callable[[], object]]) -> float:
    for call in calls:  # warm up: compilation, handles
        call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    calls[0]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings() -> dict[str, float]:
    """Measured limits of this GPU: copy and read bandwidth (TB/s), bf16 matrix rate (TFLOP/s)."""
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    other = torch.empty_like(big)
    words = big.view(torch.int64)
    copy = microseconds([lambda: other.copy_(big)] * 2)
    read = microseconds([lambda: words.sum()] * 2)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matrix = microseconds([lambda: a @ b] * 2)
    return {
        "copy_tb_s": 2 * big.nbytes / copy / 1e6,
        "read_tb_s": big.nbytes / read / 1e6,
        "bf16_tflop_s": 2 * 8192**3 / matrix / 1e6,
    }
