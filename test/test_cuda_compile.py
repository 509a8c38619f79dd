"""CUDA C++ kernels compile without a GPU, in registers alone: small batch, and rounded decode.

With ``nvcc`` at hand its report is read (registers, spills, warnings such as "wgmma serialized");
else NVRTC compiles; with neither the tests are skipped.
"""

import re
import shutil
import subprocess

import pytest
import torch

from int4q.kernels import cuda_decode, cuda_small_batch, nvrtc
from int4q.kernels.cuda_small_batch import Config, choose_config, defines

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
    """The decode kernel's compile-time parameters for ``int4_matmul``."""
    config = cuda_decode.choose_rounded_config(M, N, group_size, 132)
    copy = cuda_decode._scale_copy_bytes(True, 256 // group_size, 2, 4096, 4096, 0)
    ring = cuda_decode._Ring(M, 4096, group_size, 16, 2, copy, True, True, True)
    config = ring.fit(config, 232448, 233472)
    return {
        "ACT_BITS": 16, "GROUP": group_size, "X_TYPE": 0, "SCALE_TYPE": 0, "PDL": 1,
        "SYMMETRIC": 1, "ROUNDED": 1, "MATVEC": 0, "MIN_CTAS": config.ctas_per_sm,
        "COALESCED": int(copy > 0), "SCALE_VEC": copy, "COL_TILES": ring.col_tiles,
        "SPLIT": ring.split, "FUSED": 0, "WARPS": config.warps, "ROW_TILES": config.row_tiles,
        "STAGES": config.stages, "ARRANGED": int(ring.table_bytes > 0),
    }  # fmt: skip


@pytest.mark.parametrize("group_size", [32, 128, 256])
@pytest.mark.parametrize("N", [512, 4096, 21504, 28672])
@pytest.mark.parametrize("M", [1, 4, 16])
def test_rounded_decode_compiles_in_registers(M, N, group_size, tmp_path):
    compile_in_registers(
        cuda_decode._source(), rounded_defines(M, N, group_size), "int4_decode", tmp_path
    )


@pytest.mark.parametrize("case", UNIQUE, ids=lambda case: "-".join(map(str, case.values())))
def test_compiles_in_registers(case, tmp_path):
    compile_in_registers(cuda_small_batch._source(), case, "int4_small_batch", tmp_path)


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
