"""An AOTInductor package in a C++ program that has the core and no Python."""

import pytest
import torch
from programs import QUICK, Package, built, inputs
from torch import nn

from int4q import Int4WeightOnlyConfig, quantize_
from int4q.kernels.cpu import core

_library, _reason = core.load()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_library is None, reason=str(_reason)),
    # torch.export and AOTInductor use what torch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


def test_a_package_gives_the_same_bits(tmp_path):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64, bias=False))
    quantize_(model, Int4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    rows = {0: torch.export.Dim("rows", min=1, max=4096)}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.ones(3, 256),), dynamic_shapes=(rows,))
        package = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(
            exported, package_path=package, inductor_configs=QUICK
        )
        program = built(Package.source, tmp_path, "torch", "torch_cpu")
        run = Package(program, _library._name, package)
        for M in (1, 3, 200):  # decode, and blocks
            assert torch.equal(run(inputs(M, 256)), model(inputs(M, 256)))
