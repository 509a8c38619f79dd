"""Every way to write ``act_pre_scale`` is the same weight, wherever the weight goes."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from int4q import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor

N, K = 48, 256

# What is assigned, and the factors of the K activations that it means.
WRITTEN = {
    "a number": (2, torch.full((K,), 2.0)),
    "a fraction": (0.5, torch.full((K,), 0.5)),
    "0-d": (torch.tensor(2.0), torch.full((K,), 2.0)),
    "[1]": (torch.tensor([2.0]), torch.full((K,), 2.0)),
    "[1, 1]": (torch.tensor([[2.0]]), torch.full((K,), 2.0)),
    "[K]": (torch.linspace(0.5, 2, K), torch.linspace(0.5, 2, K)),
    "[1, K]": (torch.linspace(0.5, 2, K)[None], torch.linspace(0.5, 2, K)),
    "strided": (torch.linspace(0.5, 2, 2 * K)[::2], torch.linspace(0.5, 2, 2 * K)[::2]),
}
LAYOUTS = {
    "plain": Int4Tensor.from_int4_tensor,
    "coalesced": lambda t: CudaCoalescedInt4Tensor.from_int4_tensor(t, torch.bfloat16),
    "rows": lambda t: CpuPackedInt4Tensor.from_int4_tensor(t, "rows"),
    "aten": lambda t: CpuPackedInt4Tensor.from_int4_tensor(t, "aten"),
}


def weight(layout):
    torch.manual_seed(0)
    return LAYOUTS[layout](Int4Tensor.from_hp(torch.randn(N, K), [1, 32]))


def saved_and_loaded(t):
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


KEPT = {
    "itself": lambda t: t,
    "clone": torch.clone,
    "deepcopy": copy.deepcopy,
    "saved and loaded": saved_and_loaded,
    "to": lambda t: t.to(torch.float32, copy=True),
    "half": lambda t: t.half(),
    "detach": torch.detach,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "through plain": lambda t: t.to_int4_tensor(),
    "copied": lambda t: torch.zeros_like(t).copy_(t),
}
SHAPED = {
    "rows": (lambda t: t[:16], slice(None)),
    "in features": (lambda t: t[:, 64:128], slice(64, 128)),
    "cat": (lambda t: torch.cat([t, t]), slice(None)),
    "cat of in features": (lambda t: torch.cat([t[:, :64], t[:, 64:]], 1), slice(None)),
    "t": (lambda t: t.t(), slice(None)),
    "unsqueeze": (lambda t: t[None], slice(None)),
}


def close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_and_gradients(layout, written):
    value, factors = WRITTEN[written]
    t, x = weight(layout), torch.randn(3, K)
    t.act_pre_scale = value
    w = t.dequantize().double() * factors.double()
    with torch.no_grad():
        close(F.linear(x, t), x.double() @ w.T)
    x.requires_grad_()
    F.linear(x, t).sum().backward()
    close(x.grad, w.sum(0).expand(3, K))
    torch._dynamo.reset()
    compiled = torch.compile(lambda v: F.linear(v, t), backend="aot_eager", fullgraph=True)
    close(compiled(x.detach()), x.detach().double() @ w.T)
    tangent = torch.func.jvp(lambda v: F.linear(v, t), (x.detach(),), (x.detach(),))[1]
    close(tangent, x.detach().double() @ w.T)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_where_the_weight_goes(layout, written, kept):
    value, factors = WRITTEN[written]
    t = weight(layout)
    t.act_pre_scale = value
    moved = KEPT[kept](t)
    # 2^-11: one rounding to float16.
    close(moved.act_pre_scale, factors.double(), 2**-11 if kept == "half" else 0)
    assert moved.nbytes == sum(p.numel() * p.element_size() for p in moved.data_tensors().values())
    x = torch.randn(2, K).to(moved.dtype)
    torch.testing.assert_close(F.linear(x, moved), F.linear(x, t), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("shaped", SHAPED)
@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("layout", ["plain", "coalesced"])
def test_it_follows_the_in_features(layout, written, shaped):
    (op, kept), (value, factors) = SHAPED[shaped], WRITTEN[written]
    t = weight(layout)
    t.act_pre_scale = value
    assert torch.equal(op(t).act_pre_scale, factors[kept])


@pytest.mark.parametrize("written", WRITTEN)
def test_the_constructor_and_torchao_take_it_too(written):
    value, factors = WRITTEN[written]
    t = weight("plain")
    parts = t.qdata, t.scale, t.zero_point, t.block_size, t.shape
    made = Int4Tensor(*parts, value)
    assert torch.equal(made.act_pre_scale, factors)
    theirs = made.to_torchao()
    assert torch.equal(theirs.act_pre_scale, factors)
    theirs.act_pre_scale = value  # as torchao's own tests set it
    assert torch.equal(Int4Tensor.from_torchao(theirs).act_pre_scale, factors)


WRONG = {
    "too few": (torch.ones(8), ValueError, r"tensor of 1 or 256 \(K\) entries, got \[8\]"),
    "a column": (torch.ones(K, 1), ValueError, r"got \[256, 1\]"),
    "a row for each out feature": (torch.ones(N, K), ValueError, r"got \[48, 256\]"),
    "integers": (torch.ones(K, dtype=torch.int32), TypeError, "floating-point .* got torch.int32"),
    "text": ("2", TypeError, "must be a number .* got str"),
    "a list": ([2.0] * K, TypeError, "got list"),
    "a bool": (True, TypeError, "got bool"),
    "elsewhere": (torch.ones(K, device="meta"), ValueError, "must be on the device cpu, got meta"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_one_is_refused_when_it_is_set(layout, wrong):
    value, error, message = WRONG[wrong]
    t = weight(layout)
    t.act_pre_scale = 2
    with pytest.raises(error, match=message):
        t.act_pre_scale = value
    assert torch.equal(t.act_pre_scale, torch.full((K,), 2.0))
    t.act_pre_scale = None
    assert t.act_pre_scale is None and "act_pre_scale" not in t.data_tensors()
