"""``int4q.tune()``: find the fastest tile of every Triton kernel on this GPU, and keep them.

For every kernel that runs here, every weight and every number of rows: run each candidate, compare
its result with the reference, time it with a cold cache (bench/timing.py). The winner of a class
of shapes (tuned_table.py) is the candidate with the smallest geometric mean over the shapes timed
in it. A class gets a row where the winner beats what ships by ``MARGIN``. The CUDA C++ kernels
choose by their own rules and are not tuned.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn

from int4q import errors
from int4q._version import __version__
from int4q.bench import timing
from int4q.bench.shapes import CORE
from int4q.kernels.triton import tuned, tuned_table
from int4q.kernels.triton.tuned_table import Row
from int4q.tensor.base import Int4TensorBase
from int4q.tuning.families import (
    FAMILIES,
    Copies,
    Family,
    Place,
    through_cublas,
)

ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MARGIN = 0.02
"""How much faster than the tile that ships another must be, as a fraction."""
_TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-4}

Timer = Callable[[Sequence[Callable[[], object]]], float]


def tune(
    model: nn.Module | None = None,
    *,
    shapes: Iterable[tuple[int, int]] | None = None,
    group_sizes: Sequence[int] = (128, 32),
    rows: Sequence[int] = ROWS,
    dtype: torch.dtype = torch.bfloat16,
    kernels: Sequence[str] | None = None,
    path: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    timer: Timer = timing.microseconds,
    log: Callable[[str], None] = print,
) -> Path:
    """Search the tiles for this device, write them, and use them from now on.

    Args:
        model: tune for the shapes and group sizes of its 4-bit weights.
        shapes: ``(N, K)`` of the weights instead; by default those of bench/shapes.py's ``CORE``.
        group_sizes: with ``shapes``: the group sizes.
        rows: numbers of activation rows (M).
        dtype: of activations, scales and zero points.
        kernels: names out of ``FAMILIES``; by default those that calls on the device reach.
        path: of the table; by default the device's file in the cache folder, which every later
            process reads. Another path is read where ``$INT4Q_TUNED`` names it.
        device: by default the current CUDA device.
        timer: microseconds of one call, given calls on different copies of the weight.
        log: takes a line for each class tuned.

    Returns:
        The path written.

    Raises:
        ValueError: no CUDA device (or, without one, no interpreter), nothing to tune, or a
            shape, kernel or dtype that does not exist.
    """
    device = _checked_device(device)
    weights = _wanted(model, shapes, group_sizes)
    chosen = _reached(device, dtype) if kernels is None else tuple(kernels)
    if unknown := sorted(set(chosen) - set(FAMILIES)):
        raise errors.value(f"kernels must be out of {sorted(FAMILIES)}", unknown)
    if not rows or min(rows) < 1:
        raise errors.value("rows must be positive numbers", list(rows))
    if dtype not in _TOLERANCE:
        raise errors.type_(f"dtype must be {errors.dtypes(tuple(_TOLERANCE))}", dtype)
    search = _Search(device, dtype, timer, log)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for N, K, group_size in weights:
            search.weight(Copies.random(N, K, group_size, dtype, device), rows, chosen)
    if not search.times:
        raise errors.value(f"one of {chosen} must run on {device} at one of the rows", list(rows))
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "int4q": __version__,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }
    described = tuned.describe(device)
    path = tuned_table.default_path(described) if path is None else path
    crossover = search.dequantize_from_m()
    path = tuned_table.write(path, described, search.rows(), crossover, about)
    tuned.use(path)
    return path


def _checked_device(device) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise errors.value("tune needs a CUDA device", device, "Set TRITON_INTERPRET=1 to try it")
    return device


def _reached(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels that serve ``device``: one matrix kernel, and the two others."""
    capability = tuned.describe(device).capability
    hopper = capability is not None and capability[0] == 9 and dtype != torch.float32
    return "stream" if hopper else "matmul", "matvec", "dequantize"


def _wanted(model, shapes, group_sizes) -> list[tuple[int, int, int]]:
    """``(N, K, group_size)``, each once."""
    if model is not None:
        found = {
            (*p.shape[-2:], p.group_size)
            for p in model.parameters()
            if isinstance(p, Int4TensorBase) and p.grouped_dim == p.ndim - 1
        }
        if not found:
            raise errors.value("the model must have 4-bit weights", "none", "Quantise it first")
        return sorted(found)
    shapes = [(s.N, s.K) for s in CORE] if shapes is None else [tuple(s) for s in shapes]
    wanted = [(N, K, g) for N, K in shapes for g in group_sizes]
    if not wanted:
        raise errors.value("tune needs shapes and group sizes", "none")
    for N, K, group_size in wanted:
        if group_size not in (32, 64, 128, 256) or N < 1 or K < 1 or K % group_size:
            raise errors.value(
                "K must be a positive multiple of a group size of 32, 64, 128 or 256",
                f"N={N}, K={K}, group_size={group_size}",
            )
    return wanted


