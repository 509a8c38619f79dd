"""Generate: a whole model of transformers in its ``generate``, in bfloat16 and in 4 bits.

Ways to decode: ``eager`` (transformers' loop, its default cache), ``static`` (the same with
``cache_implementation="static"``, which on a GPU compiles the model), ``graph``
(``custom_generate=int4q.cuda_graph_generate``) and ``graph + compile`` (the same with
``compile_forward=True``). Batch 1, greedy. The contenders come one after the other, each alone in
memory but for the weights' source; the fastest of a few calls counts, and the first is timed on its
own. Tokens are compared with those of the contender's own eager loop.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import int4q
from int4q.bench.cpu import cpu_name
from int4q.bench.models import Contender, contenders, load
from int4q.bench.report import pyplot

WAYS = ("eager", "graph", "static", "graph + compile")
PROMPT = 16
"""Tokens before those that are timed."""
TOKENS = 96
CONTEXTS = (512, 4096)
REPEATS = 3


@dataclass
class Request:
    """What is measured.

    Attributes:
        model: a preset or a folder.
        layers: of a preset, where not all.
        groups: sizes of groups of weights.
        ways: to decode, of ``WAYS``.
        only: contenders, by the beginning of their names; all by default.
        tokens: new tokens of a call.
        contexts: lengths of prompts to the first token.
        time_limit: seconds after which nothing more is begun.
    """

    model: str = "llama-8b"
    layers: int | None = None
    groups: tuple[int, ...] = (128, 32)
    ways: tuple[str, ...] = WAYS
    only: tuple[str, ...] = ()
    tokens: int = TOKENS
    contexts: tuple[int, ...] = CONTEXTS
    time_limit: float = 1e9
    device: str = "cpu"
    started: float = field(default_factory=time.perf_counter)

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() - self.started > self.time_limit


def _generate(model: Any, way: str, prompt: torch.Tensor, tokens: int) -> tuple[list[int], float]:
    """New tokens, and seconds."""
    asked = {
        "eager": {},
        "static": {"cache_implementation": "static"},
        "graph": {"custom_generate": int4q.cuda_graph_generate},
        "graph + compile": {
            "custom_generate": int4q.cuda_graph_generate,
            "compile_forward": True,
        },
    }[way]
    start = time.perf_counter()
    result = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
        pad_token_id=0, **asked,
    )  # fmt: skip
    new = result[0, prompt.shape[1] :].tolist()  # waits for the device
    return new, time.perf_counter() - start


def decoding(model: Any, way: str, request: Request, expected: list[int]) -> dict[str, Any]:
    """One way of one contender: tokens a second, the first call, and how long tokens agree."""
    prompt = _prompt(model, PROMPT)
    _, first = _generate(model, way, prompt, request.tokens)
    runs = [_generate(model, way, prompt, request.tokens) for _ in range(REPEATS)]
    new, seconds = min(runs, key=lambda run: run[1])
    alike = next((i for i, (a, b) in enumerate(zip(new, expected, strict=False)) if a != b), None)
    if alike == 0:
        raise RuntimeError(f"the first token of {way} is {new[0]}, not {expected[0]}")
    return {
        "tokens_s": request.tokens / seconds,
        "first_call_s": first,
        "alike": len(expected) if alike is None else alike,
    }


def first_token(model: Any, length: int) -> float:
    """Milliseconds from a prompt of ``length`` tokens to the first new one."""
    prompt = _prompt(model, length)
    return min(_generate(model, "eager", prompt, 1)[1] for _ in range(REPEATS)) * 1e3


def _prompt(model: Any, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
    return ids.to(model.device)


def _gigabytes(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def measure(name: str, model: Any, request: Request) -> dict[str, Any]:
    """One contender: a row of the table."""
    row: dict[str, Any] = {"name": name, "ways": {}, "first_token_ms": {}, "not_run": {}}
    if request.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    expected, _ = _generate(model, "eager", _prompt(model, PROMPT), request.tokens)
    for way in request.ways:
        if request.is_over():
            row["not_run"][way] = "no time left"
        else:
            row["ways"][way] = decoding(model, way, request, expected)
            print(name, way, row["ways"][way], flush=True)
    row["peak_gb"] = _gigabytes(request.device)  # (of decoding)
    for length in request.contexts:
        if not request.is_over():
            row["first_token_ms"][str(length)] = first_token(model, length)
    int4q.drop_cuda_graphs(model)
    return row


def _made(name: str, among: dict[str, Contender], last: dict[str, Any], request: Request) -> Any:
    """A contender's model, made of the last one's if that is what it is made of."""
    contender = among[name]
    model = last.pop(contender.after, None)
    last.clear()
    if model is None and contender.after:
        model = _made(contender.after, among, last, request)
    elif model is None:
        gc.collect()  # the last model's, and what was compiled of it
        torch._dynamo.reset()
        if request.device == "cuda":
            torch.cuda.empty_cache()
        model = load(request.model, request.layers, request.device)
    return contender.make(model)


def rows(request: Request) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row each contender, and why others have none."""
    among = {c.name: c for c in contenders(request.groups, request.device)}
    found: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    last: dict[str, Any] = {}
    for name, contender in among.items():
        if request.only and not name.startswith(request.only):
            continue
        if reason := contender.missing() or ("no time left" if request.is_over() else None):
            not_run[name] = reason
            continue
        try:
            last = {name: _made(name, among, last, request)}
            found.append(measure(name, last[name], request))
        except (ImportError, NotImplementedError, RuntimeError) as error:
            if not contender.is_peer:
                raise
            not_run[name] = str(error).split("\n")[0]
    return found, not_run


