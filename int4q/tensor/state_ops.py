"""The ops that copy, cast and compare, and what a tensor is besides its values: for all layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from int4q import errors
from int4q.ops import SCALE_DTYPES
from int4q.tensor.arguments import overrides
from int4q.tensor.base import Int4TensorBase

aten = torch.ops.aten
implements = Int4TensorBase.implements

# Descriptors; torch's stubs give the types of what they read.
_DATA: Any = Tensor.data
_REQUIRES_GRAD: Any = Tensor.requires_grad


# --- copying, casting, comparing ------------------------------------------------------------------


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    """``.to(device)`` moves every part; ``.to(dtype)`` casts scale and zero_point."""
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **{k: v for k, v in kwargs.items() if v is not None})
    dtype = to.pop("dtype")
    if dtype not in SCALE_DTYPES:
        raise errors.type_(
            f"a 4-bit weight can be cast to {errors.dtypes(SCALE_DTYPES)}",
            dtype,
            f"Use .dequantize({dtype}) for a plain tensor",
        )

    def copy(t: Tensor) -> Tensor:
        return t.to(**to, dtype=dtype if t.is_floating_point() else t.dtype, copy=True)

    return return_and_correct_aliasing(func, args, kwargs, self._apply_fn_to_data(copy))


@implements(aten.copy_.default)
def _(func, types, args, kwargs):
    """In place, from a weight of the same shape and groups in any layout; or into a plain tensor.

    A plain tensor takes the values, as it takes those of any dtype: so a model in high precision
    loads a quantised ``state_dict``.
    """
    self, src = args[0], args[1]
    if not isinstance(self, Int4TensorBase):
        return self.copy_(_values(src))
    if not isinstance(src, Int4TensorBase):
        raise errors.type_(
            f"copy_ into a {type(self).__name__} takes a 4-bit weight",
            type(src).__name__,
            "Quantise it with from_hp first",
        )
    src = self._in_my_layout(src)
    if self.shape != src.shape or self.block_size != src.block_size:
        raise errors.value(
            f"copy_ needs shape {errors.dims(self.shape)} and block_size {self.block_size}",
            f"{errors.dims(src.shape)} and {src.block_size}",
        )
    if (self.act_pre_scale is None) != (src.act_pre_scale is None):
        raise errors.value("either both sides of copy_ have an act_pre_scale or none", "one has")
    for name, part in self.data_tensors().items():
        part.copy_(getattr(src, name))
    return self


def _values(src: Int4TensorBase) -> Tensor:
    if src.act_pre_scale is not None:
        raise errors.value(
            "a plain tensor cannot hold the act_pre_scale of a 4-bit weight",
            errors.dims(src.act_pre_scale.shape),
            "Quantise the model that takes the weight first",
        )
    return src.dequantize()


@implements([aten.empty_like.default, aten.zeros_like.default])
def _(func, types, args, kwargs):
    """Parts of the same shape on the asked device; a dtype is that of scale and zero_point."""
    self = args[0]
    dtype = kwargs.pop("dtype", None) or self.dtype
    kwargs.pop("memory_format", None)
    return self._apply_fn_to_data(
        lambda t: func(t, dtype=dtype if t.is_floating_point() else t.dtype, **kwargs)
    )


@implements(aten.equal.default)
def _(func, types, args, kwargs):
    """Same class, shape, groups, and bytes of every part."""
    a, b = args
    if type(a) is not type(b) or a.shape != b.shape or a.block_size != b.block_size:
        return False
    left, right = a.data_tensors(), b.data_tensors()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@implements(aten.is_pinned.default)
def _(func, types, args, kwargs):
    return args[0].is_pinned()


# --- what a tensor is besides its values ----------------------------------------------------------


@overrides(_DATA.__set__)
def _set_data(self, data):
    """``weight.data = other`` shares ``other``'s parts; the class stays."""
    if type(data) is not type(self):
        raise errors.type_(
            f"the data of a {type(self).__name__} must be one too",
            type(data).__name__,
            "Assign an nn.Parameter to the module instead",
        )
    if self._is_held:
        raise errors.value(
            "the weight of a prepared module keeps its parts",
            "other data",
            "Assign the module's weight, or call int4q.unprepare_ first",
        )
    with torch._C.DisableTorchFunctionSubclass():
        _DATA.__set__(self, data)  # shape, dtype and device
    _, attributes = data.__tensor_flatten__()
    for name in (*data.tensor_data_names, *data.optional_tensor_data_names, *attributes):
        if name != "shape":
            setattr(self, name, getattr(data, name))


@overrides(Tensor.requires_grad_)
def _requires_grad_(self, requires_grad=True):
    """The packed weight takes no gradient, so it stays as it is: not asking for one."""
    return self


@overrides(_REQUIRES_GRAD.__set__)
def _set_requires_grad(self, requires_grad):
    return None


@overrides(Tensor.storage)
def _storage(self):
    """What safetensors asks for, and with it ``save_pretrained``."""
    raise errors.type_(
        "safetensors saves tensors that have one storage each",
        f"{type(self).__name__}, which holds {list(self.data_tensors())}",
        "Save the model with int4q.save_file, or call int4q.adopt(model) before save_pretrained",
    )
