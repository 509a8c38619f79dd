"""Decode (M = 1 to 8) on a GPU: what the layout of the scales and int8 activations are worth.

* The same kernel on scales ``[n_groups, N]`` (plain) and ``[N, n_groups]`` (coalesced): the CUDA
  C++ engine, which copies scales to shared memory in either layout, and the plain-Triton W4A8
  kernel, whose lanes load their own.
* The fraction of the floor (``floor.py``), measured on as many bytes in the same run.
* The ratio to Humming, where installed.
* The relative error of W4A8 and W4A16 against float32 arithmetic on the same weights.

Every result is checked before it is timed. Writes ``decode.json`` and ``decode.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from int4q import CudaCoalescedInt4Tensor, Int4Tensor
from int4q.bench import timing
from int4q.bench.peers import PEERS
from int4q.bench.report import geometric_mean
from int4q.bench.shapes import GROUPS, Shape
from int4q.kernels.cuda import decode as cuda_decode
from int4q.kernels.triton import tuned
from int4q.kernels.weight import Weight

SHAPES = (
    Shape(21504, 5376, "Gemma 3 27B gate_proj or up_proj"),
    Shape(5376, 21504, "Gemma 3 27B down_proj"),
    Shape(28672, 4096, "Llama 3.1 8B gate_up_proj"),
    Shape(4096, 4096, "Llama 3.1 8B o_proj"),
)
ROWS = (1, 2, 4, 8)
LAYOUTS = ("plain", "coalesced")
ENGINES = ("C++ W4A16", "C++ W4A8", "Triton W4A8")
WIDE = "Triton W4A8 plain, 8 rows"
"""Plain scales suit a thread that takes 8 rows: 8 scales of a group come with one 16-byte load."""
_PEER = next(p for p in PEERS if p.name == "Humming")
_OUTLIERS = {"normal": 1.0, "one channel x100": 1e2, "one channel x10000": 1e4}
_TOLERANCE = {"C++ W4A16": 6e-3}
"""Of bf16 outputs; int8 activations get 1.5e-2."""


def engine(name: str) -> Callable[..., Tensor]:
    """``(x, weight, ...) -> y`` of an entry of ``ENGINES``."""
    if name.startswith("Triton"):
        from int4q.kernels.triton import w4a8 as triton_w4a8

        return triton_w4a8.linear
    dtype = torch.int8 if name.endswith("A8") else torch.bfloat16
    return partial(cuda_decode.linear, activation=dtype)


class Copies:
    """Copies of one weight in both layouts, its peer, and its values."""

    def __init__(self, shape: Shape, group_size: int, peer: bool):
        w = (torch.randn(shape.N, shape.K, device="cuda") / shape.K**0.5).bfloat16()
        self.tensor = t = Int4Tensor.from_hp(w, [1, group_size])
        n = timing.copies(t.qdata.nbytes)
        plain = [t.clone() for _ in range(n)]
        coalesced = [CudaCoalescedInt4Tensor.from_int4_tensor(p) for p in plain]
        self.parts = {
            name: [Weight(*p._weight_parts(), group_size) for p in copies]
            for name, copies in zip(LAYOUTS, (plain, coalesced), strict=True)
        }
        self.peer = _PEER.prepare(t, w, n) if peer else None
        self.exact, self.original = t.dequantize(torch.float32), w.float()

    def calls(self, x: Tensor) -> dict[str, tuple[list[Callable[[], Tensor]], Tensor, float]]:
        """Name -> one call a copy, the exact result, the tolerance."""
        found = {}
        for name in ENGINES:
            for layout in LAYOUTS:
                run, tolerance = engine(name), _TOLERANCE.get(name, 1.5e-2)
                calls = [lambda p=p, r=run: r(x, p) for p in self.parts[layout]]
                found[f"{name} {layout}"] = calls, self.exact, tolerance
        if x.shape[0] <= 2:  # (more rows of activations spill)
            wide = tuned.W4A8Config(8, 4)
            calls = [
                lambda p=p: engine("Triton W4A8")(x, p, config=wide) for p in self.parts["plain"]
            ]
            found[WIDE] = calls, self.exact, 1.5e-2
        if self.peer is not None:
            found[_PEER.name] = self.peer(x), self.original, _PEER.tolerance
        return found


def relative_error(y: Tensor, exact: Tensor) -> float:
    """``||y - exact|| / ||exact||``."""
    return float((y.float() - exact).norm() / exact.norm())


def row(shape: Shape, weight: Copies, M: int, floor_us: float) -> dict:
    """Times of every contender at this M; a wrong one has none."""
    x = torch.randn(M, shape.K, device="cuda", dtype=torch.bfloat16)
    us, errors, wrong = {}, {}, {}
    for name, (calls, values, tolerance) in weight.calls(x).items():
        errors[name] = relative_error(calls[0](), F.linear(x.float(), values))
        if errors[name] < tolerance:
            us[name] = timing.microseconds(calls)
        else:
            wrong[name] = f"relative error {errors[name]:.3g}"
    t = weight.tensor
    return {
        "N": shape.N, "K": shape.K, "group_size": t.group_size, "M": M, "bytes": t.nbytes,
        "floor_us": floor_us, "us": us, "relative_error": errors, "wrong": wrong,
    }  # fmt: skip


def numerics(t: Int4Tensor, M: int = 4) -> list[dict]:
    """Relative errors of W4A8 and W4A16 on float32 activations (no rounding of the output)."""
    weights = {
        name: CudaCoalescedInt4Tensor.from_int4_tensor(t, dtype)
        for name, dtype in (("W4A8", torch.int8), ("W4A16", torch.bfloat16))
    }
    values = t.dequantize(torch.float32)
    found = []
    for label, factor in _OUTLIERS.items():
        x = torch.randn(M, t.shape[1], device=t.device)
        x[:, t.shape[1] // 3] *= factor
        exact = F.linear(x.double(), values.double())
        errors = {
            name: float((F.linear(x, w).double() - exact).norm() / exact.norm())
            for name, w in weights.items()
        }
        found.append({"N": t.shape[0], "K": t.shape[1], "group_size": t.group_size,
                      "activations": label, "relative_error": errors})  # fmt: skip
    return found


def run(
    out: Path, groups=GROUPS, shapes=SHAPES, rows=ROWS, peers: tuple[str, ...] | None = None
) -> dict:
    """Measure, write ``decode.json`` and ``decode.md`` into ``out``, print the table.

    Humming is run where it is installed, unless ``peers`` leaves it out.
    """
    from int4q.bench import floor

    out.mkdir(parents=True, exist_ok=True)
    missing = _PEER.missing() if peers is None or _PEER.name in peers else "left out"
    result = {
        **timing.machine(),
        "not_run": {_PEER.name: missing} if missing else {},
        "rows": [],
        "numerics": [],
    }
    for group_size in groups:
        for shape in shapes:
            torch.manual_seed(shape.N + group_size)
            weight = Copies(shape, group_size, peer=missing is None)
            floor_us = floor.microseconds(weight.tensor.nbytes)
            for M in rows:
                result["rows"].append(row(shape, weight, M, floor_us))
                print(line(result["rows"][-1]), flush=True)
            result["numerics"] += numerics(weight.tensor)
            del weight
            torch.cuda.empty_cache()
            (out / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (out / "decode.md").write_text(text)
    print(text)
    return result


# --- the report ---------------------------------------------------------------------------------


def line(row: dict) -> str:
    """One row for the terminal."""
    cells = [f"{name} {us:.1f}" for name, us in row["us"].items()]
    cells += [f"{name} WRONG: {why}" for name, why in row["wrong"].items()]
    head = f"{row['N']}x{row['K']} g{row['group_size']} M={row['M']}: floor {row['floor_us']:.1f}"
    return "; ".join([head, *cells])


def markdown(result: dict) -> str:
    """Times, the layout's worth, and errors."""
    rows = result["rows"]
    names = list(dict.fromkeys(name for r in rows for name in r["us"]))
    lines = [
        f"{result['gpu']}; torch {result['torch']}, CUDA {result['cuda']}, int4q "
        f"{result['int4q']}, {result['date']}.",
        "",
        "Median microseconds of one call, CUDA-graph replays, cold L2, zero points included. "
        "`floor`: a kernel that only reads as many bytes, same run; in brackets the floor over "
        "the time.",
        "",
        "| N x K | group | M | floor | " + " | ".join(names) + " |",
        "|---" * (len(names) + 4) + "|",
    ]
    for r in rows:
        cells = [
            f"{r['us'][n]:.1f} ({r['floor_us'] / r['us'][n]:.0%})" if n in r["us"]
            else ("wrong" if n in r["wrong"] else "-")
            for n in names
        ]  # fmt: skip
        head = [f"{r['N']} x {r['K']}", str(r["group_size"]), str(r["M"]), f"{r['floor_us']:.1f}"]
        lines.append("| " + " | ".join(head + cells) + " |")
    if "note" in result:
        lines += ["", result["note"]]
    return "\n".join([*lines, "", *_worth(rows), "", *_errors(result["numerics"])]) + "\n"


