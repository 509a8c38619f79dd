"""Second moments of the inputs of weights: gathered, kept, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4q import errors

MIN_TOKENS = 32
"""An expert that met fewer takes what its whole layer met."""
_FORMAT = "int4q.calibration.1"


class CalibrationWarning(UserWarning):
    """A calibration that some weights got too little from."""


@dataclass(frozen=True)
class Moments:
    """What one weight ``[N, K]``, or a stack of E of them, was multiplied with.

    Attributes:
        mean_square: float32 ``[K]`` or ``[E, K]``, the mean of ``x_k ** 2``.
        tokens: int64 ``[]`` or ``[E]``, the number of inputs.
        hessian: float32 ``[K, K]`` or ``[E, K, K]``, the mean of ``x_i * x_k``; ``None`` where it
            was not gathered.
    """

    mean_square: Tensor
    tokens: Tensor
    hessian: Tensor | None = None

    @property
    def dead(self) -> int:
        """Inputs that were always 0 (a stack's are counted for each expert)."""
        return int((self.mean_square == 0).sum())


class Calibration(Mapping[str, Moments]):
    """The :class:`Moments` of a model's weights, by the full names of its parameters.

    Made by :func:`int4q.calibrate`; weights that share an input share its moments.
    """

    def __init__(self, moments: Mapping[str, Moments]):
        self._moments = dict(moments)

    def __getitem__(self, name: str) -> Moments:
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def __repr__(self) -> str:
        kind = "with Hessians" if self.has_hessians else "without Hessians"
        dead = sum({id(m): m.dead for m in self.values()}.values())
        return f"Calibration({len(self)} weights, {kind}, {dead} inputs that were always 0)"

    @property
    def has_hessians(self) -> bool:
        """Whether ``gptq`` can use it."""
        return any(m.hessian is not None for m in self.values())

    def save(self, path: str | Path) -> None:
        """Write it to a file, with ``torch.save``; what weights share is written once."""
        held = {name: vars(m) for name, m in self.items()}
        torch.save({"format": _FORMAT, "moments": held}, path)

    @classmethod
    def load(cls, path: str | Path, map_location: Any = None) -> Calibration:
        """Read what :meth:`save` wrote, tensors only (``weights_only=True``).

        Raises:
            ValueError: the file holds something else.
        """
        held = torch.load(path, map_location=map_location, weights_only=True)
        found = held.get("format") if isinstance(held, dict) else type(held).__name__
        if found != _FORMAT:
            raise errors.value(f"{path} must hold a calibration, format {_FORMAT!r}", found)
        return cls({name: Moments(**fields) for name, fields in held["moments"].items()})
