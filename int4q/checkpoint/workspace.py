"""The folder that a checkpoint is written in before it appears: a lock, journals, the data.

For ``models/small`` it is ``models/.small.int4q``:

    ``lock``              held by the process that writes
    ``plan``              digest of the plan: what is being written
    ``journal-<rank>``    numbers of the jobs whose bytes are safe on disk, one a line
    ``data/``             the checkpoint; renamed to its place once it is complete

A line is written after the bytes that it speaks of have reached the disk. So whatever was killed,
and wherever, what the journals name need not be done again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from int4q import errors


class Workspace:
    """Where ``target`` is prepared; see the module.

    Attributes:
        data: the folder that becomes ``target``.
    """

    def __init__(self, target: Path):
        self.target = target.absolute()
        self.root = self.target.parent / f".{self.target.name}.int4q"
        self.data = self.root / "data"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out.

        Raises:
            FileExistsError: ``target`` is there already.
            BlockingIOError: another process is writing it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BlockingIOError(f"another process is writing {self.target}") from None
        try:
            if self.target.is_file() or (self.target.is_dir() and any(self.target.iterdir())):
                shutil.rmtree(self.root)  # of a run that was killed after its last step, or ours
                raise FileExistsError(f"{self.target} exists already and is never overwritten")
            yield
        finally:
            lock.release()

    def begin(self, digest: str) -> None:
        """Start the work that ``digest`` stands for, or go on with it.

        Raises:
            ValueError: other work was begun here and not finished.
        """
        plan = self.root / "plan"
        if not plan.exists():
            shutil.rmtree(self.data, ignore_errors=True)
            self.data.mkdir()
            write(plan, digest.encode())
        elif plan.read_text() != digest:
            raise errors.value(
                f"{self.target} was begun with other options, another source or another version",
                "these",
                f"Run that command again to finish it, or delete {self.root} to start anew",
            )

    def done(self) -> set[int]:
        """Numbers of the plan's jobs that need not be done again."""
        numbers: set[int] = set()
        for journal in self.root.glob("journal-*"):
            lines = journal.read_bytes().split(b"\n")[:-1]  # the last one may be half a line
            numbers.update(map(int, lines))
        return numbers

    def journal(self, rank: int) -> Journal:
        """Of one process."""
        return Journal(self.root / f"journal-{rank}")

    def finish(self) -> None:
        """Let ``data`` appear as ``target``, all at once."""
        sync(self.data)
        os.rename(self.data, self.target)
        sync(self.target.parent)
        shutil.rmtree(self.root)


class Journal:
    """Numbers of finished jobs, added in batches; see :class:`Workspace`."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # A half line of a run that was killed is cut off, so that what follows is a line.
        whole = os.pread(self._fd, os.fstat(self._fd).st_size, 0).rfind(b"\n") + 1
        os.ftruncate(self._fd, whole)
        os.lseek(self._fd, whole, os.SEEK_SET)

    def add(self, numbers: list[int]) -> None:
        """Note jobs whose bytes are on disk."""
        rest = memoryview("".join(f"{number}\n" for number in numbers).encode())
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def write(path: Path, content: bytes | Path) -> None:
    """A small file (or a copy of one) that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    if isinstance(content, Path):
        shutil.copyfile(content, part)
    else:
        part.write_bytes(content)
    sync(part)
    part.replace(path)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
