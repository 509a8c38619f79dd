"""The compiled CPU kernels of ``csrc/int4_cpu.c``, loaded through ctypes.

They take the plain layout as it is stored: ``qdata`` int8 ``[N, K/2]`` (signed or offset-binary
nibbles, even k low), ``scale`` and ``zero_point`` indexed ``[n_groups, N]`` with any strides, so
no packed copy of a weight is made. The library is optional: :func:`load` and :func:`unsupported`
say why it cannot be used, and nothing is loaded before the first of them is called.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

DECODE_MAX_M = {torch.bfloat16: 16, torch.float16: 256, torch.float32: 128}
"""Rows of ``x`` up to which the decode kernel beats dequantising blocks for torch's own product."""
TILES_MIN_M = 5
"""Rows of a bfloat16 ``x`` from which bf16 tiles are faster, where the CPU has them (AMX)."""
_GROUP_SIZES = (32, 64, 128, 256)
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_VNNI, _AMX, _BF16 = 1, 2, 4
_ERRORS = {1: "this CPU lacks the instructions", 2: "out of memory"}
_OUT_OF_RANGE = 3
_RANGE = 2.0**121
"""Fixed point holds smaller activations."""


class Product(enum.IntEnum):
    """What a weight and an activation are in the products of :func:`linear`; sums are float32."""

    EXACT = 0
    """Weights as they are; ``x`` in 16-bit (float32: 24-bit) fixed point by blocks of eight."""
    BF16 = 1
    """Weights rounded once to bfloat16, ``x`` bfloat16; no zero points."""
    INT8 = 2
    """Weights as they are, ``x`` int8 as :func:`int4q.kernels.reference.linear_int8` has it."""


class _Args(ctypes.Structure):
    """``int4q_args`` of the C file, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "qdata", "scale", "zero", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "q_stride", "out_stride")),
        *((name, ctypes.c_int64) for name in ("scale_stride_g", "scale_stride_n")),
        *((name, ctypes.c_int64) for name in ("zero_stride_g", "zero_stride_n")),
        *((name, ctypes.c_int64) for name in ("M", "N", "K", "group")),
        *((name, ctypes.c_int64) for name in ("x_kind", "scale_kind", "out_kind", "threads")),
        *((name, ctypes.c_int64) for name in ("offset_binary", "product", "features")),
    ]


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or ``None`` and the reason why there is none; looked for once."""
    found = sorted(Path(__file__).parent.glob("_int4_cpu*.so"))
    if not found:
        return None, "the compiled CPU kernels were not built (pip install with a C compiler)"
    try:
        lib = ctypes.CDLL(str(found[0]))
        lib.int4q_cpu_features.restype = ctypes.c_int
        lib.int4q_args_bytes.restype = ctypes.c_int64
        for name in ("int4q_decode", "int4q_gemm", "int4q_dequant"):
            getattr(lib, name).argtypes = [ctypes.POINTER(_Args)]
            getattr(lib, name).restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        return None, f"the compiled CPU kernels did not load: {error} (install int4q again)"
    if lib.int4q_args_bytes() != ctypes.sizeof(_Args):
        return None, "the compiled CPU kernels are of another version (install int4q again)"
    return lib, None


@functools.cache
def _features() -> int:
    lib, _ = load()
    return 0 if lib is None else lib.int4q_cpu_features()


def unsupported(
    M: int,
    N: int,
    K: int,
    group_size: int,
    x_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    product: Product = Product.EXACT,
) -> str | None:
    """Why :func:`linear` cannot run this problem, or ``None``."""
    if reason := _weight_unsupported(N, K, group_size, scale_dtype):
        return reason
    if x_dtype not in _KINDS:
        return f"takes bfloat16, float16 and float32 activations, not {x_dtype}"
    if product == Product.BF16 and x_dtype != torch.bfloat16:
        return f"rounds weights to bfloat16 for bfloat16 activations, not {x_dtype}"
    if M <= DECODE_MAX_M[x_dtype] or _uses_tiles(M, x_dtype, product):
        return None
    slower = f"slower than blocks above M = {DECODE_MAX_M[x_dtype]}"
    return f"{slower} on a CPU without AMX" if x_dtype == torch.bfloat16 else slower


