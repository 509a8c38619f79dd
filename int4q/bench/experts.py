"""GPU: products with stacks of experts (``torch._grouped_mm`` and ``torch.bmm`` on a 4-bit weight,
zero points included) against the peers installed.

For every model, layer, group size and number of tokens under random routing: check up to 256 rows
of each result, then time it (``timing.py``), then print. Writes JSON and a Markdown table.
"""

from __future__ import annotations

import json
import math
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from int4q import CudaCoalescedInt4Tensor, Int4Tensor
from int4q.bench import timing
from int4q.bench.experts_peers import BMM_PEERS, PEERS, ExpertsPeer

TOKENS = (1, 8, 64, 512, 4096)
BMM_ROWS = (1, 16, 128, 1024)
GROUPS = (128, 32)
OURS = ("int4q plain", "int4q coalesced")
_MAX_COPIES_BYTES = 8 << 30


@dataclass(frozen=True)
class Stack:
    """The experts of one layer: ``[experts, N, K]``, of which each token meets ``top_k``.

    ``top_k = 0`` is a batched product: as many rows for each.
    """

    name: str
    experts: int
    top_k: int
    N: int
    K: int


STACKS = (
    Stack("Mixtral 8x7B gate_up", 8, 2, 28672, 4096),
    Stack("Mixtral 8x7B down", 8, 2, 4096, 14336),
    Stack("Qwen3 30B-A3B gate_up", 128, 8, 1536, 2048),
    Stack("Qwen3 30B-A3B down", 128, 8, 2048, 768),
    Stack("bmm", 8, 0, 4096, 4096),
)


def routing(stack: Stack, tokens: int) -> Tensor:
    """int32 ``[experts]``: end rows when every token goes to ``top_k`` random experts."""
    if stack.top_k == 0:
        return torch.arange(1, stack.experts + 1, dtype=torch.int32) * tokens
    g = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, stack.experts, generator=g).topk(stack.top_k, 1).indices
    counts = chosen.flatten().bincount(minlength=stack.experts)
    return counts.cumsum(0).int()


def _ours(stack: Stack):
    def prepare(make):
        def calls_of(t: Int4Tensor, w: Tensor, n: int):
            stacks = [make(t.clone()) for _ in range(n)]
            if stack.top_k == 0:
                return lambda x, _: [lambda w=w: torch.bmm(x, w) for w in stacks]
            return lambda x, offs: [
                lambda w=w: torch._grouped_mm(x, w.mT, offs=offs) for w in stacks
            ]

        return calls_of

    def coalesced(t):
        return CudaCoalescedInt4Tensor.from_int4_tensor(t, torch.bfloat16)

    return [
        ExpertsPeer(OURS[0], "torch", prepare(lambda t: t), tolerance=6e-3),
        ExpertsPeer(OURS[1], "torch", prepare(coalesced), tolerance=6e-3),
    ]


