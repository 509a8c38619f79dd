"""Export of a decode step: a graph without a turn or a copy of the scales, files that run again."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, to_coalesced_

# torch's own run_decompositions and AOTInductor use what torch deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",
)
MODELS = {  # layout of the scales, activations -> the one op of its linears
    "plain": (Int4Tensor, torch.bfloat16, "int4_linear"),
    "coalesced-a16": (CudaCoalescedInt4Tensor, torch.bfloat16, "int4_plain_mm"),
    "coalesced-a8": (CudaCoalescedInt4Tensor, torch.int8, "int4_plain_mm"),
}
COPIES = {
    "t", "transpose", "permute", "numpy_T", "mT", "clone", "contiguous", "_to_copy", "to", "copy_",
    "view", "reshape", "as_strided", "expand", "slice",
}  # fmt: skip


class Block(nn.Module):
    """Two linears with biases and a residual, 4-bit weights in groups of 32."""

    def __init__(self, name: str):
        super().__init__()
        torch.manual_seed(2)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        layout, dtype, _ = MODELS[name]
        for linear in (self.up, self.down):
            t = layout.from_hp(linear.weight.detach(), [1, 32], dtype)
            linear.weight = nn.Parameter(t, requires_grad=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def exported(name, M=1):
    m, x = Block(name), torch.randn(M, 64)
    with torch.no_grad():
        return m, x, torch.export.export(m, (x,))


def overload(node):
    return str(node.target).split(".")[-2] if node.op == "call_function" else ""


def derived_from_weights(program):
    """Names of ops that see a part of a 4-bit weight, or what was made of one, besides int4q's."""
    weights = {n for n in program.graph.nodes if n.op == "placeholder" and "weight" in n.name}
    assert weights
    found = []
    for node in program.graph.nodes:
        if node.op == "call_function" and weights & set(node.all_input_nodes):
            if str(node.target).startswith("int4q."):
                continue
            weights.add(node)
            found.append(overload(node))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_decode_graph_neither_turns_nor_copies_metadata(name):
    _, _, program = exported(name)
    ops = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [o for o in ops if o.startswith("int4q.")] == [f"int4q.{MODELS[name][2]}.default"] * 2
    # Before parts are unwrapped only the unwrapping itself touches a weight; after it nothing does.
    assert set(derived_from_weights(program)) <= {"access_subclass_inner_tensor"}
    with torch.no_grad():
        program = program.run_decompositions()
    assert derived_from_weights(program) == []
    ops = [overload(n) for n in program.graph.nodes if n.op == "call_function"]
    assert not COPIES & set(ops), ops


def test_that_reading_would_find_a_turn():
    """The check above sees a transpose, had the model one."""

    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 16), requires_grad=False)
            self.qdata_weight = nn.Parameter(torch.zeros(16, 64, dtype=torch.int8), False)

        def forward(self, x):
            s = self.weight.t().contiguous()
            return torch.ops.int4q.int4_plain_mm(x, self.qdata_weight, s, s, 32)

    with torch.no_grad():
        program = torch.export.export(Turning(), (torch.randn(1, 128),)).run_decompositions()
    assert COPIES & set(derived_from_weights(program))


def test_a_converted_model_exports_the_same_graph():
    m = to_coalesced_(Block("plain"), torch.int8)
    _, x, program = exported("coalesced-a8")
    with torch.no_grad():
        other = torch.export.export(m, (x,))
    assert [str(n.target) for n in other.graph.nodes] == [
        str(n.target) for n in program.graph.nodes
    ]
    assert torch.equal(other.module()(x), program.module()(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_a_graph_break(name):
    m, x = Block(name), torch.randn(3, 64)
    # relu and the residual are fused, in float32, as they are computed eagerly: the same bits.
    assert torch.equal(torch.compile(m, fullgraph=True)(x), m(x))


FRESH = """
import sys, torch, int4q
saved = torch.load(sys.argv[1], weights_only=True)
for path, y in saved["y"].items():
    if path.endswith(".aoti.pt2"):
        got = torch._inductor.aoti_load_package(path)(saved["x"])
    else:
        got = torch.export.load(path).module()(saved["x"])
    assert torch.equal(got, y), path
"""


@pytest.mark.slow
def test_files_give_the_same_bits_in_a_fresh_process(tmp_path):
    """``torch.export`` and AOTInductor packages of every layout, loaded by one new process."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    results, x = {}, torch.randn(1, 64)
    for name in MODELS:
        m = Block(name)
        with torch.no_grad():
            program, y = torch.export.export(m, (x,)), m(x)
            path = str(tmp_path / f"{name}.pt2")
            torch.export.save(program, path)
            results[path] = y
            if compiler:
                path = str(tmp_path / f"{name}.aoti.pt2")
                torch._inductor.aoti_compile_and_package(program, package_path=path)
                loaded = torch._inductor.aoti_load_package(path)
                # No op but ours rounds differently when compiled: relu and one addition.
                assert torch.equal(loaded(x), y)
                results[path] = y
    torch.save({"x": x, "y": results}, tmp_path / "saved.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "saved.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if not compiler:
        pytest.skip("AOTInductor needs a C++ compiler; the exported files were checked")
