"""The sweep of ``int4q/bench/q4gsw_sweep.py``: every row on every backend, and from a .pt2 file.

Rows marked heavy run with INT4Q_HEAVY=1.
"""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import HEAVY
from torch import nn

from int4q.bench import q4gsw_sweep as sweep
from int4q.kernels import linear_q4gsw, reference
from int4q.kernels.weight import Weight

ROWS = [
    pytest.param(
        c,
        id=c.name,
        marks=pytest.mark.skipif(c.heavy and not HEAVY, reason="heavy row: set INT4Q_HEAVY=1"),
    )
    for c in sweep.CONFIGS
]
every_row = pytest.mark.parametrize("config", ROWS)


def check(config, y):
    assert y.dtype == torch.float32 and y.shape == (config.M, config.N)
    _, relative = sweep.errors(config, y)
    assert relative <= config.tolerance, relative


def on(device, parts):
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in parts]


def test_the_table():
    """What the suite promises: the layers, the rows, and tolerances that follow K alone."""
    names = [c.name for c in sweep.CONFIGS]
    assert len(set(names)) == len(names)
    required = [c for c in sweep.CONFIGS if not c.heavy]
    layers = {(c.K, c.N) for c in required if c.M == 1}
    llama = {(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048), (2048, 128256)}
    assert llama <= layers
    prefill = {(c.M, c.N) for c in required if c.K == 2048 and c.M > 1}
    assert {(m, n) for m in (4096, 8192) for n in (512, 2048)} <= prefill
    assert {8, 16, 32, 64, 128} <= {c.group_size for c in required}
    for config in sweep.CONFIGS:
        assert config.tolerance == (sweep.SHORT if config.K <= 2048 else sweep.LONG)
        assert config.reason


def test_the_ramp():
    x = sweep.ramp(40, 30)
    assert x.flatten().tolist() == [((i % 17) - 8) / 16 for i in range(1200)]
    for M, K in ((40, 30), (40, 34), (3, 30)):
        x, repeats = sweep.ramp(M, K), sweep.distinct_rows(M, K)
        assert torch.equal(x, x[:repeats][torch.arange(M) % repeats])


def test_errors_see_what_is_wrong():
    config = next(c for c in sweep.CONFIGS if c.name == "tile-65")
    y = linear_q4gsw(sweep.ramp(config.M, config.K), *sweep.weight(config))
    good = sweep.errors(config, y)[1]
    for wrong in (float("nan"), float("inf"), y[64, 65].item() + 1e-2):
        bad = y.clone()
        bad[64, 65] = wrong
        assert good <= config.tolerance
        assert not sweep.errors(config, bad)[1] <= config.tolerance


@every_row
def test_op(config, device):
    parts = on(device, sweep.weight(config))
    check(config, linear_q4gsw(sweep.ramp(config.M, config.K).to(device), *parts))


@every_row
def test_the_plain_torch_op_agrees_with_the_golden(config):
    """The second oracle: another way to unpack, float32; a slice of columns at a time."""
    weights, scales, group_size, bias = sweep.weight(config)
    repeats = sweep.distinct_rows(config.M, config.K)
    x = sweep.ramp(repeats, config.K)
    parts = [
        reference.linear(x, Weight(w.view(torch.int8), s, None, group_size, signed=False))
        for w, s in zip(weights.split(16384), scales.split(16384, dim=1), strict=True)
    ]
    y = torch.cat(parts, dim=1) + (0 if bias is None else bias)
    error = (y.double() - sweep.golden(config)).abs().max()
    assert error <= config.tolerance * sweep.golden(config).square().mean().sqrt()


@every_row
def test_webgpu(config, webgpu):
    from int4q.kernels.webgpu import WebGPULinear

    if sweep.is_heavy(config, webgpu.software) and not HEAVY:
        pytest.skip("heavy row on a software adapter: set INT4Q_HEAVY=1")
    layer = WebGPULinear(*sweep.weight(config), gpu=webgpu)
    check(config, layer(sweep.ramp(config.M, config.K)))


# --- .pt2 files, run by another process ---------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, weights, weight_scales, group_size, bias):
        super().__init__()
        self.group_size = group_size
        for name, t in (("weights", weights), ("weight_scales", weight_scales), ("bias", bias)):
            self.register_buffer(name, t)

    def forward(self, x):
        return linear_q4gsw(x, self.weights, self.weight_scales, self.group_size, self.bias)


# The ramp is made again here in another way, from the formula.
CHILD = """
import hashlib, json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
import int4q
report = {}
for name, (M, K, path) in json.load(sys.stdin).items():
    x = (((np.arange(M * K) % 17) - 8) / np.float32(16)).astype(np.float32).reshape(M, K)
    y = torch.export.load(path).module()(torch.from_numpy(x)).numpy()
    report[name] = [hashlib.sha256(a.tobytes()).hexdigest() for a in (x, y)]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def from_files(tmp_path_factory):
    """Row name -> hashes of the ramp and of the output, both from a fresh process."""
    folder = tmp_path_factory.mktemp("pt2")
    files = {}
    for config in sweep.CONFIGS:
        if config.heavy and not HEAVY:
            continue
        path = folder / f"{config.name}.pt2"
        layer = Layer(*sweep.weight(config))
        program = torch.export.export(layer, (sweep.ramp(config.M, config.K),))
        torch.export.save(program, path)
        files[config.name] = config.M, config.K, str(path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(files),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for _, _, path in files.values():
        os.remove(path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@every_row
def test_from_a_file_in_a_fresh_process(config, from_files):
    x = sweep.ramp(config.M, config.K)
    y = linear_q4gsw(x, *sweep.weight(config))
    check(config, y)
    expected = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (x, y)]
    assert from_files[config.name] == expected
