"""Processes that die at one of their writes, and the check that nothing comes of it."""

import os
import random
import signal

import torch
from checkpoints import contents


def kill_at(call: int) -> None:
    """End this process at the ``call``-th system call that writes, half way through its bytes."""
    count = 0

    def wrap(name):
        real = getattr(os, name)

        def wrapped(*args):
            nonlocal count
            count += 1
            if count == call:
                if name in ("write", "pwrite"):
                    fd, data, *rest = args
                    real(fd, data[: len(data) // 2], *rest)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(os, name, wrapped)

    for name in ("pwrite", "write", "fsync", "fdatasync", "ftruncate", "rename", "replace"):
        wrap(name)


def killed(work, call: int) -> bool:
    """Whether ``work`` was, in a process of its own that dies at its ``call``-th write."""
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            kill_at(call)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def check_kills(work, target, expected, number):
    rng, kills = random.Random(number), 0
    while kills < number:
        if not killed(work, rng.randrange(1, 120)):
            assert contents(target) == expected
            for path in target.iterdir():
                path.unlink()
            target.rmdir()
            continue
        kills += 1
        assert not target.exists() or contents(target) == expected  # complete or not at all
    if not target.exists():
        work()
    assert contents(target) == expected
    assert os.listdir(target.parent) == [target.name]
