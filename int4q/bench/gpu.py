"""GPU: ``F.linear`` on a plain 4-bit weight (zero points included) against the peers installed.

For every shape, group size and M: check the result, then time it (``timing.py``), then print
microseconds, TB/s, TFLOP/s, the fraction of the measured ceiling, and the ratio to each peer of
the same run. Writes JSON, a Markdown table and a plot of each shape.
"""

from __future__ import annotations

import json
import math
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from int4q import CudaCoalescedInt4Tensor, Int4Tensor
from int4q.bench import timing
from int4q.bench.peers import PEERS, Peer
from int4q.bench.shapes import GROUPS, ROWS, SETS, Shape
from int4q.kernels import reference
from int4q.kernels.weight import Weight
from int4q.packing import signed_to_offset

OURS = ("int4q plain", "int4q coalesced W4A16", "int4q coalesced W4A8", "int4q symmetric")
_TOLERANCE = {"int4q coalesced W4A8": 1.5e-2}


def _ours(t: Int4Tensor, n: int) -> dict[str, object]:
    """Name -> (x -> one callable a copy)."""
    plain = [t.clone() for _ in range(n)]
    coalesced = CudaCoalescedInt4Tensor.from_int4_tensor
    a16 = [coalesced(t.clone(), torch.bfloat16) for t in plain]
    a8 = [coalesced(t.clone(), torch.int8) for t in plain]
    symmetric = [(signed_to_offset(t.qdata), t.scale.mT.contiguous()) for t in plain]

    def symmetric_calls(x: Tensor):
        op = torch.ops.int4q.int4_matmul
        return [lambda s=s: op(x, *s, t.group_size) for s in symmetric]

    return {
        OURS[0]: lambda x: [lambda w=w: F.linear(x, w) for w in plain],
        OURS[1]: lambda x: [lambda w=w: F.linear(x, w) for w in a16],
        OURS[2]: lambda x: [lambda w=w: F.linear(x, w) for w in a8],
        OURS[3]: symmetric_calls,
    }


def _relative_error(y: Tensor, exact: Tensor) -> float:
    error = (y.float() - exact).norm() / exact.norm()
    return float(error) if torch.isfinite(error) else math.inf


class Bench:
    """One weight: ours and the peers, prepared once, run at every M."""

    def __init__(self, shape: Shape, group_size: int, ours: tuple[str, ...], peers: list[Peer]):
        self.shape, self.group_size = shape, group_size
        w = (torch.randn(shape.N, shape.K, device="cuda") / shape.K**0.5).bfloat16()
        t = Int4Tensor.from_hp(w, [1, group_size])
        n = timing.copies(t.qdata.nbytes)
        self.weight_bytes, self.original = t.nbytes, w
        self.values = t.dequantize(torch.float32)
        symmetric = Weight(t.qdata, t.scale, None, group_size)
        self.symmetric_values = reference.dequantize(symmetric, torch.bfloat16).float()
        self.calls = {k: v for k, v in _ours(t, n).items() if k in ours}
        self.problems: dict[str, str] = {}
        self.peers = {}
        for peer in peers:
            try:
                self.calls[peer.name] = peer.prepare(t, w, n)
                self.peers[peer.name] = peer
            except Exception as error:  # a peer that breaks is reported, not fatal
                self.problems[peer.name] = f"{type(error).__name__}: {error}"[:200]

    def _exact(self, name: str, x: Tensor) -> Tensor:
        peer = self.peers.get(name)
        original = peer is not None and (peer.own_values or name.startswith("cuBLAS"))
        w = self.original.float() if original else self.values
        return F.linear(x.float(), self.symmetric_values if name == OURS[3] else w)

    def _tolerance(self, name: str) -> float:
        peer = self.peers.get(name)
        return peer.tolerance if peer else _TOLERANCE.get(name, 6e-3)

    def row(self, M: int) -> dict:
        """Times at this M, and why one has none."""
        x = torch.randn(M, self.shape.K, device="cuda", dtype=torch.bfloat16)
        us, errors, problems = {}, {}, dict(self.problems)
        for name, make in self.calls.items():
            peer = self.peers.get(name)
            if peer is not None and peer.largest_M < M:
                problems[name] = f"not run above M = {peer.largest_M}"
                continue
            try:
                calls = make(x)
                errors[name] = _relative_error(calls[0](), self._exact(name, x))
                if errors[name] > self._tolerance(name):
                    problems[name] = f"wrong: relative error {errors[name]:.3g}"
                    continue
                us[name] = timing.microseconds(calls)
            except Exception as error:
                problems[name] = f"{type(error).__name__}: {error}"[:200]
                if name in OURS:
                    traceback.print_exc()
        flops, moved = 2 * M * self.shape.N * self.shape.K, self.weight_bytes
        moved += 2 * M * (self.shape.N + self.shape.K)
        return {
            "N": self.shape.N, "K": self.shape.K, "group_size": self.group_size, "M": M, "us": us,
            "relative_error": errors, "not_timed": problems, "flops": flops, "bytes": moved,
        }  # fmt: skip


def run(
    out: Path,
    shapes: str = "core",
    groups: tuple[int, ...] = GROUPS,
    rows: tuple[int, ...] = ROWS,
    peers: tuple[str, ...] | None = None,
    ours: tuple[str, ...] = OURS[:1],
) -> dict:
    """Measure, write ``gpu.json``, ``gpu.md`` and plots into ``out``, print the table."""
    from int4q.bench import report

    out.mkdir(parents=True, exist_ok=True)
    wanted = [p for p in PEERS if peers is None or p.name in peers]
    missing = {p.name: reason for p in wanted if (reason := p.missing())}
    result = {
        **timing.machine(),
        "not_installed": missing,
        "ceilings": timing.ceilings(),
        "rows": [],
    }
    for shape in SETS[shapes]:
        for group_size in groups:
            torch.manual_seed(shape.N + group_size)
            bench = Bench(shape, group_size, ours, [p for p in wanted if p.name not in missing])
            for M in rows:
                result["rows"].append(bench.row(M))
                print(report.line(result["rows"][-1], result["ceilings"]), flush=True)
            del bench
            torch.cuda.empty_cache()
            (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "gpu.md").write_text(report.markdown(result))
    report.plots(result, out)
    return result
