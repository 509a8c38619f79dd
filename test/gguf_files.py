"""Small GGUF files, written by the package `gguf`, for the tests of reading and writing them."""

from pathlib import Path

import gguf
import numpy as np
import torch

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, LAYERS, EXPERTS = 64, 256, 4, 2, 64, 2, 3
KINDS = gguf.GGMLQuantizationType
_ATTENTION = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
}  # fmt: skip
_DENSE = {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
_MOE = {f"{name}_exps": (EXPERTS, *shape) for name, shape in _DENSE.items()}
_SHARED = {f"{name}_shexp": shape for name, shape in _DENSE.items()}


def blocks(shape, kind):
    """Bytes of a 4-bit tensor: random values, scales that are finite."""
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    made = torch.randint(0, 256, (*shape[:-1], shape[-1] // values, nbytes), dtype=torch.uint8)
    halves = 2 if kind == KINDS.Q4_0 else 4
    some = (torch.randn(*made.shape[:-1], halves // 2).half() * 0.02).view(torch.uint8)
    made[..., :halves] = some
    return made.flatten(-2).numpy()


def write(
    path: Path, architecture="llama", experts=False, down=KINDS.Q4_K, extra=None, told=None
) -> Path:
    """A model of two layers (Q4_0 the first, Q4_1 the second) and a tokenizer.

    Args:
        down: type of the last matrix of a layer.
        extra: further tensors by name.
        told: called with the writer, to add metadata.
    """
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(16384)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    if experts:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(INNER)
        writer.add_expert_shared_feed_forward_length(INNER)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*(chr(33 + i) for i in range(VOCAB - 2)), "!!", "##"])
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["! !", "# #"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if told is not None:
        told(writer)
    for name, data, kind in _tensors(architecture, experts, down):
        writer.add_tensor(name, data, raw_dtype=kind)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(architecture, experts, down):
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((VOCAB, HIDDEN), dtype=np.float32)
    yield "token_embd.weight", gguf.quantize(embedding, KINDS.Q8_0), KINDS.Q8_0
    norms = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
    if architecture.startswith("qwen3"):
        norms |= {"attn_q_norm": HIDDEN // HEADS, "attn_k_norm": HIDDEN // HEADS}
    elif architecture == "gemma2":
        norms |= {"post_attention_norm": HIDDEN, "post_ffw_norm": HIDDEN}
    matrices = _ATTENTION | (_MOE if experts else _DENSE)
    if architecture == "qwen2moe":
        matrices |= _SHARED
        norms |= {"ffn_gate_inp_shexp": HIDDEN}
    for layer in range(LAYERS):
        if architecture.startswith("qwen2"):
            for name in ("attn_q", "attn_k", "attn_v"):
                bias = rng.standard_normal(_ATTENTION[name][0], dtype=np.float32)
                yield f"blk.{layer}.{name}.bias", bias, None
        for name, shape in matrices.items():
            kind = down if name.startswith("ffn_down") else (KINDS.Q4_0, KINDS.Q4_1)[layer]
            yield f"blk.{layer}.{name}.weight", blocks(shape, kind), kind
        if experts:
            router = rng.standard_normal((EXPERTS, HIDDEN), dtype=np.float32)
            yield f"blk.{layer}.ffn_gate_inp.weight", router, None
        for name, size in norms.items():
            yield f"blk.{layer}.{name}.weight", np.ones(size, dtype=np.float32), None
    yield "output_norm.weight", np.ones(HIDDEN, dtype=np.float32), None


def values(path):
    """Every tensor of a file by the library: name -> values."""
    found = {}
    for t in gguf.GGUFReader(path).tensors:
        w = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        found[t.name] = w.view(*map(int, reversed(t.shape)))
    return found
