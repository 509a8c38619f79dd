"""Plans, made and replayed in Python; the driver is a stand-in that notes its inputs."""

from __future__ import annotations

import threading

import pytest
import torch
from fake_cuda import launch

from int4q.kernels.launch import record
from int4q.kernels.launch.record import planned

BF16 = torch.bfloat16


def parts(M=2, seed=0):
    torch.manual_seed(seed)
    return torch.randn(M, 16, dtype=BF16), torch.randint(-128, 128, (4, 8), dtype=torch.int8)


def address(parameter: bytes) -> int:
    return int.from_bytes(parameter, "little")


@pytest.fixture
def product(fake):
    """Two launches with scratch memory between them; ``runs()`` counts those in Python."""
    first, second = fake.function(*[8] * 5, 4), fake.function(8, 8, 4)

    runs = []

    @planned
    def run(x, weight, bias=None, factor=5):
        runs.append(factor)
        out = x.new_empty((x.shape[0], weight.shape[0]))
        part = x.new_empty((3, 5), dtype=torch.float32)
        count = torch.empty(9, dtype=torch.int32)
        words = weight.view(torch.int16)[1:]
        launch(first, (x, words, bias, part, count), factor, dependent=True)
        launch(second, (part, out), x.shape[0], grid=(8, x.shape[0], 1))
        return out

    run.runs = lambda: len(runs)
    return run


def test_the_second_call_is_replayed_on_its_own_tensors(fake, product):
    product(*parts())
    fake.take()
    for seed in (1, 2):
        x, weight = parts(seed=seed)
        y = product(x, weight)
        assert y.shape == (2, 4) and y.dtype == BF16
        first, second = fake.take()
        assert (first.grid, first.block, first.shared) == ("6 1 1", "128 1 1", "1024")
        assert (first.stream, first.context, first.attributes) == ("0x42", "0xc0", "6=1 ")
        assert (second.grid, second.attributes) == ("8 2 1", "")
        where = [address(p) for p in first.parameters]
        part, count = where[3:5]
        assert where == [x.data_ptr(), weight.data_ptr() + 8, 0, part, count, 5]
        assert count - part == 256  # 60 bytes, to the next multiple
        assert [address(p) for p in second.parameters] == [part, y.data_ptr(), 2]
    assert product.runs() == 1


def test_every_fact_makes_a_kind(product):
    x, weight = parts()
    wide = torch.randn(2, 32, dtype=BF16)
    off = torch.zeros(33, dtype=BF16)[1:].view(2, 16)
    bias = torch.zeros(4)
    kinds = [
        (x, weight),
        (x, weight, None, 6),
        (x, weight, bias),
        (x, weight, bias.half()),
        (wide[:, :16], weight),
        (x.t().contiguous().t(), weight),
        (off, weight),
        (x.half(), weight),
        (parts(M=3)[0], weight),
    ]
    for _ in range(2):
        for kind in kinds:
            product(*kind)
    assert product.runs() == len(kinds) == len(record._plans)


def test_plans_are_forgotten(product):
    product(*parts())
    record.clear()
    product(*parts())
    assert product.runs() == 2


def test_plans_are_bounded(product, monkeypatch):
    monkeypatch.setattr(record, "MAX_PLANS", 3)
    for factor in (*range(7), 6, 5, 4):
        product(*parts(), None, factor)
    assert product.runs() == 7 and len(record._plans) == 3


NOT_PLANNED = {
    "computes": lambda x: x + 1,
    "writes": lambda x: x.zero_(),
    "returns a part": lambda x: x.new_empty(8, 4)[:2],
    "returns an argument": lambda x: x,
    "returns what it did not allocate": lambda x: torch.ones(3),
}


@pytest.mark.parametrize("case", NOT_PLANNED)
def test_what_a_plan_cannot_hold_runs_every_time(fake, case):
    calls = []

    @planned
    def run(x):
        calls.append(x)
        return NOT_PLANNED[case](x)

    for i in range(3):
        x = torch.full((2, 4), float(i))
        assert torch.equal(run(x).isnan(), NOT_PLANNED[case](x).isnan())
    assert len(calls) == 3


def test_an_address_that_is_nobodys_is_no_plan(fake):
    elsewhere = torch.zeros(4)
    function = fake.function(8)

    @planned
    def run(x):
        launch(function, (elsewhere,))

    for _ in range(2):
        run(torch.zeros(4))
    assert list(record._plans.values()) == [None] and len(fake.take()) == 2


def test_an_address_of_two_tensors_is_no_plan(fake):
    function = fake.function(8)

    @planned
    def run(x, y):
        launch(function, (y,))

    x = torch.zeros(4)
    run(x, x[1:])
    assert list(record._plans.values()) == [None]


@pytest.mark.parametrize("inference", [False, True])
def test_products_and_copies_are_steps(fake, inference):
    """As ``x`` is not contiguous, and its dtype changes, it is copied twice at every call."""
    calls = []

    @planned
    def run(x, w, bias):
        calls.append(x)
        x = x.contiguous().float().reshape(-1, 3)
        out, other = x.new_empty(x.shape[0], 4), x.new_empty(x.shape[0], 4)
        torch.mm(x, w[:2].t(), out=out[:, :2])
        torch.addmm(bias[2:], x, w[2:].t(), out=out[:, 2:])
        torch.mm(x, w.t(), out=other)
        return out, other

    with torch.inference_mode(inference):
        for seed in range(3):
            torch.manual_seed(seed)
            x, w, bias = torch.randn(3, 5).half().mT, torch.randn(4, 3), torch.randn(4)
            bias[:2] = 0
            out, other = run(x, w, bias)
            torch.testing.assert_close(other, x.float() @ w.t())
            torch.testing.assert_close(out, other + bias)
    assert len(calls) == 1


def test_a_tensor_map_is_moved_every_call(fake):
    function = fake.function(8, 128)

    @planned
    def run(x):
        out = x.new_empty(4)
        launch(function, (out,), box=x)
        return out

    for _ in range(3):
        x = torch.zeros(4)
        run(x)
        (seen,) = fake.take()
        box = seen.parameters[1]
    assert address(box[:8]) == x.data_ptr() and box[8:] == bytes(range(8, 128))


def test_an_error_of_the_driver_is_raised(fake, product):
    product(*parts())
    fake.library.fake_fail(700)
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed: .* 700 .an illegal address"):
        product(*parts())


def test_threads(fake, product):
    """Parameters are filled and launched as one: no launch sees another call's tensors."""
    product(*parts())
    fake.take()
    inputs = [parts(seed=seed) for seed in range(8)]

    def work(one):
        for _ in range(50):
            product(*one)

    threads = [threading.Thread(target=work, args=(one,)) for one in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [tuple(map(address, s.parameters[:2])) for s in fake.take() if s.grid == "6 1 1"]
    wanted = [(x.data_ptr(), w.data_ptr() + 8) for x, w in inputs for _ in range(50)]
    assert sorted(seen) == sorted(wanted)
