"""C++ programs of the tests, built with torch's headers and libraries."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension


def built(source: Path, folder: Path, *libraries: str) -> Path:
    """The program of ``source``."""
    compiler = shutil.which("g++") or pytest.skip("no g++")
    path = folder / source.stem
    command = [compiler, "-std=c++20", "-O0", str(source), "-o", str(path)]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    for folder in cpp_extension.library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    # A library is needed for what it registers, too.
    command += ["-Wl,--no-as-needed", *(f"-l{name}" for name in libraries), "-lc10", "-ldl"]
    subprocess.run(command, check=True)
    return path


QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
"""Options of AOTInductor under which a package is there sooner."""


class Package:
    """An AOTInductor package, run in a process without Python."""

    source = Path(__file__).with_name("run_package.cpp")

    def __init__(self, program: Path, core: str, package: str, *plans: str):
        self._command, self._plans = [str(program), core, package], plans

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What it gives for ``x = inputs(rows, columns)``; ``microseconds`` is the time of it."""
        rows, columns = x.shape
        command = [*self._command, str(rows), str(columns), *self._plans]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        self.microseconds = float(done.stderr.split()[-1])
        numbers = torch.tensor([float.fromhex(line) for line in done.stdout.split()])
        return numbers.view(rows, -1).to(x)


def inputs(rows: int, columns: int) -> torch.Tensor:
    """What the program computes as its input, float32."""
    return torch.arange(rows * columns).double().sin().view(rows, columns).float()
