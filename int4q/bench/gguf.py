"""A GGUF file's model on a CPU: int4q in transformers' ``generate`` against llama.cpp.

Tokens a second after a prompt of ``PROMPT`` tokens, and the time from that prompt to the first new
token. Every contender runs in a process of its own: ``bf16`` (the file's values in bfloat16) and
``int4`` (its 4-bit values as they are, fused), each in transformers' loop (``eager``), in int4q's
(``loop``), and in that with a compiled forward (``loop + compile``); ``int4 head`` has the output
layer in 4 bits as well, which the file has in 8; llama.cpp through ``llama-cpp-python``. The best
of a few calls counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PROMPT, TOKENS, REPEATS = 512, 64, 3
WARM = 16
"""New tokens before those that are timed: both calls have a cache of one length then."""
LLAMA = "llama.cpp"
CONTENDERS = (
    LLAMA, "bf16, eager", "bf16, loop + compile", "int4, eager", "int4, loop",
    "int4, loop + compile", "int4 head, loop + compile",
)  # fmt: skip


def _prompt(vocabulary: int) -> list[int]:
    """Token ids that look random, the same for all."""
    return [3 + (i * 7919) % (vocabulary - 3) for i in range(PROMPT)]


def llama(path: str, threads: int) -> dict[str, Any]:
    """llama.cpp's figures; its own library does all of the loop but the choice of the token."""
    from llama_cpp import Llama

    settings = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
    model = Llama(path, n_ctx=2 * PROMPT, n_batch=PROMPT, **settings)
    firsts, tokens = [], []
    for _ in range(REPEATS):
        model.reset()
        start = time.perf_counter()
        model.eval(_prompt(model.n_vocab()))
        firsts.append(time.perf_counter() - start)
        start = time.perf_counter()
        for token in range(TOKENS):
            model.eval([token + 100])
        tokens.append((time.perf_counter() - start) / TOKENS)
    return {"first_token_s": min(firsts), "tokens_s": 1 / min(tokens)}


def _model(path: str, kind: str) -> Any:
    import torch

    import int4q

    model: Any = int4q.load(path)[0]
    model.generation_config.eos_token_id = None
    if kind == "bf16":
        for module in model.modules():
            if isinstance(weight := getattr(module, "weight", None), int4q.Int4Tensor):
                values = weight.dequantize(torch.bfloat16)
                module.weight = torch.nn.Parameter(values, requires_grad=False)
        return model
    if kind == "int4 head":
        head = model.get_output_embeddings().weight.detach()
        packed = int4q.Int4Tensor.from_hp(head, [1, 32])
        model.get_output_embeddings().weight = torch.nn.Parameter(packed, requires_grad=False)
    return int4q.prepare_for_inference_(model, fuse=True)


def transformers(path: str, threads: int, name: str) -> dict[str, Any]:
    """The figures of a contender in ``generate``."""
    import torch

    import int4q

    torch.set_num_threads(threads)
    kind, _, way = name.partition(", ")
    model = _model(path, kind)
    ids = torch.tensor([_prompt(model.config.vocab_size)])
    asked: dict[str, Any] = {} if way == "eager" else {"custom_generate": int4q.cuda_graph_generate}
    if way.endswith("compile"):
        asked["compile_forward"] = True

    def seconds(new: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            pad_token_id=0, **asked,
        )  # fmt: skip
        return time.perf_counter() - start

    with torch.inference_mode():
        first_call = seconds(WARM)  # (compiles)
        first = min(seconds(1) for _ in range(REPEATS))
        warm = min(seconds(WARM) for _ in range(REPEATS))
        whole = min(seconds(WARM + TOKENS) for _ in range(REPEATS))
    return {
        "first_token_s": first,
        "tokens_s": TOKENS / (whole - warm),
        "first_call_s": first_call,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table of ``result``."""
    threads = result["threads"]
    head = [f"tokens/s, {t} threads" for t in threads]
    head += [f"ms to the first token, {t} threads" for t in threads]
    lines = [
        f"{result['model']}, {result['cpu']}, {result['date']}: {PROMPT} tokens of prompt, then "
        f"{TOKENS} new ones; in brackets over llama.cpp's (decoding) or bfloat16's (first token).",
        "",
        "| | " + " | ".join(head) + " |",
        "|---" * (len(head) + 1) + "|",
    ]
    rows = result["rows"]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["threads"]: row for row in rows if row["name"] == name}
        cells = [_ratio(own[t]["tokens_s"], _of(rows, LLAMA, t, "tokens_s"), 1) for t in threads]
        for t in threads:
            base = _of(rows, "bf16, eager", t, "first_token_s")
            milliseconds = own[t]["first_token_s"] * 1e3
            cells.append(_ratio(milliseconds, base and base * 1e3, 0))
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _of(rows: list[dict[str, Any]], name: str, threads: int, what: str) -> float | None:
    found = (row[what] for row in rows if (row["name"], row["threads"]) == (name, threads))
    return next(found, None)


def _ratio(value: float, base: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ({value / base:.2f})" if base else "")


def run(path: Path, out: Path, threads: tuple[int, ...]) -> dict[str, Any]:
    """Measure, write ``gguf.json`` and ``gguf.md`` into ``out``, print the table."""
    from int4q.bench.cpu import cpu_name

    names = [n for n in CONTENDERS if n != LLAMA or importlib.util.find_spec("llama_cpp")]
    rows = []
    for count in threads:
        for name in names:
            command = [sys.executable, "-m", "int4q.bench.gguf", str(path)]
            done = subprocess.run(
                [*command, "--threads", str(count), "--contender", name],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(), "cpu": cpu_name(),
        "model": path.name, "threads": list(threads), "rows": rows,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "gguf.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "gguf.md").write_text(markdown(result))
    print(markdown(result))
    return result


def main() -> None:
    """``python -m int4q.bench.gguf FILE``."""
    parser = argparse.ArgumentParser(prog="python -m int4q.bench.gguf", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contender", choices=CONTENDERS, help="only this, as JSON")
    arguments = parser.parse_args()
    if arguments.contender is None:
        run(arguments.path, arguments.out, tuple(arguments.threads))
        return
    name, (count, *_) = arguments.contender, arguments.threads
    path = str(arguments.path)
    row = llama(path, count) if name == LLAMA else transformers(path, count, name)
    print(json.dumps({"name": name, "threads": count, **row}))


if __name__ == "__main__":
    main()
