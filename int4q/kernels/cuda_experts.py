"""Stacks of int4 weights that meet few rows each: the CUDA C++ decode kernels over experts.

``csrc/int4_decode.cu`` built with EXPERTS: a first kernel quantises the rows of x (16-bit integers
that share a float32 scale per 128 elements, see cuda_decode.py), cuts every expert's rows into
blocks and writes a plan of them; a second one shares the weight rows of all blocks evenly among
its thread blocks. Both read ``offs`` on the device. An expert with more rows than a block has is
read once a block, mostly from L2.
"""

from __future__ import annotations

import ctypes
import struct
import threading

import torch
from torch import Tensor

from int4q.kernels import cuda_decode, cuda_plan, nvrtc
from int4q.kernels.cuda_decode import ROW_UNIT, STEP_K, Config

MAX_MEAN_ROWS = {32: 2.5, 64: 2.5, 128: 5, 256: 5}
"""Group size -> rows an expert has on average, up to which these kernels are the fastest (H200)."""
_PARAMS = struct.Struct("=8Q4q10iQ4q4i")
_PLAN_ENTRY = 16  # bytes


def block_rows(T: int, E: int, even: bool = False) -> int:
    """Rows that meet a weight at a time: with random routing, all of an expert's in most cases.

    ``even``: every expert has ``T / E``.
    """
    mean = T / max(1, E)
    if even:
        return 1 if mean <= 1 else 2 if mean <= 2 else 4 if mean <= 4 else 8
    return 1 if mean <= 0.3 else 2 if mean <= 0.8 else 4 if mean <= 2.5 else 8


def choose_config(rows: int, K: int) -> Config:
    """The configuration for blocks of so many rows, as tuned on an H200 (random routing).

    Few steps of K leave a block of many warps waiting for its slowest at every row tile.
    """
    if rows <= 4:
        return Config(16, 2, 2, 1) if K >= 4096 else Config(4, 2, 2, 4)
    return Config(4, 4, 2, 2) if K >= 2048 else Config(1, 4, 2, 8)


def unsupported(problem) -> str | None:
    """Why these kernels cannot (or should not) run ``problem``; ``None`` where they can."""
    if problem.device != "cuda":
        return f"runs on cuda, not {problem.device}"
    shape = problem.N, problem.K, problem.group_size
    facts = problem.dtype, problem.scale_dtype, problem.capability
    if reason := cuda_decode.unsupported(1, *shape, *facts):
        return reason
    if problem.N % ROW_UNIT:
        return f"N={problem.N} must be a multiple of {ROW_UNIT}"
    if problem.M > MAX_MEAN_ROWS[problem.group_size] * problem.experts:
        return f"{problem.M} rows on {problem.experts} weights: the matrix kernels are faster"
    return None


