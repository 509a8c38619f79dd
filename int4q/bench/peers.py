"""Other int4 linears, where installed: found by import, checked before they are timed.

A peer gets the weight as the parts of a plain tensor and gives one callable a copy of it. What it
computes is its own format's best: tinygemm and fbgemm take the same affine values; Humming and
bitsandbytes quantise the weight themselves (Humming symmetric, bitsandbytes to NF4).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from int4q import Int4Tensor
from int4q.packing import signed_to_offset

Prepared = Callable[[Tensor], list[Callable[[], Tensor]]]


@dataclass(frozen=True)
class Peer:
    """One library.

    Attributes:
        name: column of the table.
        module: what must be importable.
        prepare: ``(weight, n_copies) -> (x -> one callable a copy)``.
        tolerance: relative error allowed against float32 on the *original* weight for a library
            that quantises itself, on the dequantised one for those that take our values.
        own_values: it quantises the original weight itself.
        largest_M: above this it is not run (it would take seconds).
    """

    name: str
    module: str
    prepare: Callable[[Int4Tensor, Tensor, int], Prepared]
    tolerance: float = 2e-2
    own_values: bool = False
    largest_M: int = 1 << 20

    def missing(self) -> str | None:
        """Why it cannot run here, or ``None``."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def _cublas(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    n = max(2, min(n, 1 + (512 << 20) // w.nbytes))
    weights = [w.clone() for _ in range(n)]
    return lambda x: [lambda w=w: F.linear(x, w) for w in weights]


def _fbgemm(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    import fbgemm_gpu.experimental.gen_ai  # noqa: F401  (registers the ops)

    sets = [(t.qdata.clone(), t.scale.clone(), t.zero_point.clone()) for _ in range(n)]
    op = torch.ops.fbgemm.bf16i4bf16_rowwise
    return lambda x: [lambda s=s: op(x, *s) for s in sets]


def _tinygemm(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    swapped = signed_to_offset(t.qdata).view(torch.uint8)
    swapped = (swapped << 4) | (swapped >> 4)  # tinygemm reads the high nibble first
    packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    both = torch.stack([t.scale, t.zero_point], dim=-1).contiguous()
    sets = [(packed.clone(), both.clone()) for _ in range(n)]
    op, g = torch.ops.aten._weight_int4pack_mm, t.group_size
    return lambda x: [lambda s=s: op(x, s[0], g, s[1]) for s in sets]


def _humming(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    from humming.layer import HummingLayer

    N, K = w.shape
    layer = HummingLayer(
        shape_n=N,
        shape_k=K,
        weight_config={"dtype": "int4", "group_size": t.group_size},
        torch_dtype=torch.bfloat16,
    ).cuda()
    layer.load_from_unquantized(w)
    layer.transform()
    layers = [layer, *(copy.deepcopy(layer) for _ in range(n - 1))]
    return lambda x: [lambda m=m: m(x) for m in layers]


def _gemlite(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    from gemlite.core import DType, GemLiteLinear

    N, K = w.shape
    u = (t.qdata.view(torch.uint8) ^ 0x88).to(torch.int32)
    q = torch.stack([u & 15, u >> 4], dim=-1).flatten(-2).to(torch.uint8)
    layers = []
    for _ in range(n):
        layer = GemLiteLinear(
            4, t.group_size, in_features=K, out_features=N, input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )  # fmt: skip
        zeros = 8 - t.zero_point.mT.float() / t.scale.mT.float()
        layer.pack(q, t.scale.mT.contiguous(), zeros.bfloat16(), None)
        layers.append(layer)
    return lambda x: [lambda m=m: m(x) for m in layers]


def _bitsandbytes(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    import bitsandbytes.functional as bnb
    from bitsandbytes import matmul_4bit

    sets = [bnb.quantize_4bit(w, blocksize=64, quant_type="nf4") for _ in range(n)]
    return lambda x: [lambda s=s: matmul_4bit(x, s[0].t(), quant_state=s[1]) for s in sets]


PEERS = (
    Peer("cuBLAS bf16", "torch", _cublas),
    Peer("Humming", "humming", _humming, tolerance=0.2, own_values=True),
    Peer("fbgemm", "fbgemm_gpu", _fbgemm),
    Peer("tinygemm", "torch", _tinygemm, largest_M=64),
    Peer("GemLite", "gemlite", _gemlite, largest_M=256),
    Peer("bitsandbytes nf4", "bitsandbytes", _bitsandbytes, tolerance=0.2, own_values=True),
)
