"""A decoder-only transformer of given shapes and random weights, for ``decode.py``.

Pre-norm blocks as in Llama: RMS norm, grouped-query attention with rotary embedding, RMS norm,
SiLU-gated feed-forward. The norms' weights are folded into the linears behind them, as export
tools do (here they are ones), so that a norm is one factor a row, applied after the linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int4q import Int4WeightOnlyConfig, quantize_

EPS = 1e-6
ROPE_BASE = 500_000.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; ``tied``: the output head is the embedding."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False


PRESETS = {
    "gemma-31b": Shape(60, 5376, 21504, 32, 16, 256, 262144, tied=True),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "tiny": Shape(2, 256, 512, 4, 2, 32, 1000, tied=True),
}


def random_linear(N: int, K: int, generator: torch.Generator, dtype: torch.dtype) -> nn.Linear:
    """No bias; weights that keep the variance of a normed input."""
    device = generator.device
    linear = nn.utils.skip_init(nn.Linear, K, N, bias=False, device=device, dtype=dtype)
    linear.weight.requires_grad_(False).normal_(0, K**-0.5, generator=generator)
    return linear


class Layer(nn.Module):
    """The four linears of a block; q, k, v are one, gate and up are one."""

    def __init__(self, shape: Shape, seed: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator(device).manual_seed(seed)
        width = shape.heads * shape.head_dim
        kv = shape.kv_heads * shape.head_dim

        def linear(N: int, K: int) -> nn.Linear:
            return random_linear(N, K, generator, dtype)

        self.qkv = linear(width + 2 * kv, shape.hidden)
        self.o = linear(shape.hidden, width)
        self.gate_up = linear(2 * shape.ffn, shape.hidden)
        self.down = linear(shape.hidden, shape.ffn)


class Decoder:
    """Model, key-value cache and decoding state, all in memory that does not move.

    Attributes:
        token: int64 ``[1]``, the next to be read; a step leaves the one it chose.
        position: int64 ``[1]``, how many tokens the cache holds.
        history: int64 ``[max_len]``, the token at every position.
        logits: ``[1, vocab]`` of the last step, in the model's dtype.
    """

    def __init__(
        self,
        shape: Shape,
        config: Int4WeightOnlyConfig | None,
        max_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """Layer by layer: random weights, then ``quantize_`` if there is a ``config``."""
        self.shape, self.max_len = shape, max_len
        generator = torch.Generator(device).manual_seed(0)
        self.embedding = torch.empty(shape.vocab, shape.hidden, device=device, dtype=dtype)
        self.embedding.normal_(0, shape.hidden**-0.5, generator=generator)
        self.head = nn.utils.skip_init(
            nn.Linear, shape.hidden, shape.vocab, bias=False, device="meta"
        )
        head = self.embedding
        if not shape.tied:
            head = random_linear(shape.vocab, shape.hidden, generator, dtype).weight
        self.head.weight = nn.Parameter(head, requires_grad=False)
        self.layers = []
        for index in range(shape.layers):
            layer = Layer(shape, 1 + index, device, dtype)
            if config is not None:
                quantize_(layer, config)
            self.layers.append(layer)

        cache = (2, shape.layers, shape.kv_heads, max_len, shape.head_dim)
        self.k_cache, self.v_cache = torch.zeros(cache, device=device, dtype=dtype)
        half = torch.arange(shape.head_dim // 2, device=device) * 2 / shape.head_dim
        angle = torch.arange(max_len, device=device)[:, None] * ROPE_BASE**-half
        self.cos, self.sin = angle.cos(), angle.sin()
        self.token, self.position = torch.zeros(2, 1, device=device, dtype=torch.int64)
        self.history = torch.zeros(max_len, device=device, dtype=torch.int64)
        self.logits = torch.zeros(1, shape.vocab, device=device, dtype=dtype)
        self.kernels = None
        if device.type == "cuda":
            import decode_kernels

            sizes = shape.heads, shape.kv_heads, shape.head_dim
            self.kernels = decode_kernels.Attention(*sizes, device), decode_kernels.gate

    # --- one pass over some tokens ---------------------------------------------------------------

    @torch.no_grad()
    def sections(self, tokens: Tensor) -> Iterator[str]:
        """Run ``tokens [T]`` from ``position`` on; yields the name of each part just launched.

        Leaves the last token's logits; ``position`` stays.
        """
        x = F.embedding(tokens, self.embedding)
        yield "embedding"
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(x)
            yield "qkv"
            out = self._attend(index, qkv, x)
            yield "attention, rope, norm"
            x = _added(x, layer.o, out)
            yield "o"
            gate_up = layer.gate_up(x)
            yield "gate_up"
            out = self._gate(gate_up, x)
            yield "silu, norm"
            x = _added(x, layer.down, out)
            yield "down"
        # The last norm scales a row by a positive factor: it would not change the choice.
        self.logits = self.head(x[-1:])
        yield "lm_head"

    @torch.no_grad()
    def step(self) -> Iterator[str]:
        """Read ``token``, choose the next one: no value goes through the host."""
        yield from self.sections(self.token)
        self.position.add_(1)
        self.token.copy_(argmax(self.logits))
        self.history.index_copy_(0, self.position, self.token)
        yield "argmax"

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> None:
        """Start anew: all of ``tokens [T]`` but the last go into the cache; that one is next."""
        self.position.zero_()
        self.history[: len(tokens)] = tokens
        for _ in self.sections(tokens[:-1]):
            pass
        self.rewind(len(tokens) - 1)

    def rewind(self, position: int) -> None:
        """Continue behind the first ``position`` tokens."""
        self.position.fill_(position)
        self.token.copy_(self.history[position : position + 1])

    def _attend(self, index: int, qkv: Tensor, x: Tensor) -> Tensor:
        tables = self.cos, self.sin, self.position
        caches = self.k_cache[index], self.v_cache[index]
        if self.kernels and len(x) == 1:
            return self.kernels[0](qkv, x, *tables, *caches, EPS)
        return attend(qkv, x, *tables, *caches, self.shape.heads)

    def _gate(self, gate_up: Tensor, x: Tensor) -> Tensor:
        return (self.kernels[1] if self.kernels and len(x) == 1 else gate)(gate_up, x, EPS)

    # --- what it weighs --------------------------------------------------------------------------

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: layers with scales and zero points, and the head."""
        modules = [m for layer in self.layers for m in layer.children()] + [self.head]
        return sum(_bytes(m.weight) for m in modules)

    def cache_bytes(self, tokens: float) -> float:
        """Bytes of keys and values that a step behind ``tokens`` tokens reads."""
        s = self.shape
        return 2 * tokens * s.layers * s.kv_heads * s.head_dim * self.k_cache.element_size()


