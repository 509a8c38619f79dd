"""``int4q tune``: search the fastest tiles of the Triton kernels on this GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from int4q.bench.shapes import GROUPS, SETS
from int4q.tuning.families import FAMILIES
from int4q.tuning.search import ROWS, tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``int4q tune`` takes."""
    parser.add_argument("--shapes", choices=sorted(SETS), default="core", help="which layers")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="group sizes")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="values of M")
    parser.add_argument("--kernels", nargs="+", choices=sorted(FAMILIES))
    parser.add_argument("--out", type=Path, help="the table (default: the cache folder)")


def run(arguments: argparse.Namespace) -> None:
    """Search, and print where the table is."""
    path = tune(
        shapes=[(shape.N, shape.K) for shape in SETS[arguments.shapes]],
        group_sizes=arguments.groups,
        rows=arguments.rows,
        kernels=arguments.kernels,
        path=arguments.out,
    )
    print(path)
