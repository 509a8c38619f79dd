"""``python -m int4q.bench WHAT``: measure this machine; JSON, tables and plots."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from int4q.bench import cpu, decode, experts, generate, gpu, host, lora
from int4q.bench.models import PRESETS
from int4q.bench.shapes import GROUPS, ROWS, SETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``int4q bench`` and ``python -m int4q.bench`` take."""
    parser.add_argument(
        "what",
        nargs="?",
        choices=["gpu", "cpu", "decode", "experts", "host", "generate", "lora"],
        default="gpu" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="host, generate, lora (default: a GPU)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--threads", type=int, help="cpu, host, generate: torch's (default: all)")
    parser.add_argument("--shapes", choices=sorted(SETS), default="core", help="gpu: which layers")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="not cpu: sizes")
    parser.add_argument("--rows", type=int, nargs="+", help="gpu, host: values of M")
    parser.add_argument("--peers", nargs="*", help="only these (default: all installed)")
    parser.add_argument("--ours", nargs="+", choices=gpu.OURS, default=gpu.OURS[:1])
    group = parser.add_argument_group("generate")
    group.add_argument(
        "--model", default="llama-8b", help=f"{', '.join(PRESETS)} (random weights), or a folder"
    )
    group.add_argument("--layers", type=int, help="only so many")
    group.add_argument("--ways", nargs="+", choices=generate.WAYS, default=generate.WAYS)
    group.add_argument("--only", nargs="+", default=(), help="contenders (beginnings of names)")
    group.add_argument("--tokens", type=int, default=generate.TOKENS, help="new ones of a call")
    group.add_argument("--contexts", type=int, nargs="*", default=generate.CONTEXTS)
    group.add_argument("--time-limit", type=float, default=1e9, help="begin nothing after, seconds")


def run(arguments: argparse.Namespace) -> None:
    """Measure as asked."""
    if arguments.what == "cpu":
        cpu.run(arguments.out, arguments.threads)
        return
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.what == "lora":
        lora.run(arguments.out, device, arguments.groups[0])
        return
    if arguments.what == "generate":
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        names = "model layers groups ways only tokens contexts time_limit".split()
        asked = {name: getattr(arguments, name) for name in names}
        asked = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in asked.items()}
        generate.run(arguments.out, generate.Request(**asked, device=device))
        return
    if arguments.what == "host":
        host.run(arguments.out, device, arguments.threads, tuple(arguments.rows or ()))
        return
    groups, peers = tuple(arguments.groups), arguments.peers
    peers = None if peers is None else tuple(peers)
    if arguments.what == "decode":
        decode.run(arguments.out, groups, peers=peers)
        return
    if arguments.what == "experts":
        experts.run(arguments.out, groups, peers)
        return
    rows, ours = tuple(arguments.rows or ROWS), tuple(arguments.ours)
    gpu.run(arguments.out, arguments.shapes, groups, rows, peers, ours)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m int4q.bench", description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
