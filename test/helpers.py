"""What several test files use."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from int4q import CudaCoalescedInt4Tensor, Int4Tensor
from int4q.kernels.cpu import core

ROOT = Path(__file__).parents[1]
"""Of the repository."""
LAYOUTS = (Int4Tensor, CudaCoalescedInt4Tensor)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
HEAVY = os.environ.get("INT4Q_HEAVY") == "1"
heavy = pytest.mark.skipif(not HEAVY, reason="says again what others say: set INT4Q_HEAVY=1")
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.x")


@contextlib.contextmanager
def without_core():
    """The Python kernels where the C++ core would run; not in graphs that are compiled already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "load", lambda: (None, "switched off by a test"))
        yield


def run_in_interpreter(path: str) -> None:
    """Run a test file in a process of its own, whose Triton is the interpreter.

    Which Triton it is, is settled when Triton is first imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
