"""The C++ core's replay: the launches of Python's, wherever the op is called from."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from planned_op import LIBRARY, OP, TWO, named, parts, register
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from int4q import kernel_preference
from int4q.kernels.core import library
from int4q.kernels.launch import record
from int4q.ops import cuda

_core, _reason = library.load()
pytestmark = pytest.mark.skipif(_core is None, reason=str(_reason))


def products(x, w, bias):
    x = x.contiguous().float()
    out, other = x.new_empty(x.shape[0], 4), x.new_empty(x.shape[0], 4)
    torch.mm(x, w[:2].t(), out=out[:, :2])
    torch.addmm(bias[2:], x, w[2:].t(), out=out[:, 2:])
    torch.mm(x, w.t(), out=other)
    return out, other


class Counted:
    def __init__(self, run):
        self.run, self.runs = run, 0

    def __call__(self, *args):
        self.runs += 1
        return self.run(*args)


if _core is not None:
    PRODUCTS = Counted(products)
    PRODUCTS_OP = register(
        "test_products", PRODUCTS, "(Tensor x, Tensor w, Tensor b) -> (Tensor, Tensor)", "TTT", 2
    )
    SUMS = Counted(lambda x: x + 1)
    SUMS_OP = register("test_sums", SUMS, "(Tensor x) -> Tensor", "T")


@pytest.fixture(autouse=True)
def fresh(fake):
    TWO.use(fake)
    PRODUCTS.runs = SUMS.runs = 0


KINDS = {
    "plain": lambda x, w: (x, w),
    "bias": lambda x, w: (x, w, torch.zeros(4)),
    "bias of another dtype": lambda x, w: (x, w, torch.zeros(4).half()),
    "factor": lambda x, w: (x, w, None, 6),
    "flag": lambda x, w: (x, w, None, 5, True),
    "rows of a wider tensor": lambda x, w: (torch.cat([x, x], 1)[:, :16], w),
    "columns first": lambda x, w: (x.t().contiguous().t(), w),
    "off 16 bytes": lambda x, w: (torch.cat([x.flatten(), x[0]])[1:33].view(2, 16), w),
    "float16": lambda x, w: (x.half(), w),
    "more rows": lambda x, w: (torch.cat([x, x]), w),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_launches_of_python(fake, kind):
    """The first call, the core's replay and Python's replay ask the driver for the same."""
    seen = []
    for seed, call in enumerate((OP, OP, TWO.planned, TWO.planned)):
        args = KINDS[kind](*parts(seed=seed))
        y = call(*args)
        assert y.shape == (args[0].shape[0], 4) and y.dtype == args[0].dtype
        bias = {"bias": args[2]} if len(args) > 2 and args[2] is not None else {}
        tensors = dict(x=args[0], w=args[1], w1=args[1][1:], out=y, **bias)
        seen.append(named(fake.take(), **tensors))
    assert TWO.runs == 1
    assert len(seen[0]) == 2 and seen[0] == seen[1] == seen[2] == seen[3]
    assert {"x", "w1", "scratch0"} <= {str(p) for p in seen[0][0].parameters}


def test_every_fact_makes_a_kind():
    x, w = parts()
    for _ in range(2):
        for change in KINDS.values():
            OP(*change(x, w))
    assert TWO.runs == len(KINDS) == _core.int4q_core_plans()


def test_products_and_copies():
    for seed in range(3):
        torch.manual_seed(seed)
        x, w, bias = torch.randn(3, 5).half().mT, torch.randn(4, 3), torch.randn(4)
        bias[:2] = 0
        out, other = PRODUCTS_OP(x, w, bias)
        torch.testing.assert_close(other, x.float() @ w.t())
        torch.testing.assert_close(out, other + bias)
    assert PRODUCTS.runs == 1


def test_what_has_no_plan_runs_every_time():
    for i in range(3):
        assert torch.equal(SUMS_OP(torch.full((3,), float(i))), torch.full((3,), i + 1.0))
    assert SUMS.runs == 3


def test_plans_are_forgotten():
    for _ in range(2):
        OP(*parts())
        record.clear()
    assert TWO.runs == 2


def test_plans_are_bounded():
    x, w = parts()
    for factor in range(2100):
        OP(x, w, None, factor)
    assert TWO.runs == 2100 and _core.int4q_core_plans() == 2048
    OP(x, w, None, 2099)
    assert TWO.runs == 2100
    OP(x, w, None, 0)
    assert TWO.runs == 2101


def test_an_error_of_the_op_keeps_its_type():
    x, w = parts()
    with pytest.raises(RuntimeError, match="factor must not be negative") as raised:
        OP(x, w, None, -1)
    assert isinstance(library.cause(raised.value), ValueError)
    assert library.cause(raised.value) is raised.value  # told once
    assert OP(x, w).shape == (2, 4)


def test_an_error_of_the_driver(fake):
    OP(*parts())
    fake.library.fake_fail(700)
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed: .* 700 .an illegal address"):
        OP(*parts())
    OP(*parts())
    assert TWO.runs == 1


def test_another_preference_leaves_plans_alone():
    OP(*parts())
    with kernel_preference("triton"):
        OP(*parts())
        OP(*parts())
        with ThreadPoolExecutor(1) as pool:  # another thread has its own preference
            pool.submit(OP, *parts()).result()
    assert TWO.runs == 3
    OP(*parts())
    assert TWO.runs == 3


def test_threads(fake):
    OP(*parts())
    fake.take()
    inputs = [parts(seed=seed) for seed in range(8)]

    def work(one):
        for _ in range(50):
            OP(*one)

    threads = [threading.Thread(target=work, args=(one,)) for one in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [s.parameters[:2] for s in fake.take() if s.grid == "6 1 1"]
    wanted = [(x.data_ptr(), w[1:].data_ptr()) for x, w in inputs for _ in range(50)]
    assert sorted(tuple(int.from_bytes(p, "little") for p in s) for s in seen) == sorted(wanted)


def test_a_context_is_left_as_it_was(fake):
    OP(*parts())
    before = fake.take()
    fake.library.cuCtxSetCurrent(7)
    OP(*parts())
    assert {s.context for s in (*before, *fake.take())} == {"0xc0"}
    seen = ctypes.c_void_p()
    fake.library.cuCtxGetCurrent(ctypes.byref(seen))
    assert seen.value == 7
    fake.library.cuCtxSetCurrent(None)


OPS: list = []


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        OPS.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("known", [False, True])
def test_modes_see_the_op_alone(known):
    inputs = parts()
    if known:
        OP(*inputs)
    OPS.clear()
    with Seen():
        OP(*inputs)
    assert OPS == [OP]


def test_inference_mode():
    with torch.inference_mode():
        for _ in range(2):
            assert OP(*parts()).is_inference()
    assert not OP(*parts()).is_inference() and TWO.runs == 1


def test_a_plan_that_ends_early_or_late_is_not_kept():
    with record.recording(parts()) as seen:
        y = TWO.body(*seen.inputs)
    words = seen.plan(y).words()
    c_int64 = ctypes.c_int64
    kept = []

    def run(x, w):
        for change in (words[:-1], [*words, 0], [*words[:5], 1 << 40, *words[6:]], words):
            kept.append(_core.int4q_core_keep((c_int64 * len(change))(*change), len(change)))
        return TWO.body(x, w)

    op = register("test_keep", run, "(Tensor x, Tensor w) -> Tensor", "TT")
    op(*parts())
    assert kept == [1, 1, 1, 0]
    assert _core.int4q_core_keep((c_int64 * 1)(0), 1) == 1  # outside of a planner


def test_fake_tensors_go_to_the_fake():
    torch.library.register_fake(
        "int4q::test_two_launches",
        lambda x, w, *rest: x.new_empty((x.shape[0], w.shape[0])),
        lib=LIBRARY,
    )
    with FakeTensorMode():
        assert OP(*parts()).shape == (2, 4)
    assert TWO.runs == 0


def test_a_driver_that_is_not_there_is_a_reason(fake):
    reason = library.open_driver(_core, "no such library", fake.path)
    assert "did not find" in reason


def test_an_op_on_a_gpu_runs_its_twin(monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda: None)
    monkeypatch.setitem(cuda._twins, "int4_linear", OP)
    kernel = cuda._on_gpu("int4_linear", lambda *args: "Python")
    x, w = parts()
    assert kernel(x, w).shape == (2, 4)
    with pytest.raises(ValueError, match="factor must not be negative"):
        kernel(x, w, None, -1)
    with kernel_preference("triton"):
        assert kernel(x, w) == "Python"
    monkeypatch.setattr(library, "unavailable", lambda: "switched off")
    assert kernel(x, w) == "Python"
