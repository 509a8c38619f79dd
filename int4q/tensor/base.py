"""What both weight layouts share: their parts, the checks on them, and how they are rebuilt.

A layout is a class that says, in ``parts``, how each component is held: whether its last two
storage dims are swapped, and how many logical elements one entry covers along the grouped dim.
Every shape op (``shape_ops.py``, ``view_ops.py``) and every matmul (``matmul_ops.py``) is written
once against that description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from int4q import errors, geometry, qparams
from int4q.kernels import reference
from int4q.kernels.weight import Weight
from int4q.ops import SCALE_DTYPES
from int4q.ops.define import kernel
from int4q.tensor.fsdp import GatheredByFSDP
from int4q.tensor.parts import ActPreScale, Part, check_parts

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's own, from Python 3.11 on

_KEEP: Any = object()
FLAT_BUFFERS = (
    "One flat buffer for all parameters cannot hold 4-bit weights: leave them out of it, for "
    "DistributedDataParallel by _set_params_and_buffers_to_ignore_for_model(module, names), "
    "for fully_shard by ignored_params"
)


class _OneTensorIsAParameter(type(TorchAOBaseTensor)):  # type: ignore[misc]  # no types
    """``type(param)(tensor, requires_grad=...)``, as accelerate rebuilds the weights it moves."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], cls):
            return nn.Parameter(args[0], requires_grad=False)
        return super().__call__(*args, **kwargs)


