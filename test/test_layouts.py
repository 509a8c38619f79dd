"""``to_coalesced_`` and ``to_plain_``: the same values, in place, once a weight."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int4q import (
    CpuPackedInt4Tensor,
    CudaCoalescedInt4Tensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    quantize_,
    to_coalesced_,
    to_plain_,
)


class Experts(nn.Module):
    """A stack, a Linear, an Embedding tied to a head, and a weight in a buffer."""

    def __init__(self, layout=Int4Tensor):
        super().__init__()
        torch.manual_seed(3)

        def weight(*shape):
            t = layout.from_hp(torch.randn(*shape).bfloat16(), [1] * (len(shape) - 1) + [32])
            return nn.Parameter(t, requires_grad=False)

        self.up_proj = weight(3, 16, 64)
        self.linear = nn.Linear(64, 32, dtype=torch.bfloat16)
        self.linear.weight = weight(32, 64)
        self.embedding, self.head = nn.Embedding(48, 64), nn.Linear(64, 48, bias=False)
        self.embedding.weight = self.head.weight = weight(48, 64)
        self.norm = nn.LayerNorm(64, dtype=torch.bfloat16)
        self.register_buffer("spare", weight(8, 32).data)

    def forward(self, tokens):
        x = self.norm(F.embedding(tokens, self.embedding.weight))
        y = torch.bmm(x.expand(3, -1, -1), self.up_proj)
        return self.head(x), self.linear(x), y, F.linear(x[:, :32], self.spare)


TOKENS = torch.tensor([0, 5, 47])
NAMES = ["up_proj", "linear.weight", "embedding.weight", "head.weight", "spare"]


def weights(model):
    return [model.get_parameter(n) if n != "spare" else model.spare for n in NAMES]


def same_memory(a, b, part):
    return getattr(a, part).data_ptr() == getattr(b, part).data_ptr()


def test_there_and_back():
    m = Experts()
    before, y = weights(copy.deepcopy(m)), m(TOKENS)
    assert to_coalesced_(m) is m
    for t, plain in zip(weights(m), before, strict=True):
        assert type(t) is CudaCoalescedInt4Tensor and t.activation_dtype == torch.bfloat16
        assert torch.equal(t.to_int4_tensor(), plain)
    assert all(torch.equal(a, b) for a, b in zip(m(TOKENS), y, strict=True))
    assert to_plain_(m) is m
    for t, plain in zip(weights(m), before, strict=True):
        assert type(t) is Int4Tensor and torch.equal(t, plain)


def test_shared_parameters_stay_shared():
    m = to_coalesced_(Experts())
    assert m.embedding.weight is m.head.weight
    assert isinstance(m.spare, CudaCoalescedInt4Tensor) and not isinstance(m.spare, nn.Parameter)
    assert "spare" in dict(m.named_buffers())
    assert to_plain_(m).embedding.weight is m.head.weight


def test_nothing_to_do_changes_nothing():
    m = Experts()
    before = weights(m)
    assert all(a is b for a, b in zip(weights(to_plain_(m)), before, strict=True))
    before = weights(to_coalesced_(m))
    assert all(a is b for a, b in zip(weights(to_coalesced_(m)), before, strict=True))
    dense = nn.Linear(4, 4)
    w = dense.weight
    assert to_coalesced_(dense).weight is w and to_plain_(dense).weight is w


def test_activation_dtype_is_kept_or_set():
    m = to_coalesced_(Experts(), activation_dtype=torch.int8)
    before = weights(m)
    assert all(t.activation_dtype == torch.int8 for t in before)
    assert all(a is b for a, b in zip(weights(to_coalesced_(m)), before, strict=True))  # kept
    to_coalesced_(m, torch.bfloat16)
    for t, old in zip(weights(m), before, strict=True):
        assert t.activation_dtype == torch.bfloat16 and same_memory(t, old, "scale")
    with pytest.raises(ValueError, match="must be int8 or bfloat16 or None, got torch.float16"):
        to_coalesced_(m, torch.float16)


def test_act_pre_scale_is_kept():
    m = nn.Linear(64, 16, dtype=torch.bfloat16)
    t = Int4Tensor.from_hp(m.weight.detach(), [1, 32])
    scaled = Int4Tensor(t.qdata, t.scale, t.zero_point, t.block_size, t.shape, torch.rand(64))
    m.weight = nn.Parameter(scaled, requires_grad=False)
    for convert in (to_coalesced_, to_plain_):
        convert(m)
        assert same_memory(m.weight, scaled, "qdata")
        assert same_memory(m.weight, scaled, "act_pre_scale")


@pytest.mark.parametrize("packing", ["rows", "aten"])
def test_cpu_packed_weights_go_through_plain(packing):
    m = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    plain = Int4Tensor.from_hp(m[0].weight.detach(), [1, 32])
    for convert, layout in ((to_coalesced_, CudaCoalescedInt4Tensor), (to_plain_, Int4Tensor)):
        packed = CpuPackedInt4Tensor.from_int4_tensor(plain, packing)
        m[0].weight = nn.Parameter(packed, requires_grad=False)
        convert(m)
        assert type(m[0].weight) is layout
        assert torch.equal(m[0].weight.to_int4_tensor(), plain)


@pytest.mark.parametrize("convert", [to_coalesced_, to_plain_])
def test_only_modules(convert):
    t = Int4Tensor.from_hp(torch.randn(16, 64), [1, 32])
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got Int4Tensor"):
        convert(t)


def test_one_weight_at_a_time(monkeypatch):
    """When a weight is converted, the parts of the one before are gone already."""
    m = nn.Sequential(*(nn.Linear(64, 32, dtype=torch.bfloat16) for _ in range(4)))
    quantize_(m, Int4WeightOnlyConfig(group_size=32))
    scales = [weakref.ref(layer.weight.scale) for layer in m]
    convert, alive = CudaCoalescedInt4Tensor.from_int4_tensor, []

    def watched(t, dtype):
        alive.append(sum(ref() is not None for ref in scales))
        return convert(t, dtype)

    monkeypatch.setattr(CudaCoalescedInt4Tensor, "from_int4_tensor", watched)
    to_coalesced_(m)
    assert alive == [4, 3, 2, 1]


def test_a_saved_model_of_either_layout_loads_into_the_other(tmp_path):
    plain, coalesced = Experts(), to_coalesced_(Experts(), torch.int8)
    torch.save(coalesced.state_dict(), tmp_path / "c.pt")
    plain.linear.weight.qdata.zero_()
    plain.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
    assert torch.equal(plain.linear.weight, coalesced.linear.weight.to_int4_tensor())
