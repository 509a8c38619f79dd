"""W4A8 for 1 to 8 rows of activations in plain Triton: int8 activations, exact integer sums.

    y[m, n] = sum_b d[m, b] * (scale[g, n] * dot[m, b, n] + zero_point[g, n] * sum(xq[m, b]))

over blocks ``b`` of 32 k, ``g = 32 * b // group_size``. Two launches. The first quantises the
activations once (``d = amax / 127``, ``xq = round_half_even(x / d)``) and adds up each block. In
the second every thread holds one block, 16 bytes, of each of a few weight rows: its 8 dp4a need
no other thread. ``dot`` is an exact int32; scales are applied and summed in float32.

Word ``j`` of a block of ``qdata`` (int32) holds k = 8j .. 8j+7, the even ones in its low nibbles.
Shifted into the high half of each byte a nibble is 16 times the signed weight, so the activations
are stored as words too, four even k and four odd k apart, and the factor 1/16 goes into ``d``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from int4q.kernels.launch.record import planned
from int4q.kernels.launch.triton_launch import launch
from int4q.kernels.triton import tuned
from int4q.kernels.triton.common import (
    INTERPRET,
    has_launch_overlap,
    matched_groups,
    rounded,
    unsupported_anywhere,
    wait_for_producer,
)
from int4q.kernels.weight import Weight

MAX_M = 8
BLOCK = 32
"""Activations that share an int8 scale."""
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it rounds a small float32, half to even, into the low bits."""


def unsupported(problem) -> str | None:
    """Why this kernel cannot run ``problem``; ``None`` where it can."""
    if problem.M > MAX_M:
        return f"takes up to {MAX_M} rows of activations, not M={problem.M}"
    return unsupported_anywhere(problem)


# --- activations --------------------------------------------------------------------------------


