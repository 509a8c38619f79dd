"""``python -m int4q.bench [gpu|cpu|decode|experts]``: measure; JSON, a table and plots."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from int4q.bench import cpu, decode, experts, gpu
from int4q.bench.shapes import GROUPS, ROWS, SETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``int4q bench`` and ``python -m int4q.bench`` take."""
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "device", nargs="?", choices=["gpu", "cpu", "decode", "experts"], default=default
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--threads", type=int, help="cpu: torch threads (default: all)")
    parser.add_argument("--shapes", choices=sorted(SETS), default="core", help="gpu: which layers")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="not cpu: sizes")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="gpu: values of M")
    parser.add_argument("--peers", nargs="*", help="only these (default: all installed)")
    parser.add_argument("--ours", nargs="+", choices=gpu.OURS, default=gpu.OURS[:1])


def run(arguments: argparse.Namespace) -> None:
    """Measure as asked."""
    if arguments.device == "cpu":
        cpu.run(arguments.out, arguments.threads)
        return
    groups, peers = tuple(arguments.groups), arguments.peers
    peers = None if peers is None else tuple(peers)
    if arguments.device == "decode":
        decode.run(arguments.out, groups, peers=peers)
        return
    if arguments.device == "experts":
        experts.run(arguments.out, groups, peers)
        return
    rows, ours = tuple(arguments.rows), tuple(arguments.ours)
    gpu.run(arguments.out, arguments.shapes, groups, rows, peers, ours)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m int4q.bench", description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