@functools.cache
def _weight_unsupported(N: int, K: int, group_size: int, scale_dtype: torch.dtype) -> str | None:
    lib, reason = load()
    if lib is None:
        return reason
    if not _features() & _VNNI:
        return "needs an x86-64 CPU with AVX-512 (F, BW, VL, VNNI)"
    if group_size not in _GROUP_SIZES:
        return f"group_size must be 32, 64, 128 or 256, not {group_size}"
    if K == 0 or N == 0 or K % group_size:
        return f"K must be a positive multiple of group_size {group_size}, not {K} (N = {N})"
    if scale_dtype not in _KINDS:
        return f"takes bfloat16, float16 and float32 scales, not {scale_dtype}"
    return None


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None = None,
    offset_binary: bool = False,
    product: Product = Product.EXACT,
    out_of_range_rows: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``x @ W.T + bias`` with ``W[n, k] = q[n, k] * scale[g, n] + zero_point[g, n]``.

    Two kernels. For few rows (``DECODE_MAX_M``) weights are read as they are stored and ``product``
    says what is multiplied.
    For more (bfloat16 ``x`` on a CPU with AMX: from ``TILES_MIN_M``, unless ``INT8``) weights are
    rounded once to bfloat16. Both sum in float32, add the bias there and round once.

    Args:
        x: ``[M, K]``; any strides.
        qdata: int8 ``[N, K/2]``; rows any distance apart.
        scale, zero_point: ``[n_groups, N]``, one dtype, any strides; no zero point is all 0.
        bias: ``[N]``.
        offset_binary: the nibbles of ``qdata`` are ``q + 8``.
        out_of_range_rows: gives the results of the rows of ``x`` with a NaN, an Inf or a number
            from 2^121 on, which fixed point (``EXACT``, ``INT8``) does not hold; without it they
            are NaN.

    Returns:
        ``[M, N]`` in ``x.dtype``.

    Raises:
        ValueError, TypeError: parts that do not fit together, or what :func:`unsupported` says.
    """
    M, K = x.shape
    N = qdata.shape[0]
    _check_weight(qdata, scale, zero_point, group_size)
    if 2 * qdata.shape[1] != K:
        raise ValueError(f"x must have {2 * qdata.shape[1]} columns (two a byte of qdata), got {K}")
    if product == Product.BF16 and zero_point is not None:
        raise ValueError("zero_point must be None where weights are rounded to bfloat16")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must have shape [{N}], got {list(bias.shape)}")
    if reason := unsupported(M, N, K, group_size, x.dtype, scale.dtype, product):
        raise ValueError(f"compiled CPU kernel: {reason}")
    out = torch.empty((M, N), dtype=x.dtype)
    if M == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.detach().to(torch.float32).contiguous()
    name = "int4q_gemm" if _uses_tiles(M, x.dtype, product) else "int4q_decode"
    weight = qdata, scale, zero_point
    in_range = _call(name, x, *weight, bias, out, M, K, group_size, offset_binary, product)
    if not in_range and out_of_range_rows is not None:
        rows = ~(x.abs() < _RANGE).all(dim=1)
        out[rows] = out_of_range_rows(x[rows])
    return out


def _uses_tiles(M: int, x_dtype: torch.dtype, product: Product) -> bool:
    if product == Product.INT8 or x_dtype != torch.bfloat16:
        return False
    return M >= TILES_MIN_M and bool(_features() & _AMX)


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    offset_binary: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``q * scale + zero_point`` in float32, rounded once to ``dtype``.

    Args:
        qdata: int8 ``[N, K/2]``; rows any distance apart.
        scale, zero_point: ``[n_groups, N]``, one dtype, any strides; no zero point is all 0.
        dtype: bfloat16, float16 or float32.
        offset_binary: the nibbles of ``qdata`` are ``q + 8``.
        out: contiguous ``[N, K]`` of ``dtype`` to write to.

    Returns:
        ``[N, K]``.

    Raises:
        ValueError, TypeError: parts that do not fit together, or a weight the kernel cannot take.
    """
    N, K = qdata.shape[0], 2 * qdata.shape[1]
    _check_weight(qdata, scale, zero_point, group_size)
    if dtype not in _KINDS:
        raise TypeError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    if reason := _weight_unsupported(N, K, group_size, scale.dtype):
        raise ValueError(f"compiled CPU kernel: {reason}")
    if out is None:
        out = torch.empty((N, K), dtype=dtype)
    elif out.dtype != dtype or out.shape != (N, K) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {dtype} [{N}, {K}], got {out.dtype} {out.shape}")
    weight = qdata, scale, zero_point
    _call("int4q_dequant", None, *weight, None, out, 0, K, group_size, offset_binary)
    return out


def _check_weight(qdata: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> None:
    if qdata.dtype != torch.int8:
        raise TypeError(f"qdata must be int8 (two signed nibbles a byte), got {qdata.dtype}")
    if qdata.stride(1) != 1:
        raise ValueError(
            f"qdata must be contiguous along K, got strides {qdata.stride()}. "
            "Call .contiguous() on it"
        )
    zero_point = scale if zero_point is None else zero_point
    if zero_point.dtype != scale.dtype:
        raise TypeError(f"zero_point must have scale's dtype {scale.dtype}, got {zero_point.dtype}")
    expected = (2 * qdata.shape[1] // group_size, qdata.shape[0])
    for name, t in (("scale", scale), ("zero_point", zero_point)):
        if t.shape != expected:
            raise ValueError(
                f"{name} must have shape [n_groups, N] = {list(expected)}, got {list(t.shape)}"
            )


def _call(
    name, x, qdata, scale, zero_point, bias, out, M, K, group_size, offset_binary, product=0
) -> bool:
    """Run a kernel; whether all activations were in the range of fixed point."""
    lib, _ = load()
    status = getattr(lib, name)(
        _Args(
            None if x is None else x.data_ptr(),
            qdata.data_ptr(),
            scale.data_ptr(),
            None if zero_point is None else zero_point.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            0 if x is None else x.stride(0),
            qdata.stride(0),
            out.stride(0),
            *scale.stride(),
            *((0, 0) if zero_point is None else zero_point.stride()),
            M,
            qdata.shape[0],
            K,
            group_size,
            0 if x is None else _KINDS[x.dtype],
            _KINDS[scale.dtype],
            _KINDS[out.dtype],
            torch.get_num_threads(),
            offset_binary,
            product,
            _features(),
        )
    )
    if status in _ERRORS:
        raise RuntimeError(f"{name}: {_ERRORS[status]}")
    return status != _OUT_OF_RANGE
