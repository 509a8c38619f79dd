"""An AOTInductor package in a C++ program that has the core and no Python."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

from int4q import Int4WeightOnlyConfig, quantize_
from int4q.kernels.cpu import core

_library, _reason = core.load()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_library is None, reason=str(_reason)),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    # torch.export and AOTInductor use what torch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]
SOURCE = Path(__file__).with_name("run_package.cpp")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "run_package"
    command = ["g++", "-std=c++20", "-O0", str(SOURCE), "-o", str(path)]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    for folder in cpp_extension.library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"], check=True)
    return path


def test_a_package_gives_the_same_bits(program, tmp_path):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64, bias=False))
    quantize_(model, Int4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    rows = {0: torch.export.Dim("rows", min=1, max=4096)}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.ones(3, 256),), dynamic_shapes=(rows,))
        package = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        for M in (1, 3, 200):  # decode, and blocks
            command = [str(program), _library._name, package, str(M)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            got = torch.tensor([float.fromhex(line) for line in done.stdout.split()])
            assert torch.equal(got.view(M, 64), model(torch.ones(M, 256)))
