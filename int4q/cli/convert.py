"""``int4q convert``: other formats of 4-bit weights in and out, exactly where that can be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from int4q.cli.show import bytes_progress, console, errors_in_one_line


@errors_in_one_line
def run(
    src: Annotated[Path, typer.Argument(help="GGUF file, or folder: GPTQ, AWQ, ...")],
    dst: Annotated[Path, typer.Argument(help="folder to make")],
    max_shard_size: Annotated[str, typer.Option(help="of a file")] = "5GB",
    to: Annotated[str, typer.Option(help="int4q, or compressed-tensors (of int4q's)")] = "int4q",
    requantize: Annotated[
        int | None,
        typer.Option(metavar="GROUP_SIZE", help="quantise bitsandbytes' values again; not exact"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="a line for every tensor")] = False,
) -> None:
    """Turn a 4-bit checkpoint of another format into one that transformers loads."""
    from int4q import export
    from int4q.checkpoint.converting import plan_folder, plan_gguf
    from int4q.checkpoint.source import Source
    from int4q.checkpoint.stream import run as stream
    from int4q.checkpoint.team import team

    if to not in ("int4q", "compressed-tensors"):
        raise ValueError(f"--to must be int4q or compressed-tensors, got {to!r}")
    if requantize is not None and (to != "int4q" or not src.is_dir()):
        raise ValueError(f"--requantize is for a folder of bitsandbytes' weights, got {src}")
    notes: dict[str, str] = {}
    note = notes.__setitem__
    if to == "compressed-tensors":
        plan = export.plan(Source(src))
    else:
        plan = plan_folder(Source(src), note, requantize) if src.is_dir() else plan_gguf(src, note)
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
