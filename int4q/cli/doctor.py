"""``int4q doctor``: what runs on this machine, what does not, and what to do about it."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from int4q._version import __version__
from int4q.cli.show import console, errors_in_one_line
from int4q.kernels import cpu
from int4q.kernels.cpu import core
from int4q.kernels.registry import Problem, explain

_PACKAGES = {
    "torchao": "pip install torchao",
    "transformers": "pip install 'int4q[hf]': quantize, convert, generate, eval",
    "safetensors": "pip install 'int4q[hf]': every checkpoint",
    "gguf": "pip install 'int4q[hf]': GGUF files",
    "triton": "pip install 'int4q[cuda]': the GPU kernels",
    "fbgemm-gpu-genai": "only to compare with: pip install 'int4q[cuda]'",
    "wgpu": "pip install 'int4q[webgpu]': WebGPU",
}
_ROWS = (1, 4, 64, 1024)


@errors_in_one_line
def run() -> None:
    """Say what this machine has, and which kernel a layer of 4096 x 4096 takes."""
    out = console()
    _versions(out)
    _cpu(out)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            out.print(f"GPU {index}: {torch.cuda.get_device_name(index)}, sm{major}{minor}")
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no driver"
        out.print(f"GPU: none that torch sees ({why})")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        _kernels(device, out)


def _versions(out: Console) -> None:
    out.print(f"int4q {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    table = Table(box=None, show_header=False)
    for package, fix in _PACKAGES.items():
        try:
            table.add_row(package, version(package), "")
        except PackageNotFoundError:
            table.add_row(package, "not installed", escape(fix))
    out.print(table)


def _cpu(out: Console) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    out.print(f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    out.print(f"C compiler: {compiler or 'none: install one and int4q again for its CPU kernels'}")
    for name, (library, reason) in (("C", cpu.native.load()), ("C++", core.load())):
        out.print(f"{name} kernels: {'loaded' if library else reason}", markup=False)


def _kernels(device: str, out: Console) -> None:
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    table = Table("int4_linear, bfloat16, on " + device, box=None)
    for M in _ROWS:
        table.add_column(f"M = {M}", overflow="fold")
    bf16 = torch.bfloat16
    columns = [
        explain(Problem("int4_linear", device, bf16, bf16, M, 4096, 4096, 128, capability))
        for M in _ROWS
    ]
    for rows in zip(*columns, strict=True):
        reasons = [why for *_, why in rows]
        if not all(why and why.startswith("runs on ") for why in reasons):  # another device's
            table.add_row(rows[0][0], *("runs" if why is None else why for why in reasons))
    out.print(table)
    taken = [next(name for name, _, why in rows if why is None) for rows in columns]
    out.print("taken: " + ", ".join(f"M = {M} {n}" for M, n in zip(_ROWS, taken, strict=True)))
