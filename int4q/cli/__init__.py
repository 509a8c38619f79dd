"""The command ``int4q``: from checkpoint to checkpoint, and what this machine makes of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from int4q._version import __version__
from int4q.bench import __main__ as bench
from int4q.cli import convert, doctor, generate, inspect, quantize
from int4q.evaluation import command as evaluation
from int4q.tuning import command as tuning

app = typer.Typer(
    name="int4q",
    help="4-bit weights for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (quantize, convert, inspect, generate, doctor):
    app.command(_command.__name__.rpartition(".")[2])(_command.run)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"int4q {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def _delegate(name: str, module: Any) -> None:
    """A command that a module with ``add_arguments`` and ``run`` describes in argparse."""
    summary = module.__doc__.splitlines()[0].partition(": ")[2]
    # Its parser answers --help too.
    passed = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    def command(context: typer.Context) -> None:
        parser = argparse.ArgumentParser(prog=f"int4q {name}", description=module.__doc__)
        module.add_arguments(parser)
        module.run(parser.parse_args(context.args))

    app.command(name, help=summary, context_settings=passed)(command)


_delegate("eval", evaluation)
_delegate("bench", bench)
_delegate("tune", tuning)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` without the program's name, by default the process's."""
    try:
        app(list(sys.argv[1:] if argv is None else argv), prog_name="int4q")
    except SystemExit as done:  # typer ends the process after every command
        if done.code:
            raise
