"""Which tile sizes a kernel runs with: measured on an H200 (sm_90), and a default elsewhere.

Nothing is tuned on a user's first call. A row holds for a class of shapes, not one shape; the
first whose limits fit is taken.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

DEQUANTIZE_FROM_M = 2048
"""From this M on, dequantising the weight and calling cuBLAS beats every fused kernel."""
SMALL_WEIGHT = 1 << 21
"""A weight of at most this many elements is dequantised in some 2 us: less than a fused kernel's
preparation of the activations costs beyond the decode kernels' rows."""


def dequantizes(M: int, N: int, K: int) -> bool:
    """Whether dequantising and calling cuBLAS is the way for this shape."""
    return M >= DEQUANTIZE_FROM_M or (M > 16 and N * K <= SMALL_WEIGHT)


@dataclass(frozen=True)
class DequantizeConfig:
    block_n: int
    block_h: int
    num_warps: int


@dataclass(frozen=True)
class MatvecConfig:
    block_n: int
    block_h: int
    num_warps: int


@dataclass(frozen=True)
class MatmulConfig:
    block_n: int
    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group_m: int = 8


@dataclass(frozen=True)
class StreamConfig:
    """Of the sm_90 kernel.

    Attributes:
        block_n, block_m, block_k: tile of the output, and the part of K in one stage.
        num_warps, num_stages: warps a program (a multiple of 4, block_n >= 16 * num_warps),
            depth of the ring.
        programs: how many share the work evenly; 0 for one program a tile, no tile shared.
        min_steps: fewest blocks of K that are worth a program of their own.
        in_flight: multiplies that may run while the next fragment is unpacked (1 or 2).
        group_m: tiles of M that go round before the next tile of N.
        stage_scales: copy scales through the ring where their layout allows.
        max_registers: cap, so that more programs fit on a multiprocessor.
    """

    block_n: int
    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 0
    min_steps: int = 4
    in_flight: int = 1
    group_m: int = 1
    stage_scales: bool = True
    max_registers: int | None = None


GLUON_FROM_M = 9
"""Below this M the decode kernels win."""


def _fill(M: int, N: int, block_n: int, block_m: int, slots: int) -> float:
    """How full the rounds are in which tiles take their turn on ``slots`` places."""
    tiles = -(-M // block_m) * -(-N // block_n)
    return tiles / (-(-tiles // slots) * slots)


def stream_config(M: int, N: int, K: int, light_scales: bool, device: torch.device) -> StreamConfig:
    """Tile of the sm_90 kernel (measured with zero points on four large shapes).

    ``light_scales``: groups of 128 or more and scales in half precision, which leave registers and
    shared memory for more programs on a multiprocessor.

    Sharing tiles costs traffic, so whole tiles are preferred wherever they nearly fill the device.
    """
    sms = multiprocessors(device)
    if M <= 16 and light_scales:
        return StreamConfig(64, 16, 256, 4, 3, programs=4 * sms, max_registers=128)
    if M <= 16:
        return StreamConfig(64, 16, 256, 4, 3, programs=3 * sms, max_registers=168)
    if M <= 32:
        programs = 0 if _fill(M, N, 128, 32, 2 * sms) >= 0.8 else 2 * sms
        return StreamConfig(128, 32, 256, 4, 3, programs)
    if M <= 64:
        if _fill(M, N, 128, 64, 2 * sms) >= 0.8:
            return StreamConfig(128, 64, 128, 4, 4)
        return StreamConfig(128, 64, 256, 8, 4, programs=sms, in_flight=2)
    if M <= 128:
        if _fill(M, N, 256, 128, sms) >= 0.8:
            return StreamConfig(256, 128, 128, 8, 4)
        if K <= 8192 and _fill(M, N, 64, 64, sms) >= 0.9:
            return StreamConfig(64, 64, 256, 4, 5)
        return StreamConfig(128, 128, 128, 4, 5, programs=sms)
    whole = _fill(M, N, 128, 256, sms)
    if whole >= 0.9 or (whole >= 0.8 and M <= 256):
        return StreamConfig(128, 256, 128, 8, 3, group_m=8)
    if K <= 8192 and M <= 256 and _fill(M, N, 128, 64, sms) >= 0.9:
        return StreamConfig(128, 64, 256, 8, 4)
    if M <= 384:
        return StreamConfig(128, 128, 128, 4, 5, programs=sms, group_m=4)
    if K <= 8192 and M <= 512 and _fill(M, N, 128, 128, sms) >= 0.9:
        return StreamConfig(128, 128, 128, 8, 5, group_m=8)
    return StreamConfig(128, 256, 128, 8, 3, programs=sms, group_m=2)


def experts_config(
    T: int, E: int, N: int, K: int, light_scales: bool, device: torch.device
) -> StreamConfig:
    """Tile of the sm_90 kernel for ``T`` rows of a stack of ``E`` weights.

    How the rows fall to experts is not known to the host, so the tile follows from the mean: wide
    enough that most experts need one, since a second one reads the weight again.
    """
    sms = multiprocessors(device)
    mean = T / E
    if mean <= 6:
        return StreamConfig(128, 8, 256, 4, 3, programs=2 * sms)
    if mean <= 10:
        return StreamConfig(128, 16, 256, 4, 3, programs=2 * sms)
    if mean <= 24:
        return StreamConfig(128, 32, 256, 4, 3, programs=2 * sms, group_m=4)
    if mean <= 80:
        return StreamConfig(128, 64, 128, 4, 4, programs=2 * sms, group_m=4)
    if mean <= 400:
        return StreamConfig(256, 128, 128, 8, 4, programs=sms, in_flight=2, group_m=8)
    return StreamConfig(128, 256, 128, 8, 3, programs=sms, group_m=4)


def experts_grad_config(T: int, E: int) -> MatmulConfig:
    """Tile of the gradient through a stack: BLOCK_K columns of it, BLOCK_N summed at a time."""
    block_m = 16 if T <= 16 * E else 64
    return MatmulConfig(64, block_m, 128, num_warps=4, num_stages=1)


def dequantize_config(N: int, K: int) -> DequantizeConfig:
    """Tile of the dequantise kernel: block_n rows of block_h packed bytes."""
    if K // 2 < 128:
        return DequantizeConfig(block_n=16, block_h=64, num_warps=4)
    return DequantizeConfig(block_n=8, block_h=256, num_warps=4)


def matvec_config(N: int, K: int) -> MatvecConfig:
    """Few rows a program, so that small N still fills the device."""
    return MatvecConfig(
        block_n=8 if N > 8192 else 4, block_h=512 if K >= 2048 else 128, num_warps=4
    )


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors to fill; a token number off CUDA (the interpreter)."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def matmul_config(M: int, N: int, K: int, device: torch.device) -> MatmulConfig:
    """Tile of the plain-Triton GEMM; fits the 99 KB of shared memory of sm_86 and sm_89."""
    if M <= 16:
        block_n, block_m, block_k, warps, stages = 64, 16, 256, 4, 3
    elif M <= 32:
        block_n, block_m, block_k, warps, stages = 64, 32, 256, 4, 3
    elif M <= 64:
        block_n, block_m, block_k, warps, stages = 64, 64, 128, 4, 3
    else:
        block_n, block_m, block_k, warps, stages = 128, 128, 64, 8, 3
    tiles = -(-M // block_m) * -(-N // block_n)
    # Split K until the device is about full; each split keeps at least four steps.
    split = max(1, min(8, 2 * multiprocessors(device) // tiles, K // (4 * block_k)))
    return MatmulConfig(block_n, block_m, block_k, warps, stages, split)
