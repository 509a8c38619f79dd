"""Carry a plan out: read, compute and write at the same time, and go on where a run was killed.

Some threads read the tensors of the next jobs, this one computes, one writes what came of the job
before. So at most three of the largest jobs are in memory, whatever the size of the checkpoint.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4q import errors
from int4q.checkpoint.plan import Job, Plan, Shard, digest, index, shards
from int4q.checkpoint.source import INDEX
from int4q.checkpoint.team import Team
from int4q.checkpoint.workspace import Journal, Workspace, sync, write

SYNC_BYTES = 1 << 28
"""Written between two waits for the disk: what a killed run has to do again at most."""

READERS = 4
"""Threads that read: one alone faults pages in at a fraction of what memory gives."""

Progress = Callable[[int, int], None]
"""Called with bytes read, and bytes to read in all."""


def run(
    plan: Plan,
    target: Path,
    *,
    team: Team | None = None,
    progress: Progress | None = None,
    max_shard_size: str | int | None = None,
    sync_bytes: int = SYNC_BYTES,
) -> None:
    """Write the checkpoint ``plan`` to the folder ``target``, which must not exist.

    The folder appears once everything in it is on disk. Until then the work lies beside it, see
    :mod:`int4q.checkpoint.workspace`; the same call goes on with it, and ends in the same bytes.

    Args:
        team: the processes that share the work; each calls this.
        progress: of this process.
        max_shard_size: of a file, in bytes or as ``"5GB"``.
        sync_bytes: as :data:`SYNC_BYTES`.

    Raises:
        FileExistsError: ``target`` exists.
        BlockingIOError: another process is writing it.
        ValueError: other work was begun for ``target``, or a job made other than planned.
        OSError: the disk is full or cannot be written.
    """
    team = team or Team()
    made = shards(plan) if max_shard_size is None else shards(plan, max_shard_size)
    work = digest(plan, made)
    team.agree(work)
    space = Workspace(target)
    with ExitStack() as stack:
        if team.leads:
            stack.enter_context(space.locked())
            space.begin(work)
            _allocate(space, made)
        team.wait()
        done = space.done()
        left = [n for n in range(len(plan.jobs)) if n not in done]
        team.wait()  # nobody adds to a journal before everybody has read them
        part = team.share([plan.jobs[n].nbytes for n in left])
        _work(plan, made, space, [left[i] for i in part], team.rank, progress, sync_bytes)
        team.wait()
        if team.leads:
            _finish(plan, made, space)
    team.wait()


def _allocate(space: Workspace, made: list[Shard]) -> None:
    """Every file at its full size and its header in it; what has been written there stays."""
    paths = [space.data / shard.file for shard in made]
    held = sum(path.stat().st_blocks * 512 for path in paths if path.exists())
    needed, free = sum(s.nbytes for s in made) - held, shutil.disk_usage(space.data).free
    if needed > free:
        what = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise OSError(errno.ENOSPC, what, str(space.target))
    for path, shard in zip(paths, made, strict=True):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with open(fd, "r+b") as f:
            f.write(shard.header)
            f.truncate(shard.nbytes)
        sync(path)


def _finish(plan: Plan, made: list[Shard], space: Workspace) -> None:
    files = dict(plan.files)
    if (listed := index(made, plan)) is not None:
        files[INDEX] = listed
    for name, content in files.items():
        write(space.data / name, content)
    space.finish()


def _work(
    plan: Plan,
    made: list[Shard],
    space: Workspace,
    numbers: Sequence[int],
    rank: int,
    progress: Progress | None,
    sync_bytes: int,
) -> None:
    jobs = [plan.jobs[n] for n in numbers]
    total, read = sum(job.nbytes for job in jobs), 0
    with Writer(plan, made, space, rank, sync_bytes) as writer, ThreadPoolExecutor(1) as writing:
        pending: Future[None] | None = None
        reads = _ahead(jobs)
        for number, job in zip(numbers, jobs, strict=True):
            tensors = _made(plan, job, next(reads))
            if pending is not None:
                pending.result()
            pending = writing.submit(writer.write, number, tensors, job.index)
            read += job.nbytes
            if progress:
                progress(read, total)
        if pending is not None:
            pending.result()
        writer.sync()


def _ahead(jobs: Sequence[Job]) -> Iterator[Any]:
    """What each job reads, in turn; those after it are being read meanwhile.

    As many as make up the bytes of the largest job, so small tensors cost no more memory than one
    large one.
    """
    limit = max((job.nbytes for job in jobs), default=0)
    waiting = deque(jobs)
    reading: deque[tuple[int, Future[Any]]] = deque()
    with ThreadPoolExecutor(READERS) as readers:

        def begin() -> None:
            held = sum(nbytes for nbytes, _ in reading)
            while waiting and (not reading or held + waiting[0].nbytes <= limit):
                job = waiting.popleft()
                reading.append((job.nbytes, readers.submit(job.read)))
                held += job.nbytes

        begin()
        while reading:
            got = reading.popleft()[1].result()
            begin()
            yield got
            del got


def _made(plan: Plan, job: Job, got: Any) -> Mapping[str, Tensor]:
    """What a job made, checked against the plan."""
    with torch.no_grad():
        tensors = job.make(got)
    expected = plan.specs
    for name, t in tensors.items():
        like = expected[name]
        shape = like.shape if job.index is None else like.shape[1:]
        if t.dtype != like.dtype or t.shape != shape:
            raise errors.value(
                f"{name} must be {like.dtype} {errors.dims(shape)}",
                f"{t.dtype} {errors.dims(t.shape)}",
            )
    return tensors


class Writer:
    """Puts tensors at their places, and notes the jobs whose bytes the disk has."""

    def __init__(self, plan: Plan, made: list[Shard], space: Workspace, rank: int, sync_bytes: int):
        self._places: dict[str, tuple[int, int]] = {}
        self._fds: list[int] = []
        for shard in made:
            fd = os.open(space.data / shard.file, os.O_WRONLY)
            self._fds.append(fd)
            self._places.update({name: (fd, start) for name, start in shard.offsets.items()})
        self._journal: Journal = space.journal(rank)
        self._unsynced: list[int] = []
        self._bytes, self._sync_bytes = 0, sync_bytes

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in self._fds:
            os.close(fd)
        self._journal.close()

    def write(self, number: int, tensors: Mapping[str, Tensor], index: int | None) -> None:
        """Write what job ``number`` made: whole tensors, or matrix ``index`` of stacks."""
        for name, t in tensors.items():
            fd, start = self._places[name]
            data = _bytes(t)
            start += (index or 0) * len(data)
            while data:
                count = os.pwrite(fd, data, start)
                data, start, self._bytes = data[count:], start + count, self._bytes + count
        self._unsynced.append(number)
        if self._bytes > self._sync_bytes:
            self.sync()

    def sync(self) -> None:
        """Wait for the disk, then note the jobs."""
        for fd in self._fds:
            os.fdatasync(fd)
        self._journal.add(self._unsynced)
        self._unsynced, self._bytes = [], 0


def _bytes(t: Tensor) -> memoryview:
    flat: Any = t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)
