"""Processes of one gloo group, started once for many checks.

They come from a fork server that has imported torch and int4q, so that starting one is cheap. A
check is a function of a test module; it runs in every rank, with the asserts of a test.
"""

import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch

PRELOAD = ["int4q", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
TIMEOUT = 60
"""Seconds that a rank waits for the others, and the test for all."""


class Ranks:
    """``world`` processes; ``run`` has them all do the same."""

    def __init__(self, world: int):
        self.world = world
        self.ranks = []

    def run(self, check, *args):
        """``check(*args)`` in every rank; any rank's failure is the test's, with its traceback.

        Returns:
            What rank 0 returned.
        """
        if not self.ranks:
            self.start()
        for _, pipe in self.ranks:
            pipe.send((inspect.getfile(inspect.unwrap(check)), check.__name__, args))
        done = [
            pipe.recv() if pipe.poll(TIMEOUT) else (False, "no answer") for _, pipe in self.ranks
        ]
        failed = [f"rank {rank}: {what}" for rank, (ok, what) in enumerate(done) if not ok]
        if failed:  # the others may still wait for it
            self.stop()
            pytest.fail("\n".join(failed), pytrace=False)
        return done[0][1]

    def start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.world):
            mine, its = context.Pipe()
            process = context.Process(
                target=serve,
                args=(rank, self.world, f"{self.folder.name}/store", its),
                daemon=True,
            )
            process.start()
            self.ranks.append((process, mine))

    def stop(self):
        for process, pipe in self.ranks:
            pipe.close()
            process.kill()
            process.join()
        if self.ranks:
            self.folder.cleanup()
        self.ranks = []


def serve(rank, world, store, pipe):
    """A rank's life: do what comes through the pipe until it is closed."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisoned memory, as in conftest.py
    torch.distributed.init_process_group(
        "gloo",
        rank=rank,
        world_size=world,
        init_method=f"file://{store}",
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    while True:
        try:
            path, name, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((True, getattr(_module(path), name)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _module(path):
    """The test module at ``path``, with the same folder of helpers as pytest gives it."""
    name = f"ranks_{Path(path).stem}"
    if name not in sys.modules:
        sys.path.insert(0, str(Path(__file__).parent))
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def group(world: int):
    """A fixture: ``world`` ranks for the tests of a module."""

    @pytest.fixture(scope="module")
    def ranks():
        ranks = Ranks(world)
        yield ranks
        ranks.stop()

    return ranks
