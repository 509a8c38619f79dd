"""AWQ checkpoints in the layout of its ``gemm`` kernels.

``qweight``  int32 ``[K, N/8]``: eight values along N a word, nibble ``i`` for column ``ORDER[i]``
``qzeros``   int32 ``[n_groups, N/8]``, packed alike
``scales``   float16 ``[n_groups, N]``

``value[n, k] = (u - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from int4q import errors
from int4q.checkpoint import foreign
from int4q.checkpoint.foreign import EXACT, Foreign
from int4q.checkpoint.gptq import PARTS, SCALES
from int4q.checkpoint.source import Source
from int4q.tensor import Int4Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_EIGHTS = -0x77777778
"""A word of eight zeros of 8."""


def to_int4(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Int4Tensor:
    """A weight ``[N, K]`` from its parts, as the module describes them; exact.

    Raises:
        TypeError: a part's dtype.
        ValueError: a part's shape.
    """
    n_groups, N = scales.shape
    foreign.check("qweight", qweight, (torch.int32,), (qweight.shape[0], N // 8))
    foreign.check("qzeros", qzeros, (torch.int32,), (n_groups, N // 8))
    foreign.check("scales", scales, SCALES, (n_groups, N))
    u = foreign.unpack_int32(qweight, ORDER).mT.contiguous()
    return foreign.from_zeros(u, scales.mT, foreign.unpack_int32(qzeros, ORDER).mT)


def weights(source: Source) -> Iterator[Foreign]:
    """The weights of a checkpoint.

    Raises:
        ValueError: another layout than ``gemm``, not 4 bits, or a part is missing.
    """
    config = source.config["quantization_config"]
    for key, wanted in (("bits", 4), ("version", "gemm")):
        if config.get(key, wanted) != wanted:
            raise errors.value(f"an AWQ checkpoint must have {key} {wanted}", config[key])
    for qweight in source.tensors:
        module, dot, part = qweight.rpartition(".")
        if part != PARTS[0]:
            continue
        names = [f"{module}{dot}{name}" for name in PARTS]
        packed, _, scales = (source.stored(name) for name in names)
        symmetric = bool((source.read(names[1]) == _EIGHTS).all())
        K, N = packed.shape[0], packed.shape[1] * 8
        dtype = scales.dtype if symmetric else torch.float32
        like = foreign.like((N, K), K // max(1, scales.shape[0]), dtype)
        yield Foreign(f"{module}{dot}weight", tuple(names), like, _make)


def _make(*parts: Tensor) -> tuple[Int4Tensor, str]:
    return to_int4(*parts), EXACT
