"""``experts_permute`` and ``experts_combine`` against their definitions, term by term."""

from __future__ import annotations

import pytest
import torch
from torch import func

import int4q  # noqa: F401  (registers the ops)

ops = torch.ops.int4q
CASES = [(1, 8, 128, 0), (7, 2, 8, 0), (64, 4, 6, 3), (300, 8, 16, 16), (0, 2, 4, 0)]
"""T, top_k, experts here, experts elsewhere."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def routed(T, top_k, here, elsewhere, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(T)
    scores = torch.rand(T, here + elsewhere, generator=g)
    weights, index = scores.topk(top_k, dim=1)
    return index.to(device), weights.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_permute(case, device):
    T, top_k, here, _ = case
    index, _ = routed(*case, device)
    token, offs, position, expert = ops.experts_permute(index, here)
    flat = index.reshape(-1).tolist()
    order = sorted(range(T * top_k), key=lambda s: (flat[s], s))
    assert token.tolist() == [s // top_k for s in order]
    assert expert.tolist() == [min(flat[s], here - 1) for s in order]
    assert [order[p] for p in position.tolist()] == list(range(T * top_k))
    assert offs.tolist() == [sum(e <= n for e in flat) for n in range(here)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_combine(case, dtype, device):
    """Rows of no expert may hold anything."""
    T, top_k, here, _ = case
    index, weights = routed(*case, device)
    _, offs, position, _ = ops.experts_permute(index, here)
    y = torch.randn(T * top_k, 70, device=device).to(dtype)
    y[offs[-1] :] = float("nan")
    out = ops.experts_combine(y, position, index, weights, here)
    expected = torch.zeros(T, 70, dtype=torch.float64, device=device)
    for t in range(T):
        for j in range(top_k):
            if index[t, j] < here:
                expected[t] += weights[t, j].double() * y[position[t * top_k + j]].double()
    assert out.dtype == dtype and out.shape == (T, 70)
    # float32 sums of top_k terms, rounded once
    tolerance = max(torch.finfo(dtype).eps, 4 * top_k * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_more_rows_than_are_compared(monkeypatch):
    index, _ = routed(700, 8, 32, 0)
    assert index.numel() > 4096
    token, offs, position, expert = ops.experts_permute(index, 32)
    assert offs[-1] == 5600 and bool((expert.diff() >= 0).all())
    assert torch.equal(token[position.long()], torch.arange(700).repeat_interleave(8).int())


def test_derivatives():
    index, weights = routed(5, 3, 4, 2, dtype=torch.float64)
    _, offs, position, _ = ops.experts_permute(index, 4)
    y = torch.randn(15, 6, dtype=torch.float64)

    def call(y, weights):
        return ops.experts_combine(y, position, index, weights, 4)

    for first, second in ((True, True), (True, False), (False, True)):
        args = y.clone().requires_grad_(first), weights.clone().requires_grad_(second)
        assert torch.autograd.gradcheck(call, args, check_forward_ad=True)
    args = y.clone().requires_grad_(), weights.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(call, args)
    tangents = torch.randn_like(y), torch.randn_like(weights)
    forward = func.jvp(call, (y, weights), tangents)[1]
    expected = call(tangents[0], weights) + call(y, tangents[1])
    torch.testing.assert_close(forward, expected)


def test_compiled_and_batched():
    index, weights = routed(9, 2, 4, 0)
    y = torch.randn(3, 18, 8)

    def call(index, weights, y):
        _, _, position, _ = ops.experts_permute(index, 4)
        return ops.experts_combine(y, position, index, weights, 4)

    assert torch.equal(
        torch.compile(call, fullgraph=True)(index, weights, y[0]), call(index, weights, y[0])
    )
    one_by_one = torch.stack([call(index, weights, part) for part in y])
    assert torch.equal(func.vmap(call, (None, None, 0))(index, weights, y), one_by_one)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "int64 or int32", {0: torch.zeros(2, 2)}),
        (ValueError, r"\[T, top_k\]", {0: torch.zeros(4, dtype=torch.int64)}),
        (ValueError, "positive", {1: 0}),
    ],
)
def test_bad_arguments_of_permute(error, match, change):
    args = [torch.zeros(2, 2, dtype=torch.int64), 4]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(error, match=match):
        ops.experts_permute(*args)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "floating-point", {0: torch.zeros(4, 3, dtype=torch.int32)}),
        (TypeError, "floating-point", {3: torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, "as top_k_index", {3: torch.zeros(2, 3)}),
        (ValueError, r"y must be \[4, H\]", {0: torch.zeros(5, 3)}),
        (ValueError, r"y must be \[4, H\]", {1: torch.zeros(3, dtype=torch.int32)}),
    ],
)
def test_bad_arguments_of_combine(error, match, change):
    index = torch.zeros(2, 2, dtype=torch.int64)
    position = torch.arange(4, dtype=torch.int32)
    args = [torch.zeros(4, 3), position, index, torch.ones(2, 2), 4]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(error, match=match):
        ops.experts_combine(*args)
