"""Sums with plain tensors, once for all layouts: what adapters do to the weights below them."""

from __future__ import annotations

import torch
from torch import Tensor

from int4q import errors
from int4q.tensor.arguments import overrides
from int4q.tensor.base import Int4TensorBase
from int4q.tensor.shape_ops import transpose


def _values(t):
    return t.dequantize() if isinstance(t, Int4TensorBase) else t


@overrides(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(input, other, *, alpha=1):
    """A plain tensor; gradients reach the operand that is one."""
    return torch.add(_values(input), _values(other), alpha=alpha)


@overrides(torch.sub, Tensor.sub, Tensor.__sub__)
def _sub(input, other, *, alpha=1):
    return torch.sub(_values(input), _values(other), alpha=alpha)


@overrides(Tensor.add_, Tensor.__iadd__)
def add_(self, other, *, alpha=1):
    """In place: the sum in float32, rounded to 4 bits again, by min-max and with the same groups.

    An element is off by half a step of its group's new scale at most, besides the rounding of scale
    and zero point to their dtype.
    """
    if not isinstance(self, Int4TensorBase):
        return self.add_(_values(other), alpha=alpha)
    if self.act_pre_scale is not None:
        raise errors.value("a weight with act_pre_scale takes no sum in place", "one")
    with torch.no_grad():
        total = torch.add(self.dequantize(torch.float32), _values(other), alpha=alpha)
        block_size = [1] * (self.ndim - 1) + [self.group_size]
        new = type(self).from_hp(total.transpose(self.grouped_dim, -1).contiguous(), block_size)
        turned = self.grouped_dim != self.ndim - 1
        return self.copy_(transpose(new, self.grouped_dim, -1) if turned else new)


@overrides(Tensor.sub_, Tensor.__isub__)
def _sub_(self, other, *, alpha=1):
    return add_(self, other, alpha=-alpha)


@overrides(torch.isfinite, Tensor.isfinite)
def _isfinite(input):
    return torch.isfinite(input.dequantize())
