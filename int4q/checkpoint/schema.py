"""How 4-bit weights lie in safetensors files: names, metadata, checks. Pure functions, no I/O.

The schema is torchao's own (``torchao.prototype.safetensors``), which transformers writes for a
model with ``TorchAoConfig``: a process without int4q reads such a file into torchao's
``Int4Tensor``. A 4-bit weight ``model.up.weight``, of any layout, is stored in plain, as tensors

    ``model.up._weight_qdata``          int8 ``[.., N, K/2]``
    ``model.up._weight_scale``          ``[.., n_groups, N]``
    ``model.up._weight_zero_point``     as ``scale``
    ``model.up._weight_act_pre_scale``  ``[K]``, where the weight has one

and every other tensor under its own name. The file's metadata, strings by name, say what is what:

    ``model.up.weight``    JSON: ``_type`` (``Int4Tensor``), ``_data`` (``block_size``, ``shape``,
                           ``activation_dtype``), ``_tensor_data_names`` (the parts stored)
    ``model.norm.weight``  JSON: ``{"_type": "Tensor"}``; absent for a name without a dot, on which
                           torchao's reader fails
    ``tensor_names``       JSON: the list of all names
    ``format``             ``pt``
    ``int4q``              JSON, optional and int4q's own: see ``seal.py``

Of a checkpoint in several files, *each* holds the metadata of *all* tensors (stock readers need
that: they merge the dictionaries key by key); a weight's parts may lie in different files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.utils import TorchAOBaseTensor

from int4q import errors
from int4q.tensor import Int4Tensor
from int4q.tensor.base import Int4TensorBase

NAMES, SEAL = "tensor_names", "int4q"
_OWN = {NAMES, SEAL, "format"}
INT4 = Int4Tensor.__name__
PLAIN = Tensor.__name__

Spec = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape of a stored tensor: what is known of it before it is read."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a state dict, as the metadata describe it.

    Attributes:
        name: in the state dict.
        parts: part -> name under which it is stored; ``{"": name}`` for a plain tensor.
        attributes: of an :class:`~int4q.Int4Tensor`; ``None`` for a plain tensor.
    """

    name: str
    parts: dict[str, str]
    attributes: dict[str, Any] | None = None

    def shape(self, stored: Mapping[str, Tensor]) -> torch.Size:
        """The logical shape, of ``stored`` tensors by their stored names."""
        if self.attributes is None:
            return stored[self.name].shape
        return torch.Size(self.attributes["shape"])


# --- writing --------------------------------------------------------------------------------------


_GATHER = (
    "Gather the shards with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True))"
)


def flatten(name: str, t: Tensor) -> tuple[dict[str, Tensor], str]:
    """One tensor of a state dict as plain tensors, and its metadata.

    Args:
        name: in the state dict.
        t: a 4-bit weight of any layout (stored in plain) or a plain tensor.

    Returns:
        Stored name -> contiguous plain tensor (the weight's own parts, not copied where its layout
        is plain and they are contiguous), and the JSON to be put under ``name`` in the metadata.

    Raises:
        TypeError: ``t`` is neither.
    """
    if isinstance(t, Int4TensorBase):
        plain = t.to_int4_tensor()
        parts = plain.data_tensors()
        stored = {stored_name(name, part): p.contiguous() for part, p in parts.items()}
        return stored, _describe(plain)
    if not isinstance(t, Tensor) or isinstance(t, (TorchAOBaseTensor, DTensor)):
        fixes = {INT4: "int4q.adopt makes torchao's Int4Tensor int4q's", "DTensor": _GATHER}
        raise errors.type_(
            f"{name} must be a 4-bit weight of int4q or a plain tensor",
            f"{type(t).__module__}.{type(t).__name__}",
            fixes.get(type(t).__name__, ""),
        )
    return {name: t.detach()}, _text_of_plain()


