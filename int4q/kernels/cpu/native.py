"""The compiled CPU kernels of ``csrc/`` (``int4_cpu.h`` says what they do), loaded through ctypes.

They take the plain layout as it is stored, scales with any strides, so no packed copy of a weight
is made. The library is optional: :func:`load` and :func:`unsupported`
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

from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight

DECODE_MAX_M = {torch.bfloat16: 16, torch.float16: 256, torch.float32: 128}
"""Rows of ``x`` up to which the decode kernel beats dequantising blocks for torch's own product,
where both have AVX-512."""
BF16_DECODE_MAX_M = 64
"""The same for bfloat16 ``x`` where AVX-512 multiplies bfloat16."""
NARROW_DECODE_MAX_M = {torch.bfloat16: 32, torch.float16: 32, torch.float32: 16}
"""The same for narrower registers: AVX2 and NEON."""
TILES_MIN_M = 5
"""Rows of a bfloat16 ``x`` from which bf16 tiles are faster, where the CPU has them (AMX)."""
_GROUP_SIZES = (32, 64, 128, 256)
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_AVX512, _AMX, _BF16, _AVX2, _AVX_VNNI, _NEON = 1, 2, 4, 8, 16, 32
_DECODE = _AVX512 | _AVX2 | _NEON
_ERRORS = {1: "this CPU lacks the instructions", 2: "out of memory"}
_OUT_OF_RANGE = 3
_RANGE = 2.0**121
"""Fixed point holds smaller activations."""


class Product(enum.IntEnum):
    """What a weight and an activation are in the products of :func:`linear`; sums are float32."""

    EXACT = 0
    """Weights as they are; ``x`` as it is where the CPU multiplies bfloat16 (AVX-512), else in
    16-bit (float32: 24-bit) fixed point by blocks of eight."""
    BF16 = 1
    """Weights rounded once to bfloat16, ``x`` bfloat16; no zero points."""
    INT8 = 2
    """Weights as they are, ``x`` int8 as :func:`int4q.kernels.reference.linear_int8` has it."""


class _Args(ctypes.Structure):
    """``int4q_args`` of ``int4_cpu.h``, field by field."""

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


def decode_max_m(dtype: torch.dtype) -> int:
    """Rows of such an ``x`` up to which the decode kernel is faster than blocks on this CPU."""
    wide = _features() & _AVX512
    if wide and _features() & _BF16 and dtype == torch.bfloat16:
        return BF16_DECODE_MAX_M
    return (DECODE_MAX_M if wide else NARROW_DECODE_MAX_M)[dtype]


def has_fast_bf16() -> bool:
    """Whether torch multiplies bfloat16 faster than float32 here.

    It does not on an x86-64 CPU without AVX-512, where its bfloat16 takes five times as long.
    """
    return not _features() or bool(_features() & (_AVX512 | _BF16))


def unsupported(problem: Problem, product: Product = Product.EXACT) -> str | None:
    """Why :func:`linear` cannot (or should not) run ``problem``, or ``None``."""
    if reason := unsupported_weight(problem):
        return reason
    M, x_dtype = problem.M, problem.dtype
    if x_dtype not in _KINDS:
        return f"takes bfloat16, float16 and float32 activations, not {x_dtype}"
    if product == Product.BF16 and x_dtype != torch.bfloat16:
        return f"rounds weights to bfloat16 for bfloat16 activations, not {x_dtype}"
    if product == Product.BF16 and not _features() & _AVX512:
        return "rounds weights to bfloat16 with AVX-512 (F, BW, VL, VNNI) only"
    if M <= decode_max_m(x_dtype) or _uses_tiles(M, x_dtype, product):
        return None
    slower = f"slower than blocks above M = {decode_max_m(x_dtype)}"
    return f"{slower} on a CPU without AMX" if x_dtype == torch.bfloat16 else slower


def unsupported_weight(problem: Problem) -> str | None:
    """Why neither :func:`linear` nor :func:`dequantize` can take the weight, or ``None``."""
    if problem.device != "cpu":
        return f"runs on cpu, not {problem.device}"
    lib, reason = load()
    if lib is None:
        return reason
    if not _features() & _DECODE:
        return "needs an x86-64 CPU with AVX2, FMA and F16C, or an Arm one"
    N, K, group_size = problem.N, problem.K, problem.group_size
    if group_size not in _GROUP_SIZES:
        return f"group_size must be 32, 64, 128 or 256, not {group_size}"
    if K == 0 or N == 0 or K % group_size:
        return f"K must be a positive multiple of group_size {group_size}, not {K} (N = {N})"
    if problem.scale_dtype not in _KINDS:
        return f"takes bfloat16, float16 and float32 scales, not {problem.scale_dtype}"
    return None


def unsupported_dequantize(problem: Problem) -> str | None:
    """Why :func:`dequantize` cannot give ``problem.dtype`` of the weight, or ``None``."""
    if problem.dtype not in _KINDS:
        return f"writes float32, float16 and bfloat16, not {problem.dtype}"
    return unsupported_weight(problem)


def _problem(M: int, weight: Weight, dtype: torch.dtype) -> Problem:
    shape = M, weight.N, weight.K, weight.group_size
    return Problem("int4_linear", "cpu", dtype, weight.scale.dtype, *shape)


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    product: Product = Product.EXACT,
    out_of_range_rows: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``x @ W.T + bias``.

    Two kernels. For few rows (:func:`decode_max_m`) weights are read as they are stored and
    ``product`` says what is multiplied.
    For more (bfloat16 ``x`` on a CPU with AMX: from ``TILES_MIN_M``, unless ``INT8``) weights are
    rounded once to bfloat16. Both sum in float32, add the bias there and round once.

    Args:
        x: ``[M, K]``; any strides.
        weight: ``[N, K]``; copied where its rows are not bytes side by side.
        bias: ``[N]``.
        out_of_range_rows: gives the results of the rows of ``x`` with a NaN, an Inf or a number
            from 2^121 on, which fixed point (``EXACT``, ``INT8``) does not hold; without it they
            are NaN.

    Returns:
        ``[M, N]`` in ``x.dtype``.

    Raises:
        ValueError, TypeError: parts that do not fit together, or what :func:`unsupported` says.
    """
    M, N = x.shape[0], weight.N
    _check_weight(weight)
    if x.shape[1] != weight.K:
        raise ValueError(f"x must have {weight.K} columns (two a byte of qdata), got {x.shape[1]}")
    if product == Product.BF16 and weight.zero_point is not None:
        raise ValueError("zero_point must be None where weights are rounded to bfloat16")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must have shape [{N}], got {list(bias.shape)}")
    if reason := unsupported(_problem(M, weight, x.dtype), product):
        raise ValueError(f"compiled CPU kernel: {reason}")
    out = torch.empty((M, N), dtype=x.dtype)
    if M == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    if bias is not None:
        bias = bias.detach().to(torch.float32).contiguous()
    name = "int4q_gemm" if _uses_tiles(M, x.dtype, product) else "int4q_decode"
    in_range = _call(name, x, weight, bias, out, product)
    if not in_range and out_of_range_rows is not None:
        rows = ~(x.abs() < _RANGE).all(dim=1)
        out[rows] = out_of_range_rows(x[rows])
    return out


