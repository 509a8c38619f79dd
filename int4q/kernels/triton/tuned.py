"""Which tile sizes a kernel runs with: a table of this GPU's own, or what was measured on an H200.

Nothing is tuned on a user's first call. What ships here was measured on an H200 (sm_90) and is the
default elsewhere; a rule holds for a class of shapes, and the first whose limits fit is taken.
``int4q.tune()`` writes a table for another GPU (tuned_table.py). It is found at the first call in
``$INT4Q_TUNED`` or in the cache folder, and goes before the rules here; :func:`source` says which
is in use.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from int4q import errors
from int4q.kernels.triton import tuned_table
from int4q.kernels.triton.tiles import (
    DequantizeConfig,
    MatmulConfig,
    MatvecConfig,
    StreamConfig,
    W4A8Config,
)
from int4q.kernels.triton.tuned_table import Device, Table

DEQUANTIZE_FROM_M = 3072
"""From this M on, dequantising the weight and calling cuBLAS beats every fused kernel: by 1 % on
average at 3072 rows, by 5 to 10 % at 4096; at 2048 rows it is 0 to 7 % behind."""
SMALL_WEIGHT = 1 << 21
"""A weight of at most this many elements is dequantised in some 2 us: less than a fused kernel's
preparation of the activations costs beyond the decode kernels' rows."""


def dequantize_from_m(capability: tuple[int, int] | None) -> int:
    """From how many rows on dequantise + cuBLAS is the way on a GPU of this compute capability."""
    if capability is not None and torch.cuda.is_available():
        found = table(torch.device("cuda", torch.cuda.current_device()))
        if found is not None and found.device.capability == tuple(capability):
            return found.dequantize_from_m or DEQUANTIZE_FROM_M
    return DEQUANTIZE_FROM_M


def dequantizes(M: int, N: int, K: int, capability: tuple[int, int] | None = None) -> bool:
    """Whether dequantising and calling cuBLAS is the way for this shape."""
    return M >= dequantize_from_m(capability) or (M > 16 and N * K <= SMALL_WEIGHT)


# --- this GPU's table ---------------------------------------------------------------------------

_tables: dict[Device, Table | None] = {}
_changed: list[Callable[[], None]] = []
_guard = threading.Lock()


def on_change(forget: Callable[[], None]) -> None:
    """Have ``forget`` called when other tiles come into use, by whoever keeps what they decided."""
    _changed.append(forget)


def table(device: torch.device) -> Table | None:
    """The table in use on ``device``, read from its file at the first call; ``None`` for none.

    Raises:
        ValueError: ``$INT4Q_TUNED`` names a file that is broken or of another device. (A broken
            file in the cache folder is left aside, with a warning.)
    """
    if device.type == "meta":
        return None
    key = describe(device)
    if key not in _tables:
        with _guard:
            if key not in _tables:
                _tables[key] = _find(key)
    return _tables[key]