def _bytes(w: Tensor) -> int:
    parts = [getattr(w, name) for name in getattr(w, "tensor_data_names", ())] or [w]
    return sum(p.numel() * p.element_size() for p in parts)


def _added(x: Tensor, linear: nn.Linear, y: Tensor) -> Tensor:
    """``x + linear(y)``; for one row x is the linear's bias, which costs no kernel."""
    return F.linear(y, linear.weight, x[0]) if len(x) == 1 else x + linear(y)


def argmax(logits: Tensor) -> Tensor:
    """``[1]``, of ``[1, vocab]``: in two stages: one long row may run on one multiprocessor."""
    parts = math.gcd(logits.numel(), 512)
    tops, index = logits.view(parts, -1).max(-1)
    part = tops.argmax(0, keepdim=True)
    return part * (logits.numel() // parts) + index[part]


# --- the parts between the linears, in plain torch ------------------------------------------------


def inverse_rms(x: Tensor) -> Tensor:
    """``[T, 1]`` float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x [T, heads, D]``: elements i and i + D/2 are a pair."""
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def attend(
    qkv: Tensor, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    k_cache: Tensor, v_cache: Tensor, heads: int,
) -> Tensor:  # fmt: skip
    """What ``decode_kernels.Attention`` computes, for any number of rows ``T``: the definition."""
    kv_heads, _, D = k_cache.shape
    T = len(x)
    positions = position + torch.arange(T, device=x.device)
    q, k, v = (qkv.float() * inverse_rms(x)).view(T, -1, D).split((heads, kv_heads, kv_heads), 1)
    turn = cos[positions, None], sin[positions, None]
    q, k, v = (t.to(x.dtype).transpose(0, 1) for t in (rotated(q, *turn), rotated(k, *turn), v))
    k_cache.index_copy_(1, positions, k)
    v_cache.index_copy_(1, positions, v)
    length = int(position) + T
    seen = torch.arange(length, device=x.device) <= positions[:, None]
    out = F.scaled_dot_product_attention(
        q[None], k_cache[None, :, :length], v_cache[None, :, :length], seen, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(T, heads * D)


def gate(gate_up: Tensor, x: Tensor, eps: float = EPS) -> Tensor:
    """``silu(g) * u`` of the normed gate and up halves of ``gate_up [T, 2 * ffn]``."""
    g, u = (gate_up.float() * inverse_rms(x)).chunk(2, -1)
    return (F.silu(g) * u).to(x.dtype)
