"""``int4q.tune`` on a GPU: a real search of few tiles, and calls that then run with its table."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import int4q
from int4q.kernels.triton import tuned

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("INT4Q_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("INT4Q_TUNED", raising=False)
    tuned.use(None)
    yield tmp_path / "cache"
    tuned.use(None)


def test_a_search_and_the_calls_after_it(cache):
    w = torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16)
    t = int4q.Int4Tensor.from_hp(w, [1, 128])
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    before = F.linear(x, t)
    lines = []
    path = int4q.tune(
        shapes=[(1024, 1024)], group_sizes=[128], rows=[1], kernels=["matvec", "dequantize"],
        log=lines.append,
    )  # fmt: skip
    assert path.parent == cache and tuned.source() == str(path)
    content = json.loads(path.read_text())
    assert content["device"] == torch.cuda.get_device_name()
    assert tuple(content["capability"]) == torch.cuda.get_device_capability()
    assert all(row["us"] < row["default_us"] for row in content["rows"])
    assert len([line for line in lines if "->" in line]) == 2, lines
    # The tiles of these kernels change no bits of the dequantised weight.
    assert torch.equal(F.linear(x, t), before)
    tuned.use(None)  # a new process would read the file at its first call
    assert tuned.source() == str(path)


def test_every_candidate_of_the_matrix_kernel_is_right(cache):
    """What does not fit or is wrong is left out with its reason: on this GPU, nothing is."""
    hopper = torch.cuda.get_device_capability()[0] == 9
    lines = []
    int4q.tune(
        shapes=[(256, 512)], group_sizes=[128], rows=[1024],
        kernels=["stream"] if hopper else ["matmul"], timer=lambda calls: 1.0, log=lines.append,
    )  # fmt: skip
    assert not [line for line in lines if "left out" in line], lines
    assert tuned.source() != "built-in"
