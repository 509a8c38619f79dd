"""What nn.Module, the processes of torch, and the libraries around it do with a 4-bit weight."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, Int4WeightOnlyConfig, quantize_

FORMATS = ["plain", "cuda_coalesced", "cpu_packed"]


def plain_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32)).to(torch.bfloat16)


def model(fmt="plain"):
    m = plain_model()
    quantize_(m[:1], Int4WeightOnlyConfig(group_size=32, int4_packing_format=fmt))
    return m


# --- weight.data, requires_grad -------------------------------------------------------------------


def test_data_shares_the_parts_of_the_other(layout):
    weight = nn.Parameter(layout.from_hp(torch.randn(48, 64), [1, 32]), requires_grad=False)
    other = layout.from_hp(torch.randn(40, 128).bfloat16(), [1, 64])
    other.act_pre_scale = torch.rand(128)
    weight.data = other
    assert isinstance(weight, nn.Parameter) and type(weight) is layout
    assert weight.shape == (40, 128) and weight.dtype == torch.bfloat16
    assert weight.qdata is other.qdata and weight.act_pre_scale is other.act_pre_scale
    assert torch.equal(weight, other)
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(F.linear(x, weight), F.linear(x, other))


def test_data_takes_nothing_else(layout):
    weight = layout.from_hp(torch.randn(48, 64), [1, 32])
    before = weight.dequantize()
    other = CudaCoalescedInt4Tensor if layout is Int4Tensor else Int4Tensor
    for data in (torch.zeros(48, 64), torch.zeros(7, 9), other.from_hp(before, [1, 32])):
        with pytest.raises(TypeError, match=f"the data of a {layout.__name__} must be one too"):
            weight.data = data
    assert weight.shape == (48, 64) and torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_weight_never_requires_a_gradient(fmt):
    weight = model(fmt)[0].weight
    assert weight.requires_grad_() is weight and not weight.requires_grad
    weight.requires_grad = True
    assert not weight.requires_grad and not nn.Parameter(weight.detach()).requires_grad
    m = plain_model()
    assert m[0].weight.requires_grad
    m.load_state_dict(model(fmt).state_dict(), assign=True)
    trained = [name for name, p in m.named_parameters() if p.requires_grad]
    assert trained == ["0.bias", "1.weight", "1.bias"]


# --- into a plain model ---------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_plain_model_loads_the_values(fmt):
    m, x = plain_model(), torch.randn(3, 64).bfloat16()
    nn.init.zeros_(m[0].weight)
    quantised = model(fmt)
    m.load_state_dict(quantised.state_dict())
    assert type(m[0].weight) is nn.Parameter and m[0].weight.requires_grad
    assert torch.equal(m[0].weight, quantised[0].weight.dequantize())
    wide = torch.empty(48, 64, dtype=torch.float64)
    assert wide.copy_(quantised[0].weight) is wide
    assert torch.equal(wide, quantised[0].weight.dequantize().double())
    quantised[0].weight.act_pre_scale = 2
    with pytest.raises(RuntimeError, match="cannot hold the act_pre_scale of a 4-bit weight"):
        m.load_state_dict(quantised.state_dict())
    assert m(x).shape == (3, 32)


# --- processes ------------------------------------------------------------------------------------

CHILD = """
import sys, torch, torch.multiprocessing as mp, int4q
from torch import nn
def work(queue, m, x):
    y, weight = m(x), m.weight
    shared = weight.is_shared() and isinstance(weight, nn.Parameter) and not weight.requires_grad
    weight.qdata.zero_()
    queue.put((y.tolist(), shared, weight.packing))
