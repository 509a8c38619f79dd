"""GPTQ: against its definition, against every choice there is, and with nothing to go by."""

import pytest
import torch

from int4q import gptq, qparams
from int4q.packing import unpack_nibbles

G = 32
TOKENS = torch.tensor(4096)


def inputs(K=2 * G, tokens=4096):
    """Correlated, of very different sizes."""
    x = torch.randn(tokens, K) @ torch.randn(K, K) / K**0.5
    return x * torch.logspace(-1, 0.5, K)[torch.randperm(K)]


def hessian(x):
    return x.T @ x / len(x)


def values(parts, dtype=torch.float32):
    qdata, scale, zero_point = parts[:3]
    q = unpack_nibbles(qdata).unflatten(-1, (scale.shape[-1], -1)).double()
    return (q * scale.double()[..., None] + zero_point.double()[..., None]).flatten(-2)


def output_error(parts, w, x):
    return ((values(parts) - w.double()) @ x.double().T).square().mean().item()


def by_definition(w, H, s, z, group_size):
    """Column by column in float64, the inverse Hessian downdated as in optimal brain surgery."""
    W, Hinv, K = w.double().clone(), H.double().inverse(), w.shape[1]
    q = torch.zeros_like(W)
    rest = sorted(range(K), key=lambda k: -H[k, k].item())
    while rest:
        k = rest.pop(0)
        scale, zero_point = (t[:, k // group_size].double() for t in (s, z))
        q[:, k] = ((W[:, k] - zero_point) / scale).round().clamp(-8, 7)
        error = (W[:, k] - q[:, k] * scale - zero_point) / Hinv[k, k]
        W[:, rest] -= error[:, None] * Hinv[k, rest]
        Hinv = Hinv - torch.outer(Hinv[:, k], Hinv[k]) / Hinv[k, k]
    return q


def test_values_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(gptq, "_BLOCK", 24)  # no divisor of K
    w, H = torch.randn(16, 2 * G), hessian(inputs())
    qdata, s, z, note = gptq.quantize(w, G, H, TOKENS, refit=False)
    drawn = gptq.conditioned(H, max(0.05, 64 / (64 + 4096)))
    expected = by_definition(w, drawn, s, z, G)
    # (Float32 may fall on the other side of a tie, and the rest of its row goes on from there.)
    rows = (unpack_nibbles(qdata) == expected).all(1).float().mean()
    assert rows > 0.9 and note is None
    _, s2, z2 = qparams.quantize(w, G, "search", H.diagonal())
    assert torch.equal(s, s2) and torch.equal(z, z2)


def test_the_hessian_that_can_be_inverted():
    H = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    got = gptq.conditioned(H, 0.5, damping=0.3)
    damp = 0.3 * (4 + 2 + 1) / 3
    exact = torch.tensor([[4 + damp, 0.5, 0], [0.5, 2 + damp, 0], [0, 0, 1 + damp]])
    torch.testing.assert_close(got, exact)
    assert H[2, 2] == 0  # (a copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64])
def test_outputs_are_closer_than_those_of_search_and_a_refit_closer_still(dtype, group_size):
    w, x = torch.randn(48, 128).to(dtype), inputs(128)
    H = hessian(x)
    searched = output_error(qparams.quantize(w, group_size, "search", H.diagonal()), w, x)
    swept = output_error(gptq.quantize(w, group_size, H, TOKENS, refit=False), w, x)
    refitted = output_error(gptq.quantize(w, group_size, H, TOKENS), w, x)
    assert swept < 0.8 * searched and refitted < swept


def test_near_the_best_of_all_values():
    """Four correlated inputs on a coarse grid: all 4,096 choices of eight values each."""
    w, step = torch.rand(64, 4) * 2 - 1, 0.5
    x = torch.randn(4096, 1) + 0.5 * torch.randn(4096, 4)
    H, order, U, _ = gptq._factorise(hessian(x), 0.0)
    s, z = torch.full((1, 64), step), torch.zeros(1, 64)
    q = gptq._sweep(w[:, order], U, s, z, torch.zeros(4, dtype=torch.int64))[:, order.argsort()]
    choices = torch.cartesian_prod(*[torch.arange(-4, 4)] * 4) * step
    errors = choices[None] - w[:, None]
    best = torch.einsum("nci,ij,ncj->nc", errors, H, errors).amin(1).mean()

    def mean_error(q):
        return torch.einsum("ni,ij,nj->n", q * step - w, H, q * step - w).mean()

    nearest, got = mean_error((w / step).round()), mean_error(q)
    assert best * 0.999 <= got < best + 0.25 * (nearest - best)


def test_a_row_refit_is_the_least_squares_solution():
    w, H = torch.randn(4, 2 * G), hessian(inputs())
    qdata, s, z, _ = gptq.quantize(w, G, H, TOKENS, refit=False)
    q = unpack_nibbles(qdata).float()
    new_s, new_z = gptq._refit(w, H, q, s, z)
    L = torch.linalg.cholesky(H.double()).T  # |L (w - v)|^2 is the error
    for row in range(4):
        basis = torch.zeros(2 * G, 4, dtype=torch.float64)
        for g in range(2):
            basis[g * G : (g + 1) * G, g] = q[row, g * G : (g + 1) * G].double()
            basis[g * G : (g + 1) * G, 2 + g] = 1
        exact = torch.linalg.lstsq(L @ basis, L @ w[row].double()).solution
        got = torch.cat([new_s[row], new_z[row]]).double()

        def error(pairs, basis=basis, row=row):
            return (L @ (basis @ pairs - w[row].double())).square().sum()

        old = torch.cat([s[row], z[row]]).double()
        assert error(got) - error(exact) < 0.02 * (error(old) - error(exact))


def test_refit_keeps_the_pair_of_constant_groups():
    w, H = torch.randn(3, 2 * G), hessian(inputs())
    w[1, :G], w[2] = 3.0, 0.0
    qdata, s, z, _ = gptq.quantize(w, G, H, TOKENS)
    got = values((qdata, s, z))
    assert (got[1, :G] - 3).abs().max() < 0.05 and not got[2].any()
    assert (s > 0).all() and s.isfinite().all() and z.isfinite().all()


def test_inputs_never_seen_leave_the_search():
    w = torch.randn(8, 2 * G)
    nothing = gptq.quantize(w, G, torch.zeros(2 * G, 2 * G), TOKENS, refit=False)
    searched = qparams.quantize(w, G, "search", torch.zeros(2 * G))
    for a, b in zip(nothing[:3], searched, strict=True):
        assert torch.equal(a, b)
    x = inputs()
    x[:, 5] = 0
    assert (values(gptq.quantize(w, G, hessian(x), TOKENS))[:, 5] - w[:, 5]).abs().max() < 0.6


def test_few_tokens_draw_the_hessian_to_its_diagonal():
    """Inputs seen otherwise: outputs stay about as close as those of search."""
    w, x, few = torch.randn(48, 128), inputs(128), torch.tensor(64)
    H = hessian(x[:64])
    cautious = output_error(gptq.quantize(w, G, H, few), w, x)
    bold = output_error(gptq.quantize(w, G, H, torch.tensor(10**6)), w, x)
    assert cautious < bold
    assert cautious < 1.1 * output_error(qparams.quantize(w, G, "search", H.diagonal()), w, x)


def test_a_hessian_without_a_factor():
    w, x = torch.randn(8, 2 * G), inputs()
    H = hessian(x)
    spoilt = H.clone()
    spoilt[0, 1] = spoilt[1, 0] = 3 * (H[0, 0] * H[1, 1]).sqrt()  # indefinite until shrunk by 0.7
    *parts, note = gptq.quantize(w, G, spoilt, TOKENS)
    searched = qparams.quantize(w, G, "search", H.diagonal())
    assert note is not None
    if note.startswith("by search"):
        for a, b in zip(parts, searched, strict=True):
            assert torch.equal(a, b)
    spoilt[0, 1] = spoilt[1, 0] = 1.3 * (H[0, 0] * H[1, 1]).sqrt()  # until shrunk by 0.3
    *parts, note = gptq.quantize(w, G, spoilt, TOKENS)
    assert note == "with its Hessian shrunk by 0.5 and damped by 0.01"
    assert output_error(parts, w, x) < output_error(searched, w, x)


def test_the_same_every_time_and_for_every_expert():
    w, x = torch.randn(3, 16, 2 * G), torch.stack([inputs() for _ in range(3)])
    H, tokens = torch.stack([hessian(t) for t in x]), torch.tensor([4096, 100, 64])
    *first, note = gptq.quantize(w, G, H, tokens)
    *again, _ = gptq.quantize(w, G, H, tokens)
    each = [gptq.quantize(*args)[:3] for args in zip(w, [G] * 3, H, tokens, strict=True)]
    for a, b, c in zip(first, again, zip(*each, strict=True), strict=True):
        assert torch.equal(a, b) and torch.equal(a, torch.stack(c))
    assert note is None
    before = w.clone(), H.clone()
    gptq.quantize(w, G, H, tokens)
    assert torch.equal(w, before[0]) and torch.equal(H, before[1])


@pytest.mark.parametrize(
    "H,message",
    [
        (torch.eye(G), r"must have shape \[64, 64\], got \[32, 32\]"),
        (torch.full((2 * G, 2 * G), float("nan")), "hessian must be finite"),
        (torch.eye(2 * G).index_fill(0, torch.tensor([3]), float("inf")), "hessian must be finite"),
    ],
)
def test_hessians_that_do_not_do(H, message):
    with pytest.raises(ValueError, match=message):
        gptq.quantize(torch.randn(4, 2 * G), G, H, TOKENS)


@pytest.mark.gpu
@pytest.mark.parametrize("refit", [False, True])
def test_on_a_gpu_as_on_the_cpu(refit):
    w, x = torch.randn(256, 512), inputs(512)
    H = hessian(x)
    on_cpu = gptq.quantize(w, 128, H, TOKENS, refit=refit)[:3]
    on_gpu = gptq.quantize(w.cuda(), 128, H, TOKENS, refit=refit)[:3]
    assert all(t.is_cuda for t in on_gpu)
    again = gptq.quantize(w.cuda(), 128, H.cuda(), TOKENS, refit=refit)[:3]
    assert all(torch.equal(a, b) for a, b in zip(on_gpu, again, strict=True))
    # (A value that falls on the other side of a tie changes the rest of its row.)
    a, b = (output_error([t.cpu() for t in parts], w, x) for parts in (on_cpu, on_gpu))
    assert abs(a - b) < 0.01 * a
