"""Triton kernels between the linears of a decode step (one token), for ``decode_model.py``.

Between two 4-bit linears every launch counts. There are

* ``attend``: norm, rotary embedding and cache write; attention over shares of the filled part of
  the cache; the merge of the shares;
* ``gate``: norm, SiLU, product.

An RMS norm is one number a row, so it passes through the linear: ``linear(x / rms) = linear(x) /
rms``. The kernel after the linear computes it from x, in every program, and none stands in front.

Each starts while the kernel before it still runs (programmatic dependent launch, sm_90) and lets
the next one start at once, so that a 4-bit linear fetches its first weights while they work.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK_T, WARPS = 64, 4  # of a program over the cache: tokens at a time
LOG2_E = 1.4426950408889634
NOTHING = tl.constexpr(-1e30)  # the maximum over no scores; finite, so that differences are


@functools.cache
def _device_facts(index: int) -> tuple[int, bool]:
    """Multiprocessors of the device, and whether it has programmatic dependent launch."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major >= 9


@triton.jit
def _inverse_rms(x_ptr, hidden, eps, BLOCK_X: tl.constexpr):
    i = tl.arange(0, BLOCK_X)
    x = tl.load(x_ptr + i, mask=i < hidden, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x) / hidden + eps)


@triton.jit
def _rope(
    qkv_ptr,  # [(HEADS + 2 * KV_HEADS) * D], not normed
    x_ptr,  # [hidden], what qkv was computed from
    cos_ptr, sin_ptr,  # float32 [max_len, D / 2]
    position_ptr,  # int64 [1]: tokens in the cache, and the place of this one
    q_ptr,  # [HEADS * D]
    k_ptr, v_ptr,  # [KV_HEADS, max_len, D]
    max_len, hidden, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of q, k or v: normed and, but for v, rotated; k and v go into the cache."""
    if PDL:
        gdc_launch_dependents()
    HALF: tl.constexpr = D // 2
    head, half = tl.program_id(0), tl.arange(0, HALF)
    # Before the wait: the last step wrote it, with an ordinary kernel (the embedding) between.
    position = tl.load(position_ptr)
    cos = tl.load(cos_ptr + position * HALF + half)
    sin = tl.load(sin_ptr + position * HALF + half)
    if PDL:
        gdc_wait()
    low = tl.load(qkv_ptr + head * D + half).to(tl.float32)
    high = tl.load(qkv_ptr + head * D + HALF + half).to(tl.float32)
    inverse = _inverse_rms(x_ptr, hidden, eps, BLOCK_X)
    low, high = low * inverse, high * inverse
    if head < HEADS + KV_HEADS:
        low, high = low * cos - high * sin, high * cos + low * sin
    if head < HEADS:
        to = q_ptr + head * D
    elif head < HEADS + KV_HEADS:
        to = k_ptr + ((head - HEADS) * max_len + position) * D
    else:
        to = v_ptr + ((head - HEADS - KV_HEADS) * max_len + position) * D
    tl.store(to + half, low.to(q_ptr.dtype.element_ty))
    tl.store(to + HALF + half, high.to(q_ptr.dtype.element_ty))


@triton.jit
def _prefetch(pointers):
    """Bring the cache lines into L2; nothing is read, so it may come before a wait."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _attend(
    q_ptr,  # [HEADS * D]
    position_ptr,  # int64 [1]: the last token to look at
    k_ptr, v_ptr,  # [KV_HEADS, max_len, D]
    partial_ptr,  # float32 [HEADS, SPLITS, D]
    stats_ptr,  # float32 [HEADS, SPLITS, 2]: maximum and sum
    max_len, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The query heads of one kv head over one share of the cache."""
    if PDL:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    REP: tl.constexpr = HEADS // KV_HEADS
    ROWS: tl.constexpr = 16  # of tl.dot; the first REP count
    kv, split = tl.program_id(0), tl.program_id(1)
    row, d = tl.arange(0, ROWS), tl.arange(0, D)
    used = row < REP
    length = tl.load(position_ptr).to(tl.int32) + 1  # before the wait: see _rope
    share = tl.cdiv(length, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, length)
    cache = kv.to(tl.int64) * max_len * D
    if PDL:
        first = tl.minimum(begin + tl.arange(0, BLOCK_T), length - 1)
        column = tl.arange(0, max(1, D // 64)) * 64  # 128 bytes of 16-bit elements
        at = cache + first[:, None] * D + column[None, :]
        _prefetch(k_ptr + at)
        _prefetch(v_ptr + at)
        gdc_wait()
    q = tl.load(q_ptr + (kv * REP + row[:, None]) * D + d[None, :], mask=used[:, None], other=0.0)
    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = (t < end)[:, None]
        line = cache + t[:, None] * D + d[None, :]
        keys = tl.load(k_ptr + line, mask=inside, other=0.0)
        values = tl.load(v_ptr + line, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(keys)) * scale
        scores = tl.where((t < end)[None, :], scores, NOTHING)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(DTYPE), values, acc * shrink[:, None])
        top = new_top
    entry = (kv * REP + row) * SPLITS + split
    tl.store(partial_ptr + entry[:, None] * D + d[None, :], acc, mask=used[:, None])
    tl.store(stats_ptr + entry * 2, top, mask=used)
    tl.store(stats_ptr + entry * 2 + 1, total, mask=used)


@triton.jit
def _merge(
    partial_ptr, stats_ptr, out_ptr,
    D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head: its shares, each weighted by what it is of the whole softmax."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head, d = tl.program_id(0), tl.arange(0, D)
    entries = head * SPLITS + tl.arange(0, SPLITS)
    shares = tl.load(partial_ptr + entries[:, None] * D + d[None, :])
    tops, totals = tl.load(stats_ptr + entries * 2), tl.load(stats_ptr + entries * 2 + 1)
    weights = tl.exp2(tops - tl.max(tops))
    out = tl.sum(shares * weights[:, None], 0) / tl.sum(totals * weights)
    tl.store(out_ptr + head * D + d, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _gate(
    gate_up_ptr,  # [2 * ffn], not normed
    x_ptr,  # [hidden], what gate_up was computed from
    out_ptr,  # [ffn]
    hidden, ffn, eps,
    BLOCK: tl.constexpr, BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + i, mask=i < ffn, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + ffn + i, mask=i < ffn, other=0.0).to(tl.float32)
    inverse = _inverse_rms(x_ptr, hidden, eps, BLOCK_X)
    gate, up = gate * inverse, up * inverse
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=i < ffn)


class Attention:
    """``attend`` with the scratch memory that the layers of one model share."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, device: torch.device):
        if heads % kv_heads or heads // kv_heads > 16:
            raise ValueError(
                f"heads / kv_heads must be a whole number to 16, got {heads}/{kv_heads}"
            )
        if head_dim & (head_dim - 1) or head_dim < 32:
            raise ValueError(f"head_dim must be a power of two of 32 or more, got {head_dim}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        sms, self.pdl = _device_facts(device.index or 0)
        # about two programs a multiprocessor; more than 32 would make the merge long
        self.splits = min(32, 1 << max(1, 2 * sms // kv_heads).bit_length() - 1)
        parts = heads, self.splits
        self.partial = torch.empty(*parts, head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(*parts, 2, dtype=torch.float32, device=device)

    def __call__(
        self, qkv: Tensor, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
        k_cache: Tensor, v_cache: Tensor, eps: float,
    ) -> Tensor:  # fmt: skip
        """``[1, heads * head_dim]``; writes the token's key and value into the cache.

        Args:
            qkv: ``[1, (heads + 2 * kv_heads) * head_dim]``: the linear of ``x``, not normed.
            x: ``[1, hidden]``.
            cos, sin: float32 ``[max_len, head_dim / 2]``.
            position: int64 ``[1]``, how many tokens the cache holds.
            k_cache, v_cache: ``[kv_heads, max_len, head_dim]``.
        """
        heads, kv_heads, D, pdl = self.heads, self.kv_heads, self.head_dim, self.pdl
        sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "D": D, "PDL": pdl, "launch_pdl": pdl}
        max_len, hidden = k_cache.shape[1], x.shape[1]
        q = torch.empty_like(qkv[:, : heads * D])
        _rope[(heads + 2 * kv_heads,)](
            qkv, x, cos, sin, position, q, k_cache, v_cache, max_len, hidden, eps,
            BLOCK_X=triton.next_power_of_2(hidden), **sizes,
        )  # fmt: skip
        _attend[(kv_heads, self.splits)](
            q, position, k_cache, v_cache, self.partial, self.stats, max_len, D**-0.5 * LOG2_E,
            SPLITS=self.splits, BLOCK_T=BLOCK_T, num_warps=WARPS, num_stages=2, **sizes,
        )  # fmt: skip
        out = torch.empty_like(q)
        _merge[(heads,)](
            self.partial, self.stats, out, D=D, SPLITS=self.splits, PDL=pdl, launch_pdl=pdl
        )
        return out


def gate(gate_up: Tensor, x: Tensor, eps: float) -> Tensor:
    """``silu(g) * u`` for ``g, u = gate_up / rms(x)``: ``[1, 2 * ffn]`` to ``[1, ffn]``."""
    ffn, pdl = gate_up.shape[1] // 2, _device_facts(x.device.index or 0)[1]
    out = gate_up.new_empty(1, ffn)
    _gate[(triton.cdiv(ffn, 256),)](
        gate_up, x, out, x.shape[1], ffn, eps, BLOCK=256,
        BLOCK_X=triton.next_power_of_2(x.shape[1]), PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out
