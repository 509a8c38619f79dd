"""CUDA C++ kernels compile without a GPU, in registers alone: small batch, and rounded decode.

With ``nvcc`` at hand its report is read (registers, spills, warnings such as "wgmma serialized");
else NVRTC compiles; with neither the tests are skipped.
"""

import re
import shutil
import subprocess

import pytest
import torch
from cuda_cases import Case

from int4q.kernels.cuda import decode, warp_specialised, warp_specialised_config
from int4q.kernels.cuda import small_batch as cuda_small_batch
from int4q.kernels.cuda.small_batch import Config, choose_config, defines
from int4q.kernels.launch import nvrtc
from int4q.kernels.launch.planner import Parts
from int4q.kernels.weight import Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    # every configuration that is chosen by itself
    *(
        defines(choose_config(N, 132), M, group, BF16, BF16, True, False)
        for N in (512, 4096, 8192, 21504, 28672)
        for M, group in ((16, 128), (64, 32))
    ),
    defines(choose_config(4096, 132), 40, 256, FP16, FP16, False, False),
    defines(choose_config(28672, 132), 16, 64, BF16, FP32, True, True),
    defines(Config(4, 1, 4, 2, 9, split=2), 24, 64, FP16, BF16, False, False),
]
UNIQUE = list({str(case): case for case in CASES}.values())


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


@pytest.mark.parametrize("case", UNIQUE, ids=lambda case: "-".join(map(str, case.values())))
def test_compiles_in_registers(case, tmp_path):
    compile_in_registers(cuda_small_batch._source(), case, "int4_small_batch", tmp_path)


def warp_specialised_defines(case: Case) -> dict[str, int]:
    """The warp-specialised kernel's compile-time parameters on an H200."""
    N, K, group_size = case.N, case.K, case.group_size
    scale = torch.empty(K // group_size, N, dtype=case.scale)
    if case.coalesced:
        scale = scale.mT.contiguous().mT
    packed = torch.empty(N, K // 2, dtype=torch.int8)
    zeros = None if case.symmetric else scale
    weight = Weight(packed, scale, zeros, group_size, signed=not case.symmetric)
    parts = Parts(torch.empty(case.M, K, dtype=case.x), weight, None, None)
    config = warp_specialised_config.choose_config(
        case.M, N, K, group_size, case.symmetric, sm_count=132
    )
    return warp_specialised.defines(parts, config)


WARP_SPECIALISED_CASES = [
    *(
        Case(M, N, 4096, group_size)
        for N in (512, 4096, 8192, 12288, 21504, 28672)
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
    facts = warp_specialised_defines(case)
    compile_in_registers(warp_specialised.source(), facts, "int4_warp_specialised", tmp_path)


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


@pytest.mark.parametrize("N", [1, 512, 1024, 4096, 8192, 21504, 28672, 1 << 20])
def test_chosen_configurations_fit_into_shared_memory(N):
    config = choose_config(N, 132)
    for cols in range(8, cuda_small_batch.MAX_M + 1, 8):
        for scale_bytes in (0, 2, 4, 8):
            fitted = config.fit(cols, scale_bytes)
            assert fitted.shared_bytes(cols, scale_bytes) <= 227 * 1024
            assert fitted.x_stages > 2 * fitted.k_parts and fitted.stages >= 2


def test_a_configuration_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="more shared memory than there is for 64 columns"):
        Config(4, 2, 2, 3, 5).fit(64, 4)
