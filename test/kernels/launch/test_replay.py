"""The plans of replay.py; kernel, launch and driver are stand-ins that note their inputs."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from int4q.kernels.launch import nvrtc  # noqa: E402
from int4q.kernels.launch import replay as triton_launch  # noqa: E402

METADATA = {
    "num_ctas": 1, "launch_cooperative_grid": False, "global_scratch_size": 0,
    "profile_scratch_size": 0, "num_warps": 4, "shared": 1024, "launch_pdl": True,
}  # fmt: skip


class Kernel:
    """Has the two faces of a Triton kernel that are used: it launches, and says how it compiled."""

    def __init__(self, **metadata):
        self.metadata = SimpleNamespace(**{**METADATA, **metadata})
        self.launches = 0

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches += 1
            kinds = [
                "*bf16" if isinstance(a, torch.Tensor) else "constexpr" if a == 1 else "i32"
                for a in args
            ]
            signature = {str(i): kind for i, kind in enumerate([*kinds, "constexpr"])}
            source = SimpleNamespace(signature=signature)
            return SimpleNamespace(metadata=self.metadata, function=7, src=source)

        return launch


@pytest.fixture(autouse=True)
def replayed(monkeypatch):
    """A list of ``(grid, block, shared, dependent, stream, parameters)``, one a replay."""
    seen = []

    class Launch:
        def __init__(self, function, device, grid, block, shared, params, dependent):
            self.shape, self.params = (grid, block, shared, dependent), params

        def __call__(self, stream):
            seen.append((*self.shape, stream, [p.value or 0 for p in self.params]))

    monkeypatch.setattr(nvrtc, "Launch", Launch)
    monkeypatch.setattr(triton_launch, "unavailable", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 42, raising=False)
    triton_launch.clear()
    yield seen
    triton_launch.clear()


def builder(kernel):
    def build(call, x, weight, bias, factor):
        out = call.result((x.shape[0], weight.shape[0]))
        part = call.empty((3, 5), torch.float32, x.device)
        count = call.empty((9,), torch.int32, x.device)
        words = call.view(weight.view(torch.int16), weight)
        call.launch(kernel, 6, x, words, out if bias is None else bias, part, count, 17, 1, factor)
        call.launch(kernel, 8, part, out, BLOCK=4)

    return build


def parts(M=2, seed=0):
    torch.manual_seed(seed)
    weight = torch.randint(-128, 128, (4, 8), dtype=torch.int8)
    return [torch.randn(M, 16, dtype=torch.bfloat16), weight, None]


def test_the_second_call_is_replayed_on_its_own_tensors(replayed):
    kernel = Kernel()
    build = builder(kernel)
    triton_launch.run(build, parts(), 5)
    assert kernel.launches == 2 and not replayed
    for seed in (1, 2):
        x, weight, bias = parts(seed=seed)
        replayed.clear()
        y = triton_launch.run(build, (x, weight, bias), 5)
        assert y.shape == (2, 4) and y.dtype == x.dtype
        (*first, params), (*second, after) = replayed
        assert first == [6, 128, 1024, True, 42] and second == [8, 128, 1024, True, 42]
        part, count = params[3:5]
        # 1 is compiled in; the last two are Triton's scratch memories.
        assert params == [x.data_ptr(), weight.data_ptr(), y.data_ptr(), part, count, 17, 5, 0, 0]
        assert after == [part, y.data_ptr(), 0, 0]
        assert count - part == 256  # 60 bytes, to the next multiple
    assert kernel.launches == 2


def test_every_fact_makes_a_kind():
    kernel = Kernel()
    build = builder(kernel)
    x, weight, _ = parts()
    wide = torch.randn(2, 32, dtype=torch.bfloat16)
    off = torch.zeros(33, dtype=torch.bfloat16)[1:].view(2, 16)
    bias = torch.zeros(4)
    kinds = [
        ((x, weight, None), 5),
        ((x, weight, None), 6),
        ((x, weight, bias), 5),
        ((x, weight, bias.half()), 5),
        ((wide[:, :16], weight, None), 5),
        ((x.t().contiguous().t(), weight, None), 5),
        ((off, weight, None), 5),
        ((x.half(), weight, None), 5),
        ((parts(M=3)[0], weight, None), 5),
    ]
    for _ in range(2):
        for inputs, factor in kinds:
            triton_launch.run(build, inputs, factor)
    assert len(triton_launch._plans) == len(kinds) and kernel.launches == 2 * len(kinds)


def test_one_tensor_at_two_places_is_two_inputs(replayed):
    kernel = Kernel()

    def build(call, a, b):
        call.launch(kernel, 1, a, b)

    a, b = torch.zeros(4), torch.zeros(4)
    triton_launch.run(build, (a, a))
    triton_launch.run(build, (a, b))
    assert replayed[0][-1][:2] == [a.data_ptr(), b.data_ptr()]


@pytest.mark.parametrize(
    "metadata",
    [{"num_ctas": 2}, {"launch_cooperative_grid": True}, {"global_scratch_size": 8},
     {"profile_scratch_size": 8}],
    ids=str,
)  # fmt: skip
def test_what_a_plan_cannot_hold_is_launched_normally(metadata, replayed):
    kernel = Kernel(**metadata)
    for _ in range(3):
        triton_launch.run(builder(kernel), parts(), 5)
    assert kernel.launches == 6 and not replayed and not triton_launch._plans


def test_a_copied_input_is_launched_normally(replayed):
    kernel = Kernel()

    def build(call, x):
        call.launch(kernel, 1, call.view(x.contiguous(), x))

    for _ in range(2):
        triton_launch.run(build, (torch.zeros(4, 6).t(),))
    assert kernel.launches == 2 and not replayed
    for _ in range(2):
        triton_launch.run(build, (torch.zeros(4, 6),))
    assert kernel.launches == 3 and len(replayed) == 1


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(triton_launch, "MAX_PLANS", 3)
    build = builder(Kernel())
    for factor in range(2, 9):
        triton_launch.run(build, parts(), factor)
    assert [key[1] for key in triton_launch._plans] == [(6,), (7,), (8,)]


def test_an_allocator_that_does_not_align_is_an_error():
    build = builder(Kernel())
    x, weight, bias = parts()
    triton_launch.run(build, (x, weight, bias), 5)

    class Off(torch.Tensor):
        def new_empty(self, shape):
            return torch.empty(65, dtype=torch.bfloat16)[1:]

    with pytest.raises(RuntimeError, match="must align to 16 bytes"):
        triton_launch.run(build, (x.as_subclass(Off), weight, bias), 5)


def test_threads_take_turns(replayed):
    """Parameters are filled and launched under one lock: no launch sees another call's tensors."""
    kernel = Kernel()

    def build(call, a, b):
        call.launch(kernel, 1, a)
        call.launch(kernel, 1, b, a)

    pairs = [(torch.zeros(4), torch.zeros(4)) for _ in range(8)]
    triton_launch.run(build, pairs[0])
    known = {(a.data_ptr(), b.data_ptr()) for a, b in pairs}

    def work(pair):
        for _ in range(200):
            triton_launch.run(build, pair)

    threads = [threading.Thread(target=work, args=(pair,)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replayed) == 2 * 8 * 200
    for first, second in zip(replayed[::2], replayed[1::2], strict=True):
        assert first[-1][0] == second[-1][1] and (second[-1][1], second[-1][0]) in known


def test_a_tensor_map_is_encoded_once_and_moved_every_call(monkeypatch, replayed):
    driver = []

    def call(name, *arguments):
        if name == "cuTensorMapEncodeTiled":
            box, kind, rank, address, sizes, strides, block, ones, *rest = arguments
            assert ctypes.addressof(box) % 64 == 0 and ctypes.sizeof(box) == 128
            sizes, block, ones = list(sizes), list(block), list(ones)
            driver.append((name, kind, rank, sizes, list(strides)[:-1], block, ones, rest))
        else:
            driver.append((name, arguments[1].value))

    monkeypatch.setattr(nvrtc, "driver_call", call)
    layout = {
        "swizzle": 3, "elem_size": 2, "elem_type": 1, "block_size": [4, 8], "fp4_padded": False,
    }  # fmt: skip
    metadata = SimpleNamespace(**METADATA, tensordesc_meta=[layout])
    source = SimpleNamespace(signature={"x": "tensordesc<i16[4,8]>", "n": "i64"})
    compiled = SimpleNamespace(metadata=metadata, function=7, src=source)

    def build(call, x):
        sides = {"shape": list(x.shape), "strides": list(x.stride()), "padding": "zero"}
        call.launch({(1,): lambda *args: compiled}, 1, SimpleNamespace(base=x, **sides), 9)

    for _ in range(3):
        x = torch.zeros(6, 16, dtype=torch.int16)
        triton_launch.run(build, (x,))
    encode, *moves = driver
    name, kind, rank, sizes, strides, block, ones, rest = encode
    assert (kind, rank, sizes, strides, block) == (1, 2, [16, 6], [32], [8, 4])
    assert (ones, rest) == ([1, 1], [0, 3, 2, 0])
    assert len(moves) == 2 and moves[-1] == ("cuTensorMapReplaceAddress", x.data_ptr())
    assert replayed[-1][-1][1:] == [6, 16, 16, 1, 9, 0, 0]  # the map, sizes, strides, then n


@pytest.mark.parametrize("version,known", [("3.6.0", True), ("3.6.1+git", True), ("3.7.0", False)])
def test_an_unknown_triton_is_a_reason(monkeypatch, version, known):
    import triton

    monkeypatch.undo()
    monkeypatch.setattr(triton, "__version__", version)
    reason = triton_launch.unavailable.__wrapped__()
    assert ("Triton must be one of ('3.6',)" in (reason or "")) is not known
