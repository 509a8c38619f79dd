"""The compiled search of scale and zero point against the one in torch."""

import pytest
import torch

from int4q import qparams
from int4q.kernels.cpu import native, search

RATIOS = (1.0, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.7)

_lib, _reason = native.load()
_usable = hasattr(_lib, "int4q_search") and _lib.int4q_cpu_features()
pytestmark = pytest.mark.skipif(not _usable, reason=str(_reason or "no instruction set"))


def make(rows, n_groups, group_size):
    """Weights of many sizes, some off centre; two inputs carry most of the energy."""
    w = torch.randn(rows, n_groups, group_size) * torch.logspace(-3, 1, rows)[:, None, None]
    w[::5] += 2 * w[::5].std(-1, keepdim=True)
    h = torch.rand(n_groups, group_size) ** 6 + 1e-3
    h[0, :2] = 300
    return w, h


def error(w, pair, h):
    s, z = (t.double() for t in pair)
    return ((qparams.nearest(w.double(), s, z) * s + z - w).square() * h).sum(-1)


@pytest.mark.parametrize("settings", [(RATIOS, 3), ((1.0,), 5), ((0.9, 1.0), 0)])
@pytest.mark.parametrize(
    "rows,n_groups,group_size", [(100, 3, 32), (33, 2, 64), (1, 5, 128), (16, 1, 256)]
)
def test_as_good_as_in_torch(rows, n_groups, group_size, settings):
    w, h = make(rows, n_groups, group_size)
    got, expected = (f(w, h, *settings) for f in (search.search, qparams.search_in_torch))
    ratio = error(w, got, h) / error(w, expected, h)
    assert (ratio.log().abs() < 1e-3).float().mean() > 0.97  # (the rest met a tie the other way)
    assert ratio.max() < 1.1 and abs(ratio.mean() - 1) < 1e-3
    for x, y in zip(got, expected, strict=True):
        # 0.98 and more, but one tie among 16 groups is 0.94
        assert torch.isclose(x, y, rtol=1e-3, atol=1e-6).float().mean() > 0.93


def test_importance_of_one_group_for_all_and_any_strides():
    w, h = make(20, 4, 32)
    each = search.search(w, h[:1].expand(4, 32), RATIOS, 3)
    for x, y in zip(each, search.search(w, h[0], RATIOS, 3), strict=True):
        assert torch.equal(x, y)
    turned = w.transpose(0, 1).contiguous().transpose(0, 1)
    for x, y in zip(each, search.search(turned, h[0], RATIOS, 3), strict=True):
        assert torch.equal(x, y)


def test_a_row_does_not_depend_on_its_neighbours():
    w, h = make(50, 2, 64)
    whole = search.search(w, h, RATIOS, 3)
    for i in (0, 15, 16, 49):
        for x, y in zip(whole, search.search(w[i : i + 1], h, RATIOS, 3), strict=True):
            assert torch.equal(x[i : i + 1], y)


def test_groups_at_the_ends_of_the_range():
    w = torch.randn(6, 1, 32)
    w[0], w[1], w[2] = 0, 3, -1e-7
    w[3] = 3e38 * w[3].sign()  # least squares overflow: the pair is min-max's
    w[4] *= 1e-38
    h = torch.ones(1, 32)
    for x, y in zip(
        search.search(w, h, RATIOS, 3), qparams.search_in_torch(w, h, RATIOS, 3), strict=True
    ):
        assert x.isfinite().all() and torch.allclose(x, y, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 7, 31])
def test_a_weight_that_is_not_finite_is_seen(value, at):
    w, h = make(20, 2, 32)
    w[18, 1, at] = value
    scale, _ = search.search(w, h, RATIOS, 3)
    assert scale.isnan().nonzero().tolist() == [[18, 1, 0]]
    with pytest.raises(ValueError, match="must be finite"):
        qparams.quantize(w.flatten(1), 32, "search")


def test_no_rows():
    scale, zero_point = search.search(torch.empty(0, 3, 32), torch.ones(3, 32), RATIOS, 3)
    assert scale.shape == zero_point.shape == (0, 3, 1)


def test_what_it_takes(monkeypatch):
    w, h = make(4, 2, 32)
    assert search.takes(w, h) and search.takes(w, h[0])
    refused = [
        (w.double(), h), (w, h.double()), (w.to("meta"), h),
        (w, h[:1]), (w, h[:, :1]), (w, h[0, 0]),
        (w, h.expand(1, 4, 2, 32).mT), (w.requires_grad_(), h),
        (torch.ones(2, 512), torch.ones(512)),
    ]  # fmt: skip
    assert not any(search.takes(*pair) for pair in refused)
    with torch.no_grad():
        assert search.takes(w, h)
    monkeypatch.setattr(native, "load", lambda: (None, "not built"))
    assert not search.takes(w.detach(), h)
