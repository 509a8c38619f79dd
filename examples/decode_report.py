"""What ``decode.py`` prints and writes: where a step's time goes, a table, a picture."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import torch

import int4q

MARK = "spin_kernel"  # torch.cuda._sleep's kernel, which ends a section of the uncaptured step
GAPS = "gaps"
COLOURS = {
    "qkv": "#3465a4", "o": "#729fcf", "gate_up": "#204a87", "down": "#5c85bd",
    "attention, rope, norm": "#f57900", "silu, norm": "#fcaf3e", "lm_head": "#75507b",
    "embedding": "#8f5902", "argmax": "#c17d11", GAPS: "#d3d7cf",
}  # fmt: skip


# --- where the time goes --------------------------------------------------------------------------


def _device_events(work) -> list[tuple[str, float, float]]:
    """Name, start and end (us) of everything that ``work()`` runs on the GPU, in order."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        work()
        torch.cuda.synchronize()
    events = [
        (e.name, e.time_range.start, e.time_range.end)
        for e in profiler.events()
        if e.device_type == DeviceType.CUDA
    ]
    return sorted(events, key=lambda e: e[1])


def profile_step(model, replay, steps: int = 3) -> dict:
    """The time of a replayed step by section, and the timeline of a layer in its middle (headed by
    the kernel in front of it).

    A graph's kernels carry no labels, but they are those of the uncaptured step, in its order.
    Kernels overlap (each may start before the one in front has ended), so a kernel counts from
    where the one in front ended, to its own end; what no kernel covers is a gap. The sum is the
    step's time.

    Raises:
        RuntimeError: the graph ran another number of kernels than the uncaptured step.
    """
    names: list[str] = []

    def marked() -> None:
        for name in model.step():
            names.append(name)
            torch.cuda._sleep(1)

    labels, section = [], 0
    for kernel, _, _ in _device_events(marked):
        if MARK in kernel:
            section += 1
        else:
            labels.append((names[section], kernel))
    start = int(model.position)
    replay()

    def replays() -> None:
        for _ in range(steps):
            replay()

    events = _device_events(replays)
    model.rewind(start)
    if len(events) != steps * len(labels):
        raise RuntimeError(
            f"{steps} replays ran {len(events)} kernels, one uncaptured step {len(labels)}"
        )
    events = events[len(labels) * (steps - 1) :]
    spent: dict[str, float] = {}
    done = events[0][1]
    for (section_name, _), (_, begin, end) in zip(labels, events, strict=True):
        spent[GAPS] = spent.get(GAPS, 0.0) + max(0.0, begin - done)
        begin = max(begin, done)
        spent[section_name] = spent.get(section_name, 0.0) + max(0.0, end - begin)
        done = max(done, end)
    first = [i for i, (name, _) in enumerate(labels) if name == "qkv"]
    first = [i for i in first if labels[i - 1][0] != "qkv"]
    middle = (len(first) - 1) // 2
    begin, end = first[middle], first[middle + 1]
    zero = events[begin - 1][2]
    return {
        "kernels": len(labels),
        "ms": (done - events[0][1]) / 1e3,
        "sections_ms": {name: us / 1e3 for name, us in spent.items()},
        "layer_us": [
            [labels[i][0], labels[i][1][:60], events[i][1] - zero, events[i][2] - zero]
            for i in range(begin - 1, end)
        ],
    }


# --- text -----------------------------------------------------------------------------------------


def header(options: argparse.Namespace, bandwidth: float | None) -> dict:
    """What the figures were measured on and with."""
    on_gpu = options.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "int4q": int4q.__version__,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python examples/decode.py", *sys.argv[1:]]),
        "context": options.context,
        "tokens": options.tokens,
        "read_tb_s": bandwidth and bandwidth / 1e12,
        "rows": [],
    }


def _label(row: dict) -> str:
    group = f", group {row['group_size']}" if row["group_size"] else ""
    head = ", 4-bit head" if row["lm_head"] == "int4" else ""
    return row["variant"] + group + head


