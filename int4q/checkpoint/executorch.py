"""ExecuTorch's coalesced CUDA weights: unsigned values, zero points in units of the scale.

``qdata``               int8 ``[N, K/2]``, ``u`` in 0..15, even k in the low nibble
``scale``, ``zero_point``  bfloat16 ``[N, n_groups]``; ``value = (u - zero_point) * scale``

(int4q's own coalesced tensor has the same shapes and another meaning of both.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4q.checkpoint import foreign
from int4q.checkpoint.gptq import SCALES
from int4q.packing import offset_to_signed
from int4q.tensor import Int4Tensor


def to_int4(qdata: Tensor, scale: Tensor, zero_point: Tensor) -> Int4Tensor:
    """A weight ``[N, K]`` from its parts, as the module describes them.

    Exact where the zero points are whole numbers: the result's are ``(8 - zero_point) * scale``,
    rounded to float32 else.

    Raises:
        TypeError: a part's dtype.
        ValueError: a part's shape.
    """
    N, K = qdata.shape[0], qdata.shape[1] * 2
    foreign.check("qdata", qdata, (torch.int8, torch.uint8), (N, K // 2))
    foreign.check("scale", scale, SCALES, (N, scale.shape[1]))
    foreign.check("zero_point", zero_point, SCALES, (N, scale.shape[1]))
    scale = scale.float()
    zero = ((8 - zero_point.double()) * scale.double()).float()
    signed = offset_to_signed(qdata.view(torch.int8))
    parts = scale.mT.contiguous(), zero.mT.contiguous()
    return Int4Tensor(signed, *parts, [1, K // scale.shape[1]], (N, K))
