"""What every Triton and Gluon kernel shares: unpacking, group scales, the epilogue, the activation.

Two packings of 4-bit weights, told apart by the constexpr ``SIGNED``:

* ``SIGNED=True``: two's complement nibbles, ``q = nibble ^ 8 - 8`` (the tensors' ``qdata``);
* ``SIGNED=False``: offset binary, ``q = nibble - 8`` (``w_packed``).

Both hold even k in the low nibble. ``ON_GPU`` picks inline PTX; without it the same values come
from plain Triton arithmetic, which the interpreter (``TRITON_INTERPRET=1``) runs on a CPU.

The matrix kernels see ``qdata`` as int16 ``[N, K/4]``: word j holds k = 4j .. 4j+3, and one shift
and one logical operation turn nibble ``i`` of two words into a pair of numbers. The activation is
put in the same order once a call (arrange.py), so fragments need no shuffles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from int4q.kernels.launch.triton_launch import INTERPRET

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TRITON_DTYPE = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def _repair_interpreter() -> None:
    """Let the interpreter use its one-element arrays as ``range`` bounds.

    Triton 3.6 calls ``int()`` on them, which NumPy 2.4 and later refuse.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if INTERPRET:
    _repair_interpreter()


# --- why a problem cannot run -----------------------------------------------------------------


def unsupported_anywhere(problem) -> str | None:
    """The conditions common to all kernels here; ``problem`` is a ``registry.Problem``."""
    if problem.device != "cuda" and not INTERPRET:
        return f"Triton kernels run on cuda (or under TRITON_INTERPRET=1), not on {problem.device}"
    if problem.capability is not None and problem.capability < (8, 0):
        return f"needs compute capability 8.0 or newer, this device has {problem.capability}"
    for name, dtype in (("activation", problem.dtype), ("scale", problem.scale_dtype)):
        if dtype not in FLOATS:
            return f"{name} dtype must be bfloat16, float16 or float32, not {dtype}"
    if problem.group_size not in (32, 64, 128, 256) or problem.K % problem.group_size:
        return f"K={problem.K} must be a multiple of group_size={problem.group_size} in 32..256"
    return None


# --- unpacking (each jit helper works in Triton and in Gluon) ---------------------------------


@triton.constexpr_function
def _slot_asm(slot, signed, bf16):
    # The bits of 128.0 (bf16) or 1024.0 (fp16) have a zero mantissa tail: the nibble xor-ed into
    # them *is* the number 128 + u or 1024 + u. For signed nibbles the xor flips the sign bit too.
    magic = 0x43004300 if bf16 else 0x64006400
    magic += 0x00080008 if signed else 0
    return (
        f"{{ .reg .b32 t; shr.u32 t, $1, {4 * slot}; lop3.b32 $0, t, 0x000f000f, {magic}, 0x6A; }}"
    )


@triton.constexpr_function
def _recentre_asm(bf16):
    # 128 + u -> u - 8 (1024 + u in fp16). An fma by one: add.bf16x2 needs sm_90, fma only sm_80.
    if bf16:
        return (
            "{ .reg .b32 a, b; mov.b32 a, 0x3F803F80; mov.b32 b, 0xC308C308; "
            "fma.rn.bf16x2 $0, $1, a, b; }"
        )
    return (
        "{ .reg .b32 a, b; mov.b32 a, 0x3C003C00; mov.b32 b, 0xE408E408; "
        "fma.rn.f16x2 $0, $1, a, b; }"
    )


@triton.constexpr_function
def _fma_asm(dtype, has_zero):
    suffix = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    # Adding -0.0 leaves every product as it is, negative zeros too.
    return (
        f"fma.rn.{suffix} $0, $1, $2, $3;"
        if has_zero
        else f"{{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.{suffix} $0, $1, $2, z; }}"
    )


@triton.constexpr_function
def _bytes_asm(signed):
    # Four bytes -> their four low and four high nibbles as bf16 128 + u.
    flip = 0x08080808 if signed else 0
    return (
        "{ .reg .b32 t, c; mov.b32 c, 0x43434343; "
        f"lop3.b32 t, $4, 0x0f0f0f0f, {flip}, 0x6A; "
        "prmt.b32 $0, t, c, 0x4140; prmt.b32 $1, t, c, 0x4342; "
        f"shr.u32 t, $4, 4; lop3.b32 t, t, 0x0f0f0f0f, {flip}, 0x6A; "
        "prmt.b32 $2, t, c, 0x4140; prmt.b32 $3, t, c, 0x4342; }"
    )


