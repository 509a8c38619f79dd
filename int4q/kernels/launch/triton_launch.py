"""Launch a Triton or Gluon kernel in Triton's own way, and tell the recorder of the call what ran.

Triton's launch hooks see the first call of a kind only: later ones are replayed.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator, Sequence

import triton
from torch import Tensor

from int4q.kernels.launch import images, record
from int4q.kernels.launch.plan import ABSOLUTE, Address, Launch
from int4q.kernels.launch.tensor_map import ALIGN, encode

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's CPU interpreter runs the kernels (fixed when Triton is first imported)."""
KNOWN_TRITON = ("3.6",)
"""Versions of Triton whose calling convention for compiled kernels is the one replayed here."""
_INTEGERS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
}  # fmt: skip


@functools.cache
def unavailable() -> str | None:
    """Why Triton's launches are not replayed; ``None`` where they are."""
    if INTERPRET:
        return "Triton's interpreter runs the kernels"
    if ".".join(triton.__version__.split(".")[:2]) not in KNOWN_TRITON:
        return f"Triton must be one of {KNOWN_TRITON} to be replayed, got {triton.__version__}"
    return None


def launch(kernel, grid: int | tuple[int, ...], *args, **options) -> None:
    """``kernel[grid](*args, **options)``; ``args`` are all that are no constexpr."""
    grid = grid if isinstance(grid, tuple) else (grid,)
    compiled = kernel[grid](*args, **options)
    if recorder := record.recorder():
        reason = unavailable() or _not_replayable(compiled)
        if reason is None:
            images.note(compiled.function, compiled.kernel, compiled.name)
            recorder.launch(noted(compiled, grid, args))
        else:
            recorder.fail(reason)


def _not_replayable(compiled) -> str | None:
    facts = compiled.metadata
    if (facts.num_ctas, facts.launch_cooperative_grid) != (1, False):
        return "a plan holds no clusters and no cooperative grids of Triton's"
    if facts.global_scratch_size or facts.profile_scratch_size:
        return "the kernel takes scratch memory from Triton"
    return None


def noted(compiled, grid: Sequence[int], args: Sequence) -> Launch:
    """A launch as a plan holds it, its addresses absolute."""
    block, offsets, pointers, maps = bytearray(), [], [], []

    def put(value: bytes, align: int) -> int:
        block.extend(bytes(-len(block) % align))
        offsets.append(len(block))
        block.extend(value)
        return offsets[-1]

    for kind, value in _parameters(compiled, args):
        if kind == "pointer":
            pointers.append((put(bytes(8), 8), Address(ABSOLUTE, value.data_ptr())))
        elif kind == "map":
            descriptor, layout = value
            box = tensor_map(descriptor, layout)
            maps.append((put(box, ALIGN), Address(ABSOLUTE, descriptor.base.data_ptr())))
        else:
            packed = struct.pack(f"={kind}", value)
            put(packed, len(packed))
    facts = compiled.metadata
    size = facts.shared, bool(facts.launch_pdl)
    shape = (*grid, 1, 1)[:3], 32 * facts.num_warps, *size
    places = tuple(offsets), tuple(pointers), tuple(maps)
    return Launch(compiled.function, *shape, bytes(block), *places)


def _parameters(compiled, args: Sequence) -> Iterator[tuple[str, object]]:
    """The kernel's parameters in order: ``pointer``, ``map``, or a format of ``struct``."""
    types = list(compiled.src.signature.values())
    layouts = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    for kind, arg in zip(types, args, strict=False):
        if kind == "constexpr":  # a value that Triton compiled in, such as 1
            continue
        if isinstance(arg, Tensor):
            yield "pointer", arg
        elif hasattr(arg, "base"):  # a descriptor of a tensor
            yield "map", (arg, next(layouts))
            yield from (("i", size) for size in arg.shape)
            yield from (("q", stride) for stride in arg.strides)
        else:
            yield _INTEGERS[kind], arg
    yield from (("Q", 0),) * 2  # Triton's own scratch memories, unused


def tensor_map(descriptor, layout: dict) -> bytes:
    """The driver's form (a ``CUtensorMap``) of a host descriptor, as Triton encodes it.

    Args:
        descriptor: has ``base``, ``shape`` and ``strides`` (elements, the last one 1).
        layout: its entry in the compiled kernel's ``tensordesc_meta``.
    """
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if descriptor.padding != "zero" or layout["fp4_padded"]:
        raise RuntimeError("only plain zero-padded tensor maps can be replayed")
    size = layout["elem_size"]
    return encode(
        descriptor.base.data_ptr(),
        TMA_DTYPE_DEVICE_TO_HOST[layout["elem_type"]],
        descriptor.shape,
        [size * stride for stride in descriptor.strides[:-1]],
        layout["block_size"],
        layout["swizzle"],
    )
