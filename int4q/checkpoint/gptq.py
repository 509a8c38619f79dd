"""GPTQ checkpoints (AutoGPTQ, GPTQModel, transformers' ``GPTQConfig``).

``qweight``  int32 ``[K/8, N]``: eight values along K a word, the first in the lowest bits
``qzeros``   int32 ``[n_groups, N/8]``: zeros, packed along N; version 1 stores ``zero - 1``
``scales``   float16 ``[n_groups, N]``
``g_idx``    int32 ``[K]``: the group of each input

``value[n, k] = (u - zero) * scale``. With act-order (``desc_act``) neighbours in K are in different
groups: no grouped tensor holds that, and it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from int4q import errors
from int4q.checkpoint import foreign
from int4q.checkpoint.foreign import EXACT, Foreign
from int4q.checkpoint.source import Source
from int4q.tensor import Int4Tensor

SCALES = (torch.float16, torch.bfloat16, torch.float32)
PARTS = ("qweight", "qzeros", "scales")


def to_int4(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    v2: bool = False,
) -> Int4Tensor:
    """A weight ``[N, K]`` from its parts, as the module describes them; exact.

    Args:
        v2: ``qzeros`` hold the zeros themselves (``checkpoint_format: gptq_v2``).

    Raises:
        TypeError: a part's dtype.
        ValueError: a part's shape, or a ``g_idx`` that is not in order.
    """
    n_groups, N = scales.shape
    K = qweight.shape[0] * 8
    foreign.check("qweight", qweight, (torch.int32,), (K // 8, N))
    foreign.check("qzeros", qzeros, (torch.int32,), (n_groups, N // 8))
    foreign.check("scales", scales, SCALES, (n_groups, N))
    if g_idx is not None:
        in_order = torch.arange(K, device=g_idx.device) // (K // n_groups)
        if not torch.equal(g_idx.long(), in_order):
            raise errors.value(
                "a GPTQ weight must have its groups in order (g_idx[k] = k // group_size)",
                "act-order (desc_act)",
                "Its groups are scattered over the inputs; dequantise and quantise it again",
            )
    u = foreign.unpack_int32(qweight.mT.contiguous())
    zero = foreign.unpack_int32(qzeros).mT + (0 if v2 else 1)
    return foreign.from_zeros(u, scales.mT, zero)


def weights(source: Source) -> Iterator[Foreign]:
    """The weights of a checkpoint.

    Raises:
        ValueError: not 4 bits, or a part is missing.
    """
    config = source.config["quantization_config"]
    if config.get("bits") != 4:
        raise errors.value("a GPTQ checkpoint must have 4 bits", config.get("bits"))
    v2 = config.get("checkpoint_format") == "gptq_v2"
    for qweight in source.tensors:
        module, dot, part = qweight.rpartition(".")
        if part != PARTS[0]:
            continue
        names = [f"{module}{dot}{name}" for name in PARTS]
        packed, zeros, scales = (source.stored(name) for name in names)
        symmetric = bool((source.read(names[1]) == (-0x77777778 if v2 else 0x77777777)).all())
        K, N = packed.shape[0] * 8, packed.shape[1]
        dtype = scales.dtype if symmetric else torch.float32
        like = foreign.like((N, K), K // max(1, scales.shape[0]), dtype)
        if (g_idx := f"{module}{dot}g_idx") in source.tensors:
            names.append(g_idx)
        yield Foreign(f"{module}{dot}weight", tuple(names), like, partial(_make, v2=v2))


def _make(*parts: Tensor, v2: bool) -> tuple[Int4Tensor, str]:
    return to_int4(*parts, v2=v2), EXACT
