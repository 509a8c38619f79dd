"""A high-precision weight -> 4-bit values, scales and zero points.

Every algorithm maps groups ``[.., group_size]`` (float32) to ``(q, scale, zero_point)`` with
``w ~ q * scale + zero_point`` and ``q`` in -8..7; :func:`quantize` applies it a bounded number
of rows at a time, so that the float32 working copies stay small next to the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from int4q import errors
from int4q.kernels.cpu import search as cpu_search
from int4q.packing import pack_nibbles

Q_MIN, Q_MAX = -8, 7
LEVELS = Q_MAX - Q_MIN
SMALLEST_RANGE = 1e-6
"""What ``max - min`` of a group counts at least, so that constant groups have a scale."""
# Working-set bound of one step of `quantize`, in weight elements (four float32 copies: 32 MiB; six
# in a search).
_CHUNK_ELEMENTS = 1 << 21
# The same of a search on a GPU, whose many small steps would cost more than their work.
_GPU_SEARCH_ELEMENTS = 1 << 24
_LEAST_IMPORTANCE = 1e-4


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


def search(
    groups: Tensor,
    importance: Tensor | None = None,
    *,
    ratios: Sequence[float] = (1.0, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.7),
    refits: int = 3,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of least weighted square error, of those that a short search meets.

    It starts from the range of the group times each of ``ratios``, and alternates from there:
    the nearest values to a pair, then the pair that fits these values best (weighted least
    squares). The best pair met is kept. The first one is min-max, so none is ever worse.

    Args:
        groups: float32 ``[.., group_size]``.
        importance: of every error, float32 that broadcasts to ``groups``, positive: the mean square
            of the activation that the weight multiplies. ``None`` counts them alike.
        ratios: of the range to start from to the group's own.
        refits: least-squares steps from each of them.

    Returns:
        ``scale`` and ``zero_point`` float32 ``[.., 1]``. The values are to be chosen for the pair
        as it is stored, see :func:`nearest`.
    """
    h = groups.new_ones(groups.shape[-1]) if importance is None else importance
    run = cpu_search.search if ratios and cpu_search.takes(groups, h) else search_in_torch
    return run(groups, h, ratios, refits)


def search_in_torch(
    groups: Tensor, h: Tensor, ratios: Sequence[float], refits: int
) -> tuple[Tensor, Tensor]:
    """:func:`search` on any device: the definition of what the compiled one does."""
    low, high = (end * 0.5 for end in groups.aminmax(dim=-1, keepdim=True))  # (see minmax)
    middle, radius = low + high, high - low
    total = h.sum(dim=-1, keepdim=True)
    mean = _sum(groups * h) / total
    centred = groups - mean
    q, product = torch.empty_like(groups), torch.empty_like(groups)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for ratio in ratios:
        half = radius * ratio
        scale = half.clamp(min=SMALLEST_RANGE / 2) / (LEVELS / 2)
        zero_point = ((middle - half) * 0.5 + scale * (-Q_MIN / 2)) * 2
        for step in range(refits + 1):
            if step:
                mean_q = _sum(torch.mul(q, h, out=product)) / total
                torch.mul(q.sub_(mean_q), h, out=product)
                # The values of a constant group say nothing of its scale. A scale below the
                # smallest of min-max would be lost where it is stored in float16.
                fitted = _sum(product * centred) / _sum(q.mul_(product))
                fits = fitted >= SMALLEST_RANGE / LEVELS
                scale = torch.where(fits, fitted, scale)
                zero_point = torch.where(fits, mean - fitted * mean_q, zero_point)
            rest = groups - zero_point
            torch.div(rest, scale, out=q).round_().clamp_(Q_MIN, Q_MAX)
            rest.addcmul_(q, scale, value=-1)
            error = _sum(torch.mul(rest, h, out=product).mul_(rest))
            if best is None:
                best = error, scale, zero_point
                continue
            better = error < best[0]
            pairs = zip((error, scale, zero_point), best, strict=True)
            error, kept_scale, kept_zero_point = (torch.where(better, a, b) for a, b in pairs)
            best = error, kept_scale, kept_zero_point
    if best is None:
        raise errors.value("ratios must not be empty", ratios)
    return best[1:]


def _sum(t: Tensor) -> Tensor:
    return t.sum(dim=-1, keepdim=True)


