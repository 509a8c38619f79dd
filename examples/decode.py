"""Greedy decoding of a large language model's shapes with 4-bit weights: tokens a second.

The model has random weights, so its text means nothing; its time does not depend on them. It is
built and quantised layer by layer: the most memory it takes is the quantised model, one layer in
16 bits and the output head. On a GPU a whole step (arg max and cache position included) is one
CUDA graph, replayed without a word from the host; every figure comes after a check that the graph
chooses the tokens of the uncaptured step, and that both scale layouts give the same logits.

    python examples/decode.py                                  # tiny, on the CPU, seconds
    python examples/decode.py --preset gemma-31b --out docs/benchmarks/h200
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import decode_report
import torch
from decode_model import PRESETS, Decoder
from torch import Tensor

from int4q import Int4WeightOnlyConfig, quantize_

CHECKED = 16  # tokens that the captured graph must choose as the uncaptured step does
REPEATS = 3
SAME_WEIGHT = 2e-2
"""Plain and coalesced hold the same bytes, summed in another order: their logits differ by bfloat16
roundings, carried through the layers (relative L2 error)."""


@dataclass(frozen=True)
class Variant:
    """How the layers' weights are held; ``packing`` is ``None`` for 16 bits."""

    name: str
    packing: str | None = None
    activation: torch.dtype | None = None
    group_size: int | None = None

    @property
    def config(self) -> Int4WeightOnlyConfig | None:
        return self.packing and Int4WeightOnlyConfig(
            group_size=self.group_size,
            int4_packing_format=self.packing,
            activation_dtype=self.activation,
            set_inductor_config=False,
        )


def variants(group_sizes: list[int], base: str) -> Iterator[Variant]:
    """``base`` names the 16-bit (on the CPU: float32) one."""
    yield Variant(base)
    for group in group_sizes:
        yield Variant("plain W4A16", "plain", torch.bfloat16, group)
        yield Variant("coalesced W4A16", "cuda_coalesced", torch.bfloat16, group)
        yield Variant("coalesced W4A8", "cuda_coalesced", torch.int8, group)


def run(step: Iterator[str]) -> None:
    """All of a step."""
    for _ in step:
        pass


def captured(model: Decoder) -> Callable[[], None]:
    """A function that runs one step: on a GPU the replay of a CUDA graph."""
    if not model.token.is_cuda:
        return lambda: run(model.step())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(model.step())  # warm up: handles, workspaces
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(model.step())
    return graph.replay


def decode(
    model: Decoder, step: Callable[[], None], start: int, tokens: int
) -> tuple[Tensor, float]:
    """``tokens`` steps behind the first ``start`` tokens: the tokens chosen, and seconds a step."""
    model.rewind(start)
    if model.token.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(tokens):
            step()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
    else:
        clock = time.perf_counter()
        for _ in range(tokens):
            step()
        seconds = time.perf_counter() - clock
    return model.history[start + 1 : start + tokens + 1].clone(), seconds / tokens


def first_logits(model: Decoder, context: int) -> Tensor:
    """Logits behind the whole prompt, float32."""
    model.rewind(context - 1)
    run(model.step())
    return model.logits.float()


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def read_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a kernel which only reads reaches, from 4 GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    words = torch.empty(1 << 29, dtype=torch.int64, device=device).random_()
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        words.sum()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return words.nbytes / median(times[1:])


def measure(
    model: Decoder, context: int, tokens: int, bandwidth: float | None
) -> tuple[dict, Callable[[], None]]:
    """Check the captured step, then time it; returns the figures and the step.

    Raises:
        RuntimeError: it does not choose the tokens that the uncaptured step chooses.
    """
    checked = min(CHECKED, tokens)
    eager, _ = decode(model, lambda: run(model.step()), context - 1, checked)
    step = captured(model)
    replayed, _ = decode(model, step, context - 1, checked)
    if not torch.equal(eager, replayed):
        raise RuntimeError(f"captured tokens {replayed.tolist()}, uncaptured {eager.tolist()}")
    seconds = median(decode(model, step, context - 1, tokens)[1] for _ in range(REPEATS))
    needed = model.weight_bytes() + model.cache_bytes(context - 1 + tokens / 2)
    row = {
        "tokens_s": 1 / seconds,
        "ms": seconds * 1e3,
        "weight_gb": model.weight_bytes() / 1e9,
        "checked_tokens": eager.tolist(),
    }
    if bandwidth:
        row["floor_ms"] = needed / bandwidth * 1e3
        row["fraction"] = row["floor_ms"] / row["ms"]
    return row, step


