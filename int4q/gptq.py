"""GPTQ: 4-bit values chosen one column at a time, each making up for the errors before it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2022), with scales and zero points from :func:`int4q.qparams.search` over the original weight, the
columns by falling ``H_kk``, and a Hessian drawn towards its diagonal by the little that few tokens
tell. What is stored is in the order of the weight: a kernel sees ordinary groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4q import errors, qparams
from int4q.packing import pack_nibbles

DAMPING = 0.01
LEAST_SHRINKAGE = 0.05
_BLOCK = 128
_REFIT_ELEMENTS = 1 << 26
_RIDGE = 1e-4
# Shrinkage at least, and damping, tried in turn until the Cholesky factorisation succeeds.
_LADDER = ((0.0, DAMPING), (0.2, DAMPING), (0.5, DAMPING), (0.5, 1.0))


def quantize(
    w: Tensor, group_size: int, hessian: Tensor, tokens: Tensor, *, refit: bool = True
) -> tuple[Tensor, Tensor, Tensor, str | None]:
    """Quantise ``w`` for the least mean square error of ``x @ w.T``.

    Memory: 3 K^2 float32 beside the Hessian, four copies of ``w [N, K]``, and some 0.8 GB for a
    refit. The same result every time, on one kind of device.

    Args:
        w: float32, float16 or bfloat16 ``[N, K]`` or ``[E, N, K]``, K a multiple of ``group_size``.
        group_size: elements that share a scale and a zero point.
        hessian: the mean of ``x_i * x_k``, floating point ``[K, K]`` or ``[E, K, K]``.
        tokens: that it is the mean of, integer ``[]`` or ``[E]``.
        refit: fit all scales and zero points of a row anew, together, when its values are chosen.

    Returns:
        ``qdata`` int8 ``[.., N, K/2]``, ``scale`` and ``zero_point`` ``[.., N, K/group_size]`` in
        ``w.dtype``, and, if a Hessian could not be factorised as it was, what was done instead.

    Raises:
        ValueError: NaN or Inf in ``w`` or ``hessian``, or shapes that do not fit.
    """
    expected = [*w.shape[:-2], w.shape[-1], w.shape[-1]]
    if list(hessian.shape) != expected:
        rule = f"hessian of {errors.dims(w.shape)} must have shape {errors.dims(expected)}"
        raise errors.value(rule, errors.dims(hessian.shape))
    if w.ndim == 2:
        return _quantize_matrix(w, group_size, hessian, int(tokens), refit)
    experts = zip(w, hessian, tokens, strict=True)
    each = [quantize(*(m, group_size, H, n), refit=refit) for m, H, n in experts]
    qdata, scale, zero_point = (torch.stack(p) for p in list(zip(*each, strict=True))[:3])
    notes = {f"expert {e}: {note}" for e, (*_, note) in enumerate(each) if note}
    return qdata, scale, zero_point, "; ".join(sorted(notes)) or None


def _quantize_matrix(
    w: Tensor, group_size: int, hessian: Tensor, tokens: int, refit: bool
) -> tuple[Tensor, Tensor, Tensor, str | None]:
    K = w.shape[1]
    hessian = hessian.to(w.device, torch.float32)
    if not bool(hessian.isfinite().all()):
        raise errors.value("hessian must be finite", "NaN or Inf in it")
    qdata, scale, zero_point = qparams.quantize(w, group_size, "search", hessian.diagonal())
    factorised = _factorise(hessian, max(LEAST_SHRINKAGE, K / (K + max(tokens, 1))))
    if factorised is None:
        return qdata, scale, zero_point, "by search: its Hessian has no Cholesky factor"
    H, order, U, note = factorised
    W = w.float()
    s, z = (t.float().T.contiguous() for t in (scale, zero_point))
    q = _sweep(W[:, order], U, s, z, order // group_size)
    q = q[:, order.argsort()]
    if refit:
        scale, zero_point = _refit(W, H, q, scale, zero_point)
    return pack_nibbles(q.to(torch.int8)), scale, zero_point, note


def conditioned(hessian: Tensor, shrinkage: float, damping: float = DAMPING) -> Tensor:
    """A copy that can be inverted.

    Off the diagonal times ``1 - shrinkage``; on it 1 where an input was always 0, so that its
    weights are left as they are, and ``damping`` of its mean more everywhere.
    """
    H = hessian * (1 - shrinkage)
    d = hessian.diagonal()
    d = torch.where(d == 0, 1.0, d)
    H.diagonal().copy_(d + damping * d.mean())
    return H


def _factorise(
    hessian: Tensor, shrinkage: float
) -> tuple[Tensor, Tensor, Tensor, str | None] | None:
    """``H``, the order of its columns, ``U`` with ``H^-1 = U^T U`` in that order, and a note."""
    for least, damping in _LADDER:
        H = conditioned(hessian, max(shrinkage, least), damping)
        order = H.diagonal().argsort(descending=True, stable=True)
        L, failed = torch.linalg.cholesky_ex(H[order][:, order])
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not failed:
            first = (least, damping) == _LADDER[0]
            drawn = max(shrinkage, least)
            note = f"with its Hessian shrunk by {drawn:.2g} and damped by {damping:.2g}"
            return H, order, U, None if first else note
    return None


def _sweep(W: Tensor, U: Tensor, s: Tensor, z: Tensor, group: Tensor) -> Tensor:
    """The values of ``W [N, K]``, columns in the order of ``U``; ``W`` is used up.

    ``s``, ``z``: float32 ``[n_groups, N]``; ``group``: of each column.
    """
    Q = torch.empty_like(W)
    groups, pivots = group.tolist(), U.diagonal().tolist()
    for start in range(0, W.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, W.shape[1]))
        w = W[:, block].T.contiguous()
        u, error = U[block, block], torch.empty_like(w)
        for i in range(len(w)):
            scale, zero_point = s[groups[start + i]], z[groups[start + i]]
            q = qparams.nearest(w[i], scale, zero_point)
            error[i] = (w[i] - q * scale - zero_point) / pivots[start + i]
            Q[:, start + i] = q
            w[i + 1 :].addr_(u[i, i + 1 :], error[i], alpha=-1)
        W[:, block.stop :].addmm_(error.T, U[block, block.stop :], alpha=-1)
    return Q


def _refit(
    W: Tensor, H: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """All scales and zero points of a row at once, by least squares under ``H``; ``q`` stays.

    With ``B`` the rows ``q_g`` and ``1_g`` of every group: ``B H B^T`` times the change is
    ``B H (w - v)``. A group whose new scale is not positive keeps its pair.
    """
    K = W.shape[1]
    n_groups = scale.shape[1]
    Hg = H.view(n_groups, K // n_groups, K)
    ones = Hg.sum(1).view(n_groups, n_groups, -1).sum(-1)
    step = max(1, _REFIT_ELEMENTS // (n_groups * K))
    new_scale, new_zero_point = torch.empty_like(scale), torch.empty_like(zero_point)
    for start in range(0, len(W), step):
        rows = slice(start, start + step)
        qg = q[rows].view(-1, n_groups, K // n_groups)
        s, z = scale[rows].float(), zero_point[rows].float()
        rest = W[rows] - (qg * s[..., None] + z[..., None]).flatten(1)
        pull = (rest @ H).view_as(qg)
        qH = torch.einsum("ngi,gik->ngk", qg, Hg).view(-1, n_groups, n_groups, K // n_groups)
        A = W.new_empty(len(qg), 2 * n_groups, 2 * n_groups)
        A[:, :n_groups, :n_groups] = torch.einsum("nghi,nhi->ngh", qH, qg)
        A[:, :n_groups, n_groups:] = qH.sum(-1)
        A[:, n_groups:, :n_groups] = A[:, :n_groups, n_groups:].mT
        A[:, n_groups:, n_groups:] = ones
        d = A.diagonal(dim1=1, dim2=2)
        d += _RIDGE * d + 1e-6 * d.mean(-1, keepdim=True) + 1e-30  # (constant values: collinear)
        change = torch.linalg.solve(A, torch.cat([(pull * qg).sum(-1), pull.sum(-1)], 1))
        fitted_s, fitted_z = s + change[:, :n_groups], z + change[:, n_groups:]
        kept = ~(fitted_s >= qparams.SMALLEST_RANGE / qparams.LEVELS) | ~fitted_z.isfinite()
        pair = torch.where(kept, s, fitted_s), torch.where(kept, z, fitted_z)
        new_scale[rows], new_zero_point[rows] = qparams.rounded(*pair, scale.dtype)
    return new_scale, new_zero_point
