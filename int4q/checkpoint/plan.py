"""What a checkpoint will be, known before a byte of it is written.

A :class:`Plan` says for every tensor what it is and which job makes it; :func:`shards` from there
gives every byte its place. So jobs can run in any order, in several processes, and again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.serialization._base import split_state_dict_into_shards_factory
from torch import Tensor

from int4q.checkpoint import schema
from int4q.checkpoint.source import DTYPES

MAX_SHARD_SIZE = "5GB"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Job:
    """One unit of work.

    Attributes:
        name: unique in its plan.
        nbytes: that it reads.
        read: from the source; called in another thread while the job before is being computed.
        make: what was read -> stored name -> tensor to write.
        index: of a stack: which of its matrices the tensors are.
    """

    name: str
    nbytes: int
    read: Callable[[], Any]
    make: Callable[[Any], Mapping[str, Tensor]]
    index: int | None = None


@dataclass
class Plan:
    """A checkpoint to be written.

    Attributes:
        stored: name in the state dict -> stored name -> a tensor without data (``meta``).
        described: name -> its JSON in the metadata, see :func:`int4q.checkpoint.schema.metadata`;
            empty for a checkpoint of another format.
        jobs: that make them all.
        files: further files: name -> bytes, or the file to copy.
        identity: what else makes this plan this one: options, state of the source.
    """

    stored: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    described: dict[str, str] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    files: dict[str, bytes | Path] = field(default_factory=dict)
    identity: Any = None

    def add(self, name: str, like: Tensor, jobs: Iterable[Job]) -> None:
        """Plan a tensor of the state dict: ``like`` is of its class, shape and dtype."""
        self.stored[name], self.described[name] = schema.flatten(name, like.to("meta"))
        self.jobs.extend(jobs)

    @property
    def metadata(self) -> dict[str, str]:
        """Of every file."""
        return schema.metadata(self.described) if self.described else {"format": "pt"}

    @cached_property
    def specs(self) -> dict[str, Tensor]:
        """Stored name -> a tensor without data; of a finished plan."""
        return {key: t for parts in self.stored.values() for key, t in parts.items()}

    @property
    def nbytes(self) -> int:
        """Of all tensors to be written."""
        return sum(map(_size, self.stored.values()))


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        file: its name.
        header: its first bytes.
        offsets: stored name -> where its bytes start.
        nbytes: of the file.
    """

    file: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def shards(plan: Plan, max_shard_size: str | int = MAX_SHARD_SIZE) -> list[Shard]:
    """The files that hold a plan's tensors, split and named as ``save_pretrained`` does.

    The parts of a weight stay together.
    """
    split = split_state_dict_into_shards_factory(
        plan.stored,
        get_storage_size=_size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    metadata = plan.metadata
    return [
        _shard(file, {k: t for name in names for k, t in plan.stored[name].items()}, metadata)
        for file, names in split.filename_to_tensors.items()
    ]


def digest(plan: Plan, made: Iterable[Shard]) -> str:
    """The same for the same work on the same source into the same files, and for nothing else."""
    files = [[shard.file, hashlib.sha256(shard.header).hexdigest()] for shard in made]
    body = [plan.identity, files, [job.name for job in plan.jobs]]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def index(made: list[Shard], plan: Plan) -> bytes | None:
    """``model.safetensors.index.json`` of several files; one file needs none."""
    if len(made) == 1:
        return None
    weight_map = {name: shard.file for shard in made for name in shard.offsets}
    body = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(body, indent=2) + "\n").encode()


def _shard(file: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Shard:
    """Large dtypes first, so that every tensor is aligned; the header padded to 8 bytes."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    starts, end = {}, 0
    for name in order:
        t = tensors[name]
        starts[name], end = end, end + t.numel() * t.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    offsets = {name: first + start for name, start in starts.items()}
    return Shard(file, len(text).to_bytes(8, "little") + text, offsets, first + end)


def _size(parts: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.dtype.itemsize for t in parts.values())
