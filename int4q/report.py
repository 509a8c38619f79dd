"""``int4q.summary(model)``: what was quantised, what was not and why, in bytes."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from int4q.coverage import is_matrix, reason_left
from int4q.prepare import as_given
from int4q.run import reasons
from int4q.tensor.base import Int4TensorBase


@dataclass(frozen=True)
class Weight:
    """One parameter of the report.

    Attributes:
        name: fully qualified.
        kind: class of the tensor, or its dtype.
        shape: logical shape.
        group_size: of a 4-bit weight, else ``None``.
        bytes_before: at the weight's own dtype, unquantised.
        bytes_after: held now, scales and zero points included.
        reason: why it was left alone, ``None`` where it is quantised or no matrix.
        tied_to: name of the parameter listed before that it shares its memory with.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    group_size: int | None
    bytes_before: int
    bytes_after: int
    reason: str | None = None
    tied_to: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits held for one logical element."""
        return 8 * self.bytes_after / max(1, torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` returns.

    Attributes:
        quantized: the 4-bit weights.
        skipped: every other matrix or stack of them among the parameters, biases apart, and
            computed weights that were to be quantised.
        bytes_before, bytes_after: of all parameters and buffers, shared ones once.
    """

    quantized: tuple[Weight, ...]
    skipped: tuple[Weight, ...]
    bytes_before: int
    bytes_after: int

    @property
    def bits_per_weight(self) -> float:
        """Bits for one logical element of the quantised weights."""
        elements = sum(torch.Size(w.shape).numel() for w in self.quantized)
        return 8 * sum(w.bytes_after for w in self.quantized) / max(1, elements)


def summary(model: nn.Module, *, show: bool = True, console: Console | None = None) -> Summary:
    """Report on ``model``; prints a table unless ``show=False``.

    Args:
        model: any module, quantised by int4q or not.
        show: print the table.
        console: where to; the standard output by default.
    """
    with as_given(model):
        result = _report(model)
    if show:
        _print(result, console or Console(width=None if sys.stdout.isatty() else 120))
    return result


def _report(model: nn.Module) -> Summary:
    quantized, skipped, before, after = [], [], 0, 0
    seen: dict[int, str] = {}
    for prefix, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        for name, t in own.items():
            if t is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            first = seen.setdefault(id(t), full)
            weight = _weight(module, name, t, full, None if first == full else first)
            if isinstance(t, Int4TensorBase):
                quantized.append(weight)
            elif weight.reason:
                skipped.append(weight)
            if weight.tied_to is None:
                before += weight.bytes_before
                after += weight.bytes_after
        for name in reasons(module).keys() - own.keys():  # computed weights: no memory of their own
            full = f"{prefix}.{name}" if prefix else name
            skipped.append(_weight(module, name, getattr(module, name), full))
    return Summary(tuple(quantized), tuple(skipped), before, after)


def _weight(
    module: nn.Module, name: str, t: torch.Tensor, full_name: str, tied_to: str | None = None
) -> Weight:
    size = t.numel() * t.element_size()
    if isinstance(t, Int4TensorBase):
        kind, group_size, after, reason = type(t).__name__, t.group_size, t.nbytes, None
    else:
        kind, group_size, after = str(t.dtype).removeprefix("torch."), None, size
        reason = reasons(module).get(name)
        if reason is None and name in module._parameters and is_matrix(module, name, t):
            reason = reason_left(module, name)
    return Weight(full_name, kind, tuple(t.shape), group_size, size, after, reason, tied_to)


def _print(result: Summary, console: Console) -> None:
    console.print(headline(result))
    if result.quantized:
        table = Table(box=None)
        table.add_column("weight", overflow="fold", min_width=16)
        for column in ("held as", "shape", "group", "before", "after", "bits"):
            table.add_column(column, justify="right", no_wrap=True)
        for w in result.quantized:
            table.add_row(
                w.name if w.tied_to is None else f"{w.name} (tied to {w.tied_to})",
                w.kind,
                "x".join(map(str, w.shape)),
                str(w.group_size),
                _size(w.bytes_before),
                _size(w.bytes_after),
                f"{w.bits_per_weight:.2f}",
            )
        console.print(table)
    for w in result.skipped:
        tied = f", tied to {w.tied_to}" if w.tied_to else ""
        console.print(
            f"left as {w.kind}: {w.name} [{_size(w.bytes_after)}]{tied}, {w.reason}", markup=False
        )


def headline(result: Summary) -> str:
    """The whole model in a line: weights, bits, bytes before and after."""
    quantized = sum(w.tied_to is None for w in result.quantized)
    return (
        f"{quantized} weights in 4 bits ({result.bits_per_weight:.2f} bits each, "
        f"scales included), {len(result.skipped)} left; model {_size(result.bytes_before)} -> "
        f"{_size(result.bytes_after)}"
    )


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.4g} GB"
