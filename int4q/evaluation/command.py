"""``int4q eval``: how far a 4-bit language model is from the original."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torchao.quantization import Int4Tensor as TorchAOInt4Tensor

from int4q import errors
from int4q.calibration import Calibration, calibrate
from int4q.config import Int4WeightOnlyConfig
from int4q.evaluation import card, picture
from int4q.evaluation.measure import Evaluation, evaluate
from int4q.geometry import GROUP_SIZES
from int4q.quantize import quantize_
from int4q.report import headline, summary
from int4q.tensor import Int4Tensor
from int4q.tensor.base import Int4TensorBase

ALGORITHMS = ("auto", "search", "gptq", "hqq", "tinygemm")
_ROW = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``int4q eval`` takes."""
    parser.add_argument("model", help="folder or name of a causal language model (transformers)")
    parser.add_argument("--reference", help="the original of a model that is in 4 bits already")
    parser.add_argument("text", nargs="*", type=Path, help="files (default: Python's manual)")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="auto")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128)
    parser.add_argument(
        "--calibrate", type=Path, nargs="+", metavar="TEXT", help="files (default: random ids)"
    )
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=8192, help="of text to measure at most")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--card", action="store_true", help="write the figures into the README.md of a 4-bit model"
    )
    parser.add_argument("--picture", type=Path, help="draw the layers here (matplotlib)")


def run(arguments: argparse.Namespace) -> None:
    """Measure as asked.

    Raises:
        ValueError: a reference for a model in full precision, which is compared with itself, or a
            card for one.
        ModuleNotFoundError: a picture without matplotlib.
    """
    from transformers import AutoTokenizer

    if arguments.picture:
        picture.check(arguments.picture)
    readme = card.check(arguments.model) if arguments.card else None
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = _load(arguments.model, arguments.device)
    if not any(isinstance(p, Int4TensorBase) for p in model.parameters()):
        if arguments.reference or arguments.card:
            flag = "--reference" if arguments.reference else "--card"
            raise errors.value(f"{flag} is for a model that is in 4 bits already", arguments.model)
        reference = copy.deepcopy(model)
        config = Int4WeightOnlyConfig(
            group_size=arguments.group_size,
            int4_choose_qparams_algorithm=arguments.algorithm,
            group_size_fallback=True,
        )
        quantize_(model, config, calibration=_calibration(reference, tokenizer, arguments))
    else:
        reference = _load(arguments.reference, arguments.device) if arguments.reference else None
    ids = _read(arguments.text, tokenizer)[: arguments.tokens]
    measured = evaluate(
        model,
        ids,
        reference=reference,
        window=arguments.window,
        stride=arguments.stride,
        progress=True,
    )
    show(measured)
    print(headline(summary(model, show=False)))
    if arguments.json:
        arguments.json.write_text(measured.to_json() + "\n")
    if readme:
        text = ", ".join(path.name for path in arguments.text) or "Python's manual"
        card.add(readme, measured, text, arguments.window)
    if arguments.picture:
        picture.draw(measured, arguments.picture)


def _load(name: str, device: str) -> Any:
    """A causal language model; weights that torchao wrote in 4 bits as int4q's."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    model = model.to(device).eval()
    for module in model.modules():
        for own, p in module.named_parameters(recurse=False):
            if isinstance(p, TorchAOInt4Tensor):
                ours = nn.Parameter(Int4Tensor.from_torchao(p), requires_grad=False)
                setattr(module, own, ours)
    return model


def _calibration(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Calibration | None:
    """As the algorithm needs it: on the text given, on random ids, or none."""
    if arguments.algorithm in ("hqq", "tinygemm"):
        return None
    statistics = "hessian" if arguments.algorithm == "gptq" else "importance"
    if not arguments.calibrate:
        return calibrate(model, statistics=statistics)
    ids = _read(arguments.calibrate, tokenizer)[: arguments.calibration_tokens]
    rows = ids[: len(ids) // _ROW * _ROW].view(-1, _ROW) if len(ids) >= _ROW else ids[None]
    return calibrate(model, rows, statistics=statistics)


def _read(paths: list[Path], tokenizer: Any) -> torch.Tensor:
    """Token ids ``[T]`` of the files, one after the other; of Python's manual without any."""
    if paths:
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics, key=len, reverse=True)[:8])
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)


def show(measured: Evaluation, console: Console | None = None) -> None:
    """Print it."""
    console = console or Console()
    table = Table(box=None)
    for column in (f"{measured.tokens} tokens", "perplexity", "KL (nats)", "same top token"):
        table.add_column(column, justify="right")
    if measured.reference_perplexity is not None:
        table.add_row("original", f"{measured.reference_perplexity:.3f}", "", "")
        difference = f"{measured.kl:.4f} ± {measured.kl_error:.4f}", f"{measured.top1:.1%}"
    else:
        difference = "", ""
    table.add_row("4 bits", f"{measured.perplexity:.3f}", *difference)
    console.print(table)
    if not measured.layers:
        return
    table = Table("farthest from the original", "weight (dB)", "output (dB)", box=None)
    for layer in measured.worst():
        output = "" if layer.output_sqnr is None else f"{layer.output_sqnr:.1f}"
        table.add_row(layer.name, f"{layer.weight_sqnr:.1f}", output)
    console.print(table)
