"""CUDA C++ kernels compile without a GPU, in registers alone: warp-specialised, rounded decode.

With ``nvcc`` at hand its report is read (registers, spills, warnings such as "wgmma serialized");
else NVRTC compiles; with neither the tests are skipped.
"""

import re
import shutil
import subprocess

import pytest
import torch
from cuda_cases import Case

from int4q.kernels.cuda import decode, warp_specialised
from int4q.kernels.cuda.warp_specialised_config import Config, choose_config
from int4q.kernels.launch import nvrtc
from int4q.kernels.launch.planner import Parts
from int4q.kernels.weight import Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def rounded_defines(M: int, N: int, group_size: int) -> dict[str, int]:
    """The decode kernel's compile-time parameters for ``int4_matmul`` on an H200."""
    config = decode.choose_rounded_config(M, N, group_size, 132)
    K, half = 4096, torch.bfloat16
    packed = torch.empty(N, K // 2, dtype=torch.int8)
    scale = torch.empty(N, K // group_size, dtype=half).mT
    weight = Weight(packed, scale, None, group_size, signed=False)
    parts = Parts(torch.empty(M, K, dtype=half), weight, None, None)
    scales = decode.Scales.of(weight, by_group=False)
    ring = decode.Ring(M, K, group_size, 16, scales, True, True)
    config = ring.fit(config, 232448, 233472)
    return decode.ring_defines(parts, ring, config, 16, dependent=True)


@pytest.mark.parametrize("group_size", [32, 128, 256])
@pytest.mark.parametrize("N", [512, 4096, 21504, 28672])
@pytest.mark.parametrize("M", [1, 4, 16])
def test_rounded_decode_compiles_in_registers(M, N, group_size, tmp_path):
    case = rounded_defines(M, N, group_size)
    compile_in_registers(decode.source(), case, "int4_decode", tmp_path)


def facts(case: Case) -> Parts:
    """Tensors such as a case has, without values."""
    N, K, group_size = case.N, case.K, case.group_size
    scale = torch.empty(K // group_size, N, dtype=case.scale)
    if case.coalesced:
        scale = scale.mT.contiguous().mT
    packed = torch.empty(N, K // 2, dtype=torch.int8)
    zeros = None if case.symmetric else scale
    weight = Weight(packed, scale, zeros, group_size, signed=not case.symmetric)
    return Parts(torch.empty(case.M, K, dtype=case.x), weight, None, None)


WARP_SPECIALISED_CASES = [
    *(
        Case(M, N, 4096, group_size)
        for N in (4096, 12288, 21504, 28672)
        for M, group_size in ((16, 128), (64, 32))
    ),
    *(Case(M, 28672, 4096, group_size) for M, group_size in ((8, 32), (32, 128), (40, 256))),
    Case(64, 28672, 4096, 128, coalesced=True, symmetric=True),
    Case(24, 21504, 4096, 64, coalesced=True),
    Case(40, 4096, 4096, 256, FP16, FP16),
    Case(16, 28672, 4096, 64, BF16, FP32),
    Case(56, 21504, 4096, 64, FP16, BF16, coalesced=True),
]


@pytest.mark.parametrize("case", WARP_SPECIALISED_CASES, ids=str)
def test_warp_specialised_compiles_in_registers(case, tmp_path):
    sizes = case.M, case.N, case.K, case.group_size
    config = choose_config(*sizes, case.symmetric, sm_count=132)
    defines = warp_specialised.defines(facts(case), config)
    compile_in_registers(warp_specialised.source(), defines, "int4_warp_specialised", tmp_path)


def compile_in_registers(source: str, case: dict[str, int], kernel: str, tmp_path) -> None:
    """No spills and no warnings, but for those of constants that a mode leaves unused."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        try:
            binary = nvrtc.compile_cubin(source, case, "sm_90a")
        except RuntimeError as error:
            if "was not found" in str(error):
                pytest.skip("neither nvcc nor NVRTC is installed")
            raise
        assert kernel.encode() in binary
        return
    file = tmp_path / "kernel.cu"
    file.write_text(source)
    command = [nvcc, "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
    command += ["-diag-suppress", "177,179", "-Xptxas", "-v"]
    command += ["-o", str(tmp_path / "kernel.cubin"), str(file)]
    command += [f"-D{name}={value}" for name, value in case.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "warning" not in report and "erializ" not in report, report
    assert set(re.findall(r"(\d+) bytes spill stores", report)) == {"0"}, report


@pytest.mark.parametrize("N", [1, 512, 1024, 4096, 8192, 12288, 21504, 28672, 1 << 20])
def test_chosen_configurations_fit_into_shared_memory(N):
    for M in range(8, warp_specialised.MAX_M + 1, 8):
        for group_size in (32, 64, 128, 256):
            for scale in (FP32, BF16):
                parts = facts(Case(M, 8, group_size, group_size, BF16, scale))
                config = choose_config(M, N, 4096, group_size, False, sm_count=132)
                stage = warp_specialised.stage_bytes(parts, config)
                assert config.stages(stage) >= 2 and config.stages(stage) % config.k_parts == 0
                assert config.shared_bytes(stage) <= 227 * 1024


@pytest.mark.parametrize("N", [1, 8, 600, 4096, 12352, 28672, 57344, 128256])
@pytest.mark.parametrize("cut", [(4,), (1, 1, 1, True), (2, 2, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_tiles_hold_every_row(N, cut):
    config = Config(*cut)
    found = config.cut(N, steps=3, sm_count=132)
    assert found.tile_rows % 8 == 0 and found.tile_rows <= config.capacity
    assert found.tiles * found.tile_rows >= N
    if config.k_parts * config.split > 1:
        assert found.blocks == found.tiles * config.split
    else:
        assert found.blocks <= 132 and (config.even or found.tiles % found.blocks == 0)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(warpgroups=3, k_parts=2), "warpgroups must be a multiple of k_parts"),
        (dict(even=True, split=2), "even shares need k_parts = split = 1"),
        (dict(tile_rows=20), "tile_rows must be a multiple of 8, at most 256"),
        (dict(warpgroups=1, tile_rows=72), "tile_rows must be a multiple of 8, at most 64"),
    ],
)
def test_configurations_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Config(**arguments)


def test_a_configuration_that_cannot_fit_is_refused():
    parts = facts(Case(64, 8, 32, 32, BF16, FP32))
    config = Config(4, 4)
    with pytest.raises(ValueError, match="needs more shared memory than there is"):
        config.stages(warp_specialised.stage_bytes(parts, config) * 2)
