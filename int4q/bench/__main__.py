"""``python -m int4q.bench [--out FOLDER]``: what this machine can measure, as JSON and a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from int4q.bench import cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m int4q.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: all)")
    arguments = parser.parse_args()
    cpu.run(arguments.out, arguments.threads)


if __name__ == "__main__":
    main()
