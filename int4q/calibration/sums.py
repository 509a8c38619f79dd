"""Running sums of the second moments of inputs, while a model runs."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

from int4q.calibration.moments import MIN_TOKENS, Moments

_numbers = count()


class Batch:
    """Sums over the rows of one input ``x [.., K]``, formed once for all weights that take it."""

    def __init__(self, x: Tensor, with_hessian: bool):
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.number = next(_numbers)
        self.tokens = x.shape[0]
        self.hessian = x.T @ x if with_hessian else None
        self.square = x.square().sum(0) if self.hessian is None else self.hessian.diagonal()


class Sums:
    """Of one weight ``[N, K]``, or of each of a stack of ``experts``."""

    def __init__(self, experts: int | None):
        self.experts = experts
        self.square: dict[int, Tensor] = {}
        self.hessian: dict[int, Tensor] = {}
        self.tokens = [0] * (experts or 1)
        self.history = 0

    def add(self, batch: Batch, expert: int = 0) -> None:
        """Count one input in."""
        if not batch.tokens:
            return
        self.history = hash((self.history, batch.number, expert))
        self.tokens[expert] += batch.tokens
        for sums, new in ((self.square, batch.square), (self.hessian, batch.hessian)):
            if new is not None:
                sums[expert] = sums[expert].add_(new) if expert in sums else new.clone()

    @property
    def rare(self) -> list[int]:
        """Experts that met fewer than ``MIN_TOKENS``, of a stack."""
        return [e for e, n in enumerate(self.tokens) if n < MIN_TOKENS] if self.experts else []

    def moments(self) -> Moments:
        """Means over the tokens, of which there is one at least."""
        tokens = torch.tensor(self.tokens)
        if self.experts is None:
            hessian = self.hessian[0].div_(tokens.item()) if self.hessian else None
            return Moments(self.square[0] / tokens.item(), tokens[0], hessian)
        hessian = self._stacked(self.hessian) if self.hessian else None
        return Moments(self._stacked(self.square), tokens, hessian)

    def _stacked(self, sums: dict[int, Tensor]) -> Tensor:
        """Means of each expert; of all tokens of the layer where an expert is rare."""
        rare = set(self.rare)
        of_each = {e: sums[e] / n for e, n in enumerate(self.tokens) if e not in rare}
        if rare:
            whole = torch.stack(list(sums.values())).sum(0) / sum(self.tokens)
            of_each |= dict.fromkeys(rare, whole)
        return torch.stack([of_each[e] for e in range(len(self.tokens))])