class _Plan:
    """What calls of one kind share: compiled kernels, grids, the parameter block."""

    def __init__(self, x, qdata, scale, zero_point, pre_scale, group_size, even, config, rows):
        (T, K), (E, N) = x.shape, qdata.shape[:2]
        self.device, self.dtype, self.shape = x.device, x.dtype, (T, N)
        self.index, self.lock = x.device.index, threading.Lock()
        properties = torch.cuda.get_device_properties(x.device)
        dependent = properties.major >= 9
        rows = rows or block_rows(T, E, even)
        item = scale.element_size()
        coalesced = scale.stride(1) == 1 and scale.stride(2) != 1
        copy = 0
        if coalesced or scale.stride(2) == 1:
            n_groups = K // group_size
            line = (n_groups, scale.stride(2)) if coalesced else (N, scale.stride(1))
            bits = scale.data_ptr() | zero_point.data_ptr() | scale.stride(0) * item
            copy = cuda_decode._scale_copy_bytes(coalesced, STEP_K // group_size, item, *line, bits)
        ring = cuda_decode._Ring(rows, K, group_size, 16, item, copy, coalesced)
        config = ring.fit(
            config or choose_config(rows, K),
            properties.shared_memory_per_block_optin,
            properties.shared_memory_per_multiprocessor,
        )
        blocks = E * -(-(T // E) // rows) if even else T // rows + min(E, T)
        tables = -(-_PLAN_ENTRY * (blocks + 1) // 128) * 128
        table_block = -(-ring.table_bytes // 128) * 128
        self.scratch_bytes = tables + blocks * table_block
        codes = cuda_plan.TYPE_CODES
        defines = {
            "ACT_BITS": 16, "GROUP": group_size, "X_TYPE": codes[x.dtype],
            "SCALE_TYPE": codes[scale.dtype], "PDL": int(dependent), "SYMMETRIC": 0, "MATVEC": 0,
            "EXPERTS": 1, "BLOCK_ROWS": rows, "MIN_CTAS": config.ctas_per_sm,
            "COALESCED": int(coalesced and copy > 0), "SCALE_VEC": copy,
            "COL_TILES": ring.col_tiles, "SPLIT": ring.split, "FUSED": 0,
            "WARPS": config.warps, "ROW_TILES": config.row_tiles, "STAGES": config.stages,
        }  # fmt: skip
        self.fixed = (
            *(qdata.stride(1), scale.stride(2), scale.stride(1), x.stride(0)),
            *(T, N, K),
            *(ROW_UNIT, N // ROW_UNIT, 0, 0),
            0 if pre_scale is None else codes[pre_scale.dtype],
            int(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0),
            0,
        )
        self.stack = (qdata.stride(0), scale.stride(0), tables, table_block, E, T // E, blocks, 0)
        self.params = ctypes.create_string_buffer(_PARAMS.size)
        module = nvrtc.load(cuda_decode._source(), defines, self.index)
        rest = self.params, dependent
        warps = -(-K // STEP_K) * T
        self.quantise = module.prepare("quantise_activations", -(-warps // 4), 128, 0, *rest)
        grid = properties.multi_processor_count * config.ctas_per_sm
        shared = ring.shared_bytes(config)
        self.product = module.prepare("int4_decode", grid, 32 * config.warps, shared, *rest)

    def __call__(self, x, qdata, scale, zero_point, pre_scale, offs) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with torch.cuda.device(self.index):
            # From the caching allocator: streams never share it, and a graph keeps its own.
            scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=self.device)
            stream = torch._C._cuda_getCurrentRawStream(self.index)
            pointers = [t.data_ptr() for t in (qdata, scale, zero_point, x)]
            pointers += 0, 0 if pre_scale is None else pre_scale.data_ptr()  # (no bias)
            with self.lock:
                _PARAMS.pack_into(
                    self.params, 0, *pointers, out.data_ptr(), scratch.data_ptr(),
                    *self.fixed, 0 if offs is None else offs.data_ptr(), *self.stack,
                )  # fmt: skip
                self.quantise(stream)
                self.product(stream)
        return out


_plans: dict[tuple, _Plan] = {}


def _fit(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, pre_scale: Tensor | None):
    """The parts as a plan takes them: unit strides, weight rows on 16-byte boundaries, zero_point
    lying as scale does. Copies only what does not fit."""
    if x.stride(1) != 1:
        x = x.contiguous()
    aligned = qdata.stride(2) == 1 and not any(s % 16 for s in qdata.stride()[:2])
    if not aligned or qdata.data_ptr() % 16:
        qdata = qdata.clone(memory_format=torch.contiguous_format)
    if zero_point.stride() != scale.stride() or zero_point.dtype != scale.dtype:
        like = torch.empty_strided(
            scale.shape, scale.stride(), dtype=scale.dtype, device=scale.device
        )
        zero_point = like.copy_(zero_point)
    if pre_scale is not None:
        dtype = pre_scale.dtype if pre_scale.dtype in cuda_plan.TYPE_CODES else torch.float32
        pre_scale = pre_scale.to(dtype).contiguous()
    return x, qdata, scale, zero_point, pre_scale


def _grouped(
    x, qdata, scale, zero_point, group_size, offs, config=None, rows=None, act_pre_scale=None
) -> Tensor:
    """Rows of ``x [T, K]`` times the weight of their expert; ``offs`` None: as many rows each."""
    (T, _), (E, N) = x.shape, qdata.shape[:2]
    if T * N * E == 0:
        return x.new_zeros((T, N))
    parts = _fit(x, qdata, scale, zero_point, act_pre_scale)
    x, qdata, scale, zero_point, pre_scale = parts
    pointers = qdata.data_ptr() & 15, (scale.data_ptr() | zero_point.data_ptr()) & 15
    key = (
        x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15, qdata.shape, qdata.stride(),
        scale.stride(), scale.dtype, group_size, pointers, offs is None, config, rows,
        None if pre_scale is None else pre_scale.dtype,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _Plan(*parts, group_size, offs is None, config, rows)
    return plan(*parts, offs)


def int4_grouped_mm(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    offs: Tensor,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """Rows of ``x [T, K]`` sorted by expert; see ``triton_plan.products``."""
    weight = qdata, scale, zero_point, group_size
    return _grouped(x, *weight, offs.contiguous(), act_pre_scale=act_pre_scale)


def int4_bmm(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    act_pre_scale: Tensor | None = None,
) -> Tensor:
    """``x [B, M, K]`` times a stack ``[B, N, K]``; see ``triton_plan.products``."""
    weight = qdata, scale, zero_point, group_size
    y = _grouped(x.flatten(0, 1), *weight, None, act_pre_scale=act_pre_scale)
    return y.view(*x.shape[:2], y.shape[1])