@triton.jit
def unpack_slot(
    words, SLOT: tl.constexpr, SIGNED: tl.constexpr, DTYPE: tl.constexpr, ON_GPU: tl.constexpr
):
    """Nibble ``SLOT`` (0..3) of int16 ``words`` as q in -8..7, exact in ``DTYPE``."""
    # (A constexpr is no dtype to the inline assembly, so each branch names its own.)
    if ON_GPU and DTYPE == tl.bfloat16:
        raised = tl.inline_asm_elementwise(
            _slot_asm(SLOT, SIGNED, True), "=r,r", [words],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
        return tl.inline_asm_elementwise(
            _recentre_asm(True), "=r,r", [raised], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif ON_GPU and DTYPE == tl.float16:
        raised = tl.inline_asm_elementwise(
            _slot_asm(SLOT, SIGNED, False), "=r,r", [words],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
        return tl.inline_asm_elementwise(
            _recentre_asm(False), "=r,r", [raised], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        nibble = (words.to(tl.int32) >> (4 * SLOT)) & 15
        if SIGNED:
            nibble = nibble ^ 8
        return (nibble - 8).to(tl.float32).to(DTYPE)


@triton.jit
def unpack_bytes(packed, SIGNED: tl.constexpr, ON_GPU: tl.constexpr):
    """Low (even k) and high (odd k) nibbles of int8 ``packed`` as float32 q in -8..7."""
    if ON_GPU:
        low, high = tl.inline_asm_elementwise(
            _bytes_asm(SIGNED), "=&r,=&r,=&r,=&r,r", [packed],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
        return low.to(tl.float32) - 136.0, high.to(tl.float32) - 136.0
    else:
        wide = packed.to(tl.int32)
        low = wide & 15
        high = (wide >> 4) & 15
        if SIGNED:
            low = low ^ 8
            high = high ^ 8
        return (low - 8).to(tl.float32), (high - 8).to(tl.float32)


@triton.jit
def rounded(value, DTYPE: tl.constexpr, ON_GPU: tl.constexpr):
    """float32 ``value`` in ``DTYPE``, to nearest even (the interpreter's cast truncates bf16)."""
    if ON_GPU or DTYPE != tl.bfloat16:
        return value.to(DTYPE)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return nearest.to(tl.float32, bitcast=True).to(DTYPE)


# --- scales -----------------------------------------------------------------------------------


@triton.jit
def scaled(q, scale, zero, HAS_ZERO: tl.constexpr, ON_GPU: tl.constexpr):
    """``q * scale + zero`` in the dtype of q with one rounding (the weight that the dot sees)."""
    if ON_GPU and q.dtype.primitive_bitwidth == 16 and scale.dtype == q.dtype:
        if HAS_ZERO:
            return tl.inline_asm_elementwise(
                _fma_asm(q.dtype, True), "=r,r,r,r", [q, scale, zero],
                dtype=q.dtype, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                _fma_asm(q.dtype, False), "=r,r,r", [q, scale],
                dtype=q.dtype, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        value = q.to(tl.float32) * scale.to(tl.float32)
        if HAS_ZERO:
            value += zero.to(tl.float32)
        return rounded(value, q.dtype, ON_GPU)


@triton.jit
def group_of_step(step, BLOCK_K: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """The group that block ``step`` of K begins in (written so that its alignment is known)."""
    if BLOCK_K >= GROUP_SIZE:
        return step * (BLOCK_K // GROUP_SIZE)
    else:
        return step // (GROUP_SIZE // BLOCK_K)


@triton.jit
def load_groups(ptr, rows, group, n_groups, N, stride_group, stride_row):
    """Entries ``[rows, group]`` of a ``[n_groups, N]`` tensor; 0 outside of it.

    Zeros outside matter: masked-off weights decode to -8, and only a zero scale silences them.
    """
    inside = (rows < N)[:, None] & (group < n_groups)[None, :]
    offset = rows.to(tl.int64)[:, None] * stride_row + group.to(tl.int64)[None, :] * stride_group
    return tl.load(ptr + offset, mask=inside, other=0.0)


@triton.jit
def spread(values, WIDTH: tl.constexpr):
    """Repeat each column of ``[rows, groups]`` WIDTH times: ``[rows, groups * WIDTH]``."""
    ROWS: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = values.shape[1]
    if GROUPS == 1:
        return tl.broadcast_to(values, [ROWS, WIDTH])
    else:
        wide = tl.broadcast_to(values[:, :, None], [ROWS, GROUPS, WIDTH])
        return tl.reshape(wide, [ROWS, GROUPS * WIDTH])


# --- epilogue ---------------------------------------------------------------------------------


@triton.jit
def with_bias(acc, bias_ptr, rows, N, HAS_BIAS: tl.constexpr):
    """float32 ``acc [BLOCK_N, BLOCK_M]`` plus ``bias [N]``."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def store_transposed(out_ptr, values, rows, cols, M, N, ON_GPU: tl.constexpr):
    """Store ``values [BLOCK_N, BLOCK_M]`` into the contiguous ``out [M, N]``."""
    inside = (rows < N)[:, None] & (cols < M)[None, :]
    offset = cols.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(out_ptr + offset, rounded(values, out_ptr.dtype.element_ty, ON_GPU), mask=inside)


@triton.jit
def wait_for_producer(PDL: tl.constexpr):
    """Under programmatic dependent launch: wait until the kernel before has written its results."""
    if PDL:
        gdc_wait()


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile ``(m, n)`` number ``pid``, walking GROUP_M tiles of M for each tile of N (L2 reuse)."""
    band = GROUP_M * tiles_n
    first = (pid // band) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inner = pid % band
    return first + inner % height, inner // height


# --- plain facts about tensors ----------------------------------------------------------------


def as_words(packed: Tensor) -> Tensor:
    """int8 ``[N, K/2]`` as int16 ``[N, K/4]``, copying only where the bytes cannot be seen so."""
    aligned = packed.stride(1) == 1 and packed.stride(0) % 2 == 0
    if not aligned or packed.storage_offset() % 2 or packed.data_ptr() % 2:
        packed = packed.contiguous() if not packed.is_contiguous() else packed.clone()
    return packed.view(torch.int16)


def matched_groups(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """``scale`` and ``zero_point`` in one dtype (the scale again where there is no zero point)."""
    if zero_point is None:
        return scale, scale
    if scale.dtype == zero_point.dtype:
        return scale, zero_point
    dtype = torch.promote_types(scale.dtype, zero_point.dtype)
    return scale.to(dtype), zero_point.to(dtype)


def has_launch_overlap(device: torch.device) -> bool:
    """Whether the device supports programmatic dependent launch (compute capability 9.0+)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