class _Search:
    """Times of every candidate, by class and shape."""

    def __init__(self, device: torch.device, dtype: torch.dtype, timer: Timer, log):
        self.device, self.dtype, self.timer, self.log = device, dtype, timer, log
        # class -> shape -> candidate -> microseconds; the tile that ships comes first
        self.times: dict[tuple, dict[tuple, dict[object, float]]] = {}
        self.shipped: dict[tuple, list[object]] = {}
        self.fused: dict[tuple, float] = {}  # shape -> of the best fused kernel
        self.dequantized: dict[tuple, float] = {}  # shape -> of dequantise + cuBLAS
        facts = tuned.describe(device)
        self.capability = facts.capability
        self.shared, self.sms = 101376, tuned.multiprocessors(device)
        if device.type == "cuda":
            facts = torch.cuda.get_device_properties(device)
            self.shared = facts.shared_memory_per_block_optin

    def weight(self, weight: Copies, rows: Sequence[int], kernels: Sequence[str]) -> None:
        """Everything that is to be timed for one weight."""
        N, K = weight.shape
        for M in sorted(set(rows) | {1}):
            x = torch.randn(M, K, device=self.device).to(self.dtype)
            expected = nn.functional.linear(x.float(), weight.values)
            for name in kernels:
                if (M in rows or name == "dequantize") and FAMILIES[name].runs(M, self.capability):
                    wanted = weight.values if name == "dequantize" else expected
                    self._family(FAMILIES[name], x, weight, wanted)
            shape = (M, N, K, weight.group_size)
            if shape in self.fused:
                calls = [lambda w=w, x=x: through_cublas(x, w) for w in weight.weights]
                self.dequantized[shape] = self.timer(calls)

    def _family(self, family: Family, x: Tensor, weight: Copies, expected: Tensor) -> None:
        M, (N, K) = x.shape[0], weight.shape
        rows = 0 if family.kernel == "dequantize" else M
        key = tuned_table.shape_class(family.kernel, rows, N, K, family.light(weight))
        shape = (M, N, K, weight.group_size)
        shipped = family.shipped(M, weight, self.device)
        place = Place(M, N, K, self.shared, self.sms)
        tried = dict.fromkeys([shipped, *family.candidates(place)])
        times, refused = {}, {}
        for config in tried:
            try:
                y = family.call(x, weight.weights[0], config)
                error = float((y.float() - expected).norm() / expected.norm())
                if not error <= _TOLERANCE[self.dtype]:
                    raise RuntimeError(f"wrong: relative error {error:.3g}")
                calls = [lambda w=w, c=config: family.call(x, w, c) for w in weight.weights]
                times[config] = self.timer(calls)
            except Exception as reason:  # this tile does not run here: the next one may
                refused[config] = f"{type(reason).__name__}: {reason}".splitlines()[0][:120]
        for config, reason in refused.items():
            self.log(f"  {family.kernel} {shape}: {config} left out: {reason}")
        if shipped not in times:
            self.log(f"  {family.kernel} {shape}: not tuned, as the tile that ships does not run")
            return
        best = min(times, key=times.get)
        self.log(
            f"{family.kernel} M={M} N={N} K={K} group {weight.group_size}: "
            f"{times[shipped]:.1f} -> {times[best]:.1f} us of {len(times)} tiles, {best}"
        )
        self.times.setdefault(key, {})[shape] = times
        self.shipped.setdefault(key, []).append(shipped)
        if family.kernel in ("stream", "matmul"):
            self.fused[shape] = min(times[best], self.fused.get(shape, math.inf))

    def rows(self) -> list[Row]:
        """The winner of each class where what ships is beaten."""
        rows = []
        for key in sorted(self.times):
            shapes = list(self.times[key].values())
            ships = _mean([t[s] for t, s in zip(shapes, self.shipped[key], strict=True)])
            everywhere = [c for c in shapes[0] if all(c in times for times in shapes)]
            means = {c: _mean([times[c] for times in shapes]) for c in everywhere}
            best = min(means, key=means.get, default=None)
            if best is not None and means[best] < ships * (1 - MARGIN):
                rows.append(Row(*key, best, round(means[best], 3), round(ships, 3)))
        return rows

    def dequantize_from_m(self) -> int | None:
        """The least M from which dequantise + cuBLAS wins, on average over the weights."""
        least = None
        for M in sorted({shape[0] for shape in self.fused}, reverse=True):
            shapes = [shape for shape in self.fused if shape[0] == M]
            if _mean([self.dequantized[s] / self.fused[s] for s in shapes]) > 1:
                break
            least = M
        return least


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
