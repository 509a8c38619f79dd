"""The C++ kernel of ``cpu_linear``: the Python kernel's bits, wherever the op is called from."""

import contextlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, heavy, without_core
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import int4q
from int4q import Int4Tensor, kernel_preference
from int4q.kernels.core import library
from int4q.kernels.cpu import core, libraries, native
from int4q.kernels.registry import KernelPreference
from int4q.kernels.weight import Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_library, _reason = core.load()
needs_core = pytest.mark.skipif(_library is None, reason=str(_reason))


def weight(N=48, K=256, group_size=32, dtype=BF16, signed=True, zero=True):
    parts = torch.rand(2, K // group_size, N).add(0.1).to(dtype)
    qdata = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8)
    return Weight(qdata, parts[0], parts[1] if zero else None, group_size, signed)


def both(x, w, bias=None, act_pre_scale=None, rounded=False):
    """The results of the C++ and of the Python kernel."""
    rest = bias, act_pre_scale, rounded, native.decode_max_m(x.dtype), native.TILES_MIN_M
    return core.linear(x, w, bias, act_pre_scale, rounded), core._cpu_linear(x, *w, *rest)


def check(*args, **options):
    got, expected = both(*args, **options)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@needs_core
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("scale_dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_same_bits(dtype, scale_dtype, group_size):
    w = weight(group_size=group_size, dtype=scale_dtype)
    bias, pre = torch.randn(w.N), torch.rand(w.K) + 0.5
    for M in (0, 1, 3, 8, 16, 17, 129, 257):  # decode's limits and blocks above them
        x = torch.randn(M, w.K).to(dtype)
        check(x, w)
        check(x, w, bias.to(dtype), pre)
        check(x, w._replace(zero_point=None, signed=False), bias)


@needs_core
@pytest.mark.parametrize("M", [1, 8, 16, 17, 100])
def test_same_bits_with_rounded_weights(M):
    x = torch.randn(M, 256).to(BF16)
    for signed in (True, False):
        check(x, weight(signed=signed, zero=False), rounded=True)


@needs_core
@pytest.mark.parametrize("M", [1, 40])
def test_same_bits_for_any_leading_dims_and_strides(M):
    w = weight()
    x = torch.randn(2, 3, M, 1, w.K).to(BF16)
    check(x, w)
    check(x[0, 0, 0, 0], w)
    check(x[:, 1, :, 0], w)
    check(x[0, :, :, 0].mT.contiguous().mT, w)
    check(x[0, 0, :1, 0].expand(5, w.K), w)
    check(torch.randn(M, 2 * w.K).to(BF16)[:, ::2], w)
    check(x, w._replace(qdata=w.qdata.mT.contiguous().mT))
    check(x, w._replace(qdata=w.qdata.view(torch.uint8), signed=False))
    check(x, w._replace(scale=w.scale.mT.contiguous().mT))


@needs_core
def test_same_bits_for_a_weight_of_several_blocks():
    w = weight(N=700, K=2048, group_size=128)
    check(torch.randn(20, 2048).to(BF16), w, torch.randn(700).to(BF16))


@needs_core
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rows_that_fixed_point_does_not_hold(dtype):
    w, x = weight(), torch.randn(6, 256).to(dtype)
    x[1, 3], x[2, 255], x[4, 0] = float("nan"), float("inf"), -float("inf")
    if dtype != FP16:
        x[5, 7] = 2.0**122
    got, expected = both(x, w)
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert got[[0, 3]].isfinite().all() and not got[[1, 2, 4]].isfinite().any()


@needs_core
def test_threads():
    w, xs = weight(), [torch.randn(4, 256).to(BF16) for _ in range(64)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: core.linear(x, w), xs))
    for x, y in zip(xs, results, strict=True):
        assert torch.equal(y, core.linear(x, w))


BAD = {
    "float64": (lambda x, w: (x.double(), w), "x must be bfloat16"),
    "columns": (lambda x, w: (x[:, :-2], w), r"\[.., 256\]"),
    "groups of 16": (lambda x, w: (x, w._replace(group_size=16)), "group_size must be"),
    "scale": (lambda x, w: (x, w._replace(scale=w.scale[1:])), r"scale must have shape .*\[8, 48"),
    "zero_point": (
        lambda x, w: (x, w._replace(zero_point=w.zero_point.float())),
        "zero_point must have .* the dtype of scale",
    ),
    "bias": (lambda x, w: (x, w, torch.zeros(47)), r"bias must have shape \[48\]"),
    "pre": (lambda x, w: (x, w, None, torch.zeros(47)), "act_pre_scale must have 256"),
}


