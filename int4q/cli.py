"""The command ``int4q``: measure this machine or a quantised model, tune the kernels of a GPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from int4q import tuning
from int4q._version import __version__
from int4q.bench import __main__ as bench
from int4q.bench.shapes import GROUPS, SETS
from int4q.evaluation import command as evaluation

_EVAL = "quantise a language model and measure how far it is from the original"
_TUNE = "search the fastest tiles of the Triton kernels on this GPU and keep them in a table"


def _tune(arguments: argparse.Namespace) -> None:
    path = tuning.tune(
        shapes=[(shape.N, shape.K) for shape in SETS[arguments.shapes]],
        group_sizes=arguments.groups,
        rows=arguments.rows,
        kernels=arguments.kernels,
        path=arguments.out,
    )
    print(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` without the program's name, by default the process's."""
    parser = argparse.ArgumentParser(prog="int4q", description="4-bit weights for PyTorch")
    parser.add_argument("--version", action="version", version=f"int4q {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("bench", help=bench.__doc__, description=bench.__doc__)
    bench.add_arguments(command)
    command.set_defaults(run=bench.run)
    command = commands.add_parser("eval", help=_EVAL, description=_EVAL)
    evaluation.add_arguments(command)
    command.set_defaults(run=evaluation.run)
    command = commands.add_parser("tune", help=_TUNE, description=_TUNE)
    command.add_argument("--shapes", choices=sorted(SETS), default="core", help="which layers")
    command.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="group sizes")
    command.add_argument("--rows", type=int, nargs="+", default=tuning.ROWS, help="values of M")
    command.add_argument("--kernels", nargs="+", choices=sorted(tuning.FAMILIES))
    command.add_argument("--out", type=Path, help="the table (default: the cache folder)")
    command.set_defaults(run=_tune)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)
