"""The table and the plot of ``int4q bench cpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from int4q.bench.report import pyplot


def markdown(result: dict[str, Any]) -> str:
    """The tables of ``result``, one for each instruction set and number of threads."""
    lines = [
        f"CPU: {result['cpu']}; torch {result['torch']}, int4q {result['int4q']}, "
        f"{result['date']}. Compiled kernels: {result['native']}.",
        "",
        f"Quantising 4096 x 4096 bf16: {result['quantize']['seconds']:.2f} s, peak memory above "
        f"the input {result['quantize']['peak_over_weight']:.2f} times the weight's bytes.",
    ]
    for run in result["runs"]:
        lines += ["", *_table(run)]
    return "\n".join(lines) + "\n"


def _table(run: dict[str, Any]) -> list[str]:
    rows = sorted({line["M"] for line in run["linear"]})
    lines = [
        f"Instruction set {run['isa']}, {run['threads']} threads, which read "
        f"{run['read_gb_s']:.1f} GB/s from memory. Milliseconds in 4 bits; in brackets how many "
        "times faster than `F.linear` in bf16; up to 4 rows also what reading the weight's bytes "
        "at that bandwidth would take, of the time.",
        "",
        "| N x K | group | " + " | ".join(f"M = {M}" for M in rows) + " |",
        "|---" * (len(rows) + 2) + "|",
    ]
    layers: dict[tuple[int, ...], dict[int, str]] = {}
    for line in run["linear"]:
        cell = f"{line['ms']['int4']:.3f} ({line['speedup']:.2f})"
        cell += f" {line['of_ceiling']:.0%}" if line["M"] <= 4 else ""
        layers.setdefault((line["N"], line["K"], line["group_size"]), {})[line["M"]] = cell
    for (N, K, group), cells in layers.items():
        shown = " | ".join(cells.get(M, "-") for M in rows)
        lines.append(f"| {N} x {K} | {group} | {shown} |")
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Times faster than bf16 over the rows of x, a line each instruction set; the first layer."""
    if (plt := pyplot()) is None:
        return
    first = result["runs"][0]["linear"][0]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in result["runs"]:
        for group in sorted({line["group_size"] for line in run["linear"]}):
            lines = [
                line
                for line in run["linear"]
                if (line["N"], line["K"], line["group_size"]) == (first["N"], first["K"], group)
            ]
            label = f"{run['isa']}, {run['threads']} threads, group {group}"
            speedups = [line["speedup"] for line in lines]
            axes.plot([line["M"] for line in lines], speedups, marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"rows of x ({first['N']} x {first['K']})")
    axes.set_ylabel("times faster than bf16")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
