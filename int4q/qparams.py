"""A high-precision weight -> 4-bit values, scales and zero points.

Every algorithm maps groups ``[n, group_size]`` (float32) to ``(q, scale, zero_point)`` with
``w ~ q * scale + zero_point`` and ``q`` in -8..7; :func:`quantize` applies it a bounded number
of rows at a time, so that the float32 working copies stay small next to the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from int4q import errors
from int4q.packing import pack_nibbles

Q_MIN, Q_MAX = -8, 7
LEVELS = Q_MAX - Q_MIN
SMALLEST_RANGE = 1e-6
"""What ``max - min`` of a group counts at least, so that constant groups have a scale."""
# Working-set bound of one step of `quantize`, in weight elements (four float32 copies: 32 MiB).
_CHUNK_ELEMENTS = 1 << 21


def minmax(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric min-max, bit for bit what fbgemm's ``int4_row_quantize_zp`` computes.

    Args:
        groups: float32 ``[n, group_size]``.

    Returns:
        ``q`` int8 ``[n, group_size]``, ``scale`` and ``zero_point`` float32 ``[n, 1]``:
        ``scale = max(max - min, 1e-6) / 15``, ``zero_point = min + 8 * scale``.
    """
    # In halves, so that max - min of any finite weights is finite. Halving is exact where it shows:
    # what a denormal loses is nothing beside the smallest scale.
    low, high = (end * 0.5 for end in groups.aminmax(dim=-1, keepdim=True))
    scale = (high - low).clamp(min=SMALLEST_RANGE / 2) / (LEVELS / 2)
    zero_point = (low + scale * (-Q_MIN / 2)) * 2
    q = torch.add(-low, groups, alpha=0.5).div_(scale * 0.5).round_().clamp_(0, LEVELS)
    return q.sub_(-Q_MIN).to(torch.int8), scale, zero_point


