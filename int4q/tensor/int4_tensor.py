"""``Int4Tensor``: the plain layout, byte for byte the one torchao and fbgemm use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from int4q import errors, qparams
from int4q.ops import linear_parts
from int4q.tensor import (  # noqa: F401  (registered before the subclasses)
    arithmetic_ops,
    distributed_ops,
    matmul_ops,
    shape_ops,
    state_ops,
    view_ops,
)
from int4q.tensor.base import Int4TensorBase, quantize_weight
from int4q.tensor.parts import Part

if TYPE_CHECKING:
    from torchao.quantization import Int4Tensor as TorchAOInt4Tensor


class Int4Tensor(Int4TensorBase):
    """A groupwise 4-bit weight ``[N, K]`` or ``[B, N, K]``, ``value = q * scale + zero_point``.

    Tensor data:
        qdata: int8 ``[.., N, K/2]``; even k in the low nibble, odd k in the high one, two's
            complement (-8..7).
        scale: ``[.., n_groups, N]``, n_groups = K / group_size; dtype of the original weight.
        zero_point: as ``scale``; added after scaling.
        act_pre_scale: optional, ``[K]``; multiplies the activation first.

    Attributes:
        block_size: ``[1, group_size]`` (``[1, 1, group_size]`` for a stack); the entry that is
            not 1 marks the grouped dim, so a transposed weight has ``[group_size, 1]`` over the
            same storage.
        shape: the logical shape.
        activation_dtype: ``torch.bfloat16`` (W4A16: activations keep their own dtype) or
            ``torch.float8_e4m3fn`` (each row of activations is quantised at run time).

    4.25 bits a weight at group 128 with 16-bit scales, 5 bits at group 32 (the zero points
    included).
    """

    parts = {
        "qdata": Part(nibbles=True),
        "scale": Part(swapped=True),
        "zero_point": Part(swapped=True),
    }
    activation_dtypes = (torch.bfloat16, torch.float8_e4m3fn)
    other_layout_fix = (
        "This is the coalesced layout [.., N, n_groups]; build a CudaCoalescedInt4Tensor and "
        "call .to_int4_tensor()"
    )

    @classmethod
    def from_hp(
        cls,
        w: Tensor,
        block_size: Sequence[int],
        activation_dtype: torch.dtype | None = None,
        algorithm: str | None = None,
    ) -> Int4Tensor:
        """Quantise a high-precision weight.

        Args:
            w: float32, float16 or bfloat16 ``[N, K]`` or ``[B, N, K]``.
            block_size: ones, then group_size: 32, 64, 128 or 256.
            activation_dtype: ``torch.bfloat16`` (the default) or ``torch.float8_e4m3fn``.
            algorithm: a key of ``int4q.qparams.ALGORITHMS``; by default ``"tinygemm"``
                (min-max), and ``"symmetric_full_range"`` for float8 activations, both as torchao
                quantises.

        Raises:
            TypeError: ``w`` is not a plain floating-point tensor.
            ValueError: the last dim is no multiple of group_size, NaN or Inf in ``w``, or an
                algorithm with zero points for float8 activations.
        """
        fp8 = activation_dtype == torch.float8_e4m3fn
        algorithm = algorithm or ("symmetric_full_range" if fp8 else "tinygemm")
        if fp8 and algorithm not in qparams.SYMMETRIC:
            raise errors.value(
                f"weights for float8 activations take an algorithm of {qparams.SYMMETRIC}",
                repr(algorithm),
            )
        qdata, scale, zero_point, block_size = quantize_weight(w, block_size, algorithm)
        scale, zero_point = scale.mT.contiguous(), zero_point.mT.contiguous()
        return cls(qdata, scale, zero_point, block_size, w.shape, activation_dtype=activation_dtype)

    @classmethod
    def from_torchao(cls, t: TorchAOInt4Tensor) -> Int4Tensor:
        """Wrap torchao's own ``Int4Tensor``: the same parts, nothing copied.

        Raises:
            TypeError: ``t`` is not torchao's ``Int4Tensor``.
        """
        from torchao.quantization import Int4Tensor as TorchAOInt4Tensor

        if not isinstance(t, TorchAOInt4Tensor):
            raise errors.type_("t must be a torchao.quantization.Int4Tensor", type(t).__name__)
        return cls(
            t.qdata,
            t.scale,
            t.zero_point,
            t.block_size,
            t.shape,
            act_pre_scale=t.act_pre_scale,
            activation_dtype=t.activation_dtype,
        )

    def to_torchao(self) -> TorchAOInt4Tensor:
        """torchao's own ``Int4Tensor`` over the same parts, nothing copied.

        Raises:
            ValueError: the weight is transposed (torchao's class stores no lazy transpose).
        """
        from torchao.quantization import Int4Tensor as TorchAOInt4Tensor

        if self.grouped_dim != self.ndim - 1:
            raise errors.value(
                "torchao's Int4Tensor takes groups along the last dim",
                f"block_size {self.block_size}",
                "Transpose it back first",
            )
        return TorchAOInt4Tensor(
            self.qdata,
            self.scale,
            self.zero_point,
            list(self.block_size),
            self.shape,
            act_pre_scale=self.act_pre_scale,
            activation_dtype=self.activation_dtype,
        )

    @classmethod
    def from_int4_tensor(cls, t: Int4Tensor) -> Int4Tensor:
        """``t`` itself: every layout has this way from plain."""
        return t

    def to_int4_tensor(self) -> Int4Tensor:
        """Itself: every layout has this way back to plain."""
        return self

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.qdata, self.scale, self.zero_point, self.group_size
        if self.activation_dtype == torch.float8_e4m3fn:
            return torch.ops.int4q.int4_linear_fp8(x, *weight, bias, self.act_pre_scale)
        return linear_parts(x, *weight, bias, self.act_pre_scale)


torch.serialization.add_safe_globals([Int4Tensor])
