"""What the commands share: the console, a progress bar in bytes, errors in one line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def console() -> Console:
    """Of the standard output; wide where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def errors_in_one_line(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose user errors end the process with their message and status 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            _fail(f"{error.name} is not installed: pip install 'int4q[hf]'")
            raise typer.Exit(1) from error
        except (ValueError, OSError) as error:
            _fail(str(error))
            raise typer.Exit(1) from error

    return run


def _fail(message: str) -> None:
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    stderr.print("error: ", style="red", end="")
    stderr.print(message, markup=False)


@contextmanager
def bytes_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with GB/s and time left, to be called with bytes done and in all."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.4g} GB"
