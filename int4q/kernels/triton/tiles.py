"""What can be tuned about each Triton kernel: one frozen dataclass a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from int4q import errors


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
class W4A8Config:
    """``num_warps`` warps, a block of 32 k a thread, of ``block_n`` rows each."""

    block_n: int
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

    def __post_init__(self):
        if self.num_warps % 4 or self.block_n % (16 * self.num_warps):
            raise errors.value(
                "num_warps must be a multiple of 4, block_n one of 16 * num_warps",
                f"{self.num_warps} and {self.block_n}",
            )
