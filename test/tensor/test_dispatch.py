"""How often a weight goes through torch's function dispatch, each a microsecond or two of host."""

import pytest
import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from int4q import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor
from int4q.tensor.base import Int4TensorBase

ALL = [Int4Tensor, CudaCoalescedInt4Tensor, CpuPackedInt4Tensor]


@pytest.fixture
def dispatched(monkeypatch):
    """The functions that reach ``__torch_function__``."""
    functions = []
    handle = Int4TensorBase.__torch_function__.__func__

    def record(cls, func, types, args=(), kwargs=None):
        functions.append(getattr(func, "__name__", str(func)))
        return handle(cls, func, types, args, kwargs)

    for cls in (Int4TensorBase, *ALL):
        monkeypatch.setattr(cls, "__torch_function__", classmethod(record))
    return functions


def weight(layout, act_pre_scale=None):
    t = layout.from_hp(torch.randn(32, 64), [1, 32])
    t.act_pre_scale = act_pre_scale
    return t


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("act_pre_scale", [None, torch.rand(64)], ids=["", "act_pre_scale"])
def test_flattening_asks_nobody(layout, act_pre_scale, dispatched):
    t = weight(layout, act_pre_scale)
    dispatched.clear()
    names, attributes = t.__tensor_flatten__()
    assert not dispatched
    assert (names, attributes) == TorchAOBaseTensor.__tensor_flatten__(t)
    parts = {name: getattr(t, name) for name in names}
    again = layout.__tensor_unflatten__(parts, attributes, t.shape, t.stride())
    assert type(again) is layout and torch.equal(again, t)
    assert again.__tensor_flatten__() == (names, attributes)


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("bias", [None, torch.randn(32)], ids=["", "bias"])
def test_a_linear_layer_is_one_dispatch(layout, bias, dispatched):
    t, x = weight(layout), torch.randn(3, 64)
    dispatched.clear()
    F.linear(x, t, bias)
    assert dispatched == ["linear"]