class Int4TensorBase(GatheredByFSDP, TorchAOBaseTensor, metaclass=_OneTensorIsAParameter):
    """A 4-bit weight in some layout. Not made directly: see :class:`int4q.Int4Tensor`.

    The wrapper reports the logical shape, the dtype of its scales, and contiguous strides
    whatever the strides of its parts.
    """

    tensor_data_names = ["qdata", "scale", "zero_point"]
    tensor_attribute_names = ["block_size", "shape"]
    optional_tensor_data_names = ["act_pre_scale"]
    optional_tensor_attribute_names = ["activation_dtype"]
    act_pre_scale = ActPreScale()
    _is_held = False
    """Whether a prepared module has the parts as buffers of its own (:mod:`int4q.prepare`)."""

    parts: ClassVar[dict[str, Part]]
    activation_dtypes: ClassVar[tuple[torch.dtype, ...]]
    """Allowed ``activation_dtype`` values, the default first."""
    other_layout_fix: ClassVar[str]
    """What to do with scales that have the other layout's shape."""

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        block_size: list[int],
        shape: Sequence[int],
        act_pre_scale: Tensor | float | None = None,
        activation_dtype: torch.dtype | None = None,
    ) -> Self:
        """The wrapper, once the parts are checked; arguments as the class describes them."""
        check_parts(cls, qdata, scale, zero_point, block_size, shape, activation_dtype)
        return torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=scale.dtype, device=qdata.device, requires_grad=False
        )

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        block_size: list[int],
        shape: Sequence[int],
        act_pre_scale: Tensor | float | None = None,
        activation_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.zero_point = zero_point
        self.block_size = list(block_size)
        self.act_pre_scale = act_pre_scale
        self.activation_dtype = activation_dtype or self.activation_dtypes[0]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # torchao's base puts its own __setstate__ on every subclass; ours checks the parts.
        cls.__setstate__ = _checked_setstate

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """Names of the parts held, and the attributes: what ``__tensor_unflatten__`` takes.

        Compiled code asks for it at every call, up to three times, so it is written for speed, and
        the shape is read past ``__torch_function__``; the other attributes are the instance's own
        and never get there.
        """
        names, attributes = list(self.tensor_data_names), {}
        for name in self.optional_tensor_data_names:
            if getattr(self, name) is not None:
                names.append(name)
        with torch._C.DisableTorchFunctionSubclass():
            for name in self.tensor_attribute_names:
                attributes[name] = getattr(self, name)
        for name in self.optional_tensor_attribute_names:
            attributes[name] = getattr(self, name)
        return names, attributes

    @classmethod
    def __tensor_unflatten__(
        cls,
        data: dict[str, Any],
        attributes: dict[str, Any],
        outer_size: Sequence[int] | None = None,
        outer_stride: Sequence[int] | None = None,
    ) -> Self:
        """The weight that was flattened, of the parts ``data``; size and stride follow from it."""
        return cls(**data, **attributes)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = cls._TORCH_FN_TABLE[cls].get(func)
        if handler is not None:
            return handler(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in cls._ATEN_OP_TABLE[cls]:
            # Composite ops arrive whole in inference mode, and from DTensor, below autograd.
            out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if torch.is_inference_mode_enabled():
            return _dispatch_in_inference_mode(cls, func, types, args, kwargs)
        return cls._handler(func)(func, types, args, kwargs)

    @classmethod
    def _handler(cls, func: Any) -> Callable[..., Any]:
        handler = cls._ATEN_OP_TABLE[cls].get(func)
        if handler is None:
            fix = FLAT_BUFFERS if func.namespace == "c10d" else "Use .dequantize() first"
            raise NotImplementedError(f"{func} is not implemented for {cls.__name__}. {fix}")
        return handler

    # --- geometry ------------------------------------------------------------------------------

    @property
    def grouped_dim(self) -> int:
        """The logical dim along which groups run (``ndim - 1`` unless transposed)."""
        return self.block_size.index(max(self.block_size))

    @property
    def group_size(self) -> int:
        """Weights that share one scale and zero point."""
        return max(self.block_size)

    def _rebuild(
        self,
        fn: Callable[[Tensor, int], Tensor],
        shape: Sequence[int],
        block_size: Sequence[int],
        act_pre_scale: Tensor | None = _KEEP,
    ) -> Self:
        """A tensor of the same class with ``fn(part in storage order, unit)`` for each part."""
        group_size = self.group_size
        new = {
            name: part.swap(fn(part.swap(getattr(self, name)), part.unit(group_size)))
            for name, part in self.parts.items()
        }
        return type(self)(
            **new,
            block_size=list(block_size),
            shape=list(shape),
            act_pre_scale=self.act_pre_scale if act_pre_scale is _KEEP else act_pre_scale,
            activation_dtype=self.activation_dtype,
        )

    def _weight_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """``qdata [.., N, K/2]``, ``scale`` and ``zero_point`` ``[.., n_groups, N]`` as views."""
        swap = not self.parts["scale"].swapped and self.scale.ndim > 1
        scale, zero_point = self.scale, self.zero_point
        return (self.qdata, scale.mT, zero_point.mT) if swap else (self.qdata, scale, zero_point)

    def _in_my_layout(self, other: Int4TensorBase) -> Int4TensorBase:
        """``other``, of any layout, in this tensor's."""
        if type(other) is type(self):
            return other
        return type(self).from_int4_tensor(other.to_int4_tensor())

    # --- values --------------------------------------------------------------------------------

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a plain tensor of the logical shape.

        Args:
            output_dtype: of the result; the weight's own dtype by default.

        Returns:
            ``q * scale + zero_point``, computed in float32 and rounded once.
        """
        dtype = output_dtype or self.dtype
        parts = self._weight_parts()
        if parts[0].ndim == 1:
            qdata, scale, zero_point = map(_column, parts)
            return _dequantize(qdata, scale, zero_point, self.group_size, dtype).squeeze(0)
        return _dequantize(*parts, self.group_size, dtype).movedim(-1, self.grouped_dim)

    def _quantization_type(self) -> str:
        """What ``print(nn.Linear)`` shows of its weight."""
        return (
            f"shape={tuple(self.shape)}, group_size={self.group_size}, "
            f"dtype={self.dtype}, device={self.device}, activation_dtype={self.activation_dtype}"
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{type(self).__name__}({self._quantization_type()})"

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph may depend on besides shapes and dtypes of the parts."""
        parts = [(n, t.dtype, t.shape, t.stride()) for n, t in self.data_tensors().items()]
        return repr(
            (type(self).__name__, self.shape, self.block_size, self.activation_dtype, parts)
        )

    # --- memory --------------------------------------------------------------------------------

    def data_tensors(self) -> dict[str, Tensor]:
        """Name -> component, the optional ones where present."""
        names = self.__tensor_flatten__()[0]
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:
        """Bytes held, all parts together (``torch.Tensor.nbytes`` would count the logical ones)."""
        return sum(t.numel() * t.element_size() for t in self.data_tensors().values())

    def share_memory_(self) -> Self:
        """Move every part to shared memory, as ``nn.Module.share_memory()`` asks."""
        for t in self.data_tensors().values():
            t.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether every part lies in shared memory."""
        return all(t.is_shared() for t in self.data_tensors().values())

    def pin_memory(self) -> Self:
        """A copy whose parts lie in page-locked memory."""
        return self._apply_fn_to_data(lambda t: t.pin_memory())

    def is_pinned(self) -> bool:
        """Whether every part lies in page-locked memory."""
        return all(t.is_pinned() for t in self.data_tensors().values())


def _dispatch_in_inference_mode(
    cls: type[Int4TensorBase], func: Any, types: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """What ``torch.inference_mode`` asks of a subclass beyond its ops: a view of a tensor made
    outside must be no inference tensor, or autograd's bookkeeping of views refuses it."""
    outside = func.is_view and isinstance(args[0], Tensor) and not args[0].is_inference()
    with torch.inference_mode(not outside):
        return cls._handler(func)(func, types, args, kwargs)


def _column(part: Tensor) -> Tensor:
    """A part of a single row as that of a matrix: ``[K/2] -> [1, K/2]``, ``[G] -> [G, 1]``."""
    return part.unsqueeze(0 if part.dtype == torch.int8 else -1)


def _dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The chosen kernel on a matrix or, one by one, on those of a stack; plain ops when traced."""
    weight = Weight(qdata, scale, zero_point, group_size)
    if torch.compiler.is_compiling() or type(qdata) is not Tensor or qdata.ndim > 3:
        return reference.dequantize(weight, dtype)
    run = kernel("dequantize", qdata, scale, 0, weight.N, weight.K, group_size, dtype)
    if qdata.ndim == 2:
        return run(weight, dtype)
    out = scale.new_empty((*qdata.shape[:-1], weight.K), dtype=dtype)
    for b in range(qdata.shape[0]):
        out[b] = run(weight.expert(b), dtype)
    return out


def _checked_setstate(self: Int4TensorBase, state: Any) -> None:
    """Unpickling: parts that do not fit together raise, as they do in the constructor."""
    torch._utils._set_obj_state(self, state)
    for name in (*self.optional_tensor_data_names, *self.optional_tensor_attribute_names):
        self.__dict__.setdefault(name, None)
    missing = [n for n in (*self.tensor_data_names, "block_size") if n not in self.__dict__]
    if missing:
        raise errors.value(
            f"a stored {type(self).__name__} must hold {self.tensor_data_names}",
            f"none of {missing}",
        )
    parts = self.qdata, self.scale, self.zero_point
    check_parts(type(self), *parts, self.block_size, self.shape, self.activation_dtype)
    if self.dtype != self.scale.dtype or self.device != self.qdata.device:
        raise errors.value(
            "the stored header must agree with the parts "
            f"({self.scale.dtype}, {self.qdata.device})",
            f"{self.dtype}, {self.device}",
        )


def quantize_weight(
    w: Tensor, block_size: Sequence[int], algorithm: str
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Check ``w`` and ``block_size`` and quantise: what ``from_hp`` of every layout starts with.

    Returns:
        ``qdata [.., N, K/2]``, ``scale`` and ``zero_point`` ``[.., N, n_groups]`` in ``w.dtype``,
        and ``block_size`` as a list.

    Raises:
        TypeError: ``w`` is no plain floating-point tensor.
        ValueError: shapes do not fit, or NaN or Inf in ``w``.
    """
    if isinstance(w, TorchAOBaseTensor):
        raise errors.type_("w must be a plain tensor", type(w).__name__, "It is quantised already")
    if w.dtype not in SCALE_DTYPES:
        raise errors.type_(f"w must be {errors.dtypes(SCALE_DTYPES)}", w.dtype)
    if len(block_size) != w.ndim or w.ndim < 2:
        raise errors.value(
            f"block_size must have one entry for each of the {w.ndim} dims of w (2 or more)",
            list(block_size),
        )
    if geometry.grouped_dim(block_size) != w.ndim - 1:
        raise errors.value(
            "groups must run along the last dim of w", list(block_size), "Transpose w first"
        )
    if w.shape[-1] % block_size[-1]:
        raise errors.value(
            f"the last dim of w must be a multiple of group_size {block_size[-1]}", w.shape[-1]
        )
    return *qparams.quantize(w.detach(), block_size[-1], algorithm), list(block_size)
