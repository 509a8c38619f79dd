"""Saving, loading, moving, casting: bit for bit, in a fresh process too; never a wrong one."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from int4q import (
    CpuPackedInt4Tensor,
    CudaCoalescedInt4Tensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    quantize_,
)

FORMATS = ["plain", "cuda_coalesced", "cpu_packed"]


def model(fmt="plain", dtype=torch.bfloat16):
    torch.manual_seed(1)
    m = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).to(dtype)
    quantize_(m, Int4WeightOnlyConfig(group_size=32, int4_packing_format=fmt))
    return m


def assert_equal_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert type(a[name]) is type(b[name]), name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mmap", [False, True])
def test_save_and_load_weights_only(tmp_path, fmt, mmap):
    m = model(fmt)
    torch.save(m.state_dict(), tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True, mmap=mmap)
    assert_equal_state(m.state_dict(), state)
    other = model(fmt)
    nn.init.zeros_(other[0].bias)
    other[0].weight.data_tensors()["qdata"].zero_()
    other.load_state_dict(state)
    assert_equal_state(m.state_dict(), other.state_dict())


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_model_born_on_meta_takes_a_checkpoint(fmt):
    m = model(fmt)
    with torch.device("meta"):
        born = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).to(torch.bfloat16)
    quantize_(born, Int4WeightOnlyConfig(group_size=32, int4_packing_format=fmt))
    assert born[0].weight.is_meta and type(born[0].weight) is type(m[0].weight)
    assert born(torch.ones(2, 128, device="meta", dtype=torch.bfloat16)).shape == (2, 32)
    born.to_empty(device="cpu").load_state_dict(m.state_dict())
    assert_equal_state(m.state_dict(), born.state_dict())
    born.to(device="meta") if fmt != "cpu_packed" else None
    born.load_state_dict(m.state_dict(), assign=True)
    assert_equal_state(m.state_dict(), born.state_dict())


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_any_layout_loads_into_any_other(source, target):
    m = model(target)
    m.load_state_dict(model(source).state_dict())
    assert_equal_state(m.state_dict(), model(target).state_dict())


FRESH = """
import sys, torch, int4q
saved = torch.load(sys.argv[1], weights_only=True)
x = torch.load(sys.argv[2])
from torch import nn
m = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).to(torch.bfloat16)
m.load_state_dict(saved["state"], assign=True)
assert torch.equal(m(x), saved["y"])
whole = torch.load(sys.argv[3], weights_only=False)
assert torch.equal(whole(x), saved["y"])
program = torch.export.load(sys.argv[4])
assert torch.equal(program.module()(x), saved["y"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_fresh_process_gives_the_same_bits(tmp_path, fmt):
    m, x = model(fmt), torch.randn(3, 128).bfloat16()
    paths = [str(tmp_path / name) for name in ("state.pt", "x.pt", "whole.pt", "program.pt2")]
    with torch.no_grad():
        torch.save({"state": m.state_dict(), "y": m(x)}, paths[0])
        torch.save(x, paths[1])
        torch.save(m, paths[2])
        torch.export.save(torch.export.export(m, (x,)), paths[3])
    done = subprocess.run([sys.executable, "-c", FRESH, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fmt", FORMATS)
def test_pickle_and_deepcopy(fmt):
    m = model(fmt)
    for other in (pickle.loads(pickle.dumps(m)), copy.deepcopy(m)):
        assert_equal_state(m.state_dict(), other.state_dict())
        assert isinstance(other[0].weight, nn.Parameter) and not other[0].weight.requires_grad
    before = m[0].weight.dequantize().clone()
    other[0].weight.data_tensors()["qdata"].zero_()
    assert torch.equal(m[0].weight.dequantize(), before)  # the copy is deep


@pytest.mark.parametrize("packing", ["rows", "aten"])
def test_on_disk_a_cpu_packed_weight_is_plain(monkeypatch, packing):
    monkeypatch.setattr("int4q.kernels.cpu.preferred_packing", lambda: packing)
    t = model("cpu_packed")[0].weight
    assert t.packing == packing
    rebuild, (plain, _) = t.__reduce_ex__(2)
    assert type(plain) is Int4Tensor and torch.equal(plain.dequantize(), t.dequantize())
    assert torch.equal(rebuild(plain, False), t)
    # Read on another kind of machine, it takes the packing of that one.
    other = {"rows": "aten", "aten": "rows"}[packing]
    monkeypatch.setattr("int4q.kernels.cpu.preferred_packing", lambda: other)
    moved = pickle.loads(pickle.dumps(t))
    assert moved.packing == other and torch.equal(moved.dequantize(), t.dequantize())
    assert torch.equal(t.copy_(moved).dequantize(), moved.dequantize())


def test_a_truncated_file_is_an_error(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(model().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(Exception, match="(?i)zip|archive|corrupt|central directory|invalid"):
        torch.load(path, weights_only=True)


def tamper_group(t):
    t.__dict__["block_size"] = [1, 64]


def tamper_scale(t):
    t.__dict__["scale"] = t.scale[:-1].clone()


def tamper_dtype(t):
    t.__dict__["scale"], t.__dict__["zero_point"] = t.scale.half(), t.zero_point.half()


def tamper_bytes(t):
    t.__dict__["qdata"] = t.qdata[:, :-1].clone()


def tamper_missing(t):
    del t.__dict__["zero_point"]


@pytest.mark.parametrize(
    "tamper", [tamper_group, tamper_scale, tamper_dtype, tamper_bytes, tamper_missing]
)
def test_parts_that_do_not_fit_together_do_not_load(layout, tamper):
    t = layout.from_hp(torch.randn(64, 128).bfloat16(), [1, 32])
    tamper(t)
    file = io.BytesIO()
    torch.save({"w": t}, file)
    file.seek(0)
    with pytest.raises(Exception, match="must (have|be|agree|hold)"):
        torch.load(file, weights_only=True)


def test_load_state_dict_refuses_what_does_not_fit():
    m, state = model(), model().state_dict()
    with pytest.raises(RuntimeError, match="takes a 4-bit weight, got Tensor"):
        m.load_state_dict({**state, "0.weight": torch.zeros(64, 128)})
    other = Int4Tensor.from_hp(torch.randn(64, 128).bfloat16(), [1, 64])
    with pytest.raises(RuntimeError, match="copy_ needs shape"):
        m.load_state_dict({**state, "0.weight": other})
    with pytest.raises(RuntimeError, match="Missing key"):
        m.load_state_dict({k: v for k, v in state.items() if k != "0.weight"})


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casting_really_casts(fmt, dtype):
    m = model(fmt, torch.float32)
    before = m[0].weight.dequantize(torch.float64)
    m = m.to(dtype)
    assert m[0].weight.dtype == dtype and m[0].bias.dtype == dtype
    assert m(torch.randn(2, 128).to(dtype)).dtype == dtype
    # Scale and zero point are rounded once each: 2^-8 of the largest weight for bfloat16.
    bound = {torch.float32: 0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    after = m[0].weight.dequantize(torch.float64)
    assert (after - before).abs().max() <= bound * before.abs().max()


def test_half_float_bfloat16_methods_and_float64(layout):
    t = layout.from_hp(torch.randn(8, 64), [1, 32])
    assert t.half().dtype == torch.float16 and t.bfloat16().dtype == torch.bfloat16
    assert t.half().float().dtype == torch.float32
    assert t.half().qdata.dtype == torch.int8
    with pytest.raises(TypeError, match="can be cast to float32 or float16 or bfloat16"):
        t.double()


def test_dequantize_rounds_once(layout):
    t = layout.from_hp(torch.randn(8, 64), [1, 32])
    exact = t.dequantize(torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert t.dequantize(dtype).dtype == dtype
    assert torch.equal(t.dequantize(torch.bfloat16), t.dequantize(torch.float32).bfloat16())
    # float32: one rounding of the product and one of the sum.
    assert (t.dequantize() - exact).abs().max() <= 2**-23 * exact.abs().max() * 2


@pytest.mark.parametrize("fmt", FORMATS)
def test_share_memory(fmt):
    m, x = model(fmt), torch.randn(2, 128).bfloat16()
    y = m(x)
    assert not m[0].weight.is_shared()
    m.share_memory()
    assert m[0].weight.is_shared()
    assert torch.equal(m(x), y)


CHILD = """
import sys, torch, torch.multiprocessing as mp, int4q
def work(queue, t):
    t.data_tensors()["qdata"].zero_()
    queue.put(float(t.dequantize().sum()))
if __name__ == "__main__":
    t = int4q.Int4Tensor.from_hp(torch.randn(16, 64), [1, 32]).share_memory_()
    expected = float(t.zero_point.double().sum() * 32)
    context = mp.get_context("spawn")
    queue = context.Queue()
    p = context.Process(target=work, args=(queue, t))
    p.start(); got = queue.get(timeout=60); p.join()
    assert abs(got - expected) < 1e-2, (got, expected)
    assert not t.qdata.any()  # the child wrote into the same memory
"""


@pytest.mark.slow
def test_another_process_sees_the_same_memory(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_empty_like_and_copy(layout):
    t = layout.from_hp(torch.randn(2, 8, 64), [1, 1, 32])
    empty = torch.empty_like(t, dtype=torch.float16)
    assert type(empty) is layout and empty.shape == t.shape and empty.dtype == torch.float16
    assert torch.empty_like(t, device="meta").is_meta
    zero = torch.zeros_like(t)
    assert not zero.dequantize().any()
    assert zero.copy_(t) is zero and torch.equal(zero, t)
    assert torch.equal(empty.copy_(t), t.half())
    with pytest.raises(ValueError, match="either both sides"):
        scaled = layout(t.qdata, t.scale, t.zero_point, t.block_size, t.shape, torch.ones(64))
        t.copy_(scaled)
    assert not t.is_pinned() and not torch.ops.aten.is_pinned(t)


def test_bytes_held(layout):
    t = layout.from_hp(torch.randn(16, 128).bfloat16(), [1, 32])
    assert t.nbytes == 16 * 64 + 2 * 2 * 16 * 4
    assert t.numel() == 16 * 128


def test_layout_conversion_keeps_act_pre_scale():
    t = Int4Tensor.from_hp(torch.randn(16, 64), [1, 32])
    t = Int4Tensor(t.qdata, t.scale, t.zero_point, t.block_size, t.shape, torch.rand(64))
    for layout in (CudaCoalescedInt4Tensor, CpuPackedInt4Tensor):
        assert torch.equal(layout.from_int4_tensor(t).to_int4_tensor(), t)


def test_swapping_layouts_in_place_moves_no_weight(layout):
    t = layout.from_hp(torch.randn(16, 64), [1, 32])
    assert t.to("cpu").qdata is not None and torch.equal(t.to("cpu"), t)
    assert torch.equal(t.to(torch.float32, copy=True), t)
    assert t.cpu().device.type == "cpu"
