"""``int4q convert``: other formats of 4-bit weights in and out, exactly where that can be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.table import Table

from int4q.cli.show import bytes_progress, console, errors_in_one_line

if TYPE_CHECKING:
    from int4q.checkpoint.plan import Plan


@errors_in_one_line
def run(
    src: Annotated[Path, typer.Argument(help="GGUF file, or folder: GPTQ, AWQ, ...")],
    dst: Annotated[Path, typer.Argument(help="folder to make, or .gguf file (of int4q's folder)")],
    max_shard_size: Annotated[str, typer.Option(help="of a file")] = "5GB",
    to: Annotated[str, typer.Option(help="int4q, or compressed-tensors (of int4q's)")] = "int4q",
    requantize: Annotated[
        int | None,
        typer.Option(metavar="GROUP_SIZE", help="quantise bitsandbytes' values again; not exact"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="of what is not 4-bit in a GGUF file: bfloat16, float16, float32")
    ] = "bfloat16",
    metadata: Annotated[
        Path | None,
        typer.Option(help="for a .gguf file: one of the same model, to take its tokenizer from"),
    ] = None,
    rounded: Annotated[
        bool,
        typer.Option("--round", help="for a .gguf file: the nearest float16 where scales are none"),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="a line for every tensor")] = False,
) -> None:
    """Turn a 4-bit checkpoint of another format into one that transformers loads, or back."""
    from int4q.checkpoint.stream import run as stream
    from int4q.checkpoint.team import team

    if to not in ("int4q", "compressed-tensors"):
        raise ValueError(f"--to must be int4q or compressed-tensors, got {to!r}")
    if requantize is not None and (to != "int4q" or not src.is_dir()):
        raise ValueError(f"--requantize is for a folder of bitsandbytes' weights, got {src}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype must be bfloat16, float16 or float32, got {dtype!r}")
    is_file = dst.suffix == ".gguf"
    if (metadata or rounded) and not is_file:
        raise ValueError(f"--metadata and --round are for DST.gguf, got {dst}")
    notes: dict[str, str] = {}
    if is_file:
        _gguf(src, dst, metadata, rounded, notes)
    else:
        plan = _plan(src, to, requantize, dtype, notes)
        with team() as me, bytes_progress("converting") as progress:
            report = progress if me.leads else None
            stream(plan, dst, team=me, progress=report, max_shard_size=max_shard_size)
    out = console()
    table = Table("tensors", "", box=None)
    lines = (
        notes.items() if verbose else ((str(n), how) for how, n in Counter(notes.values()).items())
    )
    for what, how in lines:
        table.add_row(what, how)
    out.print(table)
    out.print(f"wrote {dst}", markup=False)


def _plan(src: Path, to: str, requantize: int | None, dtype: str, notes: dict[str, str]) -> Plan:
    from int4q import export
    from int4q.checkpoint.converting import plan_folder, plan_gguf
    from int4q.checkpoint.source import Source

    note = notes.__setitem__
    if to == "compressed-tensors":
        return export.plan(Source(src))
    if src.is_dir():
        return plan_folder(Source(src), note, requantize)
    return plan_gguf(src, note, getattr(torch, dtype))


def _gguf(
    src: Path, dst: Path, metadata: Path | None, rounded: bool, notes: dict[str, str]
) -> None:
    from int4q.checkpoint import gguf_writing
    from int4q.checkpoint.source import Source

    with bytes_progress("converting") as progress:
        gguf_writing.write(
            Source(src),
            dst,
            notes.__setitem__,
            metadata=metadata,
            rounded=rounded,
            progress=progress,
        )