def _uses_tiles(M: int, x_dtype: torch.dtype, product: Product) -> bool:
    if product == Product.INT8 or x_dtype != torch.bfloat16:
        return False
    return M >= TILES_MIN_M and bool(_features() & _AMX)


def dequantize(weight: Weight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``q * scale + zero_point`` in float32, rounded once to ``dtype``.

    Args:
        weight: ``[N, K]``; copied where its rows are not bytes side by side.
        dtype: bfloat16, float16 or float32.
        out: contiguous ``[N, K]`` of ``dtype`` to write to.

    Returns:
        ``[N, K]``.

    Raises:
        ValueError, TypeError: parts that do not fit together, or a weight the kernel cannot take.
    """
    _check_weight(weight)
    if dtype not in _KINDS:
        raise TypeError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    if reason := unsupported_weight(_problem(0, weight, dtype)):
        raise ValueError(f"compiled CPU kernel: {reason}")
    shape = weight.N, weight.K
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    elif out.dtype != dtype or out.shape != shape or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {dtype} {list(shape)}, got {out.dtype} {list(out.shape)}"
        )
    _call("int4q_dequant", None, weight, None, out)
    return out


def _check_weight(weight: Weight) -> None:
    qdata, scale, zero_point, group_size, _ = weight
    if qdata.dtype != torch.int8:
        raise TypeError(f"qdata must be int8 (two signed nibbles a byte), got {qdata.dtype}")
    zero_point = scale if zero_point is None else zero_point
    if zero_point.dtype != scale.dtype:
        raise TypeError(f"zero_point must have scale's dtype {scale.dtype}, got {zero_point.dtype}")
    expected = (weight.K // group_size, weight.N)
    for name, t in (("scale", scale), ("zero_point", zero_point)):
        if t.shape != expected:
            raise ValueError(
                f"{name} must have shape [n_groups, N] = {list(expected)}, got {list(t.shape)}"
            )


def _call(
    name: str,
    x: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    out: Tensor,
    product: Product = Product.EXACT,
) -> bool:
    """Run a kernel; whether all activations were in the range of fixed point."""
    lib, _ = load()
    qdata, scale, zero_point, group_size, signed = weight
    # The kernels read rows byte after byte; only an exotic view is laid out otherwise.
    qdata = qdata if qdata.stride(1) == 1 else qdata.contiguous()
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
            0 if x is None else x.shape[0],
            weight.N,
            weight.K,
            group_size,
            0 if x is None else _KINDS[x.dtype],
            _KINDS[scale.dtype],
            _KINDS[out.dtype],
            torch.get_num_threads(),
            not signed,
            product,
            _features(),
        )
    )
    if status in _ERRORS:
        raise RuntimeError(f"{name}: {_ERRORS[status]}")
    return status != _OUT_OF_RANGE
