"""The practical floor of a decode kernel: the time of one that reads the weight's bytes only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from int4q.bench import timing
from int4q.kernels.triton.common import has_launch_overlap

_SHAPES = ((4, 4), (8, 4), (16, 4), (8, 8))
"""16-byte loads a thread, and warps a program, of which the fastest counts."""


@triton.jit
def _read_kernel(words_ptr, out_ptr, n_words, PDL: tl.constexpr, BLOCK: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0).to(tl.int64)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + at, mask=at < n_words, other=0, eviction_policy="evict_first")
    tl.store(out_ptr + pid, tl.xor_sum(words, axis=0))


def read(words: Tensor, loads: int, num_warps: int) -> Tensor:
    """The exclusive or of every run of ``128 * loads * num_warps`` entries of int32 ``words``."""
    block = 4 * loads * 32 * num_warps
    programs = triton.cdiv(words.numel(), block)
    out = torch.empty(programs, dtype=torch.int32, device=words.device)
    pdl = has_launch_overlap(words.device)
    _read_kernel[(programs,)](
        words, out, words.numel(), PDL=pdl, BLOCK=block, num_warps=num_warps, launch_pdl=pdl
    )
    return out


def microseconds(n_bytes: int) -> float:
    """Time to read ``n_bytes`` from memory, the L2 cache cold; the fastest of a few ways."""
    copies = [
        torch.randint(-(2**31), 2**31 - 1, (n_bytes // 4,), dtype=torch.int32, device="cuda")
        for _ in range(timing.copies(n_bytes))
    ]
    return min(
        timing.microseconds([lambda w=w, s=shape: read(w, *s) for w in copies]) for shape in _SHAPES
    )
