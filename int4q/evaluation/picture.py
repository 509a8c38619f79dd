"""A picture of an :class:`Evaluation`: every 4-bit weight by its place in the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from int4q import errors
from int4q.evaluation.layers import Layer
from int4q.evaluation.measure import Evaluation

SUFFIXES = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Before anything is measured: whether :func:`draw` will be able to.

    Raises:
        ValueError: a suffix that is none of ``SUFFIXES``.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise errors.value(f"a picture must end in one of {SUFFIXES}", path)
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("a picture needs matplotlib (pip install matplotlib)")


def draw(measured: Evaluation, path: Path) -> None:
    """Signal-to-noise ratio over depth, a line for every kind of layer.

    Outputs where they were measured, otherwise the weight itself.
    """
    from matplotlib.figure import Figure  # (without a display)

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for kind, points in _lines(measured.layers).items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind)
    axes.set(xlabel="block", ylabel="signal-to-noise ratio of outputs (dB)")
    axes.grid(alpha=0.3)
    if measured.layers:
        axes.legend(fontsize="small")
    if measured.kl is not None:
        increase = measured.perplexity - (measured.reference_perplexity or 0)
        axes.set_title(f"perplexity {increase:+.3f}, KL {measured.kl:.4f}")
    figure.savefig(path, dpi=150)


def _lines(layers: Iterable[Layer]) -> dict[str, list[tuple[int, float]]]:
    """Kind of layer (its name without the number of the block) -> (block, dB)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        number = re.search(r"(?<![^.])\d+(?![^.])", layer.name)
        kind = layer.name if number is None else layer.name[number.end() + 1 :]
        decibels = layer.weight_sqnr if layer.output_sqnr is None else layer.output_sqnr
        point = int(number.group()) if number else 0, decibels
        lines.setdefault(kind.removesuffix(".weight"), []).append(point)
    return lines
