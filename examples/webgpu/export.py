"""Write the 4-bit encoder of all-MiniLM-L6-v2 and a page that runs it in a browser.

    python examples/webgpu/export.py [--out build/webgpu] [--group-size 32]
    python -m http.server --directory build/webgpu

The folder holds the page, the package's own .wgsl files, the packed weights (8 MB), sentences as
the encoder's input, and the golden: every layer's output in float64 on the dequantised weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quantize_embedding_model import load_model  # noqa: E402

from int4q import q4gsw  # noqa: E402
from int4q.kernels.webgpu import BLOCK_K, pack  # noqa: E402

HERE = Path(__file__).parent
PAGE = ("index.html", "style.css", "main.js", "encoder.js", "q4gsw.js", "encoder.wgsl")
SHADERS = ("q4gsw_decode.wgsl", "q4gsw_prefill.wgsl")
SENTENCES = (
    "Good morning!",  # few enough tokens for the decode shader
    "The cat sleeps on the warm window sill.",
    "A kitten is napping in the sun by the window.",
    "Quarterly profits rose by twelve percent.",
    "The company earned more money than it did last spring.",
    "How do I reset the password of my account?",
    "I cannot log in any more; where can I choose a new passphrase?",
    "Simmer the tomatoes with garlic and basil for twenty minutes.",
    "A slow sauce of tomato, garlic and herbs is the heart of the dish.",
    "Light takes about eight minutes to reach the Earth from the Sun.",
)


class Blob:
    """One binary file; every part begins on a multiple of 256 bytes."""

    def __init__(self):
        self.data = bytearray()

    def add(self, array) -> list[int]:
        """``[start, bytes]`` of ``array`` in the file."""
        if isinstance(array, Tensor):
            array = array.detach().float().numpy()
        self.data += bytes(-len(self.data) % 256)
        start, raw = len(self.data), np.ascontiguousarray(array).tobytes()
        self.data += raw
        return [start, len(raw)]


def add_linear(blob: Blob, packed: q4gsw.Q4gsw) -> dict:
    """The facts and the parts of one layer, as the shaders read it."""
    ready = pack(*packed)
    return {
        "columns": ready.columns,
        "padded_columns": len(ready.bias),
        "blocks": 2 * ready.weights.shape[1] // BLOCK_K,
        "weights": blob.add(ready.weights),
        "scales": blob.add(ready.scales),
        "bias": blob.add(ready.bias),
    }


def quantize_layer(layer: nn.Module, group_size: int) -> dict[str, q4gsw.Q4gsw]:
    """A BERT layer's linear weights in 4 bits; ``layer`` keeps their dequantised values.

    Queries, keys and values become one layer of three times the columns.
    """
    attention = layer.attention.self
    places = {
        "query": attention, "key": attention, "value": attention,
        "out": layer.attention.output, "up": layer.intermediate, "down": layer.output,
    }  # fmt: skip
    packed = {}
    for name, owner in places.items():
        leaf = name if owner is attention else "dense"
        packed[name] = q4gsw.from_linear(getattr(owner, leaf), group_size)
        setattr(owner, leaf, q4gsw.to_linear(packed[name]))
    three = [packed.pop(name) for name in ("query", "key", "value")]
    packed["qkv"] = q4gsw.Q4gsw(
        torch.cat([p.weights for p in three]),
        torch.cat([p.weight_scales for p in three], dim=1),
        group_size,
        torch.cat([p.bias for p in three]),
    )
    return packed


@torch.no_grad()
def export(group_size: int, count: int) -> tuple[dict, bytes]:
    """The manifest and the binary file, with the first ``count`` sentences."""
    model, tokenizer = load_model()
    config, blob = model.config, Blob()
    model = copy.deepcopy(model)
    layers = []
    for layer in model.encoder.layer:
        packed = quantize_layer(layer, group_size)
        facts = {name: add_linear(blob, part) for name, part in packed.items()}
        norms = {"norm1": layer.attention.output.LayerNorm, "norm2": layer.output.LayerNorm}
        for name, norm in norms.items():
            facts[name] = {"gain": blob.add(norm.weight), "offset": blob.add(norm.bias)}
        layers.append(facts)
    sentences = []
    exact = copy.deepcopy(model.encoder).double()
    for text in SENTENCES[:count]:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        first = model.embeddings(input_ids=tokens)
        states, x = [], first.double()
        for layer in exact.layer:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
            states.append(x)
        golden = torch.cat(states)
        sentences.append(
            {
                "text": text,
                "tokens": tokens.shape[1],
                "input": blob.add(first),
                "golden": blob.add(golden),
            }
        )
    manifest = {
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "inner": config.intermediate_size,
        "epsilon": config.layer_norm_eps,
        "group_size": group_size,
        "layers": layers,
        "sentences": sentences,
    }
    return manifest, bytes(blob.data)


def write(out: Path, group_size: int, count: int) -> None:
    """The whole folder, ready for any static web server."""
    out.mkdir(parents=True, exist_ok=True)
    manifest, data = export(group_size, count)
    (out / "model.bin").write_bytes(data)
    (out / "manifest.json").write_text(json.dumps(manifest))
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)
    shaders = out / "wgsl"
    shaders.mkdir(exist_ok=True)
    for name in SHADERS:
        text = (resources.files("int4q.kernels.webgpu") / name).read_bytes()
        (shaders / name).write_bytes(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/webgpu"))
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--sentences", type=int, default=len(SENTENCES), help="only the first")
    arguments = parser.parse_args()
    write(arguments.out, arguments.group_size, arguments.sentences)
    size = sum(p.stat().st_size for p in arguments.out.rglob("*") if p.is_file())
    print(f"wrote {arguments.out} ({size / 1e6:.1f} MB)")
    print(f"look at it: python -m http.server --directory {arguments.out}, http://localhost:8000")


if __name__ == "__main__":
    main()