def metadata(entries: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file, of the JSON that :func:`flatten` gave for each name.

    Raises:
        ValueError: a name that the schema needs itself.
    """
    if taken := _OWN & entries.keys():
        raise errors.value("a tensor must not be named as the schema's own metadata", sorted(taken))
    plain = _text_of_plain()
    entries = {name: text for name, text in entries.items() if "." in name or text != plain}
    return {**entries, NAMES: json.dumps(list(entries)), "format": "pt"}


def stored_name(name: str, part: str) -> str:
    """``model.up.weight``, ``scale`` -> ``model.up._weight_scale``."""
    module, dot, parameter = name.rpartition(".")
    return f"{module}{dot}_{parameter}_{part}"


def _text_of_plain() -> str:
    return json.dumps({"_type": PLAIN})


def _describe(t: Int4Tensor) -> str:
    names, attributes = t.__tensor_flatten__()
    optional = [n for n in names if n in t.optional_tensor_data_names]
    dtype = str(attributes["activation_dtype"]).removeprefix("torch.")
    return json.dumps(
        {
            "_type": INT4,
            "_data": {
                "activation_dtype": {"_type": "torch.dtype", "_data": dtype},
                "block_size": attributes["block_size"],
                "shape": list(attributes["shape"]),
            },
            "_tensor_data_names": [*optional, *t.tensor_data_names],
        }
    )


# --- reading --------------------------------------------------------------------------------------


def is_schema(metadata: Mapping[str, str] | None) -> bool:
    """Whether a file's metadata are of this schema; those of other files say nothing of it."""
    return metadata is not None and NAMES in metadata


def entries(metadata: Mapping[str, str], stored: Iterable[str] = ()) -> dict[str, Entry]:
    """The tensors of a checkpoint by name, as its metadata describe them.

    Args:
        stored: names of the tensors of all its files; of them come plain tensors without a dot in
            their name.

    Raises:
        ValueError: the metadata are damaged, or describe another kind of quantised tensor.
    """
    names = _parse(metadata.get(NAMES), NAMES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise errors.value(f"the metadata's {NAMES} must be a list of names", repr(names)[:80])
    if len(set(names)) < len(names):
        raise errors.value(f"the metadata's {NAMES} must name each tensor once", "some twice")
    if unknown := metadata.keys() - _OWN - set(names):
        raise errors.value("the metadata must describe tensors that they name", sorted(unknown)[:5])
    found = {name: entry(name, metadata.get(name)) for name in names}
    parts = {name for e in found.values() for name in e.parts.values()}
    top = [name for name in stored if "." not in name and name not in parts]
    return found | {name: Entry(name, {"": name}) for name in top}


def check(entries: Iterable[Entry], stored: Mapping[str, Spec]) -> None:
    """Check what is stored against the metadata, before anything of it is read.

    Args:
        entries: all of a checkpoint.
        stored: the tensors of all its files.

    Raises:
        ValueError: a tensor is missing, stored but not described, or described as something that
            its dtype or shape contradicts.
    """
    described = set()
    for e in entries:
        for name in e.parts.values():
            if name not in stored:
                raise errors.value(f"{e.name} must be stored as {name}", "no such tensor")
            if name in described:
                raise errors.value("a stored tensor must belong to one weight", f"{name} twice")
            described.add(name)
        unflatten(e, {part: _like(stored[name]) for part, name in e.parts.items()})
    if unknown := stored.keys() - described:
        raise errors.value("every stored tensor must be described", f"{min(unknown)!r}, unknown")


def unflatten(entry: Entry, parts: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the state dict from its stored parts, which are not copied.

    Args:
        parts: by the part's name, as in ``entry.parts``.

    Raises:
        ValueError: the parts do not make one weight of the described shape and groups.
    """
    if entry.attributes is None:
        return parts[""]
    try:
        return Int4Tensor.__tensor_unflatten__(dict(parts), entry.attributes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{entry.name}: {error}") from error


def _like(spec: Spec) -> Tensor:
    dtype, shape = spec
    return torch.empty(shape, dtype=dtype, device="meta")


def entry(name: str, text: str | None) -> Entry:
    """One tensor as its metadata ``text`` describe it; errors as :func:`entries`."""
    described = _parse(text, name)
    kind = described.get("_type") if isinstance(described, dict) else None
    if kind == PLAIN and described == {"_type": PLAIN}:
        return Entry(name, {"": name})
    if kind != INT4:
        raise errors.value(
            f"the metadata of {name} must describe a {PLAIN} or an {INT4}", repr(kind)[:80]
        )
    parts = described.get("_tensor_data_names")
    required = set(Int4Tensor.tensor_data_names)
    known = required | set(Int4Tensor.optional_tensor_data_names)
    if not _is_list(parts, str) or not required <= set(parts) <= known:
        raise errors.value(
            f"{name} must have the parts {Int4Tensor.tensor_data_names}", repr(parts)[:80]
        )
    attributes = _attributes(name, described.get("_data"))
    return Entry(name, {part: stored_name(name, part) for part in parts}, attributes)


def _attributes(name: str, data: Any) -> dict[str, Any]:
    dtypes = {str(d).removeprefix("torch."): d for d in Int4Tensor.activation_dtypes}
    allowed = [{"_type": "torch.dtype", "_data": d} for d in dtypes]
    if (
        not isinstance(data, dict)
        or data.keys() != {"block_size", "shape", "activation_dtype"}
        or not _is_list(data["block_size"], int)
        or not _is_list(data["shape"], int)
        or data["activation_dtype"] not in allowed
    ):
        raise errors.value(
            f"the metadata of {name} must hold block_size, shape and activation_dtype "
            f"({', '.join(dtypes)})",
            repr(data)[:200],
        )
    return {**data, "activation_dtype": dtypes[data["activation_dtype"]["_data"]]}


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _parse(text: str | None, name: str) -> Any:
    if text is None:
        raise errors.value(f"the metadata must describe {name}", "nothing")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise errors.value(f"the metadata of {name} must be JSON", repr(text)[:80]) from error
