"""The example of tensor parallelism on two CPU ranks: its checks, and what it writes."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
def test_two_ranks(tmp_path):
    command = "-m torch.distributed.run --nproc-per-node 2 examples/tensor_parallel.py --out"
    done = subprocess.run(
        [sys.executable, *command.split(), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "tensor_parallel.json").read_text())
    assert [row["weights"] for row in result["rows"]] == [
        "16 bits",
        "plain W4A16",
        "coalesced W4A16",
    ]
    sixteen, *four = (row["layer_mb"] for row in result["rows"])
    assert all(mb < sixteen / 3 for mb in four)
    assert (tmp_path / "tensor_parallel.md").read_text().count("| tiny |") == 3
