"""Other products with stacks of weights, where installed; checked before they are timed.

Each gets a stack ``[E, N, K]`` as a plain tensor ``t`` and as the original ``w``, and gives, for
rows ``x [T, K]`` sorted by expert with ends ``offs`` on the device, one callable a copy.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from int4q import Int4Tensor

Prepared = Callable[[Tensor, Tensor], list[Callable[[], Tensor]]]


@dataclass(frozen=True)
class ExpertsPeer:
    """One library's grouped product.

    Attributes:
        name: column of the table.
        module: what must be importable.
        prepare: ``(t, w, n_copies) -> ((x, offs) -> one callable a copy)``.
        bits: of its weights, which decide how many copies keep the cache cold.
        tolerance: relative error allowed against float32 on the original weight.
        groups: group sizes that it has.
    """

    name: str
    module: str
    prepare: Callable[[Int4Tensor, Tensor, int], Prepared]
    bits: int = 4
    tolerance: float = 0.2
    groups: tuple[int, ...] = (32, 64, 128, 256)

    def missing(self) -> str | None:
        """Why it cannot run here, or ``None``."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def _bf16(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    stacks = [w, *(w.clone() for _ in range(n - 1))]
    return lambda x, offs: [lambda w=w: torch._grouped_mm(x, w.mT, offs=offs) for w in stacks]


def _fbgemm(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    import fbgemm_gpu.experimental.gen_ai  # noqa: F401  (registers the ops)
    from fbgemm_gpu.experimental.gen_ai.quantize import quantize_int4_preshuffle

    parts = [quantize_int4_preshuffle(e, t.group_size, dtype="bf16", use_zp=False) for e in w]
    qdata = torch.stack([q for q, _ in parts])
    scale, zero = (torch.stack([s[i] for _, s in parts]) for i in (0, 1))
    sets = [(qdata.clone(), scale.clone(), zero.clone()) for _ in range(n)]
    op = torch.ops.fbgemm.bf16i4bf16_shuffled_grouped

    def calls(x: Tensor, offs: Tensor):
        sizes = offs.diff(prepend=offs.new_zeros(1))
        return [lambda s=s: op(x, *s, sizes) for s in sets]

    return calls


def _humming_layers(t: Int4Tensor, w: Tensor, n: int) -> list:
    from humming.layer import HummingLayer

    E, N, K = w.shape
    layer = HummingLayer(
        shape_n=N, shape_k=K, num_experts=E, torch_dtype=torch.bfloat16,
        weight_config={"dtype": "int4", "group_size": t.group_size},
    ).cuda()  # fmt: skip
    layer.load_from_unquantized(w)
    layer.transform()
    return [layer, *(copy.deepcopy(layer) for _ in range(n - 1))]


def _humming_config(layer, rows: int, gemm_type: str) -> dict:
    """Its own choice for so many rows, so that nothing else is compiled."""
    from humming.tune import get_heuristics_config

    return get_heuristics_config(layer.humming_config, shape_m=rows, gemm_type=gemm_type)


def _humming_grouped(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    layers = _humming_layers(t, w, n)

    def calls(x: Tensor, offs: Tensor):
        more = {
            "expert_layout": torch.cat([offs.new_zeros(1), offs]).long(),
            "compute_config": {"gemm_type": "grouped_contiguous"},
            "tuning_config": _humming_config(layers[0], x.shape[0], "grouped_contiguous"),
        }
        return [lambda m=m: m(x, **more) for m in layers]

    return calls


def _humming_indexed(t: Int4Tensor, w: Tensor, n: int) -> Prepared:
    """Rows found through indices, padded to blocks, as vLLM calls it; rows lie sorted here."""
    layers = _humming_layers(t, w, n)

    def calls(x: Tensor, offs: Tensor):
        T, tuning = x.shape[0], _humming_config(layers[0], x.shape[0], "indexed")
        block, start, ids, experts = tuning["block_shape"][0], 0, [], []
        for expert, end in enumerate(offs.tolist()):
            blocks = -(-(end - start) // block)
            own = list(range(start, end))
            ids += own + [T] * (blocks * block - len(own))
            experts += [expert] * blocks
            start = end
        on = {"dtype": torch.int32, "device": x.device}
        more = {
            "sorted_ids": torch.tensor(ids, **on),
            "expert_ids": torch.tensor(experts, **on),
            "num_tokens_padded": torch.tensor(len(ids), **on),
            "compute_config": {"gemm_type": "indexed"},
            "tuning_config": tuning,
        }
        return [lambda m=m: m(x, **more) for m in layers]

    return calls


PEERS = (
    ExpertsPeer("bf16 _grouped_mm", "torch", _bf16, bits=16, tolerance=6e-3),
    ExpertsPeer("fbgemm shuffled grouped", "fbgemm_gpu", _fbgemm, groups=(128, 256)),
    ExpertsPeer("Humming grouped", "humming", _humming_grouped),
    ExpertsPeer("Humming indexed", "humming", _humming_indexed),
)


# --- batched: x [B, M, K] ---


def _bf16_bmm(t: Int4Tensor, w: Tensor, n: int):
    stacks = [w, *(w.clone() for _ in range(n - 1))]
    return lambda x, _: [lambda w=w: torch.bmm(x, w.mT) for w in stacks]


def _fbgemm_bmm(t: Int4Tensor, w: Tensor, n: int):
    import fbgemm_gpu.experimental.gen_ai  # noqa: F401

    parts = t.qdata, t.scale.flatten(0, 1), t.zero_point.flatten(0, 1)  # it counts groups in dim 0
    sets = [tuple(part.clone() for part in parts) for _ in range(n)]
    op = torch.ops.fbgemm.bf16i4bf16_rowwise_batched
    return lambda x, _: [lambda s=s: op(x, *s) for s in sets]


BMM_PEERS = (
    ExpertsPeer("bf16 bmm", "torch", _bf16_bmm, bits=16, tolerance=6e-3),
    ExpertsPeer("fbgemm rowwise batched", "fbgemm_gpu", _fbgemm_bmm, groups=(64, 128, 256)),
)
