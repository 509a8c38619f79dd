"""torchao's older 4-bit weights: ``AffineQuantizedTensor``, which torchao has up to 0.17.

Whatever its layout, ``get_plain()`` gives

``q``           integer ``[N, K]``, 0..15 or -8..7 (``quant_min`` to ``quant_max``)
``scale``       ``[N, n_groups]``
``zero_point``  ``[N, n_groups]``, or ``None``

with ``value = (q - zero_point) * scale``, or, where ``zero_point_domain`` is ``FLOAT`` (what
``int4_weight_only`` made for its tinygemm kernel), ``(q - 8) * scale + zero_point``. The layout of
that kernel is padded, and unpacked by the kernel itself: on its GPU only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from int4q import geometry
from int4q.checkpoint import foreign
from int4q.tensor import Int4Tensor


def tensor_class() -> type[Any] | None:
    """The class; of torchao 0.18 a stub without instances, ``None`` of one that has not even it."""
    try:
        from torchao.dtypes import AffineQuantizedTensor
    except ImportError:
        return None
    return AffineQuantizedTensor


def is_4bit(t: Any) -> bool:
    """Whether an ``AffineQuantizedTensor`` has 4 bits, in groups along its last dim."""
    whole = all(size == 1 for size in t.block_size[:-1])
    return whole and (t.quant_min, t.quant_max) in ((0, 15), (-8, 7))


def to_int4(t: Any) -> Int4Tensor:
    """The weight; exact, with float32 scales where zero points need them.

    (Scales that are float32 themselves have no room for that: integer zero points are rounded.)

    Raises:
        ValueError: a group size that :class:`~int4q.Int4Tensor` does not have.
    """
    *rows, K = t.shape
    group_size: int = t.block_size[-1]
    geometry.check_group_size(group_size)
    q, scale, zero = t.tensor_impl.get_plain()
    zero = torch.zeros_like(scale) if zero is None else zero

    def unpadded(part: Tensor, columns: int) -> Tensor:
        part = part.reshape(*q.shape[:-1], -1)
        return part[tuple(slice(n) for n in (*rows, columns))]

    u = unpadded(q, K).to(torch.int8) - t.quant_min
    scale, zero = unpadded(scale, K // group_size), unpadded(zero, K // group_size)
    if t.zero_point_domain.name == "FLOAT":
        return foreign.assemble(u, scale, zero)
    return foreign.from_zeros(u, scale, zero - t.quant_min)
