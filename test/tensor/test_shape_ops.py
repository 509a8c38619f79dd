"""``dequantize(op(t)) == op(dequantize(t))``, exactly, for every shape op and both layouts."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st

GROUP = 32


@st.composite
def tensors(draw, ndim=None):
    """A quantised tensor of 2 or 3 dims, transposed in some drawn order."""
    ndim = ndim or draw(st.integers(2, 3))
    lead = [draw(st.integers(1, 5)) for _ in range(ndim - 1)]
    group = draw(st.sampled_from([32, 64]))
    w = torch.randn(*lead, group * draw(st.integers(1, 4)))
    layout = draw(st.sampled_from(LAYOUTS))
    t = layout.from_hp(w, [1] * (ndim - 1) + [group])
    return t.permute(draw(st.permutations(range(ndim))))


def assert_same(op, t):
    got, expected = op(t), op(t.dequantize())
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
    else:
        got, expected = [got], [expected]
    for g, e in zip(got, expected, strict=True):
        assert type(g) is type(t)
        assert g.shape == e.shape
        assert torch.equal(g.dequantize(), e)


@settings(deadline=None, max_examples=60)
@given(tensors(), st.data())
def test_slice(t, data):
    dim = data.draw(st.integers(-t.ndim, t.ndim - 1))
    size = t.shape[dim]
    grouped = dim % t.ndim == t.grouped_dim
    unit = t.group_size if grouped else 1
    start = data.draw(st.integers(0, size // unit)) * unit
    end = data.draw(st.integers(0, size // unit + 1)) * unit
    step = 1 if grouped else data.draw(st.integers(1, 3))
    index = [slice(None)] * t.ndim
    index[dim] = slice(start, end, step)
    assert_same(lambda x: x[tuple(index)], t)
    if start + unit <= size:
        assert_same(lambda x: x.narrow(dim, start, unit), t)


@settings(deadline=None, max_examples=40)
@given(tensors(), st.data())
def test_split_chunk_unbind(t, data):
    dim = data.draw(st.integers(0, t.ndim - 1))
    unit = t.group_size if dim == t.grouped_dim else 1
    pieces = t.shape[dim] // unit
    size = data.draw(st.integers(1, pieces)) * unit
    assert_same(lambda x: x.split(size, dim), t)
    cut = data.draw(st.integers(0, pieces)) * unit
    assert_same(lambda x: x.split([cut, x.shape[dim] - cut], dim), t)
    assert_same(lambda x: x.chunk(pieces, dim), t)
    if dim != t.grouped_dim:
        assert_same(lambda x: x.unbind(dim), t)
        index = data.draw(st.integers(-t.shape[dim], t.shape[dim] - 1))
        assert_same(lambda x: x.select(dim, index), t)


@settings(deadline=None, max_examples=40)
@given(tensors(), st.data())
def test_permutations(t, data):
    order = data.draw(st.permutations(range(t.ndim)))
    d0, d1 = data.draw(st.integers(-t.ndim, t.ndim - 1)), data.draw(st.integers(0, t.ndim - 1))
    assert_same(lambda x: x.permute(order), t)
    assert_same(lambda x: x.transpose(d0, d1), t)
    assert_same(lambda x: x.movedim(d0, d1), t)
    assert_same(lambda x: x.mT, t)
    assert_same(lambda x: x.mT.contiguous(), t)


@settings(deadline=None, max_examples=40)
@given(tensors(), st.data())
def test_dims_of_size_one(t, data):
    dim = data.draw(st.integers(-t.ndim - 1, t.ndim))
    assert_same(lambda x: x.unsqueeze(dim), t)
    assert_same(lambda x: x.unsqueeze(dim).squeeze(dim), t)
    assert_same(lambda x: x.unsqueeze(dim).unsqueeze(0).squeeze(), t)
    assert_same(lambda x: x.unsqueeze(0).unsqueeze(-1).squeeze((0, -1)), t)


@settings(deadline=None, max_examples=40)
@given(tensors(), st.data())
def test_joining(t, data):
    dim = data.draw(st.integers(-t.ndim, t.ndim - 1))
    assert_same(lambda x: torch.cat([x, x], dim), t)
    unit = t.group_size if dim % t.ndim == t.grouped_dim else 1
    assert_same(lambda x: torch.cat([x.narrow(dim, 0, unit), x, x.narrow(dim, 0, 0)], dim), t)
    assert_same(lambda x: torch.stack([x, x], dim), t)


@settings(deadline=None, max_examples=40)
@given(tensors(), st.data())
def test_indexing_by_a_tensor(t, data):
    dim = data.draw(st.sampled_from([d for d in range(t.ndim) if d != t.grouped_dim]))
    size = t.shape[dim]
    index = torch.tensor(
        data.draw(st.lists(st.integers(-size, size - 1), max_size=4)), dtype=torch.long
    )
    full = (slice(None),) * dim
    assert_same(lambda x: x[(*full, index)], t)
    assert_same(lambda x: x[(*full, index.view(-1, 1))], t)
    assert_same(lambda x: x.index_select(dim, index % size), t)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    assert_same(lambda x: x[(*full, mask)], t)


@settings(deadline=None, max_examples=40)
@given(tensors(), st.data())
def test_reshaping(t, data):
    g = t.grouped_dim
    groups = t.shape[g] // t.group_size
    inner = t.group_size * data.draw(
        st.sampled_from([d for d in range(1, groups + 1) if groups % d == 0])
    )
    assert_same(lambda x: x.unflatten(g, (-1, inner)), t)
    assert_same(lambda x: x.unflatten(g, (-1, inner)).flatten(0, 0), t)
    if t.ndim == 3 and g != 1:
        dims = (0, 1) if g == 2 else (1, 2)
        assert_same(lambda x: x.flatten(*dims), t)
        assert_same(
            lambda x: x.flatten(*dims).unflatten(dims[0], x.shape[dims[0] : dims[1] + 1]), t
        )
    if g > 0:  # dims before the grouped one merge into it: groups stay whole
        before = list(range(g + 1))
        assert_same(lambda x: x.flatten(0, g), t)
        assert_same(lambda x: x.flatten(0, g).unflatten(0, [x.shape[d] for d in before]), t)
        assert_same(lambda x: x.flatten(g - 1, g).reshape(x.shape), t)
    assert_same(lambda x: x.reshape(x.shape), t)
    assert_same(lambda x: x.view(*x.shape[:-1], -1), t)


@settings(deadline=None, max_examples=20)
@given(tensors())
def test_copies(t):
    for op in (torch.clone, torch.detach, torch.Tensor.contiguous, torch.ops.aten.alias):
        assert_same(op, t)


@settings(deadline=None, max_examples=20)
@given(tensors(ndim=3))
def test_llama4_resharding_is_the_identity(t):
    """transpose, reshape to 2-D, unflatten, transpose back: the same bytes as before."""
    t = t.permute([d for d in range(3) if d != t.grouped_dim] + [t.grouped_dim])
    there = t.transpose(1, 2).transpose(1, 2).reshape(-1, t.shape[-1])
    back = there.unflatten(0, (t.shape[0], -1)).transpose(1, 2).transpose(1, 2)
    assert torch.equal(back.contiguous(), t.contiguous())


def quantised(layout, *shape, group=GROUP):
    return layout.from_hp(torch.randn(*shape), [1] * (len(shape) - 1) + [group])


def test_slices_and_views_alias_the_storage(layout):
    t = quantised(layout, 2, 6, 128)
    for view in (
        t[1],
        t[:, 2:4],
        t[:, :, 32:96],
        t.mT,
        t.unsqueeze(0),
        t.narrow(1, 3, 2),
        t.chunk(2, 1)[1],
        t.unbind(0)[0],
        t.view(2, 6, 2, 64),
        t.detach(),
    ):
        for name, part in view.data_tensors().items():
            whole = getattr(t, name).untyped_storage()
            assert part.untyped_storage().data_ptr() == whole.data_ptr(), name


VIEWS = {
    "select": lambda t: t[1], "slice": lambda t: t[:, 2:4], "transpose": lambda t: t.mT,
    "permute": lambda t: t.permute(1, 0, 2), "narrow": lambda t: t.narrow(1, 3, 2),
    "chunk": lambda t: t.chunk(2, 1)[1], "unbind": lambda t: t.unbind(0)[0],
    "unsqueeze": lambda t: t.unsqueeze(0), "squeeze": lambda t: t[:1].squeeze(0),
    "view": lambda t: t.view(2, 6, 2, 64), "detach": lambda t: t.detach(), "data": lambda t: t.data,
    "flatten": lambda t: t.flatten(0, 1), "clone": lambda t: t.clone(),
    "contiguous": lambda t: t.contiguous(), "index": lambda t: t[torch.tensor([1, 0])],
}  # fmt: skip


@pytest.mark.parametrize("op", VIEWS)
@pytest.mark.parametrize("made_outside", [True, False])
def test_inference_mode(layout, op, made_outside):
    """Also on weights made outside of it, whose views are no inference tensors."""
    with torch.inference_mode(not made_outside):
        t = torch.nn.Parameter(quantised(layout, 2, 6, 128), requires_grad=False)
    expected = VIEWS[op](t.dequantize())
    with torch.inference_mode():
        assert torch.equal(VIEWS[op](t).dequantize(), expected)
        assert t.to(torch.float16).dtype == torch.float16


def test_writing_through_a_slice_changes_the_whole(layout):
    t, part = quantised(layout, 6, 128), quantised(layout, 2, 64)
    t[2:4, 64:].copy_(part)
    assert torch.equal(t[2:4, 64:].dequantize(), part.dequantize())


def test_a_view_that_cannot_alias_refuses_and_reshape_copies_everything():
    from int4q import Int4Tensor

    t = quantised(Int4Tensor, 2, 6, 64)
    with pytest.raises(ValueError, match="Use .reshape"):
        t.view(12, 64)
    copied = t.reshape(12, 64)
    for name, part in copied.data_tensors().items():
        assert part.untyped_storage().data_ptr() != getattr(t, name).untyped_storage().data_ptr()


def test_act_pre_scale_follows_the_in_features(layout):
    t = quantised(layout, 4, 128)
    t = layout(t.qdata, t.scale, t.zero_point, t.block_size, t.shape, torch.rand(128))
    assert torch.equal(t[:, 32:96].act_pre_scale, t.act_pre_scale[32:96])
    assert torch.equal(torch.cat([t[:, :32], t[:, 32:]], 1).act_pre_scale, t.act_pre_scale)
    assert torch.equal(torch.cat([t, t]).act_pre_scale, t.act_pre_scale)
    assert t[1:3].t().act_pre_scale is t.act_pre_scale
    with pytest.raises(ValueError, match="either every tensor of a cat"):
        torch.cat([t, quantised(layout, 4, 128)])
    other = layout(t.qdata, t.scale, t.zero_point, t.block_size, t.shape, torch.rand(128))
    with pytest.raises(ValueError, match="must share act_pre_scale"):
        torch.cat([t, other])
    with pytest.raises(ValueError, match="keep its in features in one dim"):
        t.unflatten(1, (2, 64))


def test_embedding(layout):
    t = quantised(layout, 10, 64)
    index = torch.tensor([[1, 9], [0, 1]])
    assert torch.equal(F.embedding(index, t), F.embedding(index, t.dequantize()))
    with pytest.raises(ValueError, match="no max_norm"):
        F.embedding(index, t, max_norm=1.0)


# ruff: noqa: E501 (one case a line reads better)
REFUSED = {
    "cuts a group": (lambda t: t[:, 3:64], ValueError, "multiple of group_size 32, got \\[3:64\\]"),
    "step": (lambda t: t[:, 0:64:2], ValueError, "step of a slice of the grouped dim must be 1"),
    "column": (lambda t: t[:, 3], ValueError, "single elements of the grouped dim 1"),
    "columns": (lambda t: t[:, torch.tensor([1])], ValueError, "indexing by a tensor must not"),
    "two indices": (lambda t: t[torch.tensor([0]), torch.tensor([0])], ValueError, "one index tensor"),
    "mask shape": (lambda t: t[torch.tensor([True])], IndexError, "mask for dim 0"),
    "mixes groups": (lambda t: t.mT.reshape(-1), ValueError, "must keep the grouped dim"),
    "half groups": (lambda t: t.view(-1, 8, 16), ValueError, "must keep the grouped dim"),
    "count": (lambda t: t.reshape(3, 128), ValueError, "keep the 1024 elements"),
    "count -1": (lambda t: t.reshape(-1, 3, 128), ValueError, "keep the 1024 elements"),
    "two -1": (lambda t: t.reshape(-1, -1, 128), ValueError, "only one dimension"),
    "dim": (lambda t: t.transpose(0, 2), IndexError, "Dimension out of range"),
    "permute": (lambda t: torch.ops.aten.permute(t, [0, 0]), ValueError, "each of the 2 dims once"),
    "split": (lambda t: t.split([3, 4], 0), ValueError, "add up to 8"),
    "flatten": (lambda t: t.flatten(1, 0), ValueError, "start_dim <= end_dim"),
    "t of 3-D": (lambda t: torch.ops.aten.t(t.unsqueeze(0)), ValueError, "at most 2 dims"),
    "cat dtypes": (lambda t: torch.cat([t, t.half()]), ValueError, "one dtype"),
    "cat shapes": (lambda t: torch.cat([t, t[:, :32]]), ValueError, "agree except in dim 0"),
    "cat groups": (lambda t: torch.cat([t, quantised(type(t), 8, 128, group=64)]), ValueError, "one block_size"),
    "cat plain": (lambda t: torch.cat([t, t.dequantize()]), TypeError, "one class"),
    "expand": (lambda t: t.expand(3, 8, 128), ValueError, "its own shape only"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_raises(layout, case):
    op, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        op(quantised(layout, 8, 128))


def test_layouts_do_not_mix():
    a, b = (quantised(c, 8, 128) for c in LAYOUTS)
    with pytest.raises(TypeError, match="one class"):
        torch.cat([a, b])
    assert not torch.equal(a, b)
