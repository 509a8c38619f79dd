"""A measured run as lines, a Markdown table and plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

BASE = "int4q plain"


def pyplot() -> Any:
    """``matplotlib.pyplot`` drawing to files, or ``None``, said, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _floor_us(row: dict, ceilings: dict) -> tuple[float, float]:
    """What the bytes and what the arithmetic alone would take, microseconds."""
    return (
        row["bytes"] / ceilings["read_tb_s"] / 1e6,
        row["flops"] / ceilings["bf16_tflop_s"] / 1e6,
    )


def line(row: dict, ceilings: dict) -> str:
    """One row for the terminal."""
    us = row["us"]
    cells = [f"{row['N']}x{row['K']} g{row['group_size']} M={row['M']}"]
    cells += [f"{name} {t:.1f}" for name, t in us.items()]
    if BASE in us:
        fraction = max(_floor_us(row, ceilings)) / us[BASE]
        cells.append(f"{fraction:.0%} of the ceiling")
    cells += [f"{n}: {why}" for n, why in row["not_timed"].items() if not why.startswith("not run")]
    return "; ".join(cells)


def geometric_mean(values: list[float]) -> float:
    """``nan`` for none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def markdown(result: dict) -> str:
    """Microseconds of everything, and ratios of each to int4q's plain weight."""
    ceilings = result["ceilings"]
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["us"]))
    lines = [
        f"{result['gpu']}; torch {result['torch']}, CUDA {result['cuda']}, int4q "
        f"{result['int4q']}, {result['date']}. Measured ceilings: read "
        f"{ceilings['read_tb_s']:.2f} TB/s, copy {ceilings['copy_tb_s']:.2f} TB/s, bf16 matrix "
        f"product {ceilings['bf16_tflop_s']:.0f} TFLOP/s.",
        "",
        "Median microseconds of one call, CUDA-graph replays, cold L2, zero points included; in "
        "brackets the time over int4q's. `ceiling`: the larger of what the bytes and the "
        "arithmetic take at the measured ceilings, over int4q's time.",
        "",
        "| N x K | group | M | " + " | ".join(names) + " | TB/s | TFLOP/s | ceiling |",
        "|---" * (len(names) + 6) + "|",
    ]
    for row in result["rows"]:
        us = row["us"]
        base = us.get(BASE)
        cells = []
        for name in names:
            if name not in us:
                cells.append("wrong" if "wrong" in row["not_timed"].get(name, "") else "-")
            elif name == BASE or base is None:
                cells.append(f"{us[name]:.1f}")
            else:
                cells.append(f"{us[name]:.1f} ({us[name] / base:.2f})")
        end = ["-"] * 3
        if base:
            rate, flops = row["bytes"] / base / 1e6, row["flops"] / base / 1e6
            end = [f"{rate:.2f}", f"{flops:.1f}", f"{max(_floor_us(row, ceilings)) / base:.0%}"]
        head = [f"{row['N']} x {row['K']}", str(row["group_size"]), str(row["M"])]
        lines.append("| " + " | ".join(head + cells + end) + " |")
    notes = ["", result["note"]] if "note" in result else []
    return "\n".join(lines + notes + ["", *_means(result, names)]) + "\n"


def _means(result: dict, names: list[str]) -> list[str]:
    peers = [n for n in names if not n.startswith("int4q")]
    if not peers:
        return []
    lines = ["Geometric mean over the shapes of each peer's time over int4q's:", ""]
    lines += ["| M | group | " + " | ".join(peers) + " |", "|---" * (len(peers) + 2) + "|"]
    keys = sorted({(row["M"], row["group_size"]) for row in result["rows"]})
    for M, group in keys:
        rows = [r for r in result["rows"] if (r["M"], r["group_size"]) == (M, group)]
        cells = []
        for name in peers:
            pairs = [r["us"] for r in rows if name in r["us"] and BASE in r["us"]]
            mean = geometric_mean([u[name] / u[BASE] for u in pairs])
            cells.append("-" if math.isnan(mean) else f"{mean:.2f}")
        lines.append(f"| {M} | {group} | " + " | ".join(cells) + " |")
    return lines


def plots(result: dict, out: Path) -> list[Path]:
    """Time against M for each shape and group, one line a library, with both floors."""
    if (plt := pyplot()) is None:
        return []
    paths = []
    for group in sorted({row["group_size"] for row in result["rows"]}):
        rows = [r for r in result["rows"] if r["group_size"] == group]
        shapes = list(dict.fromkeys((r["N"], r["K"]) for r in rows))
        columns = min(3, len(shapes))
        figure, grid = plt.subplots(
            -(-len(shapes) // columns), columns, squeeze=False, layout="constrained",
            figsize=(5 * columns, 4 * -(-len(shapes) // columns)),
        )  # fmt: skip
        for axes in grid.flat[len(shapes) :]:
            axes.set_visible(False)
        for axes, (N, K) in zip(grid.flat, shapes, strict=False):
            of_shape = [r for r in rows if (r["N"], r["K"]) == (N, K)]
            _plot_shape(axes, of_shape, result["ceilings"])
            axes.set_title(f"N = {N}, K = {K}, group {group}", fontsize=10)
        grid.flat[0].legend(fontsize=7)
        paths.append(out / f"gpu-group{group}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _plot_shape(axes, rows: list[dict], ceilings: dict) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    for name in names:
        points = [(r["M"], r["us"][name]) for r in rows if name in r["us"]]
        own = name.startswith("int4q")
        axes.plot(*zip(*points, strict=True), "o-" if own else ".--", ms=4, label=name,
                  lw=2 if own else 1)  # fmt: skip
    floors = [max(_floor_us(r, ceilings)) for r in rows]
    axes.plot([r["M"] for r in rows], floors, color="black", lw=1, ls=":", label="memory and "
              "matrix floor")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("M")
    axes.set_ylabel("microseconds")
    axes.grid(color="#eeeeee")
