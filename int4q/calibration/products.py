"""The inputs of weights that no module of their own multiplies: experts, attention's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_OPERANDS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten._grouped_mm.default: (0, 1),
    aten.linear.default: (0, 1),
}
"""Products -> where they take the input and the weight."""


class WatchedProducts(TorchDispatchMode):
    """Within it, every product with one of ``weights``, or a slice of one, is reported.

    Args:
        weights: ``[N, K]``, or stacks ``[E, N, K]`` or ``[E, K, N]``.
        report: called with the weight, the input ``[.., K]`` and the expert (0 without a stack).
    """

    def __init__(self, weights: list[Tensor], report: Callable[[Tensor, Tensor, int], None]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._report = report
        self._weights: dict[int, list[Tensor]] = {}
        for w in weights:
            self._weights.setdefault(w.untyped_storage().data_ptr(), []).append(w)

    def __torch_dispatch__(  # noqa: D105
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _OPERANDS:
            x, part = (args[i] for i in _OPERANDS[func])
            if (whole := self._whole(part)) is not None:
                offs = args[2] if func is aten._grouped_mm.default and len(args) > 2 else None
                for rows, expert in _inputs(x, part, whole, (kwargs or {}).get("offs", offs)):
                    self._report(whole, rows, expert)
        return func(*args, **(kwargs or {}))

    def _whole(self, part: Tensor) -> Tensor | None:
        """The watched weight that ``part`` is a view of."""
        at = part.storage_offset()
        for w in self._weights.get(part.untyped_storage().data_ptr(), ()):
            if w.storage_offset() <= at < w.storage_offset() + w.numel():
                return w
        return None


def _inputs(
    x: Tensor, part: Tensor, whole: Tensor, offs: Tensor | None
) -> Iterator[tuple[Tensor, int]]:
    """Every expert of ``part``, a view of ``whole``, with the rows of ``x`` that it multiplies."""
    if whole.ndim == 2:
        yield x, 0
        return
    first = (part.storage_offset() - whole.storage_offset()) // whole.stride(0)
    if part.ndim == 2 or part.stride(0) == 0:  # one expert, or one that is expanded
        yield x, first
    elif offs is not None:
        start = 0
        for i, end in enumerate(offs.tolist()):
            yield x[start:end], first + i
            start = end
    else:
        for i, rows in enumerate(x):  # an expert gets zeros in place of what is not its own
            yield rows[rows.any(-1)], first + i
