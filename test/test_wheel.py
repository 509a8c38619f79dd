"""What a wheel is called and holds, built from a copy of the tree."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("int4q", "pyproject.toml", "setup.py", "setup.cfg", "README.md", "LICENSE")


@pytest.mark.slow
def test_a_wheel_serves_every_python_on_its_platform(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    for built in tree.rglob("_int4_c*.*"):
        built.unlink()
    command = "pip wheel . --no-deps --no-build-isolation --quiet --wheel-dir out"
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "out").glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT / "int4q").rglob("*")
            if p.suffix in (".c", ".cpp", ".cu", ".h", ".wgsl", ".typed")}  # fmt: skip
    assert len(data) >= 8 and data <= set(names)
    if shutil.which("gcc"):
        assert any("_int4_cpu" in name for name in names)
    if shutil.which("g++"):
        assert any("_int4_core" in name for name in names)
