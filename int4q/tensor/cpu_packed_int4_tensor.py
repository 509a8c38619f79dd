"""``CpuPackedInt4Tensor``: the layout of whichever CPU kernel runs it, for inference in place."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from int4q import errors, geometry
from int4q.kernels import cpu
from int4q.kernels.cpu import aten_packed
from int4q.kernels.reference import pre_scaled
from int4q.ops import SCALE_DTYPES, linear_parts
from int4q.tensor.base import Int4TensorBase
from int4q.tensor.int4_tensor import Int4Tensor

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's own, from Python 3.11 on

_UNPACK = "Convert it with .to_int4_tensor() first"


class CpuPackedInt4Tensor(Int4TensorBase):
    """A groupwise 4-bit weight ``[N, K]`` in the order that this machine's CPU kernel reads.

    Tensor data, by ``packing``:
        ``"rows"`` (int4q's compiled kernel): ``qdata`` int8 ``[N, K/2]``, the plain bytes;
            ``scale_and_zero`` ``[n_groups, 2, N]``, a group's scales, then its zero points.
        ``"aten"`` (torch's int4 kernel): ``qdata`` uint8 ``[N, K/2]`` in the order of
            ``aten._convert_weight_to_int4pack_for_cpu``, which depends on the processor's vector
            unit; ``scale_and_zero`` ``[n_groups, N, 2]``; N a multiple of 16.
        act_pre_scale: optional, ``[K]``; multiplies the activation first.

    In both ``value = q * scale + zero``. It multiplies, and converts to and from
    :class:`~int4q.Int4Tensor` without loss. On disk it is a plain weight, packed for the machine
    that reads it. Every shape op raises.
    """

    tensor_data_names = ["qdata", "scale_and_zero"]
    tensor_attribute_names = ["block_size", "shape", "packing"]
    parts = {}
    activation_dtypes = (torch.bfloat16,)
    other_layout_fix = ""

    def __new__(
        cls,
        qdata: Tensor,
        scale_and_zero: Tensor,
        block_size: list[int],
        shape: Sequence[int],
        packing: str,
        act_pre_scale: Tensor | float | None = None,
        activation_dtype: torch.dtype | None = None,
    ) -> Self:
        """The wrapper, once the parts are checked; arguments as the class describes them."""
        cls._check_parts(qdata, scale_and_zero, block_size, shape, packing)
        return torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=scale_and_zero.dtype, device=qdata.device
        )

    def __init__(
        self,
        qdata: Tensor,
        scale_and_zero: Tensor,
        block_size: list[int],
        shape: Sequence[int],
        packing: str,
        act_pre_scale: Tensor | float | None = None,
        activation_dtype: torch.dtype | None = None,
    ):
        self.qdata = qdata
        self.scale_and_zero = scale_and_zero
        self.block_size = list(block_size)
        self.packing = packing
        self.act_pre_scale = act_pre_scale
        self.activation_dtype = activation_dtype or self.activation_dtypes[0]

    @classmethod
    def _check_parts(
        cls,
        qdata: Tensor,
        scale_and_zero: Tensor,
        block_size: Sequence[int],
        shape: Sequence[int],
        packing: str,
    ) -> None:
        cls._check_shape(shape, block_size, packing)
        (N, K), n_groups = shape, shape[1] // block_size[1]
        dtype = torch.int8 if packing == "rows" else torch.uint8
        scales = (n_groups, 2, N) if packing == "rows" else (n_groups, N, 2)
        for name, t, dtypes, expected in (
            ("qdata", qdata, (dtype,), (N, K // 2)),
            ("scale_and_zero", scale_and_zero, SCALE_DTYPES, scales),
        ):
            if t.dtype not in dtypes or t.shape != expected:
                raise errors.value(
                    f"{name} must be {errors.dtypes(dtypes)} {errors.dims(expected)}",
                    f"{t.dtype} {errors.dims(t.shape)}",
                )
            if t.device.type not in ("cpu", "meta"):
                raise errors.value(f"{name} must stay on the cpu", t.device, _UNPACK)

    @classmethod
    def _check_shape(cls, shape: Sequence[int], block_size: Sequence[int], packing: str) -> None:
        if packing not in cpu.PACKINGS:
            raise errors.value(f"packing must be one of {cpu.PACKINGS}", repr(packing))
        if len(shape) != 2 or geometry.grouped_dim(block_size) != 1:
            raise errors.value(
                f"{cls.__name__} holds a weight [N, K] grouped along K",
                f"{errors.dims(shape)} with block_size {list(block_size)}",
            )
        n_multiple = cpu.PACKINGS[packing]
        if shape[0] % n_multiple or shape[1] % block_size[1]:
            raise errors.value(
                f"N must be a multiple of {n_multiple} and K of {block_size[1]}",
                errors.dims(shape),
            )

    @classmethod
    def from_hp(
        cls,
        w: Tensor,
        block_size: Sequence[int],
        activation_dtype: torch.dtype | None = None,
        algorithm: str | None = None,
        packing: str | None = None,
    ) -> CpuPackedInt4Tensor:
        """Quantise a high-precision weight ``[N, K]``; errors as ``Int4Tensor.from_hp``."""
        plain = Int4Tensor.from_hp(w, block_size, activation_dtype, algorithm)
        return cls.from_int4_tensor(plain, packing)

    @classmethod
    def from_int4_tensor(cls, t: Int4Tensor, packing: str | None = None) -> CpuPackedInt4Tensor:
        """Repack a plain weight on the CPU.

        Args:
            t: the weight.
            packing: ``"rows"`` or ``"aten"``; by default the faster one that this machine runs.

        Raises:
            TypeError: ``t`` is not an :class:`~int4q.Int4Tensor`.
            ValueError: not on the CPU, not 2-D, transposed, or N does not suit the packing.
        """
        if not isinstance(t, Int4Tensor):
            raise errors.type_("t must be an int4q.Int4Tensor", type(t).__name__)
        if t.device.type not in ("cpu", "meta"):
            raise errors.value("the weight must be on the cpu", t.device)
        packing = packing or cpu.preferred_packing()
        cls._check_shape(t.shape, t.block_size, packing)
        if packing == "rows":
            qdata = t.qdata
            scale_and_zero = torch.stack([t.scale, t.zero_point], dim=1)
        else:
            pack = torch.empty_like if t.qdata.is_meta else aten_packed.pack
            qdata = pack(t.qdata).view(torch.uint8)
            scale_and_zero = aten_packed.scale_and_zero(t.scale, t.zero_point, t.dtype)
        return cls(qdata, scale_and_zero, t.block_size, t.shape, packing, t.act_pre_scale)

    def to_int4_tensor(self) -> Int4Tensor:
        """The plain weight of the same values."""
        qdata, scale, zero_point = self._weight_parts()
        return Int4Tensor(
            qdata,
            scale.contiguous(),
            zero_point.contiguous(),
            self.block_size,
            self.shape,
            self.act_pre_scale,
        )

    def _weight_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.packing == "rows":
            scale, zero_point = self.scale_and_zero.unbind(1)
            return self.qdata, scale, zero_point
        scale, zero_point = self.scale_and_zero.unbind(-1)
        return torch.ops.int4q.int4_cpu_unpack(self.qdata), scale, zero_point

    def _in_my_layout(self, other: Int4TensorBase) -> Int4TensorBase:
        if getattr(other, "packing", None) == self.packing:
            return other
        return self.from_int4_tensor(other.to_int4_tensor(), self.packing)

    def _rebuild(
        self, fn: Any, shape: Sequence[int], block_size: Sequence[int], act_pre_scale: Any = None
    ) -> NoReturn:
        raise errors.value(
            "a CPU-packed weight keeps its shape", f"{errors.dims(shape)} asked", _UNPACK
        )

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packing == "rows":
            weight = *self._weight_parts(), self.group_size
            return linear_parts(x, *weight, bias, self.act_pre_scale)
        x = pre_scaled(x, self.act_pre_scale)
        y = torch.ops.int4q.int4_cpu_packed_linear(
            x, self.qdata, self.scale_and_zero, self.group_size
        )
        return y if bias is None else y + bias.to(y.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _repack, (self.to_int4_tensor(), getattr(self, "_is_param", False))


def _repack(plain: Int4Tensor, is_param: bool) -> CpuPackedInt4Tensor:
    packed = CpuPackedInt4Tensor.from_int4_tensor(plain)
    if is_param:
        packed._is_param = True
    return packed


def _as_held(t: CpuPackedInt4Tensor) -> tuple[Any, ...]:
    """To another process of this machine the parts go as they are, in shared memory."""
    names, attributes = t.__tensor_flatten__()
    parts = {name: getattr(t, name) for name in names}
    return _from_held, (parts, attributes, getattr(t, "_is_param", False))


def _from_held(parts: dict[str, Any], attributes: dict[str, Any], is_param: bool) -> Tensor:
    t = CpuPackedInt4Tensor(**parts, **attributes)
    return nn.Parameter(t, requires_grad=False) if is_param else t


ForkingPickler.register(CpuPackedInt4Tensor, _as_held)
torch.serialization.add_safe_globals([CpuPackedInt4Tensor, _repack])