@needs_core
@pytest.mark.parametrize("case", BAD)
def test_nothing_is_read_that_is_not_there(case):
    change, match = BAD[case]
    x, w, *rest = change(torch.randn(2, 256).to(BF16), weight())
    bias, pre = (*rest, None, None)[:2]
    with pytest.raises(RuntimeError, match=match):
        torch.ops.int4q.cpu_linear(x, *w, bias, pre, False, 16, 5)


# --- where it is called from -------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, dtype=BF16):
        super().__init__()
        self.linear = nn.Linear(256, 48).to(dtype)
        weight = Int4Tensor.from_hp(self.linear.weight.detach(), [1, 32])
        self.linear.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return torch.relu(self.linear(x))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def compiled(function, *args, **options):
    """What it gives, and whether ``cpu_linear`` is in the code."""
    options = {"fullgraph": True, **options}
    y, code = run_and_get_code(torch.compile(function, **options), *args)
    return y, "int4q.cpu_linear.default(" in "".join(code)


@needs_core
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_compiled_graph_calls_it(dtype, mode):
    net = Net(dtype)
    with mode():
        x = torch.randn(3, 256).to(dtype)
        y, used = compiled(net, x)
        assert used and torch.equal(y, net(x))


@needs_core
def test_one_graph_for_any_number_of_rows():
    net = Net()
    with torch.no_grad():
        run = torch.compile(net, fullgraph=True, dynamic=True)
        for M in (2, 5, 16, 17, 300):
            x = torch.randn(M, 256).to(BF16)
            assert torch.equal(run(x), net(x))


OPS = {  # op -> its arguments, and whether cpu_linear takes its place
    "int4_linear": lambda w, x: ((x, *w[:4]), True),
    "int4_linear float64": lambda w, x: ((x.double(), *w[:4]), False),
    "int4_linear groups of 16": lambda w, x: ((x, *weight(group_size=16)[:4]), False),
    "int4_plain_mm": lambda w, x: ((x, w.qdata, w.scale.mT, w.zero_point.mT, 32), False),
    "int4_plain_mm a16": lambda w, x: (
        (x, w.qdata, w.scale.mT, w.zero_point.mT, 32, None, None, False), True
    ),
    "int4_matmul": lambda w, x: ((x, w.qdata, w.scale.mT, 32), True),
    "int4_matvec": lambda w, x: ((x[:1], w.qdata, w.scale.mT, 32), True),
    "linear_q4gsw": lambda w, x: ((x.float(), w.qdata.view(torch.uint8), w.scale, 32), True),
}  # fmt: skip


@needs_core
@pytest.mark.parametrize("case", OPS)
def test_compiled_ops(case):
    op = getattr(torch.ops.int4q, case.split()[0])
    args, expected = OPS[case](weight(), torch.randn(2, 256).to(BF16))
    y, used = compiled(lambda *args: op(*args), *args)
    assert used == expected and torch.equal(y, op(*args))


@needs_core
def test_one_graph_for_weights_of_any_shape():
    op = torch.ops.int4q.int4_linear
    run = torch.compile(lambda *args: op(*args), fullgraph=True, dynamic=True)
    for N, K in ((48, 256), (64, 512), (32, 128)):
        args = torch.randn(3, K).to(BF16), *weight(N, K)[:4]
        assert torch.equal(run(*args), op(*args))


