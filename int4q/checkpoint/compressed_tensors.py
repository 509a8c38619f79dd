"""compressed-tensors' ``pack-quantized`` checkpoints of 4-bit integers, in and out.

``weight_packed``      int32 ``[N, K/8]``: eight values along K a word, stored as ``q + 8``
``weight_scale``       ``[N, n_groups]``
``weight_zero_point``  int32 ``[N/8, n_groups]``, asymmetric ones only: packed along N, ``+ 8`` too
``weight_shape``       int64 ``[2]``: N, K
``weight_g_idx``       int32 ``[K]``, with act-order only, which is refused

``value[n, k] = (q - zero_point) * scale``. Read as bytes ``weight_packed`` is ``qdata`` XOR 0x88.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from int4q import errors, geometry
from int4q.checkpoint import foreign
from int4q.checkpoint.foreign import EXACT, Foreign
from int4q.checkpoint.gptq import SCALES
from int4q.checkpoint.source import Source
from int4q.packing import signed_to_offset
from int4q.tensor import Int4Tensor

FORMAT = "pack-quantized"
_WANTED: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "strategy": ("group", "channel"),
    "actorder": (None, "static", "weight"),
    "dynamic": (False, None),
}


def to_int4(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    *,
    group_size: int,
) -> Int4Tensor:
    """A weight ``[N, K]`` from its parts, as the module describes them; exact.

    Args:
        group_size: of the result; a scale that serves a whole row or more of its groups is
            repeated.

    Raises:
        TypeError: a part's dtype.
        ValueError: a part's shape.
    """
    N, K = weight_packed.shape[0], weight_packed.shape[1] * 8
    scale = _spread(weight_scale, N, K // group_size)
    foreign.check("weight_packed", weight_packed, (torch.int32,), (N, K // 8))
    foreign.check("weight_scale", weight_scale, SCALES, tuple(weight_scale.shape))
    u = foreign.unpack_int32(weight_packed)
    if weight_zero_point is None:
        return foreign.assemble(u, scale, None)
    columns = weight_scale.shape[1]
    expected = (-(-N // 8), columns)
    foreign.check("weight_zero_point", weight_zero_point, (torch.int32,), expected)
    zero = foreign.unpack_int32(weight_zero_point.mT.contiguous()).mT[:N]
    return foreign.from_zeros(u, scale, _spread(zero, N, K // group_size))


def from_int4(t: Int4Tensor) -> dict[str, Tensor]:
    """The parts of a symmetric weight ``[N, K]``; the inverse of :func:`to_int4`.

    Raises:
        ValueError: it has zero points, an ``act_pre_scale``, is a stack or transposed: the format
            has no such weights (its zero points are integers).
    """
    if t.ndim != 2 or t.grouped_dim != 1 or t.act_pre_scale is not None:
        rule = "compressed-tensors takes weights [N, K] without act_pre_scale"
        raise errors.value(rule, errors.dims(t.shape))
    parts = {
        "weight_packed": signed_to_offset(t.qdata).contiguous().view(torch.int32),
        "weight_scale": t.scale.mT.contiguous(),
        "weight_shape": torch.tensor(t.shape),
    }
    if bool(t.zero_point.any()):
        parts["weight_zero_point"] = _integer_zeros(t)
    return parts


def _integer_zeros(t: Int4Tensor) -> Tensor:
    scale, zero_point = t.scale.double(), t.zero_point.double()
    zero = (-zero_point / scale).round()
    if not bool(((zero * scale == -zero_point) & (zero >= -8) & (zero <= 7)).all()):
        raise errors.value(
            "compressed-tensors' zero points are whole multiples of the scale, -8 to 7",
            "others",
            'Quantise with Int4Tensor.from_hp(w, block_size, algorithm="symmetric")',
        )
    padded = torch.nn.functional.pad(zero.to(torch.int8) + 8, (0, -zero.shape[1] % 8))
    return foreign.pack_int32(padded).mT.contiguous()


def scheme(config: dict[str, Any]) -> dict[str, Any]:
    """The weights' scheme of a ``quantization_config``.

    Raises:
        ValueError: other than 4-bit integers, packed, without act-order and one scheme for all.
    """
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1 or config.get("format") != FORMAT:
        found = f"{config.get('format')} with {len(groups)} groups"
        raise errors.value(f"a checkpoint must be {FORMAT} with one group of layers", found)
    weights: dict[str, Any] = groups[0].get("weights") or {}
    for key, wanted in _WANTED.items():
        if weights.get(key) not in wanted:
            rule = f"{key} of compressed-tensors' weights must be one of {wanted}"
            raise errors.value(rule, weights.get(key))
    return weights


def weights(source: Source) -> Iterator[Foreign]:
    """The weights of a checkpoint.

    Raises:
        ValueError: as :func:`scheme`, or a part is missing.
    """
    of_all = scheme(source.config["quantization_config"])
    symmetric = of_all.get("symmetric", True)
    for packed_name in source.tensors:
        module, dot, part = packed_name.rpartition(".")
        if part != "weight_packed":
            continue
        if f"{module}{dot}weight_g_idx" in source.tensors:
            raise errors.value(f"{module} must have its groups in order", "act-order")
        roles = ("weight_packed", "weight_scale") + (() if symmetric else ("weight_zero_point",))
        names = tuple(f"{module}{dot}{role}" for role in roles)
        packed, scale, *_ = (source.stored(name) for name in names)
        N, K = packed.shape[0], packed.shape[1] * 8
        if tuple(source.read(f"{module}{dot}weight_shape").tolist()) != (N, K):
            raise errors.value(f"{module} must fill its words", "a padded weight")
        group_size = _group_size(K, K // max(1, scale.shape[1]))
        like = foreign.like((N, K), group_size, scale.dtype if symmetric else torch.float32)
        yield Foreign(f"{module}{dot}weight", names, like, _maker(group_size, like.dtype))


def _maker(group_size: int, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    def make(*parts: Tensor) -> tuple[Int4Tensor, str]:
        made = to_int4(*parts, group_size=group_size)
        return made.to(dtype), EXACT  # (zeros that are all 0 are held like others)

    return make


def _group_size(K: int, shared: int) -> int:
    """The largest group size within runs of ``shared`` inputs."""
    fitting = [g for g in geometry.GROUP_SIZES if shared % g == 0 and K % g == 0]
    if not fitting:
        raise errors.value(f"groups must hold a multiple of {geometry.GROUP_SIZES[0]}", shared)
    return max(fitting)


def _spread(t: Tensor, N: int, n_groups: int) -> Tensor:
    """``[N, fewer]`` -> ``[N, n_groups]``, each column repeated."""
    if t.ndim != 2 or t.shape[0] != N or n_groups % max(1, t.shape[1]):
        rule = f"scales must have shape [{N}, columns] with columns a divisor of {n_groups}"
        raise errors.value(rule, errors.dims(t.shape))
    return t.repeat_interleave(n_groups // t.shape[1], dim=1)
