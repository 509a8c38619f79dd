"""Where the elements of a grouped 4-bit tensor lie: pure arithmetic on shapes, no tensors.

A tensor has a *logical* shape and a ``block_size`` of the same length with one entry that is
not 1: the group size, at the *grouped dim*. Its parts are held in *storage order*: the logical
dims with the grouped dim moved last (so a transposed weight keeps its storage untouched). One
entry of a part covers ``unit`` logical elements along the grouped dim: 2 for packed nibbles,
``group_size`` for scales and zero points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from int4q import errors

GROUP_SIZES = (32, 64, 128, 256)
NIBBLES_PER_BYTE = 2


def check_group_size(group_size: int) -> int:
    """``group_size`` itself if it is one of ``GROUP_SIZES``; ``ValueError`` otherwise."""
    if group_size not in GROUP_SIZES:
        raise errors.value(f"group_size must be one of {GROUP_SIZES}", group_size)
    return group_size


def grouped_dim(block_size: Sequence[int]) -> int:
    """The one dim of ``block_size`` that is not 1.

    Raises:
        ValueError: no or several such dims, or a group size that is not supported.
    """
    grouped = [d for d, size in enumerate(block_size) if size != 1]
    if len(grouped) != 1:
        raise errors.value(
            "block_size must have exactly one entry other than 1 (the group size)",
            list(block_size),
            "For a weight [N, K] in groups of 128 along K use [1, 128]",
        )
    check_group_size(block_size[grouped[0]])
    return grouped[0]


def storage_dim(dim: int, grouped: int, ndim: int) -> int:
    """The storage dim that holds logical dim ``dim``."""
    if dim == grouped:
        return ndim - 1
    return dim - (dim > grouped)


def storage_shape(shape: Sequence[int], grouped: int) -> list[int]:
    """The logical sizes in storage order."""
    return [*shape[:grouped], *shape[grouped + 1 :], shape[grouped]]


def storage_permutation(dims: Sequence[int], grouped: int) -> list[int]:
    """What a logical ``permute(dims)`` does to the storage dims (the grouped one stays last)."""
    ndim = len(dims)
    moved = [storage_dim(d, grouped, ndim) for d in dims if d != grouped]
    return [*moved, ndim - 1]


def wrap_dim(dim: int, ndim: int) -> int:
    """A dim in ``0 .. ndim - 1``; ``IndexError`` out of range, as torch words it."""
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-ndim}, {ndim - 1}], "
            f"but got {dim})"
        )
    return dim % ndim


def slice_bounds(size: int, start: int | None, end: int | None) -> tuple[int, int]:
    """Python slice bounds clamped to ``0 <= start <= end <= size``."""
    start = 0 if start is None else start
    end = size if end is None else end
    start = min(max(start + size if start < 0 else start, 0), size)
    end = min(max(end + size if end < 0 else end, start), size)
    return start, end


def check_aligned_slice(start: int, end: int, step: int, group_size: int) -> None:
    """A slice of the grouped dim must take whole groups.

    Raises:
        ValueError: a bound inside a group, or a step other than 1.
    """
    if step != 1:
        raise errors.value("the step of a slice of the grouped dim must be 1", step, _DEQUANTIZE)
    if start % group_size or end % group_size:
        raise errors.value(
            f"a slice of the grouped dim must start and end on a multiple of "
            f"group_size {group_size}",
            f"[{start}:{end}]",
            _DEQUANTIZE,
        )


def regroup(
    shape: Sequence[int], new_shape: Sequence[int], grouped: int, group_size: int, fix: str = ""
) -> tuple[list[int], int]:
    """Check a ``view`` of ``shape`` as ``new_shape`` and find the grouped dim in it.

    The view is exact when every group stays a run of neighbours in one dim: the grouped dim is
    kept, split with an inner part that holds whole groups, or merged with dims before it. (Dims
    after it cannot be merged into it: they lie between the elements of a group.)

    Returns:
        The new shape with ``-1`` resolved, and its grouped dim.

    Raises:
        ValueError: the element counts differ, or the view would mix groups.
    """
    new_shape = _resolve(shape, new_shape)
    inner = _prod(shape[grouped + 1 :])
    # The new grouped dim is the one whose elements lie `inner` apart. Counted in elements `inner`
    # apart, groups start at multiples of group_size in both shapes.
    for dim in range(len(new_shape) - 1, -1, -1):
        tail = _prod(new_shape[dim + 1 :])
        if tail == inner and new_shape[dim] != 1:
            if new_shape[dim] % group_size == 0:
                return new_shape, dim
            break
    raise errors.value(
        f"a view must keep the grouped dim {grouped} in whole groups of {group_size}",
        f"{errors.dims(shape)} -> {errors.dims(new_shape)}",
        fix or _DEQUANTIZE,
    )


def _resolve(shape: Sequence[int], new_shape: Sequence[int]) -> list[int]:
    total, new_shape = _prod(shape), list(new_shape)
    if new_shape.count(-1) > 1:
        raise errors.value("only one dimension can be inferred", errors.dims(new_shape))
    if -1 in new_shape:
        known = _prod(s for s in new_shape if s != -1)
        if known == 0 or total % known:
            raise errors.value(
                f"a view must keep the {total} elements of shape {errors.dims(shape)}",
                errors.dims(new_shape),
            )
        new_shape[new_shape.index(-1)] = total // known
    if _prod(new_shape) != total:
        raise errors.value(
            f"a view must keep the {total} elements of shape {errors.dims(shape)}",
            errors.dims(new_shape),
        )
    return new_shape


def _prod(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


_DEQUANTIZE = "Use .dequantize() first for a plain tensor of any shape"