def _ratio(rows: list[dict], over: str, under: str) -> str:
    pairs = [r["us"] for r in rows if over in r["us"] and under in r["us"]]
    return f"{geometric_mean([us[over] / us[under] for us in pairs]):.2f}" if pairs else "-"


def _worth(rows: list[dict]) -> list[str]:
    columns = [(f"{e}: plain / coalesced", f"{e} plain", f"{e} coalesced") for e in ENGINES]
    columns.append(("Triton W4A8: plain, 8 rows / coalesced", WIDE, f"{ENGINES[2]} coalesced"))
    columns += [(f"{_PEER.name} / {e}", _PEER.name, f"{e} coalesced") for e in ENGINES[:2]]
    lines = [
        "Ratios of times, geometric mean over the shapes (above 1: the second is faster):",
        "",
        "| group | M | " + " | ".join(title for title, _, _ in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for group, M in sorted({(r["group_size"], r["M"]) for r in rows}):
        of = [r for r in rows if (r["group_size"], r["M"]) == (group, M)]
        cells = [_ratio(of, over, under) for _, over, under in columns]
        lines.append(f"| {group} | {M} | " + " | ".join(cells) + " |")
    return lines


def _errors(found: list[dict]) -> list[str]:
    lines = [
        "Relative error `||y - exact|| / ||exact||` against float64 on the same 4-bit weights, "
        "float32 activations, 4 rows:",
        "",
        "| N x K | group | activations | W4A8 | W4A16 |",
        "|---|---|---|---|---|",
    ]
    for r in found:
        e = r["relative_error"]
        lines.append(
            f"| {r['N']} x {r['K']} | {r['group_size']} | {r['activations']} | "
            f"{e['W4A8']:.1e} | {e['W4A16']:.1e} |"
        )
    return lines