class Bench:
    """One stack and group size: what is run is prepared once for each number of copies."""

    def __init__(self, stack: Stack, group_size: int, wanted: list[ExpertsPeer]):
        self.stack, self.group_size, self.wanted = stack, group_size, wanted
        self.prepared: dict = {}  # by name and number of copies
        E, N, K = stack.experts, stack.N, stack.K
        w = torch.empty(E, N, K, device="cuda", dtype=torch.bfloat16)
        for expert in w:
            expert.normal_(std=K**-0.5)
        self.w, self.t = w, Int4Tensor.from_hp(w, [1, 1, group_size])

    def _exact(self, x: Tensor, offs: Tensor, rows: Tensor, name: str) -> Tensor:
        """float32 results of some rows, on the weights that ``name`` started from."""
        ends = offs.to(rows.device)
        experts = torch.searchsorted(ends, rows.int(), right=True)
        flat, out = x.reshape(-1, x.shape[-1]), []
        for expert in experts.unique().tolist():
            w = self.t[expert].dequantize(torch.float32) if name in OURS else self.w[expert].float()
            out.append(flat[rows[experts == expert]].float() @ w.t())
        return torch.cat(out)

    def _time(
        self, entry: ExpertsPeer, x: Tensor, offs: Tensor, active: int
    ) -> tuple[float, float]:
        """Microseconds and relative error; raises where the result is wrong."""
        stack_bytes = self.w.numel() * entry.bits // 8
        n = timing.copies(stack_bytes * active // self.stack.experts)
        n = max(2, min(n, _MAX_COPIES_BYTES // stack_bytes))
        if (entry.name, n) not in self.prepared:
            self.prepared[entry.name, n] = entry.prepare(self.t, self.w, n)
        calls = self.prepared[entry.name, n](x, offs)
        rows = torch.linspace(0, x.numel() // x.shape[-1] - 1, 256, device="cuda").long().unique()
        exact = self._exact(x, offs, rows, entry.name)
        y = calls[0]().reshape(-1, self.stack.N)[rows].float()
        error = float((y - exact).norm() / exact.norm())
        if not error <= entry.tolerance:
            raise ArithmeticError(f"wrong: relative error {error:.3g}")
        return timing.microseconds(calls), error

    def row(self, tokens: int) -> dict:
        """Times at so many tokens (rows of each weight, for bmm), and why one has none."""
        stack, offs = self.stack, routing(self.stack, tokens)
        T = int(offs[-1])
        active = int((offs.diff(prepend=offs.new_zeros(1)) > 0).sum())
        shape = (T, stack.K) if stack.top_k else (stack.experts, tokens, stack.K)
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        us, errors, problems = {}, {}, {}
        for entry in self.wanted:
            if self.group_size not in entry.groups:
                problems[entry.name] = f"has no group size {self.group_size}"
                continue
            try:
                us[entry.name], errors[entry.name] = self._time(entry, x, offs.cuda(), active)
            except Exception as error:  # one that breaks is reported, not fatal
                problems[entry.name] = f"{type(error).__name__}: {error}"[:200]
                if entry.name in OURS:
                    traceback.print_exc()
            torch.cuda.empty_cache()
        weight = self.t.nbytes * active // stack.experts
        return {
            "stack": stack.name, "experts": stack.experts, "top_k": stack.top_k, "N": stack.N,
            "K": stack.K, "group_size": self.group_size, "tokens": tokens, "rows": T,
            "active_experts": active, "us": us, "relative_error": errors, "not_timed": problems,
            "flops": 2 * T * stack.N * stack.K, "bytes": weight + 2 * T * (stack.N + stack.K),
        }  # fmt: skip


def _floor_us(row: dict, ceilings: dict) -> float:
    """The larger of what the bytes and what the arithmetic take at the measured ceilings."""
    return max(
        row["bytes"] / ceilings["read_tb_s"] / 1e6, row["flops"] / ceilings["bf16_tflop_s"] / 1e6
    )


def line(row: dict) -> str:
    """One row for the terminal."""
    cells = [f"{row['stack']} g{row['group_size']} {row['tokens']}"]
    cells += [f"{name} {t:.1f}" for name, t in row["us"].items()]
    return "; ".join(cells + [f"{n}: {why}" for n, why in row["not_timed"].items()])


def markdown(result: dict) -> str:
    """Microseconds of everything, and what bf16 and the best other peer take over ours."""
    ceilings, rows = result["ceilings"], result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    head = ["stack", "group", "tokens", "rows", "experts met", *names, "bf16", "best peer", "floor"]
    lines = [
        f"{result['gpu']}; torch {result['torch']}, CUDA {result['cuda']}, int4q "
        f"{result['int4q']}, {result['date']}. Measured ceilings: read "
        f"{ceilings['read_tb_s']:.2f} TB/s, bf16 matrix product "
        f"{ceilings['bf16_tflop_s']:.0f} TFLOP/s.",
        "",
        "Median microseconds of one product, CUDA-graph replays, cold L2, random routing, zero "
        "points included in int4q's. `bf16`, `best peer`: their time over int4q plain's. `floor`: "
        "the larger of what the bytes and the arithmetic take at the measured ceilings, "
        "microseconds. `tokens` of a bmm are rows of each of its weights.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        us = row["us"]
        cells = [row["stack"], row["group_size"], row["tokens"], row["rows"], row["active_experts"]]
        cells += [f"{us[n]:.1f}" if n in us else "-" for n in names]
        peers = {n: t for n, t in us.items() if not n.startswith("int4q")}
        base = us.get(OURS[0], math.nan)
        dense = [t for n, t in peers.items() if n.startswith("bf16")]
        others = [t for n, t in peers.items() if not n.startswith("bf16")]
        cells += [f"{min(t) / base:.2f}" if t else "-" for t in (dense, others)]
        lines.append(
            "| " + " | ".join(map(str, [*cells, f"{_floor_us(row, ceilings):.1f}"])) + " |"
        )
    notes = ["", result["note"]] if "note" in result else []
    return "\n".join(lines + notes) + "\n"


def run(
    out: Path,
    groups: tuple[int, ...] = GROUPS,
    peers: tuple[str, ...] | None = None,
    stacks: tuple[Stack, ...] = STACKS,
    tokens: tuple[int, ...] = TOKENS,
) -> dict:
    """Measure, write ``experts.json`` and ``experts.md`` into ``out``, print the rows."""
    out.mkdir(parents=True, exist_ok=True)
    every = [p for p in (*PEERS, *BMM_PEERS) if peers is None or p.name in peers]
    missing = {p.name: reason for p in every if (reason := p.missing())}
    result = {
        **timing.machine(),
        "not_installed": missing,
        "ceilings": timing.ceilings(),
        "rows": [],
    }
    for stack in stacks:
        theirs = PEERS if stack.top_k else BMM_PEERS
        wanted = _ours(stack) + [p for p in theirs if p in every and p.name not in missing]
        for group_size in groups:
            torch.manual_seed(stack.N + group_size)
            bench = Bench(stack, group_size, wanted)
            for count in tokens if stack.top_k else BMM_ROWS:
                result["rows"].append(bench.row(count))
                print(line(result["rows"][-1]), flush=True)
            del bench
            torch.cuda.empty_cache()
            (out / "experts.json").write_text(json.dumps(result, indent=1) + "\n")
            (out / "experts.md").write_text(markdown(result))
    return result