def source(device: torch.device | str | None = None) -> str:
    """Where tile sizes come from on ``device`` (by default the current one): a path or "built-in".

    Raises:
        ValueError: as :func:`table`.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found = table(device)
    return "built-in" if found is None else str(found.path)


def use(path: str | os.PathLike | None) -> None:
    """Take the table of its device from ``path``; ``None``: look for files again at the next call.

    Raises:
        ValueError: the file is broken, or of a device that this process does not see.
    """
    if path is None:
        _tables.clear()
    else:
        found = tuned_table.read(path)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        seen = {describe(torch.device("cuda", i)) for i in range(count)} | {describe("cpu")}
        if found.device not in seen:
            known = sorted(device.name for device in seen)
            raise errors.value(
                f"{path} must be of one of {known}", found.device, "Run int4q tune on this machine"
            )
        _tables[found.device] = found
    for forget in _changed:
        forget()


@functools.lru_cache(maxsize=64)
def describe(device: torch.device | str) -> Device:
    """What a table must be of to serve ``device``."""
    device = torch.device(device)
    if device.type != "cuda":
        return Device(device.type, None)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.name, (properties.major, properties.minor))


def _find(device: Device) -> Table | None:
    if explicit := os.environ.get("INT4Q_TUNED"):
        found = tuned_table.read(explicit)
        if found.device != device:
            raise errors.value(
                f"$INT4Q_TUNED ({explicit}) must be of {device}", found.device, "Unset it"
            )
        return found
    path: Path = tuned_table.default_path(device)
    if not path.exists():
        return None
    try:
        found = tuned_table.read(path)
        if found.device != device:
            raise errors.value(f"{path} must be of {device}", found.device)
    except ValueError as error:
        warnings.warn(f"int4q uses its built-in tiles: {error}", stacklevel=2)
        return None
    return found


def _tuned(kernel: str, M: int, N: int, K: int, light: bool, device: torch.device | None):
    found = None if device is None else table(device)
    return None if found is None else found.config(kernel, M, N, K, light)


# --- what ships --------------------------------------------------------------------------------


GLUON_FROM_M = 9
"""Below this M the decode kernels win."""


def _fill(M: int, N: int, block_n: int, block_m: int, slots: int) -> float:
    """How full the rounds are in which tiles take their turn on ``slots`` places."""
    tiles = -(-M // block_m) * -(-N // block_n)
    return tiles / (-(-tiles // slots) * slots)


def stream_config(M: int, N: int, K: int, light_scales: bool, device: torch.device) -> StreamConfig:
    """Tile of the sm_90 kernel.

    ``light_scales``: groups of 128 or more and scales in half precision, which leave registers and
    shared memory for more programs on a multiprocessor.
    """
    found = _tuned("stream", M, N, K, light_scales, device)
    return found or stream_rule(M, N, K, light_scales, device)


def stream_rule(M: int, N: int, K: int, light_scales: bool, device: torch.device) -> StreamConfig:
    """What ships for :func:`stream_config` (measured with zero points on four large shapes).

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
    if K <= 8192 and M <= 256 and _fill(M, N, 64, 128, sms) >= 0.9:
        return StreamConfig(64, 128, 256, 4, 3)
    if 192 < M <= 256 and -(-N // 128) > sms:
        return StreamConfig(128, 256, 128, 8, 3, programs=sms, group_m=2)
    if M <= 384:
        return StreamConfig(128, 128, 128, 4, 5, programs=sms, group_m=4)
    if K <= 8192 and M <= 512 and _fill(M, N, 64, 256, sms) >= 0.9:
        return StreamConfig(64, 256, 128, 4, 3, group_m=8)
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


def dequantize_config(N: int, K: int, device: torch.device | None = None) -> DequantizeConfig:
    """Tile of the dequantise kernel: block_n rows of block_h packed bytes."""
    return _tuned("dequantize", 0, N, K, True, device) or dequantize_rule(N, K)


def dequantize_rule(N: int, K: int) -> DequantizeConfig:
    """What ships for :func:`dequantize_config`."""
    if K // 2 < 128:
        return DequantizeConfig(block_n=16, block_h=64, num_warps=4)
    return DequantizeConfig(block_n=8, block_h=256, num_warps=4)


def matvec_config(N: int, K: int, device: torch.device | None = None) -> MatvecConfig:
    """Tile of the one-row kernel."""
    return _tuned("matvec", 1, N, K, True, device) or matvec_rule(N, K)


def matvec_rule(N: int, K: int) -> MatvecConfig:
    """What ships for :func:`matvec_config`: few rows a program: small N fills the device."""
    return MatvecConfig(
        block_n=8 if N > 8192 else 4, block_h=512 if K >= 2048 else 128, num_warps=4
    )


def w4a8_config(M: int, N: int, K: int) -> W4A8Config:
    """Tile of the plain-Triton W4A8 kernel (measured on four large shapes, groups 32 and 128)."""
    return W4A8Config(block_n=4, num_warps=1 if M > 2 or (N > 8192 and K <= 4096) else 2)


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors to fill; a token number off CUDA (the interpreter)."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def matmul_config(
    M: int, N: int, K: int, device: torch.device, light_scales: bool = True
) -> MatmulConfig:
    """Tile of the plain-Triton GEMM; ``light_scales``: groups of 128 or more."""
    return _tuned("matmul", M, N, K, light_scales, device) or matmul_rule(M, N, K, device)


def matmul_rule(M: int, N: int, K: int, device: torch.device) -> MatmulConfig:
    """What ships for :func:`matmul_config`; fits the 99 KB of shared memory of sm_86 and sm_89."""
    if M <= 16:
        block_n, block_m, block_k, warps, stages = 64, 16, 256, 4, 3
    elif M <= 32:
        block_n, block_m, block_k, warps, stages = 64, 32, 256, 4, 3
    elif M <= 64:
        block_n, block_m, block_k, warps, stages = 64, 64, 128, 4, 3
    else:
        block_n, block_m, block_k, warps, stages = 128, 128, 64, 8, 3
    split = split_of(M, N, K, block_n, block_m, block_k, multiprocessors(device))
    return MatmulConfig(block_n, block_m, block_k, warps, stages, split)


def split_of(M: int, N: int, K: int, block_n: int, block_m: int, block_k: int, sms: int) -> int:
    """How often to split K until the device is about full; a split keeps at least four steps."""
    tiles = -(-M // block_m) * -(-N // block_n)
    return max(1, min(8, 2 * sms // tiles, K // (4 * block_k)))
