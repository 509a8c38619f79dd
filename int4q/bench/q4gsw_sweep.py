"""The problems that ``linear_q4gsw`` is checked on: Llama 3.2 1B's layers, and edges.

One table, ``CONFIGS``; the input is an exactly representable ramp, the golden is float64. Tests,
the measured table and every backend read them here.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

PERIOD = 17
SHORT = 2e-5
"""Tolerance to K = 2048: float32 sums. Rounding errors of partial sums add as a random walk, about
2^-24 sqrt(K / 2) of the output's root mean square; the largest of millions is six times that."""
LONG = 4e-5
"""Tolerance to K = 8192: four times as many terms, sqrt(4) times the error."""


@dataclass(frozen=True)
class Config:
    """One problem.

    Attributes:
        name: unique; layer and rows.
        M, K, N: rows, in features, out features.
        group_size: weights that share a scale.
        heavy: runs only when asked for; every other row is required.
        tolerance: of the largest error, over the root mean square of the golden.
        reason: why the row is here, and why its tolerance if that is not ``SHORT``.
        bias: the layer has one.
    """

    name: str
    M: int
    K: int
    N: int
    group_size: int
    heavy: bool = False
    tolerance: float = SHORT
    reason: str = ""
    bias: bool = False

    def __str__(self):
        return self.name


SOFTWARE_WORK = 1 << 34
"""Multiply-adds above which a row is heavy on a software adapter (some 20 s on two cores)."""


def is_heavy(config: Config, software: bool = False) -> bool:
    """Whether ``config`` runs only when asked for."""
    return config.heavy or (software and config.M * config.K * config.N > SOFTWARE_WORK)


_SUM = "float32 sums of 8192 terms instead of 2048"
CONFIGS = (
    Config("q_o_proj-1", 1, 2048, 2048, 32, reason="decode"),
    Config("k_v_proj-1", 1, 2048, 512, 32, reason="decode, few columns"),
    Config("gate_up_proj-1", 1, 2048, 8192, 32, reason="decode, many columns"),
    Config("down_proj-1", 1, 8192, 2048, 32, tolerance=LONG, reason=f"decode; {_SUM}"),
    Config("lm_head-1", 1, 2048, 128256, 32, reason="decode, 131 MB of weights"),
    Config("k_v_proj-4096", 4096, 2048, 512, 32, reason="prefill"),
    Config("k_v_proj-8192", 8192, 2048, 512, 32, reason="prefill; as tight as one row"),
    Config("q_o_proj-4096", 4096, 2048, 2048, 32, reason="prefill"),
    Config("q_o_proj-8192", 8192, 2048, 2048, 32, reason="prefill; as tight as one row"),
    Config("gate_up_proj-4096", 4096, 2048, 8192, 32, heavy=True, reason="prefill"),
    Config("down_proj-4096", 4096, 8192, 2048, 32, heavy=True, tolerance=LONG, reason=_SUM),
    Config("lm_head-64", 64, 2048, 128256, 32, heavy=True, reason="logits of many tokens"),
    Config("down_proj-9", 9, 8192, 2048, 128, tolerance=LONG, reason=f"group 128; {_SUM}"),
    Config("one-of-each", 1, 32, 1, 32, reason="one block, one column"),
    Config("rows-8", 8, 1024, 96, 64, reason="the last row count of the decode kernels"),
    Config("rows-9", 9, 1024, 96, 64, reason="the first above them"),
    Config("tile-64", 64, 256, 64, 32, reason="exactly one tile"),
    Config("tile-65", 65, 256, 66, 32, bias=True, reason="one row and two columns over a tile"),
    Config("tile-127", 127, 320, 200, 64, bias=True, reason="partial tiles in M and N; K tail"),
    Config("odd-n-1", 1, 512, 77, 128, bias=True, reason="odd N, decode"),
    Config("odd-n-30", 30, 512, 1001, 128, reason="odd N, prefill"),
    Config("group-8", 5, 520, 40, 8, reason="four groups in a block of 32; K no multiple of 32"),
    Config("group-8-33", 33, 520, 40, 8, reason="the same, prefill"),
    Config("group-16", 5, 528, 40, 16, bias=True, reason="two groups in a block of 32"),
    Config("group-16-33", 33, 528, 40, 16, reason="the same, prefill"),
    Config("group-32", 4, 512, 40, 32, reason="a group is a block"),
    Config("group-64", 4, 576, 40, 64, reason="two blocks a group"),
    Config("group-128", 4, 640, 40, 128, reason="four blocks a group"),
    Config("group-256", 40, 768, 40, 256, reason="the widest group"),
)  # fmt: skip


def ramp(M: int, K: int) -> Tensor:
    """float32 ``[M, K]``: element i of the flattened ramp is ``((i % 17) - 8) / 16``, exact."""
    return (torch.arange(M * K).remainder_(PERIOD) - 8).div(16).view(M, K)


def distinct_rows(M: int, K: int) -> int:
    """The ramp's rows repeat after so many: row m and row m + 17 begin at the same step of 17."""
    return min(M, PERIOD // math.gcd(PERIOD, K))


@functools.cache
def weight(config: Config) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """The op's arguments after x, the same on every run: all nibbles, a scale for each group."""
    g = torch.Generator().manual_seed(config.K * 131 + config.N)
    weights = torch.randint(0, 256, (config.N, config.K // 2), dtype=torch.uint8, generator=g)
    weights[0, :4] = torch.tensor([0x00, 0xFF, 0x0F, 0xF0], dtype=torch.uint8)
    scales = (torch.rand(config.K // config.group_size, config.N, generator=g) + 0.1) / 64
    bias = torch.randn(config.N, generator=g) if config.bias else None
    return weights, scales, config.group_size, bias


def dequantize(weights: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """float32 ``[N, K]``: ``(u - 8) * scale``, written here again for the golden alone."""
    u = torch.stack([weights & 15, weights >> 4], dim=-1).flatten(1).float().sub_(8)
    return u.unflatten(1, (-1, group_size)).mul_(scales.T.unsqueeze(-1)).flatten(1)


@functools.cache
def golden(config: Config) -> Tensor:
    """float64 ``x.double() @ dequantize(W).double().T`` of the ramp's distinct rows, ``[R, N]``."""
    x = ramp(distinct_rows(config.M, config.K), config.K).double()
    weights, scales, group_size, bias = weight(config)
    step = max(1, (1 << 23) // config.K)  # 64 MB of float64 weights at a time
    y = torch.empty(x.shape[0], config.N, dtype=torch.float64)
    for n in range(0, config.N, step):
        columns = slice(n, n + step)
        w = dequantize(weights[columns], scales[:, columns], group_size)
        y[:, columns] = x @ w.double().T
    return y if bias is None else y + bias.double()


def errors(config: Config, y: Tensor) -> tuple[float, float]:
    """Largest absolute error of ``y [M, N]``, and that over the golden's root mean square.

    NaN where ``y`` has one.
    """
    exact = golden(config).to(y.device)
    repeats = exact.shape[0]
    worst = max((y[m::repeats].double() - exact[m]).abs().max().item() for m in range(repeats))
    # max() skips a NaN that is not first.
    worst = worst if bool(y.isfinite().all()) else math.nan
    return worst, worst / exact.square().mean().sqrt().item()
