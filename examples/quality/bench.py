"""What compare.py, variants.py and peers.py share: a model, texts, and one way to measure."""

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import int4q
from int4q import Int4WeightOnlyConfig
from int4q.tensor.base import Int4TensorBase

TOKENS = 8192  # of text to calibrate on


class Bench:
    """A float32 model and a table of what becomes of it.

    Args:
        model: folder of a causal language model of transformers.
        texts: folder with ``calibration.npy`` and ``heldout.npy``, token ids ``[n, T]``.
    """

    def __init__(self, model: Path, texts: Path, device: str, rows: int):
        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model = self.model.to(device).eval()
        ids = {n: np.load(texts / f"{n}.npy").astype(np.int64) for n in ("calibration", "heldout")}
        self.calibration_ids, self.heldout = (torch.from_numpy(t) for t in ids.values())
        self.heldout = self.heldout[:: -(-len(self.heldout) // rows)]  # (of every part)
        self.results: list[dict] = []

    @cached_property
    def random(self) -> int4q.Calibration:
        """On 2,048 random ids."""
        return int4q.calibrate(self.model)

    @cached_property
    def text(self) -> int4q.Calibration:
        """Hessians of 8,192 tokens of text."""
        rows = self.calibration_ids[: TOKENS // self.calibration_ids.shape[1]]
        return int4q.calibrate(self.model, rows, statistics="hessian")

    def weights(self) -> list[str]:
        """Names of the linear layers that are quantised: all but the head."""
        head = self.model.get_output_embeddings()
        return [
            n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and m is not head
        ]

    def measure(self, name: str, group: int, change: Callable[[nn.Module], None]) -> nn.Module:
        """Apply ``change`` to a copy, print a line and keep it."""
        model = copy.deepcopy(self.model)
        begin = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(model)
        if self.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.monotonic() - begin
        bits = int4q.summary(model, show=False).bits_per_weight
        in_full(model)
        window = self.heldout.shape[1]
        got = int4q.evaluate(model, self.heldout, reference=self.model, window=window)
        result = {
            "name": name, "group": group, "seconds": round(seconds, 1), "bits": bits,
            "tokens": got.tokens, "original": got.reference_perplexity,
            "increase": got.perplexity - got.reference_perplexity, "kl": got.kl,
            "kl_error": got.kl_error, "top1": got.top1,
        }  # fmt: skip
        self.results.append(result)
        base = next(
            (r for r in self.results if r["name"] == "min-max" and r["group"] == group), result
        )
        closes = [f"{1 - result[k] / base[k]:.1%}" for k in ("increase", "kl")]
        print(
            f"| {name} | {group} | {result['increase']:.3f} | {closes[0]} | {got.kl:.4f} "
            f"({got.kl_error:.4f}) | {closes[1]} | {got.top1:.1%} | {seconds:.1f} |",
            flush=True,
        )
        return model


def quantized(algorithm: str, group: int, calibration: int4q.Calibration | None):
    """A change for :meth:`Bench.measure`: int4q's own ``quantize_``."""
    config = Int4WeightOnlyConfig(
        group_size=group, int4_choose_qparams_algorithm=algorithm, group_size_fallback=True,
        set_inductor_config=False,
    )  # fmt: skip
    return lambda model: int4q.quantize_(model, config, calibration=calibration)


def each(names: list[str], function: Callable[[str, torch.Tensor], torch.Tensor]):
    """A change that replaces every weight by ``function(name, weight)``."""

    def change(model: nn.Module) -> None:
        for name in names:
            weight = model.get_submodule(name).weight
            weight.data = function(f"{name}.weight", weight.data).to(weight)

    return change


def in_full(model: nn.Module) -> None:
    """4-bit weights as float ones of the same values: kernels have no say in what is measured."""
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), Int4TensorBase):
            full = module.weight.dequantize()
            module.weight = nn.Parameter(full, requires_grad=False)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--rows", type=int, default=80, help="of held-out text, at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    return parser


def finish(bench: Bench, path: Path | None) -> None:
    print(f"original {bench.results[0]['original']:.3f}, {bench.results[0]['tokens']} tokens")
    if path:
        path.write_text(json.dumps(bench.results, indent=1) + "\n")
