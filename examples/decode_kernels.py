"""The two Triton kernels between the linears of a decode step (one token), for ``decode_model.py``.

Between two 4-bit linears every launch counts, so each kernel does all that lies there:

* ``attend``: RMS norm, rotary embedding, cache write, attention over the filled part of the cache;
* ``gate``: RMS norm, SiLU, product.

A norm is one number a row, so it passes through the linear: ``linear(x / rms) = linear(x) / rms``.
The kernel after the linear computes it from x, in every program, and no kernel stands in front.

Both start while the kernel before them still runs (programmatic dependent launch, sm_90) and let
the next linear start at once: it fetches weights while they work.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK_T = 64  # tokens of the cache that a program takes at a time
LOG2_E = 1.4426950408889634
NOTHING = tl.constexpr(-1e30)  # the maximum over no scores; finite, so that differences are


@functools.cache
def _device_facts(index: int) -> tuple[int, bool]:
    """Multiprocessors of the device, and whether it has programmatic dependent launch."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major >= 9


@triton.jit
def _begin(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _inverse_rms(x_ptr, hidden, eps, BLOCK_X: tl.constexpr):
    i = tl.arange(0, BLOCK_X)
    x = tl.load(x_ptr + i, mask=i < hidden, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x) / hidden + eps)


@triton.jit
def _rotated(low, high, cos, sin, DTYPE: tl.constexpr):
    return (low * cos - high * sin).to(DTYPE), (high * cos + low * sin).to(DTYPE)


