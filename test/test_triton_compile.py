"""Every Triton and Gluon kernel compiles for sm_90 without a GPU, in registers alone.

The calls are the library's own, on meta tensors, with a driver that claims an sm_90 device and a
launch that only compiles; what ptxas produced is read back from the binary. A spill shows as a
stack frame. Both replace parts of Triton, so they happen in a process of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

MAX_REGISTERS = 255
CHILD = "INT4Q_COMPILE_CHILD"


def jobs():
    """``(name, call)`` for one representative of every kernel and tile in the table."""
    import torch

    from int4q.kernels import gluon_matmul, triton_dequant, triton_matmul, triton_matvec

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def linear(run, M, N, K, group_size, dtype=torch.bfloat16, coalesced=False, bias=True):
        shape = (N, K // group_size) if coalesced else (K // group_size, N)
        scale = empty(*shape, dtype=dtype)
        scale = scale.mT if coalesced else scale
        qdata = empty(N, K // 2, dtype=torch.int8)
        bias = empty(N, dtype=dtype) if bias else None
        return lambda: run(empty(M, K, dtype=dtype), qdata, scale, scale, group_size, bias)

    found = []
    for M in (16, 32, 64, 128, 256):  # one row of the table each, for wide and for narrow N
        for N in (28672, 4096):
            name = f"gluon M={M} N={N}"
            found.append((name, linear(gluon_matmul.int4_linear, M, N, 4096, 128)))
    for name, more in {
        "group 32, scales [N, groups]": dict(group_size=32, coalesced=True),
        "group 256, fp16": dict(group_size=256, dtype=torch.float16),
    }.items():
        found.append((f"gluon {name}", linear(gluon_matmul.int4_linear, 64, 4096, 4096, **more)))
    for M in (1, 16, 64, 256):
        found.append((f"triton M={M}", linear(triton_matmul.int4_linear, M, 4096, 4096, 128)))
    for M in (16, 32, 64, 256):
        args = empty(M, 4096, dtype=torch.float32), empty(4096, 2048, dtype=torch.uint8)
        scales = empty(128, 4096, dtype=torch.float32)
        job = partial(triton_matmul.linear_q4gsw, *args, scales, 32, scales[0])
        found.append((f"q4gsw M={M}", job))
    packed, by_row = empty(4096, 2048, dtype=torch.int8), empty(4096, 32)
    x = empty(16, 4096)
    found += [
        ("gluon symmetric", lambda: gluon_matmul.int4_matmul(x, packed, by_row, 128)),
        ("triton symmetric", lambda: triton_matmul.int4_matmul(x, packed, by_row, 128)),
        ("matvec", lambda: triton_matvec.int4_matvec(x[:1], packed, by_row, 128)),
        ("dequantise", lambda: triton_dequant.dequant_w4_to_bf16(packed, by_row, 128)),
        (
            "dequantise affine, tail of K",
            lambda: triton_dequant.dequantize(
                packed[:, :80], by_row[:, :5].mT, by_row[:, :5].mT, 32, torch.float16
            ),
        ),
    ]
    return found


def pretend_sm90(compiled: list) -> None:
    """Make Triton compile for sm_90 and collect the kernels instead of launching them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from int4q.kernels import triton_common, triton_matmul, tuned

    class Utils:
        get_device_properties = staticmethod(
            lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
        )
        load_binary = staticmethod(lambda *_: (0, 0, 0, 0, 1024))

    class Driver:
        utils = Utils
        launcher_cls = staticmethod(lambda *_: None)

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, _=0):
            return 0

    driver.set_active(Driver())
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    tuned.multiprocessors = lambda _: 132
    triton_common.has_launch_overlap = triton_matmul.has_launch_overlap = lambda _: True


def resources(kernel) -> dict:
    """Registers, stack bytes and dynamic shared memory of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr).groups()
    return {
        "kernel": kernel.metadata.name,
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
    }


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    pytest.importorskip("triton")
    env = {**os.environ, CHILD: "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_all_compile(compiled):
    names = {entry["kernel"] for entry in compiled}
    assert names == {
        "_arrange_kernel", "_dequantize_kernel", "_gemm_kernel", "_matvec_kernel", "_stream_kernel",
    }  # fmt: skip


def test_no_spills(compiled):
    """None, but for 16 bytes in the plain GEMM, where it adds up a split K after its loop."""
    allowed = {"_gemm_kernel": 16}
    spilled = [e for e in compiled if e["stack"] > allowed.get(e["kernel"], 0)]
    assert not spilled
    assert all(e["registers"] <= MAX_REGISTERS for e in compiled)


def test_shared_memory(compiled):
    """The sm_90 kernel fits 227 KB; the others the 99 KB of sm_86 and sm_89."""
    limit = {True: 232448, False: 101376}
    over = [e for e in compiled if e["shared"] > limit[e["kernel"] == "_stream_kernel"]]
    assert not over


if __name__ == "__main__" and os.environ.get(CHILD):
    kernels: list = []
    pretend_sm90(kernels)
    report = []
    for job, call in jobs():
        kernels.clear()
        call()
        report += [{"job": job, **resources(kernel)} for kernel in kernels]
    print(json.dumps(report))
