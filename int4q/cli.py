"""The command ``int4q``: ``int4q bench`` measures this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from int4q._version import __version__
from int4q.bench import __main__ as bench


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` without the program's name, by default the process's."""
    parser = argparse.ArgumentParser(prog="int4q", description="4-bit weights for PyTorch")
    parser.add_argument("--version", action="version", version=f"int4q {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("bench", help=bench.__doc__, description=bench.__doc__)
    bench.add_arguments(command)
    command.set_defaults(run=bench.run)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)
