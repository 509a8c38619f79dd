"""torchao's own test cases, run on both classes, and what its int4 tests check beyond them."""

import types

import pytest
import torch
import torch.nn.functional as F
import torchao.testing.utils as torchao_cases
from helpers import LAYOUTS
from torch import nn
from torch.overrides import TorchFunctionMode

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, Int4WeightOnlyConfig, quantize_

# torchao's cases compile the same function for every dtype and device.
pytestmark = pytest.mark.filterwarnings("ignore:torch._dynamo hit config:UserWarning")


def _case(base, layout):
    def body(namespace):
        namespace.update(
            TENSOR_SUBCLASS=layout,
            FACTORY_FN=staticmethod(layout.from_hp),
            kwargs={"block_size": [1, 32]},
            LINEAR_MIN_SQNR=20,
            __module__=__name__,
        )
        if not torch.cuda.is_available():  # this one calls .cuda() whatever its parameters say
            namespace["test_device1_to_device2_device1_cpu_device2_cpu"] = None

    name = f"{base.__name__.removeprefix('TorchAO')}{layout.__name__}"
    cls = types.new_class(name, (base,), exec_body=body)
    globals()[name] = cls


for _base in (torchao_cases.TorchAOBasicTestCase, torchao_cases.TorchAOCompileTestCase):
    for _layout in LAYOUTS:
        _case(_base, _layout)
del _base  # or it would be collected, with torchao's own subclass


def setup_function():
    torch._dynamo.reset()


# --- TorchAOIntegrationTestCase: what vLLM and Llama 4's code do to a weight ----------------------


