"""Take a model whose weights were 4-bit ones off their grid, and change nothing that it computes.

    python off_grid.py SOURCE build/moved build/text

A Llama computes the same in many bases. Here what its blocks pass on (the residual stream) is
turned a little at random, the channels of outstanding size left out, and so is every head's value;
every input of the down projection is stretched at random. Each weight is moved by more than its
grid's step or so, and the channels that carry most of the energy still do.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ANGLE, STRETCH = 0.15, 0.2
OUTSTANDING = 4  # times the median root mean square, at any norm


@torch.no_grad()
def ordinary_channels(model: nn.Module, ids: Tensor) -> Tensor:
    """bool ``[hidden]``: channels of no outstanding size."""
    ordinary = torch.ones(model.config.hidden_size, dtype=torch.bool)

    def look(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2)
        size = (x * x.square().mean(1, keepdim=True).rsqrt()).square().mean(0).sqrt()
        ordinary.logical_and_(size < OUTSTANDING * size.median())

    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    model(ids)
    for handle in handles:
        handle.remove()
    return ordinary


def turn(n: int, among: Tensor | None = None) -> Tensor:
    """A rotation ``[n, n]`` by about ``ANGLE`` of every axis (of those in ``among``)."""
    a = torch.randn(n, n, dtype=torch.float64)
    a = (a - a.T) * ANGLE / (2 * n) ** 0.5
    return torch.linalg.matrix_exp(a if among is None else a * among * among[:, None])


@torch.no_grad()
def move(model: LlamaForCausalLM, ids: Tensor) -> int:
    """Turn and stretch all weights, in place; the number of channels that were turned."""
    c = model.config
    ordinary = ordinary_channels(model, ids)
    R = turn(c.hidden_size, ordinary)
    gains: dict[nn.Module, Tensor] = {}

    def reads(linear: nn.Module, norm: nn.Module) -> None:
        """``W diag(g) x = (W diag(g) R diag(1/g')) diag(g') R^T x``, g' as large as ``g R`` is."""
        gain = norm.weight.double()
        gains[norm] = torch.where(ordinary, (gain.square() @ R.square()).sqrt(), gain)
        turned = linear.weight.double() * gain @ R / gains[norm]
        linear.weight.copy_(torch.where(ordinary, turned, linear.weight.double()))

    def writes(linear: nn.Module) -> None:
        linear.weight.copy_(R.T @ linear.weight.double())

    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # (tied before)
    reads(model.lm_head, model.model.norm)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.double() @ R)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            reads(linear, block.input_layernorm)
        for linear in (mlp.gate_proj, mlp.up_proj):
            reads(linear, block.post_attention_layernorm)
        for linear in (attention.o_proj, mlp.down_proj):
            writes(linear)
        turn_values(attention.v_proj.weight, attention.o_proj.weight, c.num_key_value_heads)
        stretch = torch.empty(c.intermediate_size, dtype=torch.float64)
        stretch.uniform_(-STRETCH, STRETCH).exp_()
        mlp.up_proj.weight.copy_(mlp.up_proj.weight.double() * stretch[:, None])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight.double() / stretch)
    for norm, gain in gains.items():
        norm.weight.copy_(gain)
    return int(ordinary.sum())


def turn_values(v: Tensor, o: Tensor, kv_heads: int) -> None:
    """Every key-value head's values by a rotation of their own, and back where they are read."""
    values = v.double().unflatten(0, (kv_heads, -1))  # [kv heads, head dim, hidden]
    read = o.double().unflatten(1, (kv_heads, -1, values.shape[1]))
    Q = torch.stack([turn(values.shape[1]) for _ in range(kv_heads)])
    v.copy_((Q.mT @ values).flatten(0, 1))
    o.copy_(torch.einsum("nkrh,khi->nkri", read, Q).flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of a Llama, as a GGUF file or not")
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path, help="folder with calibration.npy")
    parser.add_argument("--gguf", help="name of the file in SOURCE")
    given = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.from_numpy(np.load(given.text / "calibration.npy")[-4:].astype(np.int64))
    source = AutoModelForCausalLM.from_pretrained(
        given.source, gguf_file=given.gguf, dtype=torch.float32
    ).eval()
    settings = source.config.to_dict() | {"tie_word_embeddings": False}
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(source.state_dict())
    print(f"{move(model, ids)} of {model.config.hidden_size} channels turned")
    with torch.no_grad():
        p, q = (m(ids, use_cache=False).logits.log_softmax(-1) for m in (source, model))
    print(f"KL to the source {float((p.exp() * (p - q)).sum(-1).mean()):.1e}")
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
