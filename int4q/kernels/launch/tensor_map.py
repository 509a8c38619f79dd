"""Tensor maps (``CUtensorMap``): what Hopper's copy engine reads boxes of a matrix by."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from int4q.kernels.launch import driver

BYTES, ALIGN = 128, 64
PROMOTE_TO_128_BYTES, PROMOTE_TO_256_BYTES = 2, 3  # CU_TENSOR_MAP_L2_PROMOTION_L2_*
NO_SWIZZLE, SWIZZLE_128_BYTES = 0, 3  # CU_TENSOR_MAP_SWIZZLE_*
_UNSIGNED = {1: 0, 2: 1, 4: 2}  # CU_TENSOR_MAP_DATA_TYPE_UINT8, 16, 32 by bytes


def encode(
    address: int,
    kind: int,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle: int,
    promotion: int = PROMOTE_TO_128_BYTES,
) -> bytes:
    """The driver's form of a map; what lies outside of the tensor is read as zeros.

    Args:
        address: of the first element, a multiple of 16.
        kind: a ``CUtensorMapDataType``.
        shape, box: elements, the dim whose elements are adjacent last.
        strides: bytes, of all dims but the last; multiples of 16.
        swizzle, promotion: as the driver numbers them.
    """
    memory = (ctypes.c_char * (BYTES + ALIGN))()
    shift = -ctypes.addressof(memory) % ALIGN
    encoded = (ctypes.c_char * BYTES).from_buffer(memory, shift)
    rank = len(shape)
    driver.call(
        "cuTensorMapEncodeTiled",
        encoded,
        kind,
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * rank)(*reversed(strides)),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,  # not interleaved
        swizzle,
        promotion,
        0,  # zeros outside
    )
    return bytes(encoded)


def fits(tensor: Tensor) -> bool:
    """Whether a map can be made of a matrix: whole rows in memory, each on 16 bytes."""
    row = tensor.stride(0) * tensor.element_size()
    whole = tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]
    return whole and not (row | tensor.data_ptr()) % 16


def of_matrix(tensor: Tensor, box: Sequence[int], swizzle: int = NO_SWIZZLE) -> bytes:
    """The map of a matrix that :func:`fits`, its elements as unsigned integers."""
    item = tensor.element_size()
    sides = tensor.shape, [tensor.stride(0) * item]
    kind = _UNSIGNED[item]
    return encode(tensor.data_ptr(), kind, *sides, box, swizzle, PROMOTE_TO_256_BYTES)
