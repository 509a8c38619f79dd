"""The compiled CPU kernels built for Arm and run by qemu, in the place of the loaded library."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from int4q.kernels.cpu import native

CC, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
SOURCES = Path(native.__file__).parent / "csrc"
FLAGS = ("-O2", "-Wall", "-Werror", "-ffp-contract=off", f"-I{SOURCES}")
_SIZE = {code: torch.empty(0, dtype=dtype).element_size() for dtype, code in native._KINDS.items()}


def missing() -> str | None:
    """Why nothing can be emulated here, or ``None``."""
    lacking = [tool for tool in (CC, QEMU) if shutil.which(tool) is None]
    return f"{' and '.join(lacking)} not found" if lacking else None


def build(folder: Path) -> Path:
    """The program of ``emulated.c`` for Arm; compiles without a warning."""
    program = folder / "emulated"
    sources = [Path(__file__).parent / "kernels/cpu/emulated.c", *sorted(SOURCES.glob("*.c"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_compile, sources, objects))
    subprocess.run([CC, "-static", "-o", program, *objects], check=True)
    return program


def _compile(source: Path, to: Path) -> None:
    subprocess.run([CC, *FLAGS, "-c", source, "-o", to], check=True)


class Library:
    """What :func:`native.load` gives, on an emulated CPU."""

    def __init__(self, program: str, cpu: str):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([QEMU, "-cpu", cpu, program], stdin=pipe, stdout=pipe)
        self._lock = threading.Lock()

    def close(self) -> None:
        self._process.communicate()

    def int4q_cpu_features(self) -> int:
        return self._run(2, native._Args(), [0] * 5, 0)[0]

    def int4q_decode(self, args: native._Args) -> int:
        extent = (args.M - 1) * args.x_stride + args.K
        out = _SIZE[args.out_kind] * ((args.M - 1) * args.out_stride + args.N)
        return self._call(0, args, extent * _SIZE[args.x_kind], out)

    def int4q_dequant(self, args: native._Args) -> int:
        return self._call(1, args, 0, _SIZE[args.out_kind] * args.N * args.out_stride)

    def _call(self, kernel: int, args: native._Args, x_bytes: int, out_bytes: int) -> int:
        groups, size = args.K // args.group, _SIZE[args.scale_kind]

        def params(stride_g: int, stride_n: int) -> int:
            return size * ((groups - 1) * stride_g + (args.N - 1) * stride_n + 1)

        sizes = [
            x_bytes,
            (args.N - 1) * args.q_stride + args.K // 2,
            params(args.scale_stride_g, args.scale_stride_n),
            params(args.zero_stride_g, args.zero_stride_n) if args.zero else 0,
            4 * args.N if args.bias else 0,
        ]
        status, out = self._run(kernel, args, sizes, out_bytes)
        ctypes.memmove(args.out, out, out_bytes)
        return status

    def _run(self, kernel: int, args: native._Args, sizes: list[int], out_bytes: int):
        arrays = args.x, args.qdata, args.scale, args.zero, args.bias
        pipe, answer = self._process.stdin, self._process.stdout
        with self._lock:
            pipe.write(struct.pack("=8q", kernel, *sizes, out_bytes, 0) + bytes(args))
            for address, size in zip(arrays, sizes, strict=True):
                pipe.write(ctypes.string_at(address, size) if size else b"")
            pipe.flush()
            return struct.unpack("=q", answer.read(8))[0], answer.read(out_bytes)
