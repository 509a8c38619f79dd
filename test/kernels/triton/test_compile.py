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
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
MAX_REGISTERS = 255
CHILD = "INT4Q_COMPILE_CHILD"


def jobs():
    """``(name, call)`` for one representative of every kernel and tile in the table."""
    import torch

    from int4q.kernels.triton import dequant as triton_dequant
    from int4q.kernels.triton import experts as triton_experts
    from int4q.kernels.triton import fp8 as triton_fp8
    from int4q.kernels.triton import gluon_experts, gluon_matmul
    from int4q.kernels.triton import matmul as triton_matmul
    from int4q.kernels.triton import matvec as triton_matvec
    from int4q.kernels.triton import routing as triton_routing
    from int4q.kernels.triton import w4a8 as triton_w4a8
    from int4q.kernels.weight import Weight

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def linear(run, M, N, K, group_size, dtype=torch.bfloat16, coalesced=False, bias=True):
        shape = (N, K // group_size) if coalesced else (K // group_size, N)
        scale = empty(*shape, dtype=dtype)
        scale = scale.mT if coalesced else scale
        weight = Weight(empty(N, K // 2, dtype=torch.int8), scale, scale, group_size)
        bias = empty(N, dtype=dtype) if bias else None
        return lambda: run(empty(M, K, dtype=dtype), weight, bias)

    found = []
    for M in (16, 32, 64, 128, 256, 512):  # one row of the table each, for wide and for narrow N
        for N in (28672, 4096):
            name = f"gluon M={M} N={N}"
            found.append((name, linear(gluon_matmul.linear, M, N, 4096, 128)))
    for name, more in {
        "group 32, scales [N, groups]": dict(group_size=32, coalesced=True),
        "group 256, fp16": dict(group_size=256, dtype=torch.float16),
    }.items():
        found.append((f"gluon {name}", linear(gluon_matmul.linear, 64, 4096, 4096, **more)))
    for M in (2, 16, 64, 256):
        found.append((f"triton M={M}", linear(triton_matmul.linear, M, 4096, 4096, 128)))
        wide = linear(triton_matmul.linear, M, 4096, 4096, 32, torch.float32)
        found.append((f"triton M={M}, float32", wide))
    found.append(("matvec", linear(triton_matvec.linear, 1, 4096, 4096, 128)))

    def experts(run, T, E, group_size=128, coalesced=False):
        scale = empty(E, 2048, 2048 // group_size).mT if coalesced else empty(E, 16, 2048)
        stack = Weight(empty(E, 2048, 1024, dtype=torch.int8), scale, scale, group_size)
        return lambda: run(empty(T, 2048), stack, empty(E, dtype=torch.int32))

    for mean in (1, 8, 20, 64, 128, 1024):  # one row of experts_config each
        run = gluon_experts.int4_grouped_mm
        found.append((f"gluon experts, {mean} rows each", experts(run, 8 * mean, 8)))
    run = gluon_experts.int4_grouped_mm
    found.append(("gluon experts, group 32, coalesced", experts(run, 64, 64, 32, True)))
    for mean in (1, 64, 256):
        for name in ("int4_grouped_mm", "int4_grouped_mm_backward"):
            run = getattr(triton_experts, name)
            found.append((f"triton {name}, {mean} rows each", experts(run, 8 * mean, 8)))
    for M, N, K in ((1, 28672, 4096), (2, 28672, 4096), (8, 28672, 4096), (8, 4096, 14336)):
        for coalesced in (True, False):
            name = f"W4A8 M={M} N={N} {'coalesced' if coalesced else 'plain'}"
            job = linear(triton_w4a8.linear, M, N, K, 32, coalesced=coalesced, bias=False)
            found.append((name, job))
    job = linear(triton_w4a8.linear, 1, 1, 32, 32)  # Triton turns arguments of 1 into constants
    found.append(("W4A8 of one row of one block", job))
    x, scale = empty(16, 4096), empty(32, 4096)
    by_row = empty(4096, 32).mT  # as the symmetric ops have their scales
    symmetric = Weight(empty(4096, 2048, dtype=torch.int8), by_row, None, 128, signed=False)
    tail = Weight(empty(4096, 80, dtype=torch.int8), scale[:5], scale[:5], 32)
    found += [
        ("gluon symmetric", lambda: gluon_matmul.linear(x, symmetric)),
        ("triton symmetric", lambda: triton_matmul.linear(x, symmetric)),
        ("fp8 rows", lambda: triton_fp8.fp8_rows(x, scale[0])),
        ("fp8 rows, float32", lambda: triton_fp8.fp8_rows(empty(3, 320, dtype=torch.float32))),
        ("permute", lambda: triton_routing.permute(empty(8, 8, dtype=torch.int64), 128)),
        (
            "combine",
            lambda: triton_routing.combine(
                empty(64, 2048),
                empty(64, dtype=torch.int32),
                empty(8, 8, dtype=torch.int64),
                empty(8, 8),
                128,
            ),
        ),
        ("matvec symmetric", lambda: triton_matvec.linear(x[:1], symmetric)),
        ("dequantise", lambda: triton_dequant.dequantize(symmetric, torch.bfloat16)),
        ("dequantise affine, tail", lambda: triton_dequant.dequantize(tail, torch.float16)),
    ]
    return found


def pretend_sm90(compiled: list) -> None:
    """Make Triton compile for sm_90 and collect the kernels instead of launching them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from int4q.kernels.launch import driver as cuda_driver
    from int4q.kernels.triton import common as triton_common
    from int4q.kernels.triton import experts as triton_experts
    from int4q.kernels.triton import matmul as triton_matmul
    from int4q.kernels.triton import tuned
    from int4q.kernels.triton import w4a8 as triton_w4a8

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
        compiled.append((run(self, *args, grid=grid, warmup=True, **options), args))

    JITFunction.run = compile_only
    cuda_driver.call = lambda *_: None
    tuned.multiprocessors = lambda _: 132
    for module in (triton_common, triton_experts, triton_matmul, triton_w4a8):
        module.has_launch_overlap = lambda _: True


def read_binary(kernel, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True)
    return done.stdout + done.stderr


def resources(kernel) -> dict:
    """Registers, stack bytes and dynamic shared memory of a compiled kernel."""
    usage = read_binary(kernel, "-res-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "kernel": kernel.metadata.name,
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
    }


def parameters(kernel, args) -> dict:
    """Bytes of every parameter, as the binary takes them and as a replay passes them."""
    import struct

    from int4q.kernels.launch.triton_launch import _parameters

    sizes = {"pointer": 8, "map": 128}
    passed = [sizes.get(kind) or struct.calcsize(kind) for kind, _ in _parameters(kernel, args)]
    entry = r"KPARAM_INFO\s.*\s.*Ordinal : 0x(\w+).*Size +: 0x(\w+)"
    taken = re.findall(entry, read_binary(kernel, "-elf"))
    taken = {int(place, 16): int(size, 16) for place, size in taken}
    return {
        "passed": passed,
        "taken": [taken[place] for place in sorted(taken)],
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
        "_arrange_experts_kernel", "_arrange_kernel", "_combine_kernel", "_dequantize_kernel",
        "_experts_grad_kernel", "_experts_kernel", "_fp8_rows_kernel", "_gemm_kernel",
        "_matvec_kernel", "_permute_kernel", "_quantize_kernel", "_stream_kernel", "_w4a8_kernel",
    }  # fmt: skip


def test_no_spills(compiled):
    """None, but for 16 bytes in the plain GEMM, where it adds up a split K after its loop, and 32
    in W4A8 at M = 8, whose tile was measured the fastest of eight."""
    allowed = {"_gemm_kernel": 16, "_w4a8_kernel": 32}
    spilled = [e for e in compiled if e["stack"] > allowed.get(e["kernel"], 0)]
    assert not spilled
    assert all(e["registers"] <= MAX_REGISTERS for e in compiled)


def test_w4a8_passes_nothing_through_shared_memory(compiled):
    """Every thread loads what it multiplies: the only shared memory is that of the last sum."""
    found = [e for e in compiled if e["kernel"] == "_w4a8_kernel"]
    assert len(found) == 9 and all(e["shared"] <= 512 for e in found)


def test_shared_memory(compiled):
    """The sm_90 kernel fits 227 KB; the others the 99 KB of sm_86 and sm_89."""
    limit = {True: 232448, False: 101376}
    over = [e for e in compiled if e["shared"] > limit[e["kernel"] == "_stream_kernel"]]
    assert not over


def test_a_replay_passes_what_the_binary_takes(compiled):
    wrong = [e for e in compiled if not e["taken"] or e["passed"] != e["taken"]]
    assert not wrong


if __name__ == "__main__" and os.environ.get(CHILD):
    kernels: list = []
    pretend_sm90(kernels)
    report = []
    for job, call in jobs():
        kernels.clear()
        call()
        report += [{"job": job, **resources(k), **parameters(k, args)} for k, args in kernels]
    print(json.dumps(report))