@needs_core
def test_compiled_gradients():
    net, x = Net(FP32), torch.randn(3, 256)
    grads = []
    for run in (net, torch.compile(net, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        net.linear.bias.grad = None
        run(leaf).sum().backward()
        grads.append((leaf.grad, net.linear.bias.grad))
    for eager, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, eager)


@needs_core
def test_a_preference_in_force_reaches_a_compiled_graph():
    net, x = Net(), torch.randn(2, 256).to(BF16)
    with torch.no_grad():
        run = torch.compile(net, fullgraph=True)
        expected = run(x)
        with kernel_preference("triton"):
            with pytest.raises(RuntimeError, match="no kernel for the preference"):
                run(x)
            with kernel_preference("torch"):
                assert torch.equal(run(x), expected)
            with ThreadPoolExecutor(1) as pool:  # another thread has its own preference
                assert torch.equal(pool.submit(net, x).result(), expected)
        assert torch.equal(run(x), expected)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_op_that_was_called():
    t, x = Int4Tensor.from_hp(torch.randn(48, 256), [1, 32]), torch.randn(2, 256)
    with Seen() as mode:
        F.linear(x, t)
    assert "int4q.int4_linear.default" in mode.ops and "int4q.cpu_linear.default" not in mode.ops


def test_autocast():
    t, x = Int4Tensor.from_hp(torch.randn(48, 256), [1, 32]), torch.randn(2, 256)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        y = F.linear(x, t)
    with torch.no_grad(), without_core():
        with torch.autocast("cpu", dtype=BF16):
            expected = F.linear(x, t)
    assert y.dtype == expected.dtype and torch.equal(y, expected)


# --- a library that is not there, or not this one ----------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    return tmp_path


def test_a_library_that_was_not_built_is_a_reason(folder):
    loaded, reason = library.load.__wrapped__()
    assert loaded is None and "not built" in reason


def test_a_broken_library_is_a_reason(folder):
    (folder / "_int4_core.so").write_bytes(b"not a library")
    loaded, reason = library.load.__wrapped__()
    assert loaded is None and "did not load" in reason


@needs_core
def test_a_library_of_another_version_is_refused(folder, monkeypatch):
    shutil.copy(_library._name, folder / "_int4_core.so")
    monkeypatch.setattr(library, "__version__", "9.9")
    loaded, reason = library.load.__wrapped__()
    assert loaded is None and f"version {int4q.__version__}, not 9.9" in reason


def test_the_switch(monkeypatch):
    monkeypatch.setenv(library.SWITCH, "0")
    loaded, reason = library.load.__wrapped__()
    assert loaded is None and library.SWITCH in reason
    with without_core():
        assert libraries() == {"CPU kernels": native.load()[1], "C++ core": core.load()[1]}
        assert libraries()["C++ core"] is not None


def test_the_preference_is_watched(monkeypatch):
    seen = []
    monkeypatch.setattr("int4q.kernels.registry._WATCHERS", [seen.append])
    with contextlib.suppress(KeyError), kernel_preference("triton"), kernel_preference("torch"):
        raise KeyError
    auto, torch_, triton = (KernelPreference(p) for p in ("auto", "torch", "triton"))
    assert seen == [triton, torch_, triton, auto]


@needs_core
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_a_static_library_of_the_compiler_stays_private():
    """Else half of its symbols are those of the shared one in the process, and messages crash."""
    command = ["nm", "-D", "--defined-only", "--format=just-symbols", _library._name]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "int4q_core_version" in names
    assert not {"__cxa_throw", "__cxa_begin_catch", "_ZNSo9_M_insertIlEERSoT_"} & {*names}


SUITES = [
    "test/kernels/cpu/test_core.py",
    "test/tensor/test_matmul.py",
    pytest.param("test/ops/test_derivatives.py", marks=heavy),
    pytest.param("test/ops/test_linear_q4gsw.py", marks=heavy),
    pytest.param("test/ops/test_symmetric_ops.py", marks=heavy),
    pytest.param("test/ops/test_symmetric_contract.py", marks=heavy),
    pytest.param("test/tensor/test_compile.py", marks=heavy),
]


@needs_core
@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_everything_works_without_it(suite):
    """The tests that run with the core here, in a process that has it switched off."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", suite]
    command += ["-m", "not slow and not gpu"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, library.SWITCH: "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


COMPILED = """
import torch
from torch._inductor.utils import run_and_get_code
from int4q import Int4Tensor
w = Int4Tensor.from_hp(torch.ones(32, 32), [1, 32])
with torch.no_grad():
    run = torch.compile(lambda x: torch.nn.functional.linear(x, w))
    y, code = run_and_get_code(run, torch.ones(1, 32))
print("int4q.cpu_linear" in "".join(code))
"""


@needs_core
@pytest.mark.slow
def test_graphs_on_disk_are_of_processes_with_the_same_kernels(tmp_path):
    def compiled(**switch):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **switch}
        command = [sys.executable, "-W", "ignore", "-c", COMPILED]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.split()

    assert compiled(INT4Q_CORE="0") == ["False"]
    assert compiled() == ["True"]