def nearest(groups: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The values ``q`` that come closest to ``groups``, float32 ``[.., group_size]``.

    ``scale`` and ``zero_point``: float32 ``[.., 1]``.
    """
    return ((groups - zero_point) / scale).round_().clamp_(Q_MIN, Q_MAX)


Algorithm = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Search = Callable[[Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
ALGORITHMS: dict[str, Algorithm] = {
    "tinygemm": minmax,
    "symmetric": symmetric,
    "symmetric_full_range": symmetric_full_range,
    "hqq": hqq,
}
"""Those that choose values, scale and zero point at once."""
SEARCHES: dict[str, Search] = {
    "search": search,
    "refit": partial(search, ratios=(1.0,), refits=5),
}
"""Those that choose scale and zero point, by importance if there is one; :func:`nearest` does the
rest, for the pair as it is stored. ``"refit"`` is the search from min-max only."""
SYMMETRIC = ("symmetric", "symmetric_full_range")
"""Algorithms whose zero points are all 0."""


def quantize(
    w: Tensor, group_size: int, algorithm: str, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise ``w`` along its last dim.

    Args:
        w: float32, float16 or bfloat16 ``[..., K]``, K a multiple of ``group_size``.
        group_size: elements that share a scale and a zero point.
        algorithm: a key of ``ALGORITHMS`` or ``SEARCHES``; ``"tinygemm"`` is :func:`minmax`.
        importance: for ``SEARCHES``: the mean square of every input, floating point ``[K]``, or
            ``[B, K]`` for a stack ``[B, N, K]``. What is less than 1e-4 of its mean counts as that,
            so that an input which was never seen has some say.

    Returns:
        ``qdata`` int8 ``[..., K/2]`` (packed nibbles), ``scale`` and ``zero_point``
        ``[..., K/group_size]`` in ``w.dtype``.

    Raises:
        ValueError: an unknown algorithm, NaN or Inf in ``w``, or an ``importance`` that does not
            fit.
    """
    known = ALGORITHMS.keys() | SEARCHES.keys()
    if algorithm not in known:
        raise errors.value(f"the algorithm must be one of {sorted(known)}", repr(algorithm))
    if importance is not None:
        check_importance(importance, w, algorithm)
    # One matrix at a time: no copy of a transposed stack; every matrix has its own importance.
    if w.ndim > 2 and (importance is not None or not w.is_contiguous()):
        of_each = [None] * len(w) if importance is None else importance
        pairs = zip(w, of_each, strict=True)
        each = [quantize(matrix, group_size, algorithm, h) for matrix, h in pairs]
        if each:
            q, s, z = (torch.stack(parts) for parts in zip(*each, strict=True))
            return q, s, z
    rows = w.reshape(-1, w.shape[-1])
    n_rows, K = rows.shape
    n_groups = K // group_size
    qdata = rows.new_empty((n_rows, K // 2), dtype=torch.int8)
    scale = rows.new_empty((n_rows, n_groups))
    zero_point = torch.empty_like(scale)
    h = None
    if importance is not None:
        h = with_floor(importance).to(w.device).view(n_groups, group_size)
    many = w.is_cuda and algorithm in SEARCHES
    elements = _GPU_SEARCH_ELEMENTS if many else _CHUNK_ELEMENTS
    step = max(1, n_rows if w.is_meta else elements // max(K, 1))
    for start in range(0, n_rows, step):
        chunk = slice(start, min(start + step, n_rows))
        groups = rows[chunk].reshape(-1, n_groups, group_size).float().contiguous()
        q, s, z = _quantize_groups(groups, algorithm, w.dtype, h)
        qdata[chunk] = pack_nibbles(q.flatten(1))
        scale[chunk] = s.squeeze(-1)
        zero_point[chunk] = z.squeeze(-1)
    lead = w.shape[:-1]
    return (
        qdata.view(*lead, K // 2),
        scale.view(*lead, n_groups),
        zero_point.view(*lead, n_groups),
    )


def _quantize_groups(
    groups: Tensor, algorithm: str, dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``q`` int8 ``[.., group_size]``, scale and zero point ``[.., 1]`` in ``dtype``."""
    if algorithm in ALGORITHMS:
        q, scale, zero_point = ALGORITHMS[algorithm](groups)
        _check_finite(scale)
        return q, *rounded(scale, zero_point, dtype)
    scale, zero_point = SEARCHES[algorithm](groups, importance)
    _check_finite(scale)
    scale, zero_point = rounded(scale, zero_point, dtype)
    q = nearest(groups, scale.float(), zero_point.float())
    return q.to(torch.int8), scale, zero_point


def check_importance(importance: Tensor, w: Tensor, algorithm: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``algorithm`` can weigh ``w`` by it."""
    if algorithm not in SEARCHES:
        raise errors.value(f"importance is for the algorithms {list(SEARCHES)}", repr(algorithm))
    if not isinstance(importance, Tensor) or not importance.is_floating_point():
        raise errors.type_(
            "importance must be a floating-point tensor",
            importance.dtype if isinstance(importance, Tensor) else type(importance).__name__,
        )
    expected = [*w.shape[:-2], w.shape[-1]]
    if list(importance.shape) != expected:
        rule = f"importance of {errors.dims(w.shape)} must have shape {errors.dims(expected)}"
        raise errors.value(rule, errors.dims(importance.shape))
    if not bool(((importance >= 0) & importance.isfinite()).all()):
        raise errors.value("importance must be finite and not negative", "other entries in it")


def with_floor(importance: Tensor) -> Tensor:
    """Importance ``[K]`` in float32, its least entries raised to 1e-4 of the mean."""
    h = importance.float()
    return h.clamp(min=h.mean() * _LEAST_IMPORTANCE + 1e-20)


def rounded(scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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
