"""The host half of the CUDA C++ linear kernels: argument checks, copies that make odd layouts fit,
and the parameter block.

A kernel module makes one :class:`Planner` of a :class:`Product`: what a call of one kind compiles
and launches. From the second call on it is replayed (:mod:`int4q.kernels.launch.record`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from int4q.kernels.launch import nvrtc, record, tensor_map
from int4q.kernels.launch.plan import ABSOLUTE, Address, Launch
from int4q.kernels.registry import Problem
from int4q.kernels.weight import Weight

GROUP_SIZES = (32, 64, 128, 256)
TYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The dtypes that the kernels read and the numbers that stand for them in the CUDA C++."""
ROW_UNIT = 4
"""Rows are dealt to thread blocks in units of 4, which keeps scale copies of 8 bytes aligned."""

# The kernels' `Params`: eight pointers, then numbers; those over experts have the pointer to the
# experts' end rows next, and more numbers.
_POINTERS_BYTES = 64
_FIXED = struct.Struct("=4q10i")
_OFFS_AT = _POINTERS_BYTES + _FIXED.size


class Parts(NamedTuple):
    """The arguments of a call: x ``[.., K]`` (for a product ``[M, K]``), bias ``[N]``,
    pre_scale ``[K]``."""

    x: Tensor
    weight: Weight
    bias: Tensor | None
    pre_scale: Tensor | None


class Map(NamedTuple):
    """A tensor map of one of the parts."""

    tensor: Tensor
    encoded: bytes


def unsupported_weight(problem: Problem) -> str | None:
    """Why no kernel takes such a weight; ``None`` if they do."""
    if problem.device != "cuda":
        return f"runs on cuda, not {problem.device}"
    N, K, group_size = problem.N, problem.K, problem.group_size
    if problem.scale_dtype not in TYPE_CODES:
        return f"scale must be bfloat16, float16 or float32, got {problem.scale_dtype}"
    if group_size not in GROUP_SIZES:
        return f"group_size must be one of {GROUP_SIZES}, got {group_size}"
    if K <= 0 or K % group_size:
        return f"K must be a positive multiple of group_size={group_size}, got {K}"
    if max(N, K) >= 1 << 30:
        return f"N and K must be below 2 ** 30, got N={N}, K={K}"
    return None


