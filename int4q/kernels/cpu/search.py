"""The search of scale and zero point by the compiled kernels, for :mod:`int4q.qparams`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from int4q.kernels.cpu import native

MAX_GROUP_SIZE = 256


class _Args(ctypes.Structure):
    """``int4q_search_args`` of ``int4_cpu.h``, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "h", "ratios", "scale", "zero")),
        *((name, ctypes.c_int64) for name in ("rows", "n_groups", "group", "n_ratios", "refits")),
        *((name, ctypes.c_int64) for name in ("threads", "features")),
    ]


def takes(groups: Tensor, importance: Tensor) -> bool:
    """Whether :func:`search` can run: not while tracing, where gradients flow, or elsewhere."""
    if torch.compiler.is_compiling() or isinstance(groups, FakeTensor):
        return False
    both = groups, importance
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in both)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in both)
    last = importance.ndim
    fits = 0 < last <= groups.ndim and groups.shape[-last:] == importance.shape
    if not plain or gradient or not fits or groups.shape[-1] > MAX_GROUP_SIZE:
        return False
    lib, _ = native.load()
    return lib is not None and lib.int4q_cpu_features() != 0


def search(
    groups: Tensor, importance: Tensor, ratios: Sequence[float], refits: int
) -> tuple[Tensor, Tensor]:
    """What :func:`int4q.qparams.search` gives, up to the rounding of its sums.

    Args:
        groups: float32 ``[.., group_size]``.
        importance: float32, of the last dims of ``groups``.
        ratios: of the ranges to start from.
        refits: steps from each of them.
    """
    lib, _ = native.load()
    w, h, starts = groups.contiguous(), importance.contiguous(), torch.tensor(ratios)
    scale, zero_point = (w.new_empty((*w.shape[:-1], 1)) for _ in range(2))
    arrays = (t.data_ptr() for t in (w, h, starts, scale, zero_point))
    n_groups = h.numel() // w.shape[-1]
    sizes = scale.numel() // max(n_groups, 1), n_groups, w.shape[-1], len(starts), refits
    args = _Args(*arrays, *sizes, torch.get_num_threads(), lib.int4q_cpu_features())
    if status := lib.int4q_search(ctypes.byref(args)):
        raise RuntimeError(f"int4q_search: status {status}")
    return scale, zero_point
