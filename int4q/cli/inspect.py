"""``int4q inspect``: what a checkpoint holds, and how far it is from its original."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from int4q.cli.show import console, errors_in_one_line, size

if TYPE_CHECKING:
    from int4q.checkpoint.source import Source


@errors_in_one_line
def run(
    path: Annotated[Path, typer.Argument(help="folder of a checkpoint, or GGUF file")],
    original: Annotated[Path | None, typer.Option(help="the float checkpoint it is of")] = None,
) -> None:
    """List a checkpoint's tensors and check them."""
    if path.is_dir():
        _folder(path, original, console())
    else:
        _gguf(path, console())


def _gguf(path: Path, out: Console) -> None:
    from int4q.checkpoint.gguf_file import GGUFFile

    file = GGUFFile(path)
    out.print(f"{file.fields.get('general.architecture')}, {len(file.tensors)} tensors")
    bytes_of: Counter[str] = Counter()
    for t in file.tensors:
        bytes_of[t.kind] += t.data.size
    number = Counter(t.kind for t in file.tensors)
    table = Table("type", "tensors", "bytes", box=None)
    for kind, n in bytes_of.most_common():
        table.add_row(kind, str(number[kind]), size(n))
    out.print(table)


def _folder(path: Path, original: Path | None, out: Console) -> None:
    from int4q.checkpoint.inspecting import read, weights
    from int4q.checkpoint.source import Source

    source = Source(path)
    held = weights(source)
    table = Table("weight", "shape", "group", "scales", "bits", box=None)
    total = nbytes = 0
    for name, entry in held.items():
        t = read(source, entry)
        shape = "x".join(map(str, t.shape))
        dtype = str(t.dtype).removeprefix("torch.")
        bits = 8 * t.nbytes / t.numel()
        table.add_row(name, shape, str(t.group_size), dtype, f"{bits:.2f}")
        total, nbytes = total + t.numel(), nbytes + t.nbytes
    out.print(table)
    everything = sum(stored.nbytes for stored in source.tensors.values())
    out.print(
        f"{len(held)} weights in 4 bits ({8 * nbytes / max(1, total):.2f} bits each), "
        f"{len(source.tensors)} tensors stored, {size(everything)}; names, shapes, dtypes and "
        "scales are in order"
    )
    if original is not None:
        _compare(source, Source(original), out)


def _compare(source: Source, original: Source, out: Console) -> None:
    from int4q.checkpoint.inspecting import BINS, differences

    table = Table("against the original", "SQNR (dB)", box=None)
    found = list(differences(source, original))
    for difference in found:
        table.add_row(difference.name, f"{difference.sqnr:.2f}")
    out.print(table)
    mean = torch.stack([d.histogram for d in found]).mean(0)
    out.print("error of a value, in steps of its group, mean over the weights:")
    for i, share in enumerate(mean.tolist()):
        label = (
            f"{i / (2 * BINS):.2f} to {(i + 1) / (2 * BINS):.2f}" if i < BINS else "0.50 and more"
        )
        out.print(f"{label:>13}  {share:6.1%}  {'█' * round(200 * share)}")
