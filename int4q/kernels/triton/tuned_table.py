"""The file that ``int4q.tune()`` writes: a device, and the fastest tile of each class of shapes.

A class is a kernel, M, N and K each rounded up to a power of two, and whether scales are light
(``light``: groups of 128 or more, and for the sm_90 kernel 16-bit scales in whole 16-byte rows).
Reading checks everything, so that a file is used as a whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from int4q import errors
from int4q.kernels.launch.nvrtc import cache_dir
from int4q.kernels.triton.tiles import DequantizeConfig, MatmulConfig, MatvecConfig, StreamConfig

FORMAT = 1
CONFIGS = {
    "stream": StreamConfig,
    "matmul": MatmulConfig,
    "matvec": MatvecConfig,
    "dequantize": DequantizeConfig,
}
"""The kernels that have tiles to choose, by the name that rows give them."""
_POWERS = ("block_n", "block_m", "block_k", "block_h", "num_warps")
_FROM_ZERO = ("programs",)

Class = tuple[str, int, int, int, bool]


@dataclass(frozen=True)
class Device:
    """What a table holds for: the name and compute capability (``None`` off CUDA)."""

    name: str
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Row:
    """The choice for one class.

    Attributes:
        kernel: a key of :data:`CONFIGS`.
        M, N, K: the class's upper bounds, powers of two; M is 0 for ``"dequantize"``.
        light: see the module.
        config: the tile.
        us, default_us: geometric means over the shapes that were timed, of this tile and of the
            one that ships, in microseconds.
    """

    kernel: str
    M: int
    N: int
    K: int
    light: bool
    config: object
    us: float
    default_us: float


@dataclass(frozen=True)
class Table:
    """A checked file.

    Attributes:
        device: that it was measured on.
        rows: by class.
        dequantize_from_m: rows of activations from which dequantise + cuBLAS won; ``None``: never.
        path: where it was read.
    """

    device: Device
    rows: Mapping[Class, Row]
    dequantize_from_m: int | None
    path: Path

    def config(self, kernel: str, M: int, N: int, K: int, light: bool):
        """The tile for a shape, ``None`` where its class was not tuned."""
        row = self.rows.get(shape_class(kernel, M, N, K, light))
        return None if row is None else row.config


def shape_class(kernel: str, M: int, N: int, K: int, light: bool) -> Class:
    """The class of a shape; see the module."""
    return kernel, *(_power(n) for n in (M, N, K)), light


def _power(n: int) -> int:
    return 0 if n <= 0 else 1 << (n - 1).bit_length()


def default_path(device: Device) -> Path:
    """Where a device's table is looked for: ``tuned-<name>.json`` in int4q's cache folder."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return cache_dir() / f"tuned-{name}.json"


def write(
    path: str | os.PathLike,
    device: Device,
    rows: Sequence[Row],
    dequantize_from_m: int | None,
    about: Mapping[str, str],
) -> Path:
    """Write a table, whole or not at all; ``about`` is for people (versions, date)."""
    path = Path(path).expanduser()
    content = {
        "format": FORMAT,
        "device": device.name,
        "capability": device.capability and list(device.capability),
        **about,
        "dequantize_from_m": dequantize_from_m,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
    return path


def read(path: str | os.PathLike) -> Table:
    """Read and check a table.

    Raises:
        ValueError: it cannot be read, or anything in it is not as :func:`write` leaves it.
    """
    path = Path(path).expanduser()
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"it is no table of format {FORMAT}")
        capability = content["capability"]
        if capability is not None:
            major, minor = capability
            capability = (_count(major), _count(minor))
        device = Device(_text(content["device"]), capability)
        rows = [_row(row) for row in content["rows"]]
        from_m = content["dequantize_from_m"]
        from_m = None if from_m is None else _count(from_m, 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.value(
            f"{path} must be a table that int4q.tune() wrote",
            f"{type(error).__name__}: {error}",
            "Delete it or tune again",
        ) from error
    by_class = {(row.kernel, row.M, row.N, row.K, row.light): row for row in rows}
    return Table(device, by_class, from_m, path)


def _row(entry: dict) -> Row:
    row = Row(**entry)
    kind = CONFIGS[row.kernel]
    config = kind(**row.config)
    for field in dataclasses.fields(kind):
        value = getattr(config, field.name)
        if isinstance(field.default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false, got {value!r}")
        elif value is not None or field.default is not None:
            _count(value, 0 if field.name in _FROM_ZERO else 1)
            if field.name in _POWERS and value & (value - 1):
                raise ValueError(f"{field.name} must be a power of two, got {value}")
    sides = [_count(side) for side in (row.M, row.N, row.K)]
    if any(side != _power(side) for side in sides) or not isinstance(row.light, bool):
        raise ValueError(f"M, N, K must be powers of two, light true or false, got {entry}")
    return dataclasses.replace(row, config=config)


def _count(value: object, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"a whole number of at least {least} is needed, got {value!r}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a device's name is needed, got {value!r}")
    return value
