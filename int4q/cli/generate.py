"""``int4q generate``: text from a model, as it comes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from int4q.cli.show import console, errors_in_one_line


@errors_in_one_line
def run(
    model: Annotated[Path, typer.Argument(help="GGUF file, or folder")],
    prompt: Annotated[str, typer.Argument(help="a question, or with --raw the start of a text")],
    tokens: Annotated[int, typer.Option(help="at most")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    sample: Annotated[bool, typer.Option("--sample", help="draw tokens, do not take the first")] = (
        False
    ),
    raw: Annotated[bool, typer.Option("--raw", help="no chat template")] = False,
) -> None:
    """Answer a prompt, streaming the text."""
    import torch
    from transformers import TextStreamer

    import int4q

    held: Any
    held, tokenizer = int4q.load(model, device=device)
    int4q.prepare_for_inference_(held, fuse=True)
    fits = held.device.type in ("cuda", "cpu")
    loop = {"custom_generate": int4q.cuda_graph_generate} if fits else {}
    if raw or not tokenizer.chat_template:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    inputs = {name: t.to(device) for name, t in inputs.items() if name != "token_type_ids"}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    with torch.inference_mode():
        out = held.generate(
            **inputs, **loop, max_new_tokens=tokens, do_sample=sample, streamer=streamer
        )
    made = out.shape[1] - inputs["input_ids"].shape[1]
    console().print(f"{made} tokens, {made / (time.perf_counter() - start):.1f} a second")
