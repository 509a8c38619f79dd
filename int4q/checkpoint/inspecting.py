"""What a checkpoint holds, read tensor by tensor: kinds, checks, errors against the original."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from int4q import errors
from int4q.checkpoint import schema
from int4q.checkpoint.skeleton import recipes, skeleton
from int4q.checkpoint.source import Source
from int4q.tensor import Int4Tensor

BINS = 10
"""Of a histogram: tenths of half a step, 0 to 0.5; what is beyond counts in one more."""


@dataclass(frozen=True)
class Difference:
    """A weight against its original.

    Attributes:
        sqnr: signal to quantisation noise, dB.
        histogram: ``[BINS + 1]``: the share of the values whose error is in each tenth of half a
            step (the group's scale), the last entry what is half a step and more away.
    """

    name: str
    sqnr: float
    histogram: Tensor


def weights(source: Source) -> dict[str, schema.Entry]:
    """The 4-bit weights of a checkpoint, checked against what is stored.

    Raises:
        ValueError: it is none of int4q's or torchao's, or its metadata and tensors disagree.
    """
    if not schema.is_schema(source.metadata):
        raise errors.value(
            f"{source.folder} must hold a 4-bit checkpoint", "another", "int4q convert makes one"
        )
    entries = schema.entries(source.metadata)
    schema.check(entries.values(), {name: s.spec for name, s in source.tensors.items()})
    return {name: entry for name, entry in entries.items() if entry.attributes is not None}


def read(source: Source, entry: schema.Entry) -> Int4Tensor:
    """One of them.

    Raises:
        ValueError: a scale or zero point is not finite.
    """
    t = schema.unflatten(entry, {part: source.read(name) for part, name in entry.parts.items()})
    for part in ("scale", "zero_point"):
        if not bool(getattr(t, part).isfinite().all()):
            raise errors.value(f"{part} of {entry.name} must be finite", "NaN or Inf in it")
    return t  # type: ignore[return-value]  # (an entry with attributes)


def differences(source: Source, original: Source) -> Iterator[Difference]:
    """Every 4-bit weight against the checkpoint that it was made of."""
    how = recipes(skeleton(original), {name: s.shape for name, s in original.tensors.items()})
    for name, entry in weights(source).items():
        t = read(source, entry)
        recipe = how[name]
        matrices = t.unbind(0) if recipe.stacked else [t]
        signal = noise = 0.0
        counts = torch.zeros(BINS + 1, dtype=torch.float64)
        for matrix, names in zip(matrices, recipe.matrices, strict=True):
            exact = torch.cat([original.read(n) for n in names]).float()
            error = (exact - matrix.dequantize(torch.float32)).abs()
            signal += float(exact.double().square().sum())
            noise += float(error.double().square().sum())
            scale = matrix.scale.float().abs().repeat_interleave(matrix.group_size, dim=-2)
            if matrix.grouped_dim == matrix.ndim - 1:
                scale = scale.mT
            bins = (error / scale * 2 * BINS).nan_to_num(BINS).clamp(max=BINS).long()
            counts += torch.bincount(bins.flatten(), minlength=BINS + 1)
        sqnr = 10 * torch.log10(torch.tensor(signal / noise)) if noise else torch.tensor(torch.inf)
        yield Difference(name, float(sqnr), counts / counts.sum())