@triton.jit
def _quantize_kernel(
    x_ptr,  # [M, K], strides below
    pre_scale_ptr,  # [K] or unused
    values_ptr,  # int32 [M, 2, blocks, 4]: of every block the words of even, then of odd k
    factors_ptr,  # float32 [M, 2, blocks]: d / 16, then d * sum(xq)
    blocks, stride_xm, stride_xk,
    HAS_PRE_SCALE: tl.constexpr, PDL: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # First wait, then release: the kernel after reads weights before it waits for this one, and
    # they may come from the kernel before.
    wait_for_producer(PDL)
    if PDL:
        gdc_launch_dependents()
    m = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = block < blocks
    k = block.to(tl.int64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + m * stride_xm + k * stride_xk, mask=inside[:, None], other=0.0)
    x = x.to(tl.float32)
    if HAS_PRE_SCALE:
        x *= tl.load(pre_scale_ptr + k, mask=inside[:, None], other=0.0).to(tl.float32)
    # The largest magnitude as an integer, so that NaN and Inf win.
    magnitude = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = magnitude < 0x7F800000
    d = tl.div_rn(magnitude.to(tl.float32, bitcast=True), tl.full([BLOCK_B], 127.0, tl.float32))
    live = finite & (d > 0)
    divisor = tl.where(live, d, 1.0)[:, None]
    ratio = tl.div_rn(x, tl.broadcast_to(divisor, [BLOCK_B, 32]))
    # A normal d is off by at most 2^-24, so no ratio exceeds 127 * (1 + 2^-23), next to 127. (Only
    # a denormal d, itself rounded, lets a ratio leave -127..127. NaN is taken out first.) A sum of
    # 32 products of 16 * nibble and xq is at most 32 * 128 * 127 < 2^19.
    ratio = tl.where(live[:, None], ratio, 0.0)
    ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
    xq = (ratio + _ROUND).to(tl.int32, bitcast=True) - 0x4B400000
    d = tl.where(finite, d, float("nan"))
    total = tl.sum(xq, axis=1).to(tl.float32)

    # k = 8 * word + 2 * byte + parity; the bytes of a word do not overlap, so adding joins them.
    nibble = tl.arange(0, 32)
    byte = (xq & 255) << (4 * (nibble & 6))[None, :]
    words = tl.sum(tl.reshape(byte, [BLOCK_B, 4, 4, 2]), axis=2)
    word = tl.arange(0, 4)[None, :, None]
    parity = tl.arange(0, 2)[None, None, :]
    row = (2 * m + parity) * blocks + block[:, None, None]
    tl.store(values_ptr + row * 4 + word, words, mask=inside[:, None, None])
    tl.store(factors_ptr + 2 * m * blocks + block, d * 0.0625, mask=inside)
    tl.store(factors_ptr + (2 * m + 1) * blocks + block, d * total, mask=inside)


def quantize_activation(
    x: Tensor, act_pre_scale: Tensor | None = None, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """``x [M, K]`` (times ``act_pre_scale [K]``) as int8 in the order of the weights' words.

    Returns:
        int32 ``[M, 2, K/32, 4]``, four xq a word: those of even k, then those of odd k; and
        float32 ``[M, 2, K/32]``: ``d / 16`` and ``d * sum(xq)``.
    """
    M, blocks = x.shape[0], x.shape[1] // BLOCK
    values = torch.empty((M, 2, blocks, 4), dtype=torch.int32, device=x.device)
    factors = torch.empty((M, 2, blocks), dtype=torch.float32, device=x.device)
    launch(
        _quantize_kernel, (triton.cdiv(blocks, 8), M),
        x, x if act_pre_scale is None else act_pre_scale.contiguous(), values, factors,
        blocks, *x.stride(), HAS_PRE_SCALE=act_pre_scale is not None, PDL=pdl, BLOCK_B=8,
        num_warps=2, launch_pdl=pdl,
    )  # fmt: skip
    return values, factors


# --- weights ------------------------------------------------------------------------------------


@triton.constexpr_function
def _dot_asm():
    steps = ["mov.b32 $0, 0;"]
    steps += [f"dp4a.s32.s32 $0, ${1 + i}, ${9 + i}, $0;" for i in range(8)]
    return "{ " + " ".join(steps) + " }"


@triton.jit
def _byte(word, INDEX: tl.constexpr):
    """Signed byte ``INDEX`` of int32 ``word``, as int32."""
    return (word << (24 - 8 * INDEX)) >> 24


@triton.jit
def block_dot(w, x, ON_GPU: tl.constexpr):
    """Sum over a block of 32 k of products of int8: 8 words of weights and 8 of activations.

    Both are tuples of int32 tensors that broadcast to one shape; the result is int32.
    """
    if ON_GPU:
        return tl.inline_asm_elementwise(
            _dot_asm(), "=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7],
             x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        total = _byte(w[0], 0) * _byte(x[0], 0)
        for i in tl.static_range(8):
            for j in tl.static_range(4):
                if i + j > 0:
                    total += _byte(w[i], j) * _byte(x[i], j)
        return total


@triton.jit
def _four_words(words):
    """The four columns of the last dim of ``words``."""
    last: tl.constexpr = len(words.shape) - 1
    shape: tl.constexpr = words.shape[:last] + [2, 2]
    even, odd = tl.split(tl.reshape(words, shape))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _unpack(words):
    """16 times the signed weights: int8 in the words of even k, then in those of odd k."""
    mask: tl.constexpr = -0x0F0F0F10  # 0xf0f0f0f0
    a, b, c, d = _four_words(words)
    return (
        (a << 4) & mask, (b << 4) & mask, (c << 4) & mask, (d << 4) & mask,
        a & mask, b & mask, c & mask, d & mask,
    )  # fmt: skip


@triton.jit
def _load_rows(
    words_ptr, scale_ptr, zero_ptr, row, live, block, blocks, stride_wn, stride_sg, stride_sn,
    stride_zg, stride_zn, one, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """A block of 32 k of each row: ``[BLOCK_B, BLOCK_N, 4]`` words, scales and zero points.

    Weight 0 is nibble 0, so nothing outside of the weight adds to a sum.
    """
    inside = (block < blocks)[:, None] & live[None, :]
    place = row[None, :] * stride_wn + block[:, None]
    words = tl.load(
        words_ptr + place[:, :, None] * 4 + tl.arange(0, 4)[None, None, :],
        mask=inside[:, :, None], other=0, eviction_policy="evict_first",
    )  # fmt: skip
    # Every thread is to load the scales of its own block, whatever the layout. If Triton saw that
    # groups lie side by side, it would load many a thread and pass them on through shared memory,
    # at two barriers each; a factor that it does not know hides that.
    group = (block // (GROUP_SIZE // 32) * one).to(tl.int64)[:, None]
    scale = tl.load(scale_ptr + row[None, :] * stride_sn + group * stride_sg, mask=inside, other=0)
    zero = tl.load(zero_ptr + row[None, :] * stride_zn + group * stride_zg, mask=inside, other=0)
    return words, scale, zero


@triton.jit(do_not_specialize=["one"])
def _w4a8_kernel(
    values_ptr,  # int32 [M, 2, blocks, 4], see quantize_activation
    factors_ptr,  # float32 [M, 2, blocks]
    words_ptr,  # int32 [N, blocks, 4], rows stride_wn blocks apart
    scale_ptr,  # [n_groups, N] by strides
    zero_ptr,  # [n_groups, N] by strides
    bias_ptr,  # [N] or unused
    out_ptr,  # [M, N] contiguous
    sums_ptr,  # int32 [M, N, blocks] or unused
    # (one: 1, see _load_rows)
    N, blocks, stride_wn, stride_sg, stride_sn, stride_zg, stride_zn, one,
    M: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, STORE_SUMS: tl.constexpr,
    ON_GPU: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, row = rows < N, rows.to(tl.int64)
    lane, word = tl.arange(0, BLOCK_B), tl.arange(0, 4)[None, :]
    # The weights of a step are loaded before those of the step in front are multiplied, the first
    # ones before the activations are there.
    words, scale, zero = _load_rows(
        words_ptr, scale_ptr, zero_ptr, row, live, lane, blocks, stride_wn, stride_sg, stride_sn,
        stride_zg, stride_zn, one, GROUP_SIZE,
    )  # fmt: skip
    wait_for_producer(PDL)
    acc = ()
    for _ in tl.static_range(M):
        acc = acc + (tl.zeros([BLOCK_B, BLOCK_N], tl.float32),)
    for first in tl.range(0, blocks, BLOCK_B, num_stages=1):
        block = first + lane
        inside = block < blocks
        w = _unpack(words)
        s, z = scale.to(tl.float32), zero.to(tl.float32)
        words, scale, zero = _load_rows(
            words_ptr, scale_ptr, zero_ptr, row, live, block + BLOCK_B, blocks, stride_wn,
            stride_sg, stride_sn, stride_zg, stride_zn, one, GROUP_SIZE,
        )  # fmt: skip
        total = ()
        for m in tl.static_range(M):
            even = values_ptr + (2 * m * blocks + block)[:, None] * 4 + word
            x = _four_words(tl.load(even, mask=inside[:, None], other=0))
            x += _four_words(tl.load(even + blocks * 4, mask=inside[:, None], other=0))
            d = tl.load(factors_ptr + 2 * m * blocks + block, mask=inside, other=0.0)
            part = tl.load(factors_ptr + (2 * m + 1) * blocks + block, mask=inside, other=0.0)
            x = (x[0][:, None], x[1][:, None], x[2][:, None], x[3][:, None],
                 x[4][:, None], x[5][:, None], x[6][:, None], x[7][:, None])  # fmt: skip
            dot = block_dot(w, x, ON_GPU)
            if STORE_SUMS:
                at = (row[None, :] + m * tl.cast(N, tl.int64)) * blocks + block[:, None]
                tl.store(sums_ptr + at, dot >> 4, mask=inside[:, None] & live[None, :])
            added = dot.to(tl.float32) * (s * d[:, None]) + z * part[:, None]
            total = total + (acc[m] + added,)
        acc = total
    for m in tl.static_range(M):
        y = tl.sum(acc[m], axis=0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + rows, mask=live, other=0.0).to(tl.float32)
        y = rounded(y, out_ptr.dtype.element_ty, ON_GPU)
        tl.store(out_ptr + m * tl.cast(N, tl.int64) + rows, y, mask=live)


def _as_blocks(qdata: Tensor) -> Tensor:
    """int8 ``[N, K/2]`` as int32 ``[N, K/8]`` whose rows lie on 16 bytes, copied where it must."""
    if qdata.stride(1) != 1 or qdata.stride(0) % 16 or qdata.data_ptr() % 16:
        qdata = qdata.clone(memory_format=torch.contiguous_format)
    return qdata.view(torch.int32)


@planned
def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    config: tuned.W4A8Config | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """``(x * act_pre_scale) @ W.T + bias``, the first factor as int8 per 32 elements.

    Args:
        x: ``[M, K]``, M at most 8; bfloat16, float16 or float32, any strides.
        bias: ``[N]``.
        act_pre_scale: ``[K]``; multiplies x in float32.
        config: tile; by shape if not given.
        sums: int32 ``[M, N, K/32]``, filled with the integer sums of every block (for tests).

    Returns:
        ``[M, N]`` in the dtype of x. A row with NaN or Inf in it is NaN.
    """
    (M, K), N = x.shape, weight.N
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = config or tuned.w4a8_config(M, N, K)
    pdl = has_launch_overlap(x.device)
    values, factors = quantize_activation(x, act_pre_scale, pdl)
    words = _as_blocks(weight.qdata)
    scale, zero = matched_groups(weight.scale, weight.zero_point)
    launch(
        _w4a8_kernel, triton.cdiv(N, config.block_n),
        values, factors, words, scale, zero, out if bias is None else bias.contiguous(), out,
        out if sums is None else sums,
        N, K // BLOCK, words.stride(0) // 4, *scale.stride(), *zero.stride(), 1,
        M=M, GROUP_SIZE=weight.group_size, HAS_BIAS=bias is not None, STORE_SUMS=sums is not None,
        ON_GPU=not INTERPRET, PDL=pdl, BLOCK_N=config.block_n, BLOCK_B=BLOCK * config.num_warps,
        num_warps=config.num_warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
