"""An AOTInductor package of a decoder layer on a GPU, in a C++ program without Python."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from programs import Package, built, inputs
from torch import nn

import int4q
from int4q.kernels.core import library
from int4q.kernels.launch import record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(library.load()[0] is None, reason=str(library.load()[1])),
    # torch.export and AOTInductor use what torch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
HIDDEN, HEADS, INNER = 1024, 8, 2816


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False, device="cuda", dtype=torch.bfloat16)


class DecoderLayer(nn.Module):
    """Llama's: ``[rows, HIDDEN]``, one sequence."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(HIDDEN, HIDDEN) for _ in range(4))
        self.gate, self.up, self.down = (
            linear(HIDDEN, INNER),
            linear(HIDDEN, INNER),
            linear(INNER, HIDDEN),
        )
        norms = (nn.RMSNorm(HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.attention_norm, self.mlp_norm = norms

    def forward(self, x):
        y = self.attention_norm(x)
        q, k, v = (
            part(y).view(-1, HEADS, HIDDEN // HEADS).transpose(0, 1)
            for part in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x = x + self.o(y.transpose(0, 1).reshape(-1, HIDDEN))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


DENSE = """
import sys
import torch
model = torch.nn.Linear(256, 128).cuda()
x = torch.ones(2, 256, device="cuda")
with torch.no_grad():
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=sys.argv[1]
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x))
"""


@pytest.fixture(scope="module", autouse=True)
def packages_run(tmp_path_factory):
    """AOTInductor itself runs here: in a process of its own, since where it does not it crashes."""
    command = [sys.executable, "-c", DENSE, str(tmp_path_factory.mktemp("dense") / "dense.pt2")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"AOTInductor runs no dense model here: {done.returncode} {done.stderr[-500:]}")


def microseconds(run, x) -> float:
    """The best of a call, as ``run_package`` takes it."""
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            run(x)
        best = min(best, (time.perf_counter() - start) / 20 * 1e6)
    return best


def test_a_decoder_layer(tmp_path, record_property):
    torch.manual_seed(3)
    layer = DecoderLayer().eval()
    int4q.quantize_(layer, int4q.Int4WeightOnlyConfig(group_size=64, set_inductor_config=False))
    int4q.prepare_for_inference_(layer)
    rows = {0: torch.export.Dim("rows", min=1, max=4096)}
    x = {M: inputs(M, HIDDEN).to("cuda", torch.bfloat16) for M in (1, 8, 160)}
    package, plans = str(tmp_path / "layer.pt2"), str(tmp_path / "layer.plans")
    record.clear()
    with torch.no_grad():
        exported = torch.export.export(layer, (x[8],), dynamic_shapes=(rows,))
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        run = torch._inductor.aoti_load_package(package)
        wanted = {M: run(x[M]) for M in x}
        for M in x:
            exact = layer(x[M]).float()
            assert ((wanted[M].float() - exact).norm() / exact.norm()).item() < 0.01
    int4q.save_plans(plans)
    program = built(Package.source, tmp_path, "torch", "torch_cpu", "torch_cuda", "c10_cuda")
    without_python = Package(program, library.load()[0]._name, package, plans)
    for M in x:
        assert torch.equal(without_python(x[M]), wanted[M])
        times = {"Python": microseconds(run, x[M]), "C++": without_python.microseconds}
        record_property(f"microseconds at M={M}", times)
    with pytest.raises(RuntimeError, match=r"no plan is saved .* shape \[7, 1024\]"):
        without_python(inputs(7, HIDDEN).to("cuda", torch.bfloat16))
