"""Tensor parallelism on 4-bit weights: layers of 8B and 70B shapes over the GPUs of one host.

PyTorch's own ``parallelize_module`` shards what ``quantize_`` made; nothing here is int4q's but the
weights. They are random; every time comes after a check of the logits against one GPU's, and is
that of a CUDA graph with its collectives in it.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py        # tiny, on the CPU
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --preset 8b 70b --prompt 2048 --steps 32
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import int4q
from int4q import Int4WeightOnlyConfig, quantize_

ROUNDING = 2
"""Times the error that sharding gives 16-bit weights, the most that 4-bit ones may have: what o and
down give is rounded to bfloat16 on every GPU before it is added, layer by layer."""
REPLAYS = 20


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int
    head_dim: int
    vocab: int


PRESETS = {
    "tiny": Shape(128, 256, 4, 2, 2, 32, 256),
    "8b": Shape(4096, 14336, 32, 8, 4, 128, 32768),
    "70b": Shape(8192, 28672, 64, 8, 2, 128, 32768),
}
WEIGHTS = {"16 bits": None, "plain W4A16": "plain", "coalesced W4A16": "cuda_coalesced"}
PLAN = {
    **dict.fromkeys(("q", "k", "v", "gate", "up"), ColwiseParallel()),
    **dict.fromkeys(("o", "down"), RowwiseParallel()),
}


class Layer(nn.Module):
    """A decoder layer of Llama's kind, without rotary embedding."""

    def __init__(self, s: Shape):
        super().__init__()
        q, kv, self.head_dim = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.head_dim
        self.q, self.k, self.v = (nn.Linear(s.hidden, n, bias=False) for n in (q, kv, kv))
        self.o = nn.Linear(q, s.hidden, bias=False)
        self.gate, self.up = (nn.Linear(s.hidden, s.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(s.inner, s.hidden, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(s.hidden), nn.RMSNorm(s.hidden)

    def forward(self, x: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        """``x [B, T, hidden]`` at ``position [T]``; ``cache [2, B, kv_heads, context, head_dim]``,
        this GPU's heads."""
        h = self.norm1(x)
        q, k, v = (
            projection(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        cache.index_copy_(3, position, torch.stack([k, v]))
        if x.shape[1] > 1:  # a prompt, from the first token on
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            seen = torch.arange(cache.shape[3], device=x.device)[None] <= position
            y = F.scaled_dot_product_attention(q, *cache, attn_mask=seen, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, s: Shape, context: int):
        super().__init__()
        self.shape, self.context = s, context
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)

    def caches(self, batch: int, ranks: int) -> list[Tensor]:
        s, like = self.shape, self.head.weight
        shape = (2, batch, s.kv_heads // ranks, self.context, s.head_dim)
        return [like.new_zeros(shape) for _ in self.layers]

    def body(self, x: Tensor, caches: list[Tensor], position: Tensor) -> Tensor:
        """All but embedding and head: what is timed."""
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, position)
        return x

    def forward(self, tokens: Tensor, caches: list[Tensor], position: Tensor) -> Tensor:
        """Logits, float32, of the last of ``tokens [B, T]``."""
        return self.head(self.body(self.embed(tokens), caches, position)[:, -1]).float()


def build(shape: Shape, packing: str | None, context: int, device: torch.device) -> Model:
    """The same weights on every rank."""
    torch.manual_seed(0)
    with device:
        model = Model(shape, context).to(torch.bfloat16).requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2:
            p.normal_(std=p.shape[1] ** -0.5)
    if packing:
        config = Int4WeightOnlyConfig(
            group_size=32 if shape.hidden < 1024 else 128,
            int4_packing_format=packing,
            activation_dtype=torch.bfloat16,
            set_inductor_config=False,
        )
        quantize_(model.layers, config)
    return model


def decode(model: Model, prompt: Tensor, ranks: int, steps: int, forced: Tensor | None = None):
    """Greedy tokens ``[steps]`` behind ``prompt [1, T]``, each step's logits ``[steps, vocab]``.

    ``forced`` are the tokens to go on with, whatever was chosen.
    """
    caches, at = model.caches(1, ranks), torch.arange(prompt.shape[1], device=prompt.device)
    logits = [model(prompt, caches, at)]
    for i in range(steps - 1):
        token = logits[-1].argmax(-1) if forced is None else forced[i : i + 1]
        logits.append(model(token[None], caches, at[-1:] + 1 + i))
    logits = torch.cat(logits)
    return logits.argmax(-1), logits


def check(
    model: Model, expected: tuple[Tensor, Tensor], prompt: Tensor, ranks: int, most: float
) -> dict:
    """The tokens chosen behind the same text as one GPU's, and how far the logits are off.

    ``most`` is the largest relative L2 error of the logits.

    Raises:
        RuntimeError: further than roundings explain, or another token was chosen where the logits
            of the two lie further apart than that.
    """
    tokens, logits = expected
    got, got_logits = decode(model, prompt, ranks, len(tokens), tokens)
    error = float((got_logits - logits).norm() / logits.norm())
    gap = logits.gather(1, tokens[:, None]) - logits.gather(1, got[:, None])
    allowed = 2 * (got_logits - logits).abs().amax(1, keepdim=True)
    if not error <= most or (gap > allowed).any():
        raise RuntimeError(
            f"logits off by {error:.1e}, tokens {got.tolist()} in place of {tokens.tolist()}"
        )
    return {"same_tokens": int((got == tokens).sum()), "tokens": len(tokens), "logits_error": error}


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Median time of ``step``: on a GPU of replays of its CUDA graph, collectives included."""
    if device.type != "cuda":
        clock = time.perf_counter()
        step()
        return (time.perf_counter() - clock) * 1e3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog goes on
        step()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times[3:])


def times(model: Model, ranks: int, prompt: int, device: torch.device) -> dict:
    """Milliseconds a layer: one token of 1 and of 16 sequences, and a prompt."""

    def milliseconds_a_layer(batch: int, length: int) -> float:
        caches = model.caches(batch, ranks)
        x = torch.randn(batch, length, model.shape.hidden, device=device, dtype=torch.bfloat16)
        position = torch.arange(length, device=device) + (prompt if length == 1 else 0)
        step = lambda: model.body(x, caches, position)  # noqa: E731
        return milliseconds(step, device) / model.shape.layers

    sizes = {"decode": (1, 1), "decode_16": (16, 1), "prefill": (1, prompt)}
    return {name: milliseconds_a_layer(*size) for name, size in sizes.items()}


@torch.no_grad()
def measure(
    name: str, weights: str, most: float, options: argparse.Namespace, mesh: DeviceMesh
) -> dict:
    shape, device, ranks = PRESETS[name], options.device, mesh.size()
    model = build(shape, WEIGHTS[weights], options.prompt + options.steps, device)
    prompt = torch.arange(options.prompt, device=device)[None] * 7 % shape.vocab
    expected = decode(model, prompt, 1, options.steps)
    one = times(model, 1, options.prompt, device)
    for layer in model.layers:
        parallelize_module(layer, mesh, PLAN)
    row = {"preset": name, "weights": weights} | check(model, expected, prompt, ranks, most)
    local = [getattr(p, "_local_tensor", p) for p in model.layers.parameters()]
    row["layer_mb"] = sum(p.nbytes for p in local) / shape.layers / 1e6
    return row | {"one": one, "all": times(model, ranks, options.prompt, device)}


def table(result: dict) -> str:
    """Markdown: milliseconds a layer, on one GPU and on all."""
    ranks, prompt = result["ranks"], result["prompt"]
    lines = [
        f"{result['device']} x {ranks}; torch {result['torch']}, NCCL {result['nccl']}, int4q "
        f"{result['int4q']}, {result['date']}; `{result['command']}`.",
        "",
        f"Milliseconds a layer, one GPU -> {ranks}. Decode: one token of 1 and of 16 sequences "
        f"behind {prompt} others; prefill: {prompt} tokens. CUDA graphs, with the all-reduces of "
        f"{ranks} GPUs in them. Same tokens: as one GPU chooses behind the same text.",
        "",
        "| model | weights | MB a layer and GPU | decode 1 | decode 16 | prefill | times 16 bits "
        f"on {ranks} GPUs: decode 1, 16, prefill | same tokens | logits off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        kinds = ("decode", "decode_16", "prefill")
        both = [f"{row['one'][k]:.3f} -> {row['all'][k]:.3f}" for k in kinds]
        base = next(r for r in result["rows"] if r["preset"] == row["preset"])
        gain = ", ".join(f"{base['all'][k] / row['all'][k]:.2f}" for k in kinds)
        cells = [row["preset"], row["weights"], f"{row['layer_mb']:.0f}", *both, gain]
        cells += [f"{row['same_tokens']} of {row['tokens']}", f"{row['logits_error']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["tiny"], choices=list(PRESETS))
    parser.add_argument("--prompt", type=int, default=32, help="tokens of it")
    parser.add_argument("--steps", type=int, default=16, help="tokens to choose")
    parser.add_argument("--out", type=Path, help="folder for tensor_parallel.json and .md")
    options = parser.parse_args(argv)
    rank, cuda = int(os.environ["RANK"]), torch.cuda.is_available()
    options.device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast: not every host has it
    if cuda:
        torch.cuda.set_device(options.device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=options.device if cuda else None)
    mesh = init_device_mesh(options.device.type, (dist.get_world_size(),))
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "ranks": mesh.size(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "none",
        "int4q": int4q.__version__,
        "prompt": options.prompt,
        "rows": [],
        "command": f"torchrun --nproc-per-node {mesh.size()} examples/tensor_parallel.py --preset "
        f"{' '.join(options.preset)} --prompt {options.prompt} --steps {options.steps}",
    }
    for name in options.preset:
        most = 0.1  # of 16-bit weights
        for weights in WEIGHTS:
            result["rows"].append(measure(name, weights, most, options, mesh))
            most = min(most, ROUNDING * result["rows"][-1]["logits_error"])
            if rank == 0:
                print(json.dumps(result["rows"][-1]), flush=True)
                if options.out:  # after every row: a run that is cut short keeps what it measured
                    options.out.mkdir(parents=True, exist_ok=True)
                    (options.out / "tensor_parallel.json").write_text(json.dumps(result, indent=1))
                    (options.out / "tensor_parallel.md").write_text(table(result))
    if rank == 0:
        print(table(result))
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()
