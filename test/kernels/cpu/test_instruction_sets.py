"""The tests of the kernels' numbers again, with every instruction set but this CPU's best."""

import os
import subprocess
import sys
from pathlib import Path

import emulate
import pytest
from helpers import heavy

from int4q.kernels.cpu import core, native

FOLDER = Path(__file__).parent
NUMBERS = "test_numbers.py", "test_native.py"
_SETS = {
    "avx2": native._AVX2,
    "avx_vnni": native._AVX_VNNI,
    "avx512": native._AVX512,
    "amx": native._AMX,
}

pytestmark = pytest.mark.slow


def run(files, **environment):
    """Tests of this folder in a process of their own; they must pass, and not by skipping."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", "not slow and not gpu", "--no-cov", *files]
    done = subprocess.run(
        command, cwd=FOLDER, env={**os.environ, **environment}, capture_output=True, text=True
    )
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, f"{summary}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
    assert int(summary.split(" passed")[0].split()[-1]) > 250, summary


@pytest.mark.parametrize(
    "isa", ["avx2", *(pytest.param(isa, marks=heavy) for isa in ("avx_vnni", "avx512"))]
)
def test_on_this_cpu(isa):
    here = [name for name, feature in _SETS.items() if native._features() & feature]
    if isa not in here[:-1]:
        pytest.skip(f"{isa} is this CPU's best, and tested as that, or it has none: {here}")
    files = (*NUMBERS, "test_compiled_search.py")
    files += () if core.load()[0] is None else ("test_core.py",)
    run(files, INT4Q_CPU_ISA=isa)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if reason := emulate.missing():
        required = os.environ.get("INT4Q_REQUIRE_QEMU") == "1"
        (pytest.fail if required else pytest.skip)(reason)
    return emulate.build(tmp_path_factory.mktemp("arm"))


@pytest.mark.parametrize(
    "cpu",
    [pytest.param("cortex-a53", marks=heavy, id="neon"), pytest.param("neoverse-n1", id="dotprod")],
)
def test_on_arm(program, cpu):
    """Armv8.0, and with the dot product; emulated."""
    run(NUMBERS, INT4Q_TEST_EMULATED=f"{program} {cpu}", INT4Q_CORE="0")
