"""``int4q.tune()``: find the fastest tile of every Triton kernel on this GPU, and keep them.

For every kernel that runs here, every weight and every number of rows: run each candidate, compare
its result with the reference, time it with a cold cache (bench/timing.py). The winner of a class
of shapes (tuned_table.py) is the candidate with the smallest geometric mean over the shapes timed
in it. A class gets a row where the winner beats what ships by ``MARGIN``. The CUDA C++ kernels
choose by their own rules and are not tuned.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from int4q import errors
from int4q._version import __version__
from int4q.bench import timing
from int4q.bench.shapes import CORE
from int4q.kernels import reference, tuned, tuned_table
from int4q.kernels.tiles import DequantizeConfig, MatmulConfig, MatvecConfig, StreamConfig
from int4q.kernels.tuned_table import Row
from int4q.tensor.base import Int4TensorBase

ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MARGIN = 0.02
"""How much faster than the tile that ships another must be, as a fraction."""
_TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-4}

Timer = Callable[[Sequence[Callable[[], object]]], float]


@dataclass(frozen=True)
class _Weight:
    """Copies of one weight's parts, and its values."""

    group_size: int
    qdata: tuple[Tensor, ...]
    scale: Tensor
    zero_point: Tensor
    values: Tensor  # float32 [N, K]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)

    @property
    def rest(self) -> tuple[Tensor, Tensor, int]:
        return self.scale, self.zero_point, self.group_size

    @classmethod
    def random(cls, N: int, K: int, group_size: int, dtype: torch.dtype, device) -> _Weight:
        copies = timing.copies(N * K // 2) if device.type == "cuda" else 1
        on = {"device": device}
        qdata = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8, **on)
        scale = (torch.rand(K // group_size, N, **on) * 0.009 + 0.001).to(dtype)
        zero_point = (torch.randn(K // group_size, N, **on) * 0.01).to(dtype)
        values = reference.dequantize(qdata, scale, zero_point, group_size, torch.float32)
        same = tuple(qdata.clone() for _ in range(copies))
        return cls(group_size, same, scale, zero_point, values)


@dataclass(frozen=True)
class _Place:
    """What candidates depend on: the shape, shared memory a program may have, multiprocessors."""

    M: int
    N: int
    K: int
    shared: int
    sms: int


@dataclass(frozen=True)
class _Family:
    """A kernel with tiles to choose: where it runs, what to try, how to call it."""

    kernel: str
    runs: Callable[[int, tuple[int, int] | None], bool]
    shipped: Callable[..., object]  # (M, weight, device) -> the tile in use without a table
    candidates: Callable[[_Place], Iterator[object]]
    call: Callable[..., Tensor]  # (x, qdata, weight, config)


def _light(weight: _Weight) -> bool:
    return weight.group_size >= 128


def _stream_light(weight: _Weight) -> bool:
    return _light(weight) and weight.shape[0] % 16 == 0 and weight.scale.itemsize == 2


def _around(M: int, sides: Sequence[int]) -> list[int]:
    """The sides of a tile that suit M rows: the least that holds them and its neighbours."""
    least = next((i for i, side in enumerate(sides) if side >= M), len(sides) - 1)
    return list(sides[max(0, least - 1) : least + 2]) if M > sides[0] else [sides[0]]


def _stream_candidates(place: _Place) -> Iterator[StreamConfig]:
    M, sms = place.M, place.sms
    for block_m, block_n, block_k in itertools.product(
        _around(M, (16, 32, 64, 128, 256)), (64, 128, 256), (128, 256)
    ):
        stage = block_n * block_k // 2 + block_m * block_k * 2
        stages = min(5, (place.shared - 4096) // (stage + 8 * block_n))
        for warps in (4, 8):
            registers = block_n * block_m // (32 * warps)  # of the accumulator, a thread
            if stages < 3 or registers > 128 or block_n % (16 * warps):
                continue
            few = registers <= 32  # such programs share a multiprocessor
            for programs in (0, 3 * sms if few and block_m == 16 else 2 * sms if few else sms):
                group_m = 8 if programs == 0 and M > block_m else 1
                yield StreamConfig(
                    block_n, block_m, block_k, warps, stages, programs, group_m=group_m
                )


def _matmul_candidates(place: _Place) -> Iterator[MatmulConfig]:
    depths = (3, 4) if place.shared > 1 << 17 else (2, 3)
    for block_m, block_n, block_k, warps, stages in itertools.product(
        _around(place.M, (16, 32, 64, 128)), (64, 128), (64, 128, 256), (4, 8), depths
    ):
        used = (block_n * block_k // 2 + block_m * block_k * 2) * stages
        registers = block_n * block_m // (32 * warps)
        if used > place.shared or not 8 <= registers <= 128 or (block_k > 128 and block_m > 32):
            continue
        split = tuned.split_of(place.M, place.N, place.K, block_n, block_m, block_k, place.sms)
        for parts in {1, split}:
            yield MatmulConfig(block_n, block_m, block_k, warps, stages, parts)


def _matvec_candidates(place: _Place) -> Iterator[MatvecConfig]:
    for shape in itertools.product((2, 4, 8, 16), (128, 256, 512), (4, 8)):
        yield MatvecConfig(*shape)


def _dequantize_candidates(place: _Place) -> Iterator[DequantizeConfig]:
    for shape in itertools.product((4, 8, 16), (64, 128, 256, 512), (4, 8)):
        yield DequantizeConfig(*shape)


def _linear(module: str):
    def call(x: Tensor, qdata: Tensor, weight: _Weight, config) -> Tensor:
        return _kernels(module).int4_linear(x, qdata, *weight.rest, config=config)

    return call


def _dequantize(x: Tensor, qdata: Tensor, weight: _Weight, config) -> Tensor:
    return _kernels("triton_dequant").dequantize(qdata, *weight.rest, x.dtype, config=config)


def _through_cublas(x: Tensor, qdata: Tensor, weight: _Weight) -> Tensor:
    return _kernels("triton_dequant").linear(x, qdata, *weight.rest)


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"int4q.kernels.{module}")  # and Triton, at the first call


FAMILIES = {
    family.kernel: family
    for family in (
        _Family(
            "stream",
            lambda M, capability: capability is not None and capability[0] == 9 and M >= 9,
            lambda M, w, device: tuned.stream_rule(M, *w.shape, _stream_light(w), device),
            _stream_candidates,
            _linear("gluon_matmul"),
        ),
        _Family(
            "matmul",
            lambda M, capability: M > 1,
            lambda M, w, device: tuned.matmul_rule(M, *w.shape, device),
            _matmul_candidates,
            _linear("triton_matmul"),
        ),
        _Family(
            "matvec",
            lambda M, capability: M == 1,
            lambda M, w, device: tuned.matvec_rule(*w.shape),
            _matvec_candidates,
            _linear("triton_matvec"),
        ),
        _Family(
            "dequantize",
            lambda M, capability: M == 1,  # once a weight
            lambda M, w, device: tuned.dequantize_rule(*w.shape),
            _dequantize_candidates,
            _dequantize,
        ),
    )
}
"""The kernels that have tiles to choose, by the name that tables give them."""


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
            search.weight(_Weight.random(N, K, group_size, dtype, device), rows, chosen)
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

    def weight(self, weight: _Weight, rows: Sequence[int], kernels: Sequence[str]) -> None:
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
                calls = [lambda q=q, x=x: _through_cublas(x, q, weight) for q in weight.qdata]
                self.dequantized[shape] = self.timer(calls)

    def _family(self, family: _Family, x: Tensor, weight: _Weight, expected: Tensor) -> None:
        M, (N, K) = x.shape[0], weight.shape
        light = True
        if family.kernel in ("stream", "matmul"):
            light = _stream_light(weight) if family.kernel == "stream" else _light(weight)
        rows = 0 if family.kernel == "dequantize" else M
        key = tuned_table.shape_class(family.kernel, rows, N, K, light)
        shape = (M, N, K, weight.group_size)
        shipped = family.shipped(M, weight, self.device)
        place = _Place(M, N, K, self.shared, self.sms)
        tried = dict.fromkeys([shipped, *family.candidates(place)])
        times, refused = {}, {}
        for config in tried:
            try:
                y = family.call(x, weight.qdata[0], weight, config)
                error = float((y.float() - expected).norm() / expected.norm())
                if not error <= _TOLERANCE[self.dtype]:
                    raise RuntimeError(f"wrong: relative error {error:.3g}")
                calls = [lambda q=q, c=config: family.call(x, q, weight, c) for q in weight.qdata]
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