@triton.jit(do_not_specialize=["max_len"])
def _attend(
    qkv_ptr,  # [(HEADS + 2 * KV_HEADS) * D], not normed
    x_ptr,  # [hidden], what qkv was computed from
    cos_ptr, sin_ptr,  # float32 [max_len, D / 2]
    position_ptr,  # int64 [1]: tokens in the cache, and the place of this one
    k_ptr, v_ptr,  # [KV_HEADS, max_len, D]
    out_ptr,  # [HEADS * D]
    partial_ptr,  # float32 [HEADS, SPLITS, D]
    stats_ptr,  # float32 [HEADS, SPLITS, 2]: maximum and sum
    counter_ptr,  # int32 [KV_HEADS], zero before and after
    max_len, hidden, eps, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (kv head, split): its query heads over its share of the cache; split 0 adds the new
    token, which no program reads from the cache. The last program of a kv head merges the shares,
    always in the same order."""
    _begin(PDL)
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    HALF: tl.constexpr = D // 2
    REP: tl.constexpr = HEADS // KV_HEADS
    ROWS: tl.constexpr = 16  # of tl.dot; the first REP count
    kv, split = tl.program_id(0), tl.program_id(1)
    position = tl.load(position_ptr).to(tl.int32)
    inverse = _inverse_rms(x_ptr, hidden, eps, BLOCK_X)
    row, half, d = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, D)
    cos = tl.load(cos_ptr + position * HALF + half)
    sin = tl.load(sin_ptr + position * HALF + half)

    at = qkv_ptr + (kv * REP + row[:, None]) * D + half[None, :]
    used = (row < REP)[:, None]
    q0 = tl.load(at, mask=used, other=0.0).to(tl.float32) * inverse
    q1 = tl.load(at + HALF, mask=used, other=0.0).to(tl.float32) * inverse
    q0, q1 = _rotated(q0, q1, cos[None, :], sin[None, :], DTYPE)
    at = qkv_ptr + (HEADS + kv) * D + half
    k0 = tl.load(at).to(tl.float32) * inverse
    k1 = tl.load(at + HALF).to(tl.float32) * inverse
    k0, k1 = _rotated(k0, k1, cos, sin, DTYPE)
    v = (tl.load(qkv_ptr + (HEADS + KV_HEADS + kv) * D + d).to(tl.float32) * inverse).to(DTYPE)
    cache = kv.to(tl.int64) * max_len * D
    if split == 0:
        tl.store(k_ptr + cache + position * D + half, k0)
        tl.store(k_ptr + cache + position * D + HALF + half, k1)
        tl.store(v_ptr + cache + position * D + d, v)

    mine = (row >= 0) & (split == 0)
    own = tl.sum(q0.to(tl.float32) * k0.to(tl.float32)[None, :], 1)
    own += tl.sum(q1.to(tl.float32) * k1.to(tl.float32)[None, :], 1)
    top = tl.where(mine, own * scale, NOTHING)
    total = tl.where(mine, 1.0, 0.0)
    acc = tl.where(mine[:, None], v.to(tl.float32)[None, :], 0.0)
    share = tl.cdiv(tl.cdiv(position, SPLITS), BLOCK_T) * BLOCK_T
    begin = split * share
    end = tl.minimum(begin + share, position)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = t < end
        line = cache + t[:, None] * D
        keys0 = tl.load(k_ptr + line + half[None, :], mask=inside[:, None], other=0.0)
        keys1 = tl.load(k_ptr + line + HALF + half[None, :], mask=inside[:, None], other=0.0)
        values = tl.load(v_ptr + line + d[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q1, tl.trans(keys1), tl.dot(q0, tl.trans(keys0))) * scale
        scores = tl.where(inside[None, :], scores, NOTHING)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p, shrink = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(DTYPE), values, acc * shrink[:, None])
        top = new_top

    entry = (kv * REP + row) * SPLITS + split
    tl.store(partial_ptr + entry[:, None] * D + d[None, :], acc, mask=used)
    tl.store(stats_ptr + entry * 2, top, mask=row < REP)
    tl.store(stats_ptr + entry * 2 + 1, total, mask=row < REP)
    tl.debug_barrier()  # all threads' stores before the one thread's release below
    if tl.atomic_add(counter_ptr + kv, 1, sem="acq_rel") == SPLITS - 1:
        rep = tl.arange(0, REP)
        entries = (kv * REP + rep)[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
        tops = tl.load(stats_ptr + entries * 2, cache_modifier=".cg")
        totals = tl.load(stats_ptr + entries * 2 + 1, cache_modifier=".cg")
        shares = tl.load(
            partial_ptr + entries[:, :, None] * D + d[None, None, :], cache_modifier=".cg"
        )
        weights = tl.exp2(tops - tl.max(tops, 1)[:, None])
        merged = tl.sum(shares * weights[:, :, None], 1) / tl.sum(totals * weights, 1)[:, None]
        tl.store(out_ptr + (kv * REP + rep)[:, None] * D + d[None, :], merged.to(DTYPE))
        tl.store(counter_ptr + kv, 0)


@triton.jit
def _gate(
    gate_up_ptr,  # [2 * ffn], not normed
    x_ptr,  # [hidden], what gate_up was computed from
    out_ptr,  # [ffn]
    hidden, ffn, eps,
    BLOCK: tl.constexpr, BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    _begin(PDL)
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
        rep = heads // kv_heads
        if heads % kv_heads or rep & (rep - 1) or rep > 16:
            raise ValueError(f"heads / kv_heads must be 1, 2, 4, 8 or 16, got {heads}/{kv_heads}")
        if head_dim & (head_dim - 1) or head_dim < 32:
            raise ValueError(f"head_dim must be a power of two of 32 or more, got {head_dim}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        sms, self.pdl = _device_facts(device.index or 0)
        # about one program a multiprocessor; more than 32 would make the merge long
        self.splits = min(32, 1 << max(1, sms // kv_heads).bit_length() - 1)
        parts = heads, self.splits
        self.partial = torch.empty(*parts, head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(*parts, 2, dtype=torch.float32, device=device)
        self.counter = torch.zeros(kv_heads, dtype=torch.int32, device=device)

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
        out = torch.empty_like(qkv[:, : self.heads * self.head_dim])
        _attend[(self.kv_heads, self.splits)](
            qkv, x, cos, sin, position, k_cache, v_cache, out,
            self.partial, self.stats, self.counter,
            k_cache.shape[1], x.shape[1], eps, self.head_dim**-0.5 * LOG2_E,
            HEADS=self.heads, KV_HEADS=self.kv_heads, D=self.head_dim, SPLITS=self.splits,
            BLOCK_T=BLOCK_T, BLOCK_X=triton.next_power_of_2(x.shape[1]), PDL=self.pdl,
            num_warps=4, num_stages=2, launch_pdl=self.pdl,
        )  # fmt: skip
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
