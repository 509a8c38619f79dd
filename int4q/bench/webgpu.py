"""WebGPU decode against a plain copy shader: GB/s of one adapter, timed by its own clock.

    python -m int4q.bench.webgpu [--json FILE]

Every call reads another copy of the weight, so that no cache holds it, and all calls of a figure
are one submission. ``serial``: each call waits for the one before, as the layers of a model do
(they write the same buffer). ``overlapped``: calls may run into each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from statistics import median

import numpy as np
import torch

import int4q
from int4q.bench.q4gsw_sweep import ramp
from int4q.kernels.webgpu import COLUMNS, WebGPULinear
from int4q.kernels.webgpu.device import Gpu, default_gpu

PREFILL = (4096, 2048, 2048)  # M, K, N
SHAPES = {"gate_up_proj": (2048, 8192), "lm_head": (2048, 128256)}  # K, N
GROUPS = (32, 128)
COLD_BYTES = 256 << 20
"""Copies of a weight hold at least this much together: several times a large L2 cache."""
COPY_BYTES = 256 << 20
CALLS, REPEATS = 40, 7
TOLERANCE = {"float32": 2e-5, "float16": 4e-3}


class Clock:
    """Time on the adapter between the two ends of a compute pass."""

    def __init__(self, gpu: Gpu):
        import wgpu

        self.gpu = gpu
        self.calls, self.repeats = (2, 2) if gpu.software else (CALLS, REPEATS)
        self._queries = gpu.device.create_query_set(type="timestamp", count=2)
        usage = wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
        self._ticks = gpu.device.create_buffer(size=16, usage=usage)

    def seconds(self, encode: Callable[[object], None]) -> float:
        """One pass with what ``encode(pass)`` puts into it."""
        encoder = self.gpu.device.create_command_encoder()
        stamps = {
            "query_set": self._queries,
            "beginning_of_pass_write_index": 0,
            "end_of_pass_write_index": 1,
        }
        work = encoder.begin_compute_pass(timestamp_writes=stamps)
        encode(work)
        work.end()
        encoder.resolve_query_set(self._queries, 0, 2, self._ticks, 0)
        queue = self.gpu.device.queue
        queue.submit([encoder.finish()])
        begin, end = np.frombuffer(queue.read_buffer(self._ticks), np.uint64)
        return float(end - begin) * 1e-9

    def per_call(self, encode: Callable[[object, int], None]) -> float:
        """Median seconds of one of many calls ``encode(pass, i)``."""

        def calls(work):
            for i in range(self.calls):
                encode(work, i)

        self.seconds(calls)
        return median(self.seconds(calls) for _ in range(self.repeats)) / self.calls


def copy_gb_s(clock: Clock) -> float:
    """Bytes read and written a second by the copy shader, GB/s."""
    gpu = clock.gpu
    size = min(COPY_BYTES, gpu.max_bytes) // 4096 * 4096
    code = (resources.files("int4q.bench") / "copy.wgsl").read_text()
    module = gpu.device.create_shader_module(code=code)
    compute = {"module": module, "entry_point": "main"}
    pipeline = gpu.device.create_compute_pipeline(layout="auto", compute=compute)
    ends = [gpu.buffer(size=size), gpu.buffer(size=size)]
    entries = [{"binding": i, "resource": {"buffer": b}} for i, b in enumerate(ends)]
    layout = pipeline.get_bind_group_layout(0)
    group = gpu.device.create_bind_group(layout=layout, entries=entries)
    groups = size // 4096  # 256 threads of 16 bytes
    wide = min(groups, 1 << 15)

    def encode(work, i):
        work.set_pipeline(pipeline)
        work.set_bind_group(0, group)
        work.dispatch_workgroups(wide, -(-groups // wide))

    return 2 * size / clock.per_call(encode) / 1e9


def decode_row(clock: Clock, name: str, group_size: int, precision: str = "float32") -> dict:
    """One layer: microseconds a call and GB/s of the bytes it must read and write."""
    gpu = clock.gpu
    K, N = SHAPES[name]
    g = torch.Generator().manual_seed(0)
    weights = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=g)
    scales = (torch.rand(K // group_size, N, generator=g) + 0.1) / 64
    options = {"gpu": gpu, "precision": precision}
    first = WebGPULinear(weights, scales, group_size, **options)
    copies = max(2, math.ceil(COLD_BYTES / first.nbytes))
    others = (WebGPULinear(weights, scales, group_size, **options) for _ in range(copies - 1))
    layers = [first, *others]
    _check(first, (weights, scales, group_size), 1, TOLERANCE[precision])
    read = first.nbytes + 4 * (K + N)
    row = {"layer": name, "K": K, "N": N, "group_size": group_size,
           "precision": precision, "copies": copies}  # fmt: skip
    pipeline = gpu.pipeline("q4gsw_decode", group_size, first.scale, first.tile)
    shared = gpu.buffer(size=4 * N)
    for kind in ("serial", "overlapped"):
        groups = []
        for layer in layers:
            steps = layer.plan(1)
            y = None if kind == "overlapped" else shared
            groups.append(
                [(c, layer.bind(c, 1, steps.x, y or own)) for c, own, _ in steps.steps]
            )  # fmt: skip

        def encode(work, i, groups=groups):
            work.set_pipeline(pipeline)
            for chunk, group in groups[i % copies]:
                work.set_bind_group(0, group)
                work.dispatch_workgroups(chunk.padded_columns // COLUMNS, 1)

        seconds = clock.per_call(encode)
        row[f"{kind}_us"] = 1e6 * seconds
        row[f"{kind}_gb_s"] = read / seconds / 1e9
    return row


def prefill_row(clock: Clock, precision: str) -> dict:
    """Many rows on a square layer: milliseconds on the adapter and TFLOP/s."""
    gpu = clock.gpu
    M, K, N = PREFILL if not gpu.software else (64, *PREFILL[1:])
    g = torch.Generator().manual_seed(0)
    weights = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=g)
    scales = (torch.rand(K // 32, N, generator=g) + 0.1) / 64
    layer = WebGPULinear(weights, scales, 32, gpu=gpu, precision=precision)
    _check(layer, (weights, scales, 32), 64, TOLERANCE[precision])
    plan = layer.plan(M)
    seconds = clock.per_call(lambda work, i: layer.encode(work, plan))
    return {"M": M, "K": K, "N": N, "precision": precision, "ms": 1e3 * seconds,
            "tflop_s": 2 * M * K * N / seconds / 1e12}  # fmt: skip


def _check(layer: WebGPULinear, weight: tuple, rows: int, tolerance: float) -> None:
    """No speed without a right result: against the CPU's, relative to its root mean square."""
    x = ramp(rows, layer.in_features)
    exact = int4q.kernels.linear_q4gsw(x, *weight)
    error = ((layer(x) - exact).abs().max() / exact.square().mean().sqrt()).item()
    if not error <= tolerance:
        raise RuntimeError(f"the WebGPU result is wrong: relative error {error}")


