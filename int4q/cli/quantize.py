"""``int4q quantize``: a float checkpoint in, a 4-bit one out, whatever its size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from int4q.cli.show import bytes_progress, console, errors_in_one_line, size

if TYPE_CHECKING:
    from int4q.checkpoint.quantizing import Coverage


@errors_in_one_line
def run(
    src: Annotated[Path, typer.Argument(help="folder of a model, as transformers saves it")],
    dst: Annotated[Path, typer.Argument(help="folder to make")],
    group_size: Annotated[int, typer.Option(help="32, 64, 128 or 256")] = 128,
    algorithm: Annotated[str, typer.Option(help="tinygemm, search, hqq or auto")] = "tinygemm",
    preset: Annotated[str, typer.Option(help="auto, dense or moe")] = "auto",
    include: Annotated[
        list[str] | None, typer.Option(help="also parameters that this regular expression finds")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="not parameters that this regular expression finds")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...: where to quantise")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="of a file")] = "5GB",
    strict: Annotated[
        bool, typer.Option("--strict", help="fail if a matrix is left that usually is not")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only report")] = False,
) -> None:
    """Quantise a checkpoint tensor by tensor. Killed, the same command goes on where it was."""
    from int4q.checkpoint import card
    from int4q.checkpoint.quantizing import Options, plan_quantize
    from int4q.checkpoint.source import Source
    from int4q.checkpoint.stream import run as stream
    from int4q.checkpoint.team import team

    options = Options(
        group_size, algorithm, preset, tuple(include or ()), tuple(exclude or ()), device
    )
    source = Source(src)
    plan, coverage = plan_quantize(source, options)
    with team() as me:
        if me.leads:
            show(coverage, console())
        unexpected = [left.name for left in coverage.left if not left.expected]
        if strict and unexpected:
            raise ValueError(f"left as they are (--strict): {', '.join(unexpected)}")
        if dry_run:
            return
        plan.files["README.md"] = card.model_card(src, dst, options, coverage)
        with bytes_progress("quantising") as progress:
            report = progress if me.leads else None
            stream(plan, dst, team=me, progress=report, max_shard_size=max_shard_size)
        if me.leads:
            console().print(f"wrote {dst}", markup=False)


def show(coverage: Coverage, out: Console) -> None:
    """What becomes of the matrices: one line a kind."""
    from int4q.checkpoint.card import kinds

    out.print(
        f"{len(coverage.quantized)} weights in 4 bits ({coverage.bits_per_weight:.2f} bits each, "
        f"scales included); checkpoint {size(coverage.bytes_before)} -> "
        f"{size(coverage.bytes_after)}"
    )
    table = Table(box=None)
    table.add_column("weights", overflow="fold", min_width=16)
    for column in ("number", "shape", "group", "after"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in kinds(coverage):
        table.add_row(row.names, str(row.number), row.shape, str(row.group_size), size(row.nbytes))
    out.print(table)
    for left in coverage.left:
        style = None if left.expected else "yellow"
        out.print(f"left: {left.name} [{size(left.nbytes)}], {left.reason}", style=style,
                  markup=False)  # fmt: skip
