"""What ``int4q.tune()`` tries: kernels that have tiles, their candidates, how to call them."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from int4q.bench import timing
from int4q.kernels import reference
from int4q.kernels.triton import tuned
from int4q.kernels.triton.tiles import DequantizeConfig, MatmulConfig, MatvecConfig, StreamConfig
from int4q.kernels.weight import Weight


@dataclass(frozen=True)
class Copies:
    """Copies of one weight, whose qdata lie apart, and its values."""

    weights: tuple[Weight, ...]
    values: Tensor  # float32 [N, K]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)

    @property
    def group_size(self) -> int:
        return self.weights[0].group_size

    @classmethod
    def random(cls, N: int, K: int, group_size: int, dtype: torch.dtype, device) -> Copies:
        copies = timing.copies(N * K // 2) if device.type == "cuda" else 1
        on = {"device": device}
        qdata = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8, **on)
        scale = (torch.rand(K // group_size, N, **on) * 0.009 + 0.001).to(dtype)
        zero_point = (torch.randn(K // group_size, N, **on) * 0.01).to(dtype)
        weight = Weight(qdata, scale, zero_point, group_size)
        values = reference.dequantize(weight, torch.float32)
        return cls(tuple(weight._replace(qdata=qdata.clone()) for _ in range(copies)), values)


@dataclass(frozen=True)
class Place:
    """What candidates depend on: the shape, shared memory a program may have, multiprocessors."""

    M: int
    N: int
    K: int
    shared: int
    sms: int


@dataclass(frozen=True)
class Family:
    """A kernel with tiles to choose: where it runs, what to try, how to call it."""

    kernel: str
    runs: Callable[[int, tuple[int, int] | None], bool]
    shipped: Callable[..., object]  # (M, copies, device) -> the tile in use without a table
    light: Callable[[Copies], bool]  # whether its scales are light (tuned_table.py)
    candidates: Callable[[Place], Iterator[object]]
    call: Callable[..., Tensor]  # (x, weight, config)


def light(copies: Copies) -> bool:
    return copies.group_size >= 128


def stream_light(copies: Copies) -> bool:
    halves = copies.weights[0].scale.itemsize == 2
    return light(copies) and copies.shape[0] % 16 == 0 and halves


def _around(M: int, sides: Sequence[int]) -> list[int]:
    """The sides of a tile that suit M rows: the least that holds them and its neighbours."""
    least = next((i for i, side in enumerate(sides) if side >= M), len(sides) - 1)
    return list(sides[max(0, least - 1) : least + 2]) if M > sides[0] else [sides[0]]


def stream_candidates(place: Place) -> Iterator[StreamConfig]:
    M, sms = place.M, place.sms
    for block_m, block_n, block_k in itertools.product(
        _around(M, (16, 32, 64, 128, 256)), (64, 128, 256), (128, 256)
    ):
        stage = block_n * block_k // 2 + block_m * block_k * 2
        stages = min(5, (place.shared - 4096) // (stage + 8 * block_n))
        for warps in (4, 8):
            registers = block_n * block_m // (32 * warps)  # of the accumulator, a thread
            if stages < 3 or registers > 128 or block_n % (16 * warps):
                continue
            few = registers <= 32  # such programs share a multiprocessor
            for programs in (0, 3 * sms if few and block_m == 16 else 2 * sms if few else sms):
                group_m = 8 if programs == 0 and M > block_m else 1
                yield StreamConfig(
                    block_n, block_m, block_k, warps, stages, programs, group_m=group_m
                )


def matmul_candidates(place: Place) -> Iterator[MatmulConfig]:
    depths = (3, 4) if place.shared > 1 << 17 else (2, 3)
    for block_m, block_n, block_k, warps, stages in itertools.product(
        _around(place.M, (16, 32, 64, 128)), (64, 128), (64, 128, 256), (4, 8), depths
    ):
        used = (block_n * block_k // 2 + block_m * block_k * 2) * stages
        registers = block_n * block_m // (32 * warps)
        if used > place.shared or not 8 <= registers <= 128 or (block_k > 128 and block_m > 32):
            continue
        split = tuned.split_of(place.M, place.N, place.K, block_n, block_m, block_k, place.sms)
        for parts in {1, split}:
            yield MatmulConfig(block_n, block_m, block_k, warps, stages, parts)


def matvec_candidates(place: Place) -> Iterator[MatvecConfig]:
    for shape in itertools.product((2, 4, 8, 16), (128, 256, 512), (4, 8)):
        yield MatvecConfig(*shape)


def dequantize_candidates(place: Place) -> Iterator[DequantizeConfig]:
    for shape in itertools.product((4, 8, 16), (64, 128, 256, 512), (4, 8)):
        yield DequantizeConfig(*shape)


def _linear(module: str):
    def call(x: Tensor, weight: Weight, config) -> Tensor:
        return _kernels(module).linear(x, weight, config=config)

    return call


def _dequantize(x: Tensor, weight: Weight, config) -> Tensor:
    return _kernels("dequant").dequantize(weight, x.dtype, config=config)


def through_cublas(x: Tensor, weight: Weight) -> Tensor:
    return _kernels("dequant").linear(x, weight)


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"int4q.kernels.triton.{module}")  # Triton: at the first call


FAMILIES = {
    family.kernel: family
    for family in (
        Family(
            "stream",
            lambda M, capability: (
                capability is not None and capability[0] == 9 and M >= tuned.GLUON_FROM_M
            ),
            lambda M, w, device: tuned.stream_rule(M, *w.shape, stream_light(w), device),
            stream_light,
            stream_candidates,
            _linear("gluon_matmul"),
        ),
        Family(
            "matmul",
            lambda M, capability: M > 1,
            lambda M, w, device: tuned.matmul_rule(M, *w.shape, device),
            light,
            matmul_candidates,
            _linear("matmul"),
        ),
        Family(
            "matvec",
            lambda M, capability: M == 1,
            lambda M, w, device: tuned.matvec_rule(*w.shape),
            lambda w: True,
            matvec_candidates,
            _linear("matvec"),
        ),
        Family(
            "dequantize",
            lambda M, capability: M == 1,  # once a weight
            lambda M, w, device: tuned.dequantize_rule(*w.shape),
            lambda w: True,
            dequantize_candidates,
            _dequantize,
        ),
    )
}
"""The kernels that have tiles to choose, by the name that tables give them."""
