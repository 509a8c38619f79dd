"""Times the CUDA decode kernels: ``python -m int4q.bench.decode_probe [--sweep] [--json FILE]``.

Timed as in ``timing.py``; every variant is checked first.
"""

import argparse
import dataclasses
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import torch

from int4q.bench import timing
from int4q.kernels import cuda_decode

SHAPES = {  # N, K
    "A": (28672, 4096), "B": (4096, 4096), "C": (4096, 14336), "D": (21504, 5376), "S": (512, 2048),
    "E": (1024, 4096), "F": (6144, 4096), "G": (14336, 4096), "H": (4096, 11008), "I": (2048, 8192),
    "J": (8192, 8192), "K": (12288, 4096), "L": (5120, 5120), "M": (2560, 9728), "N": (32000, 4096),
    "O": (151936, 2560),
}  # fmt: skip
ACTIVATIONS = {16: torch.bfloat16, 8: torch.int8}


class Weights:
    """Copies of one quantised weight, in both scale layouts, and its dequantised value."""

    def __init__(self, N: int, K: int, group: int):
        self.N, self.K, self.group = N, K, group
        self.copies = timing.copies(N * K // 2)
        q = torch.randint(-8, 8, (N, K), device="cuda", dtype=torch.int8)
        scale = ((torch.rand(K // group, N, device="cuda") + 0.5) * 0.01).bfloat16()
        zero_point = (torch.randn(K // group, N, device="cuda") * 0.02).bfloat16()
        wide = [t.float().repeat_interleave(group, 0).mT for t in (scale, zero_point)]
        self.dequantised = q * wide[0] + wide[1]
        qdata = (q[:, 0::2] & 15) | (q[:, 1::2] << 4)
        self.qdata = [qdata.clone() for _ in range(self.copies)]
        self.scales = {
            "plain": [(scale.clone(), zero_point.clone()) for _ in range(self.copies)],
            "coalesced": [
                (
                    scale.mT.clone(memory_format=torch.contiguous_format).mT,
                    zero_point.mT.clone(memory_format=torch.contiguous_format).mT,
                )
                for _ in range(self.copies)
            ],
        }

    def calls(self, x, layout, bits, config=None):
        return [
            lambda q=q, s=s: cuda_decode._linear(
                (x, q, *s, None, None), self.group, ACTIVATIONS[bits], config
            )
            for q, s in zip(self.qdata, self.scales[layout], strict=True)
        ]


def sweep_configs(M: int):
    """Configurations worth trying, as found on an H200."""
    if M == 1:
        for warps, rows, unroll in itertools.product((2, 4, 7, 8, 14), (4, 8), (1, 2)):
            for threads in (512, 768):
                if threads >= 32 * warps:
                    yield cuda_decode.MatvecConfig(warps, rows, unroll, threads // (32 * warps))
    shapes = [
        (8, 1, 2, 2),
        (8, 1, 3, 2),
        (8, 2, 2, 1),
        (8, 2, 2, 2),
        (16, 1, 2, 1),
        (16, 2, 2, 1),
        (4, 2, 2, 4),
        (4, 2, 2, 3),
    ]
    if M > 4:
        shapes += [
            (4, 4, 2, 2),
            (4, 2, 2, 2),
            (8, 4, 2, 1),
            (4, 2, 3, 2),
            (8, 2, 3, 1),
            (4, 1, 2, 4),
            (4, 1, 3, 3),
        ]
    if M < 4:
        shapes += [(8, 2, 3, 1), (8, 1, 2, 3)]
    for shape, fused in itertools.product(shapes, (False, True)):
        if not (fused and M > 8):
            yield cuda_decode.Config(*shape, fused)


def compile_all(jobs) -> None:
    """Makes many calls side by side, so that their kernels compile in parallel."""

    def one(job):
        with torch.cuda.device(0):
            try:
                return job()
            except RuntimeError as error:
                return error

    with ThreadPoolExecutor(14) as pool:
        for result in pool.map(one, jobs):
            if isinstance(result, Exception):
                print("failed:", str(result)[-400:])
    torch.cuda.synchronize()


def _short(config) -> str:
    if config is None:
        return ""
    values = dataclasses.astuple(config)
    return (
        ("v" if isinstance(config, cuda_decode.MatvecConfig) else "")
        + "("
        + ",".join(str(int(v)) for v in values)
        + ")"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="ABCDS", help="letters of SHAPES")
    parser.add_argument("--m", default="1,2,4,8,16")
    parser.add_argument("--bits", default="16,8")
    parser.add_argument("--groups", default="128")
    parser.add_argument("--layouts", default="plain,coalesced")
    parser.add_argument(
        "--sweep", action="store_true", help="try many configurations and print the best five"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    rows = []
    for shape, group in itertools.product(options.shapes, numbers(options.groups)):
        weights = Weights(*SHAPES[shape], group)
        for bits, M, layout in itertools.product(
            numbers(options.bits), numbers(options.m), options.layouts.split(",")
        ):
            x = torch.randn(M, weights.K, device="cuda", dtype=torch.bfloat16)
            want = x.float() @ weights.dequantised.mT
            configs = list(sweep_configs(M)) if options.sweep else [None]
            compile_all([weights.calls(x, layout, bits, config)[0] for config in configs])
            results = {}
            for config in configs:
                calls = weights.calls(x, layout, bits, config)
                error = ((calls[0]().float() - want).norm() / want.norm()).item()
                if not error < (3e-3 if bits == 16 else 1.5e-2):
                    print("WRONG", shape, group, bits, M, layout, config, error)
                    continue
                results[config] = timing.microseconds(calls)
            best = sorted(results, key=results.get)[:5]
            for config in results:
                rows.append([shape, group, bits, M, layout, str(config), results[config]])
            names = "  ".join(f"{results[c]:6.2f} {_short(c)}" for c in best)
            print(f"{shape} g{group:<3} A{bits:<2} M={M:<2} {layout:9} {names}", flush=True)
        del weights
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file)


if __name__ == "__main__":
    main()
