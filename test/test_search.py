"""The search of scale and zero point, against the same search written for one group at a time."""

import numpy as np
import pytest
import torch

from int4q import Int4Tensor, qparams
from int4q.packing import unpack_nibbles

G = 32


def weighted_error(w, s, z, h):
    q = np.clip(np.round((w - z) / s), -8, 7)
    return q, (h * (w - q * s - z) ** 2).sum()


def search_one(w, h, ratios=(1, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.7), refits=3):
    """One group ``[G]`` in float64."""
    best, low, high = (np.inf, None, None), w.min(), w.max()
    middle = (low + high) / 2
    for ratio in ratios:
        r = (high - middle) * ratio
        s = max(2 * r, 1e-6) / 15
        z = middle - r + 8 * s
        for _ in range(refits + 1):
            q, error = weighted_error(w, s, z, h)
            if error < best[0]:
                best = error, s, z
            mean_q, mean_w = (h * q).sum() / h.sum(), (h * w).sum() / h.sum()
            variance = (h * (q - mean_q) ** 2).sum()
            covariance = (h * (q - mean_q) * (w - mean_w)).sum()
            if variance > 0 and covariance > 0:
                s = covariance / variance
                z = mean_w - s * mean_q
    return best


def groups(n=64):
    w = torch.randn(n, G) * torch.logspace(-3, 1, n)[:, None]
    w[::7] += 3 * w.std(1)[::7, None]  # off centre
    w[5, 3] *= 20  # an outlier
    return w


@pytest.mark.parametrize("settings", [{}, dict(ratios=(1.0,), refits=5)], ids=["search", "refit"])
@pytest.mark.parametrize("weighted", [False, True])
def test_search_is_the_search_of_one_group(weighted, settings):
    w = groups()
    h = torch.rand(G) ** 6 + 1e-3 if weighted else torch.ones(G)
    s, z = qparams.search(w, h if weighted else None, **settings)
    for i, group in enumerate(w.double().numpy()):
        best, scale, zero_point = search_one(group, h.double().numpy(), **settings)
        got = weighted_error(group, s[i].double().numpy(), z[i].double().numpy(), h.numpy())[1]
        # (Float32 may meet a tie the other way, and go on from there; it is as good then.)
        assert got <= best * (1 + 2e-2)
    same = torch.isclose(s[-1:].double(), torch.tensor(scale), rtol=1e-4)
    assert same.all() and abs(z[-1].item() - zero_point) < 1e-4 * abs(zero_point)


def test_search_is_no_worse_than_min_max_and_near_the_best_of_a_grid():
    w, h = groups(), torch.rand(G) ** 6 + 1e-3

    def error(s, z):
        values = qparams.nearest(w, s, z) * s + z
        return ((values - w).double().square() * h).sum(1)

    found = error(*qparams.search(w, h))
    _, s, z = qparams.minmax(w)
    assert (found <= error(s, z) * (1 + 1e-6)).all() and found.sum() < 0.7 * error(s, z).sum()
    grid = [  # (brute force: every scale from 0.5 to 1.2, every shift up to two steps)
        error(s * a, z + s * b)
        for a in torch.linspace(0.5, 1.2, 36).tolist()
        for b in torch.linspace(-2, 2, 41).tolist()
    ]
    best = torch.stack(grid).amin(0)  # of 1,476; the search tries 16, and is within a quarter
    assert (found / best).log().mean() < 0.25 < (error(s, z) / best).log().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_the_nearest_to_the_stored_pair(dtype):
    w = (groups() + 3).to(dtype)
    qdata, s, z = qparams.quantize(w.view(16, -1), G, "search", torch.rand(4 * G))
    s, z = (t.float().unsqueeze(-1) for t in (s, z))
    q = unpack_nibbles(qdata).view(16, 4, G)
    assert torch.equal(q, qparams.nearest(w.view(16, 4, G).float(), s, z).to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-7])