class OnCpu(TorchFunctionMode):
    """Runs a case that names "cuda" on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture(params=["plain", "cuda_coalesced"])
def config(request):
    # W4A16: the resharding case compares outputs to the bit, whatever the number of rows.
    return Int4WeightOnlyConfig(
        set_inductor_config=False,
        int4_packing_format=request.param,
        activation_dtype=torch.bfloat16,
    )


@pytest.fixture
def cases(device, monkeypatch):
    case = torchao_cases.TorchAOIntegrationTestCase()
    if device == "cuda":
        yield case
    else:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torchao_cases, "get_current_accelerator_device", lambda: "cpu")
        with OnCpu():
            yield case


def test_slice_and_copy_similar_to_vllm(cases, config):
    cases._test_slice_and_copy_similar_to_vllm(config)


def test_moe_weight_reshape_ops(cases, config):
    cases._test_moe_weight_reshape_ops(config)


def test_narrow_similar_to_vllm(cases, config):
    cases._test_narrow_similar_to_vllm(config)


@pytest.mark.slow
def test_quantize_3d_param_similar_to_vllm(cases, config):
    cases._test_quantize_3d_param_similar_to_vllm(config)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_chunk_similar_to_vllm_llama4(cases, layout, dim, device):
    t = layout.from_hp(torch.randn(4, 96, 128, device=device), [1, 1, 32])
    cases._test_chunk_similar_to_vllm_llama4(t, dim)
    cases._test_chunk_similar_to_vllm_llama4(t.transpose(1, 2), dim)


# --- loading shards, as vLLM does -----------------------------------------------------------------


def weight(layout, *shape, device="cpu", dtype=torch.bfloat16):
    w = torch.randn(*shape, device=device).to(dtype)
    return nn.Parameter(layout.from_hp(w, [1] * (len(shape) - 1) + [32]), requires_grad=False)


def equal_parts(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in a.tensor_data_names)


def test_fused_qkv_is_filled_shard_by_shard(layout, device):
    """One parameter [q + k + v, K] from three checkpoints entries, each cut for this rank."""
    sizes = {"q": 64, "k": 32, "v": 32}
    fused = weight(layout, sum(sizes.values()), 128, device=device)
    whole = {n: weight(layout, 2 * size, 128, device=device) for n, size in sizes.items()}
    for rank in (0, 1):
        start = 0
        for name, size in sizes.items():
            shard = whole[name].narrow(0, rank * size, size)
            fused.data.narrow(0, start, size).copy_(shard)
            start += size
        expected = torch.cat([w.chunk(2, 0)[rank] for w in whole.values()])
        assert equal_parts(fused, expected)
        x = torch.randn(3, 128, device=device).bfloat16()
        by_part = [F.linear(x, w.chunk(2, 0)[rank]) for w in whole.values()]
        assert torch.equal(F.linear(x, fused), torch.cat(by_part, dim=-1))
        q, k, v = fused.split(list(sizes.values()), dim=0)
        assert equal_parts(k, whole["k"].chunk(2, 0)[rank])


def test_row_parallel_shards_cut_whole_groups(layout, device):
    """Along K: scales and zero points go with their groups."""
    whole, mine = weight(layout, 48, 256, device=device), weight(layout, 48, 128, device=device)
    mine.data.copy_(whole.narrow(1, 128, 128))
    assert torch.equal(mine.dequantize(), whole.dequantize()[:, 128:])
    with pytest.raises(ValueError, match="multiple of group_size 32, got \\[16:144\\]"):
        whole.narrow(1, 16, 128)
    with pytest.raises(ValueError, match="copy_ needs shape \\[48, 128\\]"):
        mine.data.copy_(whole)


def test_experts_are_stitched_from_matrices(layout, device):
    """gate and up of each expert into one [E, 2I, H] parameter, and from a chunk of it."""
    E, inner, hidden = 3, 32, 64
    stack = weight(layout, E, 2 * inner, hidden, device=device)
    gates, ups = (
        [weight(layout, inner, hidden, device=device) for _ in range(E)] for _ in range(2)
    )
    for e in range(E):
        stack.data[e].narrow(0, 0, inner).copy_(gates[e])
        stack.data[e].narrow(0, inner, inner).copy_(ups[e])
    assert equal_parts(
        stack, torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    )
    gate, up = stack.chunk(2, dim=1)
    assert equal_parts(gate, torch.stack(gates)) and equal_parts(up[2], ups[2])
    other = weight(layout, 2, 2 * inner, hidden, device=device)
    stack.data.narrow(0, 1, 2).copy_(other)  # two experts at once
    assert equal_parts(stack[1:], other) and equal_parts(stack[0][:inner], gates[0])
    half = weight(layout, E, 2 * inner, 32, device=device)
    stack.data.narrow(2, 32, 32).copy_(half)  # half of the in features of all
    assert torch.equal(stack.dequantize()[:, :, 32:], half.dequantize())


def test_copy_takes_the_other_layout_too(device):
    plain, coalesced = (weight(c, 8, 64, device=device) for c in LAYOUTS)
    plain.data.copy_(coalesced)
    assert equal_parts(plain, coalesced.to_int4_tensor())


# --- torchao's int4 tests -------------------------------------------------------------------------


def test_cat(layout, device):
    """Along K torchao's test expects the scales of the first tensor alone; ours keeps both.

    Dropping the second's leaves scales for half of the groups: the values would be wrong.
    """
    a, b = weight(layout, 96, 128, device=device), weight(layout, 96, 128, device=device)
    rows, columns = torch.cat([a, b], dim=0), torch.cat([a, b], dim=1)
    assert torch.equal(rows.qdata, torch.cat([a.qdata, b.qdata], 0))
    assert torch.equal(columns.qdata, torch.cat([a.qdata, b.qdata], 1))
    n_dim = 1 if layout is Int4Tensor else 0  # where N is in the scales
    for name in ("scale", "zero_point"):
        first, second = getattr(a, name), getattr(b, name)
        assert torch.equal(getattr(rows, name), torch.cat([first, second], n_dim))
        assert torch.equal(getattr(columns, name), torch.cat([first, second], 1 - n_dim))
    assert torch.equal(columns.dequantize(), torch.cat([a.dequantize(), b.dequantize()], 1))


def test_slice(layout, device):
    """Rows and columns, against the same parts of the dequantised weight."""
    w = weight(layout, 256, 128, device=device)
    x = torch.randn(2, 128, device=device).bfloat16()
    narrow = nn.Parameter(w.data.narrow(0, 0, 64), requires_grad=False)
    assert torch.equal(narrow.qdata, w.qdata[:64])
    assert torch.equal(F.linear(x, narrow), F.linear(x, w)[:, :64])
    left = w.data.narrow(1, 0, 64)
    assert left.shape == (256, 64) and torch.equal(left.dequantize(), w.dequantize()[:, :64])


@pytest.mark.parametrize("E,M", [(10, 2), (1, 64)])
def test_bmm(layout, device, E, M):
    m = nn.Module()
    m.weight = nn.Parameter(torch.randn(E, 256, 128, device=device).bfloat16())
    x = torch.randn(E, M, 128, device=device).bfloat16()
    packing = "plain" if layout is Int4Tensor else "cuda_coalesced"
    config = Int4WeightOnlyConfig(set_inductor_config=False, int4_packing_format=packing)
    quantize_(m, config, lambda module, name: True)
    expected = torch.bmm(x.float(), m.weight.dequantize(torch.float32).transpose(1, 2))
    got = torch.bmm(x, m.weight)
    assert got.shape == (E, M, 256)
    error = (got.float() - expected).norm() / expected.norm()
    # bfloat16 weights and results, 2^-9 each.
    assert error < 5e-3, error


def test_activation_prescaling(layout, device):
    """``act_pre_scale`` multiplies the activation, for linear, bmm and grouped matmul."""
    kwargs = {} if layout is Int4Tensor else {"activation_dtype": torch.bfloat16}
    matrix, stack = torch.randn(64, 128, device=device), torch.randn(2, 64, 128, device=device)
    factor = torch.tensor([0.5, 2.0, 4.0, 1.0] * 32, device=device)  # powers of two: exact
    x = torch.randn(5, 128, device=device)
    plain = layout.from_hp(matrix, [1, 32], **kwargs)
    scaled = layout.from_hp(matrix, [1, 32], **kwargs)
    scaled.act_pre_scale = factor
    assert torch.equal(F.linear(x, scaled), F.linear(x * factor, plain))
    plain = layout.from_hp(stack, [1, 1, 32], **kwargs)
    scaled = layout.from_hp(stack, [1, 1, 32], **kwargs)
    scaled.act_pre_scale = factor
    both = x.expand(2, 5, 128)
    assert torch.equal(torch.bmm(both, scaled), torch.bmm(both * factor, plain))
    offs = torch.tensor([2, 5], dtype=torch.int32, device=device)
    got = F.grouped_mm(x, scaled.transpose(1, 2), offs=offs)
    assert torch.equal(got, F.grouped_mm(x * factor, plain.transpose(1, 2), offs=offs))


def test_to_device(layout, device):
    for target in (device, torch.device(device)):
        m = nn.Linear(128, 256, dtype=torch.bfloat16)
        packing = "plain" if layout is Int4Tensor else "cuda_coalesced"
        quantize_(m, Int4WeightOnlyConfig(set_inductor_config=False, int4_packing_format=packing))
        assert type(m.weight) in (Int4Tensor, CudaCoalescedInt4Tensor)
        m.to(target)
        assert all(t.device.type == device for t in m.weight.data_tensors().values())