def markdown(result: dict[str, Any]) -> str:
    """The table of ``result``."""
    ways, contexts = result["ways"], result["contexts"]
    base = next((row for row in result["rows"] if row["name"] == "bf16"), None)
    head = [*ways, *(f"first token of {n}, ms" for n in contexts), "peak GB"]
    lines = [
        f"{result['device']}; torch {result['torch']}, transformers {result['transformers']}, "
        f"int4q {result['int4q']}, {result['date']}.",
        "",
        f"{result['model']}, {result['layers']} layers: tokens a second of `generate`, batch 1, "
        f"{result['tokens']} new tokens; in brackets over bfloat16's, after the comma the first "
        "call's seconds.",
        "",
        "| | " + " | ".join(head) + " |",
        "|---" * (len(head) + 1) + "|",
    ]
    for row in result["rows"]:
        cells = [_cell(row["ways"].get(way), base and base["ways"].get(way)) for way in ways]
        times = [row["first_token_ms"].get(str(n)) for n in contexts]
        cells += ["-" if t is None else f"{t:.0f}" for t in times]
        cells.append("-" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}")
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    not_run = {**result["not_run"]}
    for row in result["rows"]:
        not_run |= {f"{row['name']}, {way}": why for way, why in row["not_run"].items()}
    lines += ["", *(f"- {name}: {why}." for name, why in not_run.items())]
    return "\n".join(lines) + "\n"


def _cell(way: dict[str, float] | None, base: dict[str, float] | None) -> str:
    if way is None:
        return "-"
    ratio = f" ({way['tokens_s'] / base['tokens_s']:.2f})" if base else ""
    return f"{way['tokens_s']:.1f}{ratio}, {way['first_call_s']:.1f} s"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of tokens a second, a group of them a contender."""
    if (plt := pyplot()) is None:
        return
    names = [row["name"] for row in result["rows"]]
    figure, axes = plt.subplots(figsize=(2 + 1.2 * len(names), 4), layout="constrained")
    width = 0.8 / len(result["ways"])
    for i, way in enumerate(result["ways"]):
        heights = [row["ways"].get(way, {}).get("tokens_s", 0) for row in result["rows"]]
        axes.bar([x + i * width for x in range(len(names))], heights, width, label=way)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names, rotation=20)
    axes.set_ylabel("tokens a second")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(out: Path, request: Request) -> dict[str, Any]:
    """Measure; ``generate_<model>.json``, ``.md`` and ``.png`` in ``out``; print the table."""
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", int4q.Int4SkipWarning)
        found, not_run = rows(request)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if request.device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "int4q": int4q.__version__,
        "model": Path(request.model).name,
        "layers": request.layers or "all",
        "tokens": request.tokens,
        "prompt": PROMPT,
        "ways": list(request.ways),
        "contexts": list(request.contexts),
        "rows": found,
        "not_run": not_run,
    }
    out.mkdir(parents=True, exist_ok=True)
    stem = f"generate_{result['model']}"
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{stem}.md").write_text(markdown(result))
    plot(result, out / f"{stem}.png")
    print(markdown(result))
    return result
