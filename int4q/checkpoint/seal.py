"""Checksums of a safetensors file, kept in its own metadata: a damaged file is not taken for whole.

Optional: files that transformers or torchao wrote have none, and their readers ignore it. Pure
functions, no I/O. The metadata's key ``int4q`` holds JSON::

    {"version": 1, "tied": {name: other name}, "crc32": {stored name: CRC-32}, "header": CRC-32}

``header`` is over everything else: the metadata, ``tied``, ``crc32``, and each tensor's dtype and
shape. Of a checkpoint in several files each has a seal of its own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int4q import errors
from int4q.checkpoint.schema import SEAL, Spec

VERSION = 1


@dataclass(frozen=True)
class Seal:
    """What a file says about itself.

    Attributes:
        tied: name in the state dict -> the name under which the same tensor is described.
        crc32: stored name -> :func:`checksum`.
    """

    tied: dict[str, str]
    crc32: dict[str, int]


def checksum(t: Tensor) -> int:
    """CRC-32 of a tensor's bytes, in the order that safetensors writes them."""
    return zlib.crc32(_bytes(t))


def seal(metadata: Mapping[str, str], stored: Mapping[str, Spec], of: Seal) -> dict[str, str]:
    """``metadata`` of one file with its seal.

    Args:
        stored: the file's tensors.
        of: what the seal says: ``crc32`` of each of them.
    """
    body: dict[str, Any] = {"version": VERSION, "tied": of.tied, "crc32": of.crc32}
    body["header"] = _header(metadata, stored, body)
    return {**metadata, SEAL: json.dumps(body)}


def unseal(metadata: Mapping[str, str], stored: Mapping[str, Spec]) -> Seal | None:
    """The seal of one file, checked against its header; ``None`` if it has none.

    Raises:
        ValueError: the header is damaged, or of another version.
    """
    text = metadata.get(SEAL)
    if text is None:
        return None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise errors.value(f"the metadata of {SEAL} must be a JSON object", repr(text)[:80])
    if body.get("version") != VERSION:
        raise errors.value(
            f"the version of a checkpoint must be {VERSION}",
            body.get("version"),
            "A newer int4q wrote it, or it is damaged",
        )
    header = body.pop("header", None)
    expected = _header({k: v for k, v in metadata.items() if k != SEAL}, stored, body)
    if header != expected:
        raise errors.value("a file's header must match its checksum", "another", "It is damaged")
    return Seal(body["tied"], body["crc32"])


def verify(name: str, t: Tensor, crc32: int) -> None:
    """Check the bytes of a stored tensor against its checksum.

    Raises:
        ValueError: they are not those that were written.
    """
    if checksum(t) != crc32:
        raise errors.value(f"{name} must match its checksum", "other bytes", "The file is damaged")


def _header(metadata: Mapping[str, str], stored: Mapping[str, Spec], body: Any) -> int:
    specs = {name: [str(dtype), list(shape)] for name, (dtype, shape) in stored.items()}
    return zlib.crc32(json.dumps([dict(metadata), specs, body], sort_keys=True).encode())


def _bytes(t: Tensor) -> Any:
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
