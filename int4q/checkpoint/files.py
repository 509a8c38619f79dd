"""``save_file``, ``load_file``, ``load_into_``: models and state dicts in safetensors files.

The files are those of :mod:`int4q.checkpoint.schema`, with a seal of checksums: transformers and
torchao read them, and files that those wrote are read here.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int4q import errors
from int4q.checkpoint import schema
from int4q.checkpoint.contents import Contents, PathLike
from int4q.checkpoint.seal import Seal, checksum, seal
from int4q.tensor import CudaCoalescedInt4Tensor
from int4q.tensor.base import Int4TensorBase

# --- writing --------------------------------------------------------------------------------------


def save_file(model: nn.Module | Mapping[str, Tensor], path: PathLike) -> None:
    """Save a model's parameters and buffers, or a state dict, as one safetensors file.

    4-bit weights of any layout are stored in plain; every other tensor as it is. Tensors that share
    all of their memory (tied weights) are stored once and tied when they are loaded. The file is
    written beside ``path`` and renamed when it is whole, so whatever was there before is kept until
    then.

    Args:
        model: a module, prepared for inference or not, or its ``state_dict()``.
        path: of the file, by custom ``*.safetensors``.

    Raises:
        TypeError: a value of the state dict is no tensor, or a quantised one that is not int4q's.
        ValueError: a tensor is on the meta device, or two tensors would be stored under one name.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise errors.type_("model must be a torch.nn.Module or a state dict", type(model).__name__)
    tied = _tied(state)
    stored: dict[str, Tensor] = {}
    described: dict[str, str] = {}
    for name, t in state.items():
        if name in tied:
            continue
        parts, described[name] = schema.flatten(name, t)
        if both := stored.keys() & parts.keys():
            raise errors.value("a tensor must be stored under a name of its own", sorted(both))
        stored |= parts
    _write(path, _in_own_memory(stored), schema.metadata(described), tied)


def _write(
    path: PathLike, stored: dict[str, Tensor], metadata: dict[str, str], tied: dict[str, str]
) -> None:
    from safetensors.torch import save_file as write

    specs = {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()}
    of = Seal(tied, {name: checksum(t) for name, t in stored.items()})
    with replaced(path) as new:
        write(stored, new, seal(metadata, specs, of))