def test_constant_groups(value, dtype):
    w = torch.full((2, 2 * G), value, dtype=dtype)
    w[1, :G] = torch.randn(G)
    t = Int4Tensor.from_hp(w, [1, G], algorithm="search")
    exact = w.float() if value != -1e-7 else torch.zeros(()).expand_as(w)
    for at in (0, slice(None)), (1, slice(G, None)):
        assert (t.dequantize().float()[at] - exact[at]).abs().max() <= (1e-7 if value else 0) * 2


def test_least_importance():
    """Inputs that were never seen count 1e-4 of the mean; all of them unseen, they count alike."""
    w = torch.randn(8, 2 * G)
    h = torch.rand(2 * G)
    h[::2] = 0
    floor = torch.where(h == 0, h.mean() * 1e-4 + 1e-20, h)
    _, *pair = qparams.quantize(w, G, "search", h)
    for x, y in zip(pair, qparams.search(w.view(8, 2, G), floor.view(2, G)), strict=True):
        assert torch.equal(x, y.squeeze(-1))
    unseen, alike = (qparams.quantize(w, G, "search", i)[1] for i in (torch.zeros(2 * G), None))
    assert torch.isclose(unseen, alike, rtol=1e-4).float().mean() > 0.9  # (the rest: ties)


def test_every_expert_has_its_own_importance():
    w, h = torch.randn(3, 8, 2 * G), torch.rand(3, 2 * G) ** 6
    whole = qparams.quantize(w, G, "search", h)
    alone = [qparams.quantize(w[i], G, "search", h[i]) for i in range(3)]
    for part, of_each in zip(whole, zip(*alone, strict=True), strict=True):
        assert torch.equal(part, torch.stack(of_each))
    turned = w.mT.contiguous().mT
    for a, b in zip(whole, qparams.quantize(turned, G, "search", h), strict=True):
        assert torch.equal(a, b)


def test_chunks_do_not_show(monkeypatch):
    w, h = torch.randn(40, 4 * G), torch.rand(4 * G)
    whole = qparams.quantize(w, G, "search", h)
    monkeypatch.setattr(qparams, "_CHUNK_ELEMENTS", 7 * 4 * G)
    for a, b in zip(whole, qparams.quantize(w, G, "search", h), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "importance,algorithm,error,message",
    [
        (torch.ones(G), "search", ValueError, r"must have shape \[64\], got \[32\]"),
        (torch.ones(3, 2 * G), "search", ValueError, r"must have shape \[64\]"),
        (-torch.ones(2 * G), "search", ValueError, "finite and not negative"),
        (torch.full((2 * G,), float("nan")), "search", ValueError, "finite and not negative"),
        (torch.ones(2 * G, dtype=torch.int32), "search", TypeError, "floating-point tensor"),
        ([1.0] * 2 * G, "search", TypeError, "floating-point tensor, got list"),
        (torch.ones(2 * G), "hqq", ValueError, "importance is for the algorithms"),
    ],
)
def test_importance_that_does_not_fit(importance, algorithm, error, message):
    with pytest.raises(error, match=message):
        qparams.quantize(torch.randn(4, 2 * G), G, algorithm, importance)


def test_ratios_must_not_be_empty():
    with pytest.raises(ValueError, match="ratios must not be empty"):
        qparams.search(torch.randn(4, G), ratios=())


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    w, h = torch.randn(300, 512), torch.rand(512) ** 4
    parts = {d: qparams.quantize(w.to(d), 64, "search", h.to(d)) for d in ("cpu", "cuda")}
    on_cpu, on_gpu = parts["cpu"], [t.cpu() for t in parts["cuda"]]
    q, s, z = (t.double() for t in (unpack_nibbles(on_gpu[0]), *on_gpu[1:]))
    assert (unpack_nibbles(on_cpu[0]) == q).double().mean() > 0.999

    def error(q, s, z):
        v = q.double().unflatten(-1, (8, 64)) * s.double()[..., None] + z.double()[..., None]
        return ((v.flatten(1) - w) ** 2 * h).sum().item()

    exact = error(unpack_nibbles(on_cpu[0]), *on_cpu[1:])
    assert abs(error(q, s, z) - exact) < 1e-4 * exact
