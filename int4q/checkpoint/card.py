"""What a checkpoint says of itself: the model card, and the rows of the coverage report."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path

from int4q._version import __version__
from int4q.checkpoint.quantizing import Coverage, Options


@dataclass(frozen=True)
class Kind:
    """Weights that differ by the number of their layer only."""

    names: str
    number: int
    shape: str
    group_size: int
    nbytes: int


def kinds(coverage: Coverage) -> Iterator[Kind]:
    """The quantised weights, those of a kind together."""

    def key(item):  # type: ignore[no-untyped-def]
        name, t = item
        return re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tuple(t.shape), t.group_size

    for (names, shape, group_size), alike in groupby(
        sorted(coverage.quantized.items(), key=key), key
    ):
        held = [t for _, t in alike]
        shown = "x".join(map(str, shape))
        yield Kind(names, len(held), shown, group_size, sum(t.nbytes for t in held))


def model_card(src: Path, dst: Path, options: Options, coverage: Coverage) -> bytes:
    """``README.md``: the command, what was quantised, sizes. The same for the same command."""
    words = ["int4q", "quantize", src.name or str(src), dst.name]
    for field in fields(options):
        value, default = getattr(options, field.name), field.default
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, tuple):
            words += [word for one in value for word in (flag, one)]
        elif value != default:
            words += [flag, str(value)]
    rows = [
        f"| `{k.names}` | {k.number} | {k.shape} | {k.group_size} | {k.nbytes / 1e6:.1f} |"
        for k in kinds(coverage)
    ]
    left = [f"- `{left.name}`: {left.reason}" for left in coverage.left]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags:\n- torchao\n- int4",
            "---",
            f"# {dst.name}",
            "",
            f"4-bit weights, {coverage.bits_per_weight:.2f} bits each with scales and zero points;"
            f" {coverage.bytes_before / 1e9:.3f} GB before, {coverage.bytes_after / 1e9:.3f} GB"
            f" after. Made with int4q {__version__}:",
            "",
            f"    {shlex.join(words)}",
            "",
            "Loads with transformers' `from_pretrained` where torchao is installed; with int4q "
            "imported it runs on int4q's kernels.",
            "",
            "| weights | number | shape | group | MB |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Left as they are:",
            "",
            *left,
            "",
        ]
    ).encode()