if __name__ == "__main__":
    t = int4q.CpuPackedInt4Tensor.from_hp(torch.randn(16, 64), [1, 32], packing=sys.argv[1])
    m = nn.Linear(64, 16, bias=False)
    m.weight = nn.Parameter(t, requires_grad=False)
    if sys.argv[2] == "shared":
        m.share_memory()
    x = torch.randn(2, 64)
    expected = m(x).tolist()
    context = mp.get_context("spawn")
    queue = context.Queue()
    p = context.Process(target=work, args=(queue, m, x))
    p.start(); got = queue.get(timeout=60); p.join()
    assert got == (expected, True, sys.argv[1]), got
    assert not m.weight.qdata.any()  # the child wrote into the same memory
"""


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["shared", "private"])
@pytest.mark.parametrize("packing", ["rows", "aten"])
def test_a_cpu_packed_weight_is_shared_with_a_spawned_process(tmp_path, packing, memory):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), packing, memory]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- one buffer for all parameters ----------------------------------------------------------------

LEFT_OUT = "DistributedDataParallel by _set_params_and_buffers_to_ignore_for_model"


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store"
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fmt", ["plain", "cuda_coalesced"])
def test_distributed_data_parallel(group, fmt):
    parallel = nn.parallel.DistributedDataParallel
    m, x = model(fmt), torch.randn(3, 64).bfloat16()
    y = m(x)
    with pytest.raises((TypeError, ValueError), match=LEFT_OUT):
        parallel(m)
    parallel._set_params_and_buffers_to_ignore_for_model(m, ["0.weight"])
    wrapped = parallel(m)
    assert torch.equal(wrapped(x), y)
    wrapped(x).sum().backward()
    assert m[1].weight.grad.abs().sum() > 0 and m[0].weight.grad is None


def test_a_flat_vector_of_parameters(layout):
    t = layout.from_hp(torch.randn(48, 64), [1, 32])
    for flatten in (torch.nn.utils.parameters_to_vector, torch._utils._flatten_dense_tensors):
        with pytest.raises((TypeError, ValueError), match=LEFT_OUT):
            flatten([t, torch.randn(3)])


def test_a_collective_says_so(group, layout):
    t = layout.from_hp(torch.randn(48, 64), [1, 32])
    with pytest.raises(NotImplementedError, match=f"c10d.allreduce_.* {layout.__name__}.*flat"):
        torch.distributed.all_reduce(t)
    with pytest.raises(ValueError, match=f"one layout, shape.*{layout.__name__}.*flat"):
        torch.distributed.scatter(t, [t[:16]])


# --- the libraries around -------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_safetensors_names_the_way(tmp_path, fmt):
    safetensors = pytest.importorskip("safetensors.torch")
    m, path = model(fmt), tmp_path / "m.safetensors"
    for save in (
        lambda: safetensors.save_model(m, path),
        lambda: safetensors.save_file(m.state_dict(), path),
    ):
        with pytest.raises(TypeError, match=r"int4q.save_file, or call int4q.adopt\(model\)"):
            save()


@pytest.mark.parametrize("fmt", FORMATS)
def test_accelerate_offloads_to_the_cpu(fmt):
    accelerate = pytest.importorskip("accelerate")
    m, x = model(fmt), torch.randn(3, 64).bfloat16()
    y = m(x)
    offloaded = accelerate.cpu_offload(m, execution_device="cpu")
    assert offloaded[0].weight.is_meta
    assert torch.equal(offloaded(x), y)
    assert offloaded[0].weight.is_meta


@pytest.mark.parametrize("fmt", FORMATS)
def test_accelerate_to_the_disk_says_what_is_missing(tmp_path, fmt):
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(NotImplementedError, match="view.dtype is not implemented for .*Int4Tensor"):
        accelerate.disk_offload(model(fmt), tmp_path, execution_device="cpu")


def test_one_tensor_is_a_parameter(layout):
    """``type(param)(tensor, requires_grad=...)``: the same class over the same parts."""
    t = layout.from_hp(torch.randn(48, 64), [1, 32])
    p = layout(t, requires_grad=False)
    assert isinstance(p, nn.Parameter) and type(p) is layout and not p.requires_grad
    assert p.qdata.data_ptr() == t.qdata.data_ptr()