def bench_preset(name: str, options: argparse.Namespace, bandwidth: float | None) -> Iterator[dict]:
    """One row a variant and precision of the head; one model at a time is in memory."""
    shape, device = PRESETS[name], options.device
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(shape.vocab, (options.context,), generator=generator).to(device)
    max_len = options.context + max(options.tokens, CHECKED) + 1
    exact: dict[int | None, Tensor] = {}
    for variant in variants(options.group_sizes, str(dtype).removeprefix("torch.")):
        about = {"preset": name, "variant": variant.name, "group_size": variant.group_size}
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter()
        model = Decoder(shape, variant.config, max_len, device, dtype)
        if on_gpu:
            torch.cuda.synchronize()
            about["build_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        about["build_s"] = time.perf_counter() - clock
        model.prefill(prompt)
        about |= _compared(variant, first_logits(model, options.context), exact)
        for head in _heads(variant, options.lm_head):
            if head == "int4":
                quantize_(model.head, variant.config)
            row, step = measure(model, options.context, options.tokens, bandwidth)
            row = about | {"lm_head": head} | row
            if on_gpu and options.profile and head == "16 bits":
                model.rewind(options.context - 1)
                row["profile"] = decode_report.profile_step(model, step)
            del step  # the graph, and what it keeps
            yield row
        del model
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def _heads(variant: Variant, asked: str) -> tuple[str, ...]:
    if not variant.packing:
        return ("16 bits",)
    return {"bf16": ("16 bits",), "int4": ("int4",), "both": ("16 bits", "int4")}[asked]


def _compared(variant: Variant, logits: Tensor, exact: dict[int | None, Tensor]) -> dict:
    """Error of the logits against the plain weight of the same group size.

    Raises:
        RuntimeError: a coalesced W4A16 weight gives other logits than a plain one.
    """
    reference = exact.setdefault(variant.group_size, logits)
    if reference is logits:
        return {}
    error = relative_error(logits, reference)
    if variant.activation != torch.int8 and not error <= SAME_WEIGHT:
        raise RuntimeError(f"{variant.name}: logits differ from plain by {error:.1e}")
    return {"logits_error": error}


def main(argv: list[str] | None = None) -> dict:
    """Measure what the command line asks for; returns what is written as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["tiny"], choices=list(PRESETS))
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--context", type=int, default=512, help="tokens in the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode, timed")
    parser.add_argument("--lm-head", default="both", choices=["bf16", "int4", "both"],
                        help="precision of the output head of the 4-bit variants")  # fmt: skip
    parser.add_argument("--device", type=torch.device,
                        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True,
                        help="where the time of a step goes (CUDA)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for decode_e2e.json, .md and .png")
    options = parser.parse_args(argv)
    if options.context < 2 or options.tokens < 1:
        parser.error("--context must be at least 2 and --tokens at least 1")

    if options.device.index is not None and options.device.type == "cuda":
        torch.cuda.set_device(options.device)  # where events and graphs are made
    bandwidth = read_bandwidth(options.device)
    result = decode_report.header(options, bandwidth)
    for name in options.preset:
        for row in bench_preset(name, options, bandwidth):
            result["rows"].append(row)
            print(decode_report.line(row), flush=True)
            if options.out:  # after every row: a run that is cut short keeps what it measured
                decode_report.write(options.out / "decode_e2e.json", result)
    if options.out:
        decode_report.write_all(options.out, result)
    print("(random weights: the text means nothing, the time is that of a trained model)")
    return result


if __name__ == "__main__":
    main()
