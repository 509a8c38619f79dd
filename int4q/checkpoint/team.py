"""The processes that share a conversion out: one, or those that ``torchrun`` started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch.distributed as dist

from int4q import errors


@dataclass(frozen=True)
class Team:
    """This process's place among those that work on one checkpoint."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process prepares and finishes the work."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, digest: str) -> None:
        """Raise ``ValueError`` unless every process has the same ``digest``."""
        if self.size == 1:
            return
        digests: list[str] = [""] * self.size
        dist.all_gather_object(digests, digest)
        if len(set(digests)) > 1:
            raise errors.value(
                "every process must see the same source, options and versions",
                f"{len(set(digests))} plans in {self.size} processes",
            )

    def share(self, sizes: Sequence[int]) -> range:
        """Positions of this process's part of what ``sizes`` (bytes) lists, alike in bytes."""
        total = max(1, sum(sizes))
        middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
        owners = [min(self.size - 1, int(self.size * middle / total)) for middle in middles]
        mine = [position for position, owner in enumerate(owners) if owner == self.rank]
        return range(mine[0], mine[-1] + 1) if mine else range(0)


@contextmanager
def team() -> Iterator[Team]:
    """The team that ``torchrun`` describes in the environment; a team of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    dist.init_process_group("gloo")
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