def symmetric(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric abs-max: ``scale = max(|w|, 1e-6) / 7``, zero point 0."""
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / Q_MAX
    q = (groups / scale).round_().clamp_(Q_MIN, Q_MAX)
    return q.to(torch.int8), scale, torch.zeros_like(scale)


def symmetric_full_range(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric with all 16 levels, bit for bit what fbgemm's ``int4_row_quantize`` computes.

    ``scale = max(|w|, 1e-6) / 8``, zero point 0; a largest value that is positive becomes 7 / 8
    of itself. The format of weights for float8 activations, as torchao holds them.
    """
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / -Q_MIN
    q = (groups / scale).round_().clamp_(Q_MIN, Q_MAX)
    return q.to(torch.int8), scale, torch.zeros_like(scale)


def hqq(groups: Tensor, *, steps: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Half-quadratic quantisation: min-max scales, zero points refined against an l_0.7 norm.

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the
    error is split by a generalised soft threshold into outliers and the rest, and the zero
    point is refitted to the rest until the mean error stops falling.
    """
    norm, beta, growth = 0.7, 10.0, 1.01
    _, scale, zero_point = minmax(groups)
    best, best_error = zero_point, groups.new_full((), float("inf"))
    for _ in range(steps):
        q = ((groups - zero_point) / scale).round_().clamp_(Q_MIN, Q_MAX)
        error = groups - (q * scale + zero_point)
        mean_error = error.abs().mean()
        better = mean_error < best_error
        best = torch.where(better, zero_point, best)
        best_error = torch.where(better, mean_error, best_error)
        size = error.abs()
        outliers = error.sign() * (size - size.clamp(min=1e-8).pow(norm - 1) / beta).clamp(min=0)
        zero_point = (groups - outliers - q * scale).mean(dim=-1, keepdim=True)
        beta *= growth
    zero_point = best
    q = ((groups - zero_point) / scale).round_().clamp_(Q_MIN, Q_MAX)
    return q.to(torch.int8), scale, zero_point


Algorithm = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
ALGORITHMS: dict[str, Algorithm] = {
    "tinygemm": minmax,
    "symmetric": symmetric,
    "symmetric_full_range": symmetric_full_range,
    "hqq": hqq,
}
SYMMETRIC = ("symmetric", "symmetric_full_range")
"""Algorithms whose zero points are all 0."""


def quantize(w: Tensor, group_size: int, algorithm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise ``w`` along its last dim.

    Args:
        w: float32, float16 or bfloat16 ``[..., K]``, K a multiple of ``group_size``.
        group_size: elements that share a scale and a zero point.
        algorithm: a key of ``ALGORITHMS``; ``"tinygemm"`` is :func:`minmax`.

    Returns:
        ``qdata`` int8 ``[..., K/2]`` (packed nibbles), ``scale`` and ``zero_point``
        ``[..., K/group_size]`` in ``w.dtype``.

    Raises:
        ValueError: an unknown algorithm, or NaN or Inf in ``w``.
    """
    if algorithm not in ALGORITHMS:
        raise errors.value(f"the algorithm must be one of {sorted(ALGORITHMS)}", repr(algorithm))
    if w.ndim > 2 and not w.is_contiguous():  # one matrix at a time: no copy of a transposed stack
        each = [quantize(matrix, group_size, algorithm) for matrix in w]
        if each:
            q, s, z = (torch.stack(parts) for parts in zip(*each, strict=True))
            return q, s, z
    rows = w.reshape(-1, w.shape[-1])
    n_rows, K = rows.shape
    n_groups = K // group_size
    qdata = rows.new_empty((n_rows, K // 2), dtype=torch.int8)
    scale = rows.new_empty((n_rows, n_groups))
    zero_point = torch.empty_like(scale)
    step = max(1, _CHUNK_ELEMENTS // max(K, 1))
    for start in range(0, n_rows, step):
        chunk = slice(start, min(start + step, n_rows))
        groups = rows[chunk].reshape(-1, group_size).float()
        q, s, z = ALGORITHMS[algorithm](groups)
        _check_finite(s)
        qdata[chunk] = pack_nibbles(q.view(-1, K))
        s, z = _round(s, z, w.dtype)
        scale[chunk] = s.view(-1, n_groups)
        zero_point[chunk] = z.view(-1, n_groups)
    lead = w.shape[:-1]
    return (
        qdata.view(*lead, K // 2),
        scale.view(*lead, n_groups),
        zero_point.view(*lead, n_groups),
    )


def _round(scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zero points in the weight's dtype, adjusted where rounding would spoil a group.

    Two cases, which fbgemm leaves spoilt: float16 rounds the smallest scale and 8 times it
    separately, so that a group of zeros would come back as 6e-8; and the ends of a group beside
    the dtype's largest value may round to infinity (or ``8 * scale`` overflow on the way).
    """
    s, z = scale.to(dtype), zero_point.to(dtype)
    smallest = torch.full_like(scale, SMALLEST_RANGE) / LEVELS
    zeros = (scale <= smallest) & (zero_point == scale * -Q_MIN)
    z = torch.where(zeros, s * -Q_MIN, z)
    overflows = torch.zeros_like(zeros)
    for q in (Q_MIN, Q_MAX):
        overflows |= ~(s.float() * q + z.float()).to(dtype).isfinite()
    info = torch.finfo(dtype)
    limit = info.max * (1 - info.eps / 2)  # one step of the dtype below its largest value
    fitting = s.float().clamp(max=limit / -Q_MIN)
    s = torch.where(overflows, fitting.to(dtype), s)
    fitting = s.float()
    fitting = z.float().clamp(fitting * -Q_MIN - limit, limit - fitting * Q_MAX)
    return s, torch.where(overflows, fitting.to(dtype), z)


def _check_finite(per_group: Tensor) -> None:
    # NaN and Inf reach the scale of their group, so one value a group tells. Traced, fake and
    # meta weights have no values to look at.
    if torch.compiler.is_compiling() or per_group.is_meta or isinstance(per_group, FakeTensor):
        return
    if not bool(per_group.isfinite().all()):
        raise errors.value("a weight to quantise must be finite", "NaN or Inf in it")