@contextlib.contextmanager
def replaced(path: PathLike) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` if the ``with`` block succeeds."""
    path = Path(path)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        new.touch(exist_ok=False)
        mode = new.stat().st_mode  # as new files have; safetensors makes its own readable to nobody
        yield new
        new.chmod(mode)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> an earlier name of the same memory, seen in the same way."""
    first: dict[Any, str] = {}
    tied = {}
    for name, t in state.items():
        if not isinstance(t, Tensor):
            raise errors.type_(f"{name} must be a tensor", type(t).__name__)
        parts = t.data_tensors() if isinstance(t, Int4TensorBase) else {"": t}
        if any(p.is_meta for p in parts.values()):
            raise errors.value(
                f"{name} must have values", "one on the meta device", "It may be offloaded: load it"
            )
        key = type(t), *((n, p.data_ptr(), p.shape, p.stride(), p.dtype) for n, p in parts.items())
        if t.numel() and first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def _in_own_memory(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share a storage, as safetensors takes them."""
    seen: set[int] = set()
    own = {}
    for name, t in stored.items():
        t = t.contiguous()
        storage = t.untyped_storage()
        shares = storage.data_ptr() in seen or storage.nbytes() != t.numel() * t.element_size()
        own[name] = t.clone() if shares else t
        seen.add(storage.data_ptr())
    return own


# --- reading --------------------------------------------------------------------------------------


def load_file(
    path: PathLike, device: torch.types.Device = "cpu", *, checksums: bool = True
) -> dict[str, Tensor]:
    """The state dict in a safetensors file that int4q, transformers or torchao wrote.

    The file's header is checked before a tensor is read: names, shapes, dtypes, group sizes, and
    the checksum that int4q writes. On the CPU tensors stay mapped from the file: one takes memory
    when it is used, and only for what is written to it where the file is cached.

    Args:
        path: a file, or the folder of a checkpoint: ``model.safetensors``, or the files that
            ``model.safetensors.index.json`` names.
        device: where to put the tensors.
        checksums: compare the bytes of each tensor with the checksum that int4q wrote, if it did;
            this reads the whole file.

    Returns:
        Name -> tensor: :class:`~int4q.Int4Tensor` or a plain one. Tied names have one tensor.

    Raises:
        ValueError: the file is damaged, incomplete, or of another schema or version.
    """
    contents = Contents.of(path)
    tensors = {name: contents.read(name, device, checksums) for name in contents.entries}
    return tensors | {name: tensors[other] for name, other in contents.tied.items()}


def load_into_(
    model: nn.Module,
    path: PathLike,
    device: torch.types.Device = None,
    *,
    checksums: bool = True,
) -> nn.Module:
    """Give ``model`` the parameters and buffers of a file, in place; nothing changes on an error.

    Each becomes what the file holds: so a model just built, on the meta device or not, gets its
    4-bit weights. A parameter that is a 4-bit weight keeps its layout. Names that share a parameter
    go on to share it; the file may have any of them.

    Args:
        model: a module with the names and shapes of the file.
        path: as in :func:`load_file`.
        device: for all of it; by default each stays where it is, and what is on the meta device
            goes to the CPU.
        checksums: as in :func:`load_file`.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: as :func:`load_file`, or names or shapes differ from those of the model.
    """
    if not isinstance(model, nn.Module):
        raise errors.type_("model must be a torch.nn.Module", type(model).__name__)
    contents = Contents.of(path)
    held = model.state_dict(keep_vars=True)
    sources = _sources(held, contents)
    new: dict[str, Tensor] = {}
    for name, source in sources.items():
        if source not in new:
            old = held[name]
            t = contents.read(source, device or ("cpu" if old.is_meta else old.device), checksums)
            new[source] = _as_held(old, t)
    model.load_state_dict({name: new[source] for name, source in sources.items()}, assign=True)
    return model


def _sources(held: Mapping[str, Tensor], contents: Contents) -> dict[str, str]:
    """Name in the model -> name in the file, the same for names that share a parameter."""
    shared: dict[int, list[str]] = {}
    for name, t in held.items():
        shared.setdefault(id(t), []).append(name)
    names = {name: name for name in contents.entries} | contents.tied
    sources: dict[str, str] = {}
    for tied in shared.values():
        source = next((names[name] for name in tied if name in names), None)
        sources |= {name: source for name in tied if source is not None}
    missing, unknown = held.keys() - sources.keys(), names.keys() - held.keys()
    if missing or unknown:
        raise errors.value(
            "the model and the file must have the same names",
            f"{sorted(missing)[:5]} only in the model, {sorted(unknown)[:5]} only in the file",
        )
    for name, source in sources.items():
        shape = contents.entries[source].shape(contents.stored)
        if shape != held[name].shape:
            raise errors.value(
                f"{name} must have the model's shape {errors.dims(held[name].shape)}",
                errors.dims(shape),
            )
    return sources


def _as_held(old: Tensor, new: Tensor) -> Tensor:
    """``new`` in the layout of ``old``, and a parameter if that is one."""
    if isinstance(old, CudaCoalescedInt4Tensor) and isinstance(new, Int4TensorBase):
        new = CudaCoalescedInt4Tensor.from_int4_tensor(new.to_int4_tensor(), old.activation_dtype)
    elif isinstance(old, Int4TensorBase) and isinstance(new, Int4TensorBase):
        new = old._in_my_layout(new)
    if not isinstance(old, nn.Parameter):
        return new
    return nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