class Product:
    """One call: compiled kernels, grids, the parameter block.

    A kernel's own derives from this: it sets ``scratch_bytes``, calls :meth:`fix` and then
    :meth:`launch`, which notes a launch for :meth:`run`.
    """

    def __init__(self, parts: Parts):
        x, weight = parts.x, parts.weight
        self.device, self.dtype, self.index = x.device, x.dtype, x.device.index
        self.shape = x.shape[0], weight.N
        self.scratch_bytes = 0
        self._fixed = b""
        self._launches: list[tuple[int, int, int, int, tuple[Map, ...]]] = []

    @property
    def dependent(self) -> bool:
        """Whether launches may overlap the kernel in front (sm_90 and later)."""
        return torch.cuda.get_device_properties(self.device).major >= 9

    def fix(
        self,
        parts: Parts,
        units_per_block: int,
        extra_units: int,
        stack: bytes = b"",
        row_unit: int = ROW_UNIT,
    ) -> None:
        """Fill in the parameters that are no addresses; ``stack``: those over experts."""
        x, weight, bias, pre_scale = parts
        qdata, scale = weight.qdata, weight.scale
        self._fixed = _FIXED.pack(
            *(qdata.stride(-2), scale.stride(-1), scale.stride(-2), x.stride(0)),
            *(x.shape[0], weight.N, weight.K),
            *(row_unit, units_per_block, extra_units),
            0 if bias is None else TYPE_CODES[bias.dtype],
            0 if pre_scale is None else TYPE_CODES[pre_scale.dtype],
            int(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0),
            0,
        )
        if stack:
            self._fixed += bytes(8) + stack

    def launch(
        self,
        module: nvrtc.Module,
        name: str,
        grid: int,
        block: int,
        shared_bytes: int = 0,
        maps: tuple[Map, ...] = (),
    ) -> None:
        """Launch the kernel ``name`` in :meth:`run`; ``maps`` are its second parameter."""
        function = module.function(name, shared_bytes)
        self._launches.append((function, grid, block, shared_bytes, maps))

    def run(self, parts: Parts, offs: Tensor | None) -> Tensor:
        """The launches, into new memory: ``[M, N]``."""
        x, weight, bias, pre_scale = parts
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if not self._launches:
            return out
        table = None
        if self.scratch_bytes:
            table = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=self.device)
        zeros = weight.scale if weight.zero_point is None else weight.zero_point
        tensors = weight.qdata, weight.scale, zeros, x, bias, pre_scale, out, table
        places = [*((8 * i, tensor) for i, tensor in enumerate(tensors)), (_OFFS_AT, offs)]
        pointers = tuple(
            (at, Address(ABSOLUTE, tensor.data_ptr()))
            for at, tensor in places
            if tensor is not None
        )
        parameters = bytes(_POINTERS_BYTES) + self._fixed
        maps_at = -(-len(parameters) // tensor_map.ALIGN) * tensor_map.ALIGN
        for function, grid, block, shared_bytes, maps in self._launches:
            shape = (grid, 1, 1), block, shared_bytes, self.dependent
            all_bytes = parameters.ljust(maps_at, b"\0") + b"".join(m.encoded for m in maps)
            moved = tuple(
                (maps_at + i * tensor_map.BYTES, Address(ABSOLUTE, m.tensor.data_ptr()))
                for i, m in enumerate(maps)
            )
            offsets = (0, maps_at) if maps else (0,)
            step = Launch(function, *shape, all_bytes, offsets, pointers, moved)
            record.launch(step, self.index)
        return out


class Planner:
    """Checks the arguments of a kernel, makes them fit and runs it.

    Args:
        title: of the kernels, for messages.
        unsupported: why a problem cannot be run, or ``None``.
        make: ``(parts, **choices)`` -> a :class:`Product`.
        ndim: dims of the weight: 2, or 3 for a stack.
    """

    def __init__(
        self,
        title: str,
        unsupported: Callable[[Problem], str | None],
        make: Callable[..., Product],
        ndim: int = 2,
    ):
        self._title, self._unsupported, self._make, self._ndim = title, unsupported, make, ndim
        self._planned = record.planned(self._run)

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
        *,
        offs: Tensor | None = None,
        **choices: Any,
    ) -> Tensor:
        """``(x * act_pre_scale) @ W.T + bias``: ``[.., N]`` in x's dtype.

        Args:
            x: ``[.., K]``, any strides.
            weight: signed with zero points, or offset binary without.
            bias: ``[N]``.
            act_pre_scale: ``[K]``.
            offs: int32 ``[experts]``, contiguous: the end row of each.
            choices: hashable, for ``make``.

        Raises:
            TypeError, ValueError: arguments that do not fit together, or that the kernel lacks.
        """
        out: Tensor = self._planned(Parts(x, weight, bias, act_pre_scale), offs, **choices)
        return out

    def _run(self, given: Parts, offs: Tensor | None, **choices: Any) -> Tensor:
        self._check(given)
        parts = _fit(given)
        out = self._make(parts, **choices).run(parts, offs)
        return out.view(*given.x.shape[:-1], given.weight.N)

    def _check(self, parts: Parts) -> None:
        """Raises on arguments that no copy could make fit."""
        x, weight, bias, pre_scale = parts
        qdata, scale, zero_point, group_size, signed = weight
        if qdata.dtype != torch.int8:
            raise TypeError(f"qdata must be int8 (two nibbles a byte), got {qdata.dtype}")
        if qdata.dim() != self._ndim:
            rank = "[N, K/2]" if self._ndim == 2 else "[E, N, K/2]"
            raise ValueError(f"qdata must have shape {rank}, got {list(qdata.shape)}")
        if signed is (zero_point is None):
            raise ValueError(
                "signed nibbles come with zero points and offset-binary ones without, got "
                f"signed={signed} and {'no ' * (zero_point is None)}zero_point"
            )
        N, K = weight.N, weight.K
        if x.dim() < 1 or x.shape[-1] != K:
            raise ValueError(
                f"the last dimension of x must be K={K} (twice that of qdata "
                f"{list(qdata.shape)}), got x of shape {list(x.shape)}"
            )
        if not x.is_cuda:
            raise ValueError(f"x must be on a CUDA device, got {x.device}")
        capability = torch.cuda.get_device_capability(x.device)
        sizes = x.numel() // max(K, 1), N, K, group_size
        problem = Problem("int4_linear", "cuda", x.dtype, scale.dtype, *sizes, capability)
        if reason := self._unsupported(problem):
            raise ValueError(f"{self._title} cannot do this: {reason}")
        groups = [*qdata.shape[:-2], K // group_size, N]
        shapes = {
            "scale": (scale, groups, "[.., n_groups, N]"),
            "zero_point": (zero_point, groups, "[.., n_groups, N]"),
            "bias": (bias, [N], "[N]"),
            "act_pre_scale": (pre_scale, [K], "[K]"),
        }
        for name, (tensor, shape, letters) in shapes.items():
            if tensor is None:
                continue
            if list(tensor.shape) != shape:
                hint = " (an [N, n_groups] tensor is passed as .mT)" if len(shape) > 1 else ""
                raise ValueError(
                    f"{name} must have shape {letters} = {shape}, got {list(tensor.shape)}{hint}"
                )
            if tensor.dtype not in TYPE_CODES:
                raise TypeError(f"{name} must be bfloat16, float16 or float32, got {tensor.dtype}")
        if zero_point is not None and zero_point.dtype != scale.dtype:
            raise TypeError(
                f"zero_point must have scale's dtype {scale.dtype}, got {zero_point.dtype}"
            )
        named = (("qdata", qdata), *((name, entry[0]) for name, entry in shapes.items()))
        for name, tensor in named:
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _fit(parts: Parts) -> Parts:
    """The parts as a product takes them, each the same object where it fits already: x 2-D, unit
    strides, qdata rows on 16-byte boundaries, zero_point lying as scale does."""
    x, weight, bias, pre_scale = parts
    qdata, scale, zero_point = weight[:3]
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.reshape(-1, x.shape[-1]).contiguous()
    unaligned = qdata.data_ptr() % 16 or any(stride % 16 for stride in qdata.stride()[:-1])
    if qdata.stride(-1) != 1 or unaligned:
        qdata = qdata.clone(memory_format=torch.contiguous_format)
    if zero_point is not None and zero_point.stride() != scale.stride():
        like = torch.empty_strided(
            scale.shape, scale.stride(), dtype=scale.dtype, device=scale.device
        )
        zero_point = like.copy_(zero_point)
    bias = None if bias is None else bias.contiguous()
    pre_scale = None if pre_scale is None else pre_scale.contiguous()
    return Parts(x, weight._replace(qdata=qdata, zero_point=zero_point), bias, pre_scale)
