"""``CudaCoalescedInt4Tensor``: scales and zero points of a row side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int4q import errors
from int4q.ops import coalesced_linear
from int4q.tensor.base import Int4TensorBase, quantize_weight
from int4q.tensor.int4_tensor import Int4Tensor
from int4q.tensor.parts import Part


class CudaCoalescedInt4Tensor(Int4TensorBase):
    """A groupwise 4-bit weight whose scales lie row by row, ``value = q * scale + zero_point``.

    A warp that reads one row of weights reads that row's scales in the same cache line, where
    the plain layout touches one line a group.

    Tensor data:
        qdata: int8 ``[.., N, K/2]``: the same bytes as :class:`~int4q.Int4Tensor`.
        scale: ``[.., N, n_groups]``, n_groups = K / group_size; dtype of the original weight.
        zero_point: as ``scale``; added after scaling.
        act_pre_scale: optional, ``[K]``; multiplies the activation first.

    Attributes:
        block_size, shape: as in :class:`~int4q.Int4Tensor`.
        activation_dtype: ``torch.int8`` (the default: activations are quantised per 32 elements
            at run time for up to 8 rows, more rows run W4A16) or ``torch.bfloat16`` (W4A16).
    """

    parts = {"qdata": Part(nibbles=True), "scale": Part(), "zero_point": Part()}
    activation_dtypes = (torch.int8, torch.bfloat16)
    other_layout_fix = (
        "This is the plain layout [.., n_groups, N]; repack it with "
        "CudaCoalescedInt4Tensor.from_int4_tensor"
    )

    @classmethod
    def from_hp(
        cls,
        w: Tensor,
        block_size: Sequence[int],
        activation_dtype: torch.dtype | None = None,
        algorithm: str = "tinygemm",
    ) -> CudaCoalescedInt4Tensor:
        """Quantise a high-precision weight; arguments and errors as ``Int4Tensor.from_hp``."""
        parts = quantize_weight(w, block_size, algorithm)
        return cls(*parts, w.shape, activation_dtype=activation_dtype)

    @classmethod
    def from_int4_tensor(
        cls, t: Int4Tensor, activation_dtype: torch.dtype | None = None
    ) -> CudaCoalescedInt4Tensor:
        """Repack a plain weight: ``qdata`` is shared, scale and zero_point are transposed once.

        Args:
            t: a plain weight, possibly transposed.
            activation_dtype: ``torch.int8`` (the default) or ``torch.bfloat16``.

        Raises:
            TypeError: ``t`` is not an :class:`~int4q.Int4Tensor`.
        """
        if not isinstance(t, Int4Tensor):
            raise errors.type_("t must be an int4q.Int4Tensor", type(t).__name__)
        scale, zero_point = _turned(t.scale), _turned(t.zero_point)
        return cls(
            t.qdata, scale, zero_point, t.block_size, t.shape, t.act_pre_scale, activation_dtype
        )

    def to_int4_tensor(self) -> Int4Tensor:
        """The plain weight of the same values; ``qdata`` is shared."""
        scale, zero_point = _turned(self.scale), _turned(self.zero_point)
        return Int4Tensor(
            self.qdata, scale, zero_point, self.block_size, self.shape, self.act_pre_scale
        )

    def with_activation_dtype(self, activation_dtype: torch.dtype) -> CudaCoalescedInt4Tensor:
        """The same parts, not copied, for ``torch.int8`` or ``torch.bfloat16`` activations."""
        parts = self.qdata, self.scale, self.zero_point, self.block_size, self.shape
        return type(self)(*parts, self.act_pre_scale, activation_dtype)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.qdata, self.scale, self.zero_point, self.group_size
        int8 = self.activation_dtype == torch.int8
        return coalesced_linear(x, *weight, bias, self.act_pre_scale, int8)


def _turned(t: Tensor) -> Tensor:
    return t.mT.contiguous() if t.ndim > 1 else t


torch.serialization.add_safe_globals([CudaCoalescedInt4Tensor])