def line(row: dict) -> str:
    """One row for the terminal."""
    text = f"{row['preset']} {_label(row)}: {row['tokens_s']:.1f} tokens/s, {row['ms']:.3f} ms"
    if "fraction" in row:
        text += f", {row['fraction']:.0%} of what its bytes allow"
    text += f", {row['weight_gb']:.2f} GB of weights"
    if "logits_error" in row:
        text += f", logits off plain's by {row['logits_error']:.1e}"
    return text


def _table(rows: list[dict]) -> list[str]:
    base = rows[0]  # the one in high precision
    head = ["weights", "tokens/s", "ms a token", "of what its bytes allow",
            f"times {base['variant']}", "GB of weights", "logits off plain's"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            _label(row),
            f"{row['tokens_s']:.1f}",
            f"{row['ms']:.2f}",
            f"{row['fraction']:.0%}" if "fraction" in row else "-",
            f"{base['ms'] / row['ms']:.2f}",
            f"{row['weight_gb']:.2f}",
            f"{row['logits_error']:.1e}" if "logits_error" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if "floor_ms" in base:
        ratios = [f"{base['floor_ms'] / row['floor_ms']:.2f}" for row in rows[1:]]
        lines += ["", f"If all ran at the read bandwidth, times {base['variant']} would be (same "
                  f"order): {', '.join(ratios)}."]  # fmt: skip
    return lines


def _sections(rows: list[dict]) -> list[str]:
    rows = [r for r in rows if "profile" in r]
    if not rows:
        return []
    lines = ["", "Milliseconds of a step by part, from the CUDA trace of a graph replay:", "",
             "| weights | " + " | ".join(COLOURS) + " | sum | kernels |",
             "|---" * (len(COLOURS) + 3) + "|"]  # fmt: skip
    for row in rows:
        parts = row["profile"]["sections_ms"]
        cells = [_label(row)] + [f"{parts.get(name, 0.0):.3f}" for name in COLOURS]
        cells += [f"{row['profile']['ms']:.2f}", str(row["profile"]["kernels"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _layout_gain(rows: list[dict]) -> list[str]:
    speed = {(r["variant"], r["group_size"], r["lm_head"]): r["tokens_s"] for r in rows}
    gains = [
        f"{value / speed['plain W4A16', group, head]:.2f} (group {group}, head {head})"
        for (variant, group, head), value in speed.items()
        if variant == "coalesced W4A16" and ("plain W4A16", group, head) in speed
    ]
    lines = ["", "Tokens/s, coalesced over plain scales, both W4A16: " + ", ".join(gains) + "."]
    chosen = {(r["variant"], r["group_size"], r["lm_head"]): r["checked_tokens"] for r in rows}
    pairs = [
        (tokens, chosen["plain W4A16", group, head])
        for (variant, group, head), tokens in chosen.items()
        if variant == "coalesced W4A16" and ("plain W4A16", group, head) in chosen
    ]
    same = sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    every = sum(len(tokens) for tokens, _ in pairs)
    return [*lines, f"Of the first tokens that both choose, {same} of {every} are the same."]


NOTES = """\
Random weights: the text means nothing; the time does not depend on their values. Greedy decoding,
one sequence; a step, arg max and cache position included, is one CUDA graph. Before it is timed
the graph must choose the tokens that the uncaptured step chooses, and coalesced W4A16 must give
plain's logits (relative L2 error of the logits behind the prompt at most 2e-2; the column shows
it, and for W4A8 what int8 activations cost).

"What its bytes allow": all weights of the layers with scales and zero points, the output head, and
the keys and values of the context, at the read bandwidth measured in the same run. The output head
stays in 16 bits, as `quantize_` leaves it by default, in all rows but those with a "4-bit head".

Layers are Llama's (two norms, SiLU) in the named model's sizes. Norm weights are folded into the
linears; a norm's factor is applied after the linear, by the kernel that follows it, and the
residual is the linear's bias. A layer is then four linears and four small kernels: rotary embedding
with the cache write, attention over shares of the cache, their merge, and SiLU. `int4_plain_mm`
takes no bias: W4A8 adds its residuals in two more kernels, which also keep the next linear from
starting early (the gaps).

In the trace a kernel counts from the end of the one in front to its own end, as a 4-bit linear
starts, and fetches weights, while the kernels before it still run. Where the activations do not fit
into each thread block's memory, a linear is two kernels: one quantises them.

Other projects report 1.28 to 1.38 times the tokens/s for the coalesced layout. Their plain kernels
load a scale a lane, each from another cache line; int4q's read the scales of neighbouring rows as
whole vectors (large weights' through shared memory), which leaves the layout little to gain:
something at group 32 of the largest layers, nothing elsewhere.
"""


def markdown(result: dict) -> str:
    """The tables and what they mean."""
    lines = [
        f"{result['device']}; torch {result['torch']}, int4q {result['int4q']}, {result['date']}; "
        f"`{result['command']}`.",
        "",
        f"{result['tokens']} tokens behind a prompt of {result['context']}.",
    ]
    if result["read_tb_s"]:
        lines[-1] += f" Read bandwidth, measured: {result['read_tb_s']:.2f} TB/s."
    for preset in dict.fromkeys(row["preset"] for row in result["rows"]):
        rows = [r for r in result["rows"] if r["preset"] == preset]
        lines += ["", f"## {preset}", "", *_table(rows), *_layout_gain(rows), *_sections(rows)]
        if peaks := [f"{_label(r)} {r['build_peak_gb']:.1f}" for r in rows
                     if "build_peak_gb" in r and r["lm_head"] != "int4"]:  # fmt: skip
            lines += ["", "Most memory taken while building, GB: " + "; ".join(peaks) + "."]
    lines += ["", "![where the time goes](decode_e2e.png)"] * any(
        "profile" in row for row in result["rows"]
    )
    return "\n".join(lines) + "\n\n## Reading it\n\n" + NOTES


# --- files ----------------------------------------------------------------------------------------


def write(path: Path, content: dict | str) -> None:
    """JSON for a dict, else text; through a temporary file, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
    part.replace(path)


def write_all(folder: Path, result: dict) -> None:
    """``decode_e2e.json``, ``.md``, and ``.png`` where there is a profile and matplotlib."""
    write(folder / "decode_e2e.json", result)
    write(folder / "decode_e2e.md", markdown(result))
    if rows := [row for row in result["rows"] if "profile" in row]:
        plot(rows, folder / "decode_e2e.png")


def plot(rows: list[dict], path: Path) -> None:
    """Left: a step by part, one bar a row; right: one layer of some of the rows on a time axis."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    presets = list(dict.fromkeys(row["preset"] for row in rows))
    figure, grid = plt.subplots(
        len(presets), 2, squeeze=False, figsize=(15, 4 * len(presets)), layout="constrained"
    )
    for (bars, times), preset in zip(grid, presets, strict=True):
        of_preset = [row for row in rows if row["preset"] == preset]
        _plot_bars(bars, of_preset)
        bars.set_title(f"{preset}: one decode step, ms", loc="left")
        smallest = min((r["group_size"] for r in of_preset if r["group_size"]), default=None)
        shown = [r for r in of_preset if r["group_size"] == smallest]
        _plot_layer(times, shown)
        times.set_title("a layer in its middle, us; pale: started before its turn", loc="left")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), loc="outside lower center", ncols=len(COLOURS))
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
    plt.close(figure)


def _plot_bars(axes, rows: list[dict]) -> None:
    for y, row in enumerate(rows):
        left = 0.0
        for name, colour in COLOURS.items():
            width = row["profile"]["sections_ms"].get(name, 0.0)
            axes.barh(y, width, left=left, color=colour)
            left += width
        axes.plot([row["floor_ms"]] * 2, [y - 0.45, y + 0.45], color="black", lw=1.5)
        axes.text(left, y, f" {row['tokens_s']:.0f} tokens/s", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("black line: what the bytes allow", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_layer(axes, rows: list[dict]) -> None:
    """Solid from the end of the kernel in front; pale where both run."""
    for y, row in enumerate(rows):
        (*_, origin), *kernels = row["profile"]["layer_us"]
        done = origin
        for i, (name, _, begin, end) in enumerate(kernels):
            own = max(begin, done)
            axes.barh(y, end - own, 0.36, own - origin, color=COLOURS[name], ec="white", lw=0.5)
            if begin < own:
                left = max(begin, origin) - origin
                place = y + 0.24 + i % 3 * 0.09
                axes.barh(place, own - origin - left, 0.07, left, color=COLOURS[name], alpha=0.45)
            done = max(done, end)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