def measure(gpu: Gpu) -> dict:
    """Everything, as written to the JSON file."""
    clock = Clock(gpu)
    precisions = ["float32"] + ["float16"] * gpu.has_f16
    cases = itertools.product(precisions, SHAPES, GROUPS)
    rows = [decode_row(clock, name, group, precision) for precision, name, group in cases]
    return {
        "adapter": gpu.name,
        "int4q": int4q.__version__,
        "copy_gb_s": copy_gb_s(clock),
        "rows": rows,
        "prefill": [prefill_row(clock, precision) for precision in precisions],
    }


def markdown(result: dict) -> str:
    """The table of the docs."""
    copy = result["copy_gb_s"]
    lines = [
        f"{result['adapter']}; copy shader {copy:.0f} GB/s (bytes read and written).",
        "",
        "| layer | K -> N | group | precision | serial us | GB/s | of copy "
        "| overlapped us | GB/s | of copy |",
        "|---" * 10 + "|",
    ]
    for row in result["rows"]:
        cells = [row["layer"], f"{row['K']} -> {row['N']}", row["group_size"], row["precision"]]
        for kind in ("serial", "overlapped"):
            rate = row[f"{kind}_gb_s"]
            cells += [f"{row[f'{kind}_us']:.1f}", f"{rate:.0f}", f"{rate / copy:.0%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| prefill | precision | ms | TFLOP/s |", "|---|---|---|---|"]
    for row in result["prefill"]:
        shape = f"{row['M']} x {row['K']} -> {row['N']}"
        times = f"{row['ms']:.2f} | {row['tflop_s']:.2f}"
        lines.append(f"| {shape} | {row['precision']} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gpu = default_gpu()
    if not gpu.has_timestamps:
        raise SystemExit(f"{gpu.name} has no timestamp queries")
    result = measure(gpu)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
