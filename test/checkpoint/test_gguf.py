"""GGUF files: the values that `gguf` and transformers read, and files that are damaged."""

import os
import random

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

import gguf_files  # noqa: E402

import int4q  # noqa: E402
from int4q import Int4Tensor  # noqa: E402
from int4q.checkpoint.gguf_file import GGUFFile  # noqa: E402
from int4q.checkpoint.gguf_model import GGUFModel  # noqa: E402
from int4q.cli import main  # noqa: E402

KINDS = gguf.GGMLQuantizationType
MIXTURES = {"llama": "mixtral", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A llama of two layers with tensors of every type that is read, and a tokenizer."""
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def theirs(path):
    """transformers' own reading, dequantised to float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


def check(model, theirs, dtype=torch.bfloat16):
    """Every parameter is the one that transformers reads, 4-bit ones to float32's last bits."""
    expected = dict(theirs.named_parameters())
    quantised = 0
    for name, p in model.named_parameters():
        w = expected.pop(name).detach()
        if isinstance(p, Int4Tensor):
            quantised += 1
            assert p.dtype == torch.float32 and p.group_size == 32
            bound = float(w.abs().max()) * 2**-23 if ".down_proj." in name else 0
            torch.testing.assert_close(p.dequantize(), w, rtol=0, atol=bound)
        else:
            assert torch.equal(p, w.to(dtype))
    assert not expected and quantised == 14


def test_a_model_holds_the_files_values(path, theirs):
    model, tokenizer = int4q.load(path)
    check(model, theirs)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([tokenizer("#$%")["input_ids"]])
    assert ids.shape == (1, 3)
    ours, exact = model.float()(ids).logits, theirs(ids).logits
    assert (ours - exact).norm() < 0.02 * exact.norm()  # (the embedding is bfloat16)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts(architecture, tmp_path):
    """A mixture of experts: every matrix of its stacks as `gguf` dequantises it."""
    path = gguf_files.write(tmp_path / "moe.gguf", architecture, experts=True)
    model, _ = int4q.load(path)
    assert model.config.model_type == MIXTURES[architecture]
    assert model.config.num_experts_per_tok == 2
    held = gguf_files.values(path)
    for i, layer in enumerate(model.model.layers):
        gate, up, down = (held[f"blk.{i}.ffn_{n}_exps.weight"] for n in ("gate", "up", "down"))
        stack = layer.mlp.experts.gate_up_proj
        assert isinstance(stack, Int4Tensor)
        assert torch.equal(stack.dequantize(), torch.cat([gate, up], dim=1))
        bound = float(down.abs().max()) * 2**-23  # (Q4_K: the last bit of a zero point)
        ours = layer.mlp.experts.down_proj.dequantize()
        torch.testing.assert_close(ours, down, rtol=0, atol=bound)
        assert torch.equal(layer.mlp.gate.weight, held[f"blk.{i}.ffn_gate_inp.weight"].bfloat16())
    main(["convert", str(path), str(tmp_path / "int4")])
    again, _ = int4q.load(tmp_path / "int4")
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        exact = [t.dequantize() if isinstance(t, Int4Tensor) else t for t in (p, q)]
        assert torch.equal(*exact), name
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("architecture", ["qwen2moe", "qwen3moe"])
def test_experts_as_transformers_reads_them(architecture, tmp_path):
    path = gguf_files.write(tmp_path / "moe.gguf", architecture, experts=True, down=KINDS.Q8_0)
    model, _ = int4q.load(path, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(  # (it overlooks the experts' size)
        tmp_path, gguf_file=path.name, dtype=torch.float32, config=model.config
    )
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.dequantize() if isinstance(p, Int4Tensor) else p, q), name


def llama3(config, factor=8.0):
    """Factors of the frequencies as llama 3's formula gives them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    told = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    plain = config.rope_parameters["rope_theta"] ** -torch.arange(0, 1, 1 / 8)
    config.rope_parameters |= told
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]).numpy()


def test_scaled_frequencies(path, theirs, tmp_path):
    import copy

    factors = llama3(copy.deepcopy(theirs.config))
    scaled = gguf_files.write(tmp_path / "x.gguf", extra={"rope_freqs.weight": factors})
    frequencies = [
        model.model.rotary_emb.inv_freq for model in (int4q.load(scaled)[0], int4q.load(path)[0])
    ]
    torch.testing.assert_close(frequencies[0] * torch.from_numpy(factors), frequencies[1])
    assert factors.max() > 7.99 and abs(factors.min() - 1) < 1e-6
    other = gguf_files.write(tmp_path / "y.gguf", extra={"rope_freqs.weight": factors[::-1]})
    with pytest.raises(ValueError, match="llama 3's factors"):
        GGUFModel(other)


@pytest.mark.parametrize("kind", ["linear", "yarn", "longrope"])
def test_frequencies_scaled_by_a_rule(kind, tmp_path):
    def told(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(4096)

    path = gguf_files.write(tmp_path / "x.gguf", told=told)
    if kind == "longrope":
        with pytest.raises(ValueError, match="linearly or by yarn, got longrope"):
            GGUFModel(path)
        return
    rope = GGUFModel(path).config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == (kind, 4.0, 10000.0)
    assert kind == "linear" or rope["original_max_position_embeddings"] == 4096


def test_convert_and_load_again(path, theirs, tmp_path, capsys):
    main(["convert", str(path), str(tmp_path / "int4"), "--verbose"])
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj.weight" in out and "Q4_1, exact" in out
    assert "Q8_0, rounded to bfloat16" in out
    model, tokenizer = int4q.load(tmp_path / "int4")
    check(model, theirs)
    assert tokenizer("#$%")["input_ids"] == int4q.load(path)[1]("#$%")["input_ids"]
    main(["inspect", str(path)])
    assert "Q4_K  2 " in capsys.readouterr().out
    main(["generate", str(tmp_path / "int4"), "#$%", "--tokens", "3"])
    assert "tokens, " in capsys.readouterr().out


def test_fields_and_data_are_those_of_the_library(path):
    ours, library = GGUFFile(path), gguf.GGUFReader(path)
    assert {t.name: t.shape for t in ours.tensors} == {
        t.name: tuple(map(int, t.shape))[::-1] for t in library.tensors
    }
    for mine, other in zip(ours.tensors, library.tensors, strict=True):
        assert mine.kind == other.tensor_type.name
        assert mine.data.tobytes() == np.ascontiguousarray(other.data).tobytes()
    for key, value in ours.fields.items():
        assert value == library.fields[key].contents()


# --- damaged --------------------------------------------------------------------------------------


def u64(n):
    return n.to_bytes(8, "little")


def text(s):
    return u64(len(s)) + s.encode()


def header(tensors=0, fields=0, version=3):
    return b"GGUF" + version.to_bytes(4, "little") + u64(tensors) + u64(fields)


def entry(name="t", shape=(32,), kind=2, offset=0):
    dims = b"".join(map(u64, shape))
    return (
        text(name)
        + len(shape).to_bytes(4, "little")
        + dims
        + kind.to_bytes(4, "little")
        + u64(offset)
    )


HOSTILE = {
    "no gguf": (b"GGML" + bytes(40), "start with GGUF"),
    "short": (b"GGUF", "fewer than 24"),
    "version": (header(version=9), "version must be"),
    "tensors": (header(tensors=2**60) + bytes(64), "count must fit"),
    "fields": (header(fields=2**63) + bytes(64), "count must fit"),
    "string": (header(fields=1) + u64(2**62) + bytes(64), "length must fit"),
    "array": (
        header(fields=1) + text("k") + b"\x09\0\0\0" + b"\x04\0\0\0" + u64(2**61) + bytes(64),
        "count must fit",
    ),
    "nested array": (
        header(fields=1) + text("k") + b"\x09\0\0\0" + b"\x09\0\0\0" + u64(1) + bytes(64),
        "a value must be a number",
    ),
    "twice": (header(fields=2) + 2 * (text("k") + bytes(5)) + bytes(32), "there once"),
    "dims": (header(tensors=1) + entry(shape=(32,) * 9) + bytes(64), "up to 4 dims"),
    "huge": (header(tensors=1) + entry(shape=(2**40, 2**40)) + bytes(64), "length must fit"),
    "offset": (header(tensors=1) + entry(offset=2**50) + bytes(64), "length must fit"),
    "kind": (header(tensors=1) + entry(kind=999) + bytes(64), "known type"),
    "block": (header(tensors=1) + entry(shape=(33,)) + bytes(64), "multiple of 32"),
    "overlap": (header(tensors=2) + entry("a") + entry("b", offset=4) + bytes(96), "overlap"),
    "same name": (header(tensors=2) + entry("a") + entry("a", offset=32) + bytes(96), "a name"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers(tmp_path, what):
    data, message = HOSTILE[what]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        GGUFFile(tmp_path / "x.gguf")


def test_mutations(path, tmp_path):
    """Refused, or read as what it now says: no crash, no endless loop, nothing past the file."""
    number = int(os.environ.get("INT4Q_MUTATIONS", "1000"))
    whole, rng, refused = path.read_bytes(), random.Random(number), 0
    start = whole.index(b"output_norm.weight") + 64  # the header ends about here
    mutated = tmp_path / "mutated.gguf"
    for _ in range(number):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(start)] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        mutated.write_bytes(data)
        try:
            file = GGUFFile(mutated)
        except ValueError:
            refused += 1
            continue
        assert sum(t.data.size for t in file.tensors) <= len(data)
        for t in file.tensors:
            values, nbytes = gguf.GGML_QUANT_SIZES[KINDS[t.kind]]
            assert t.data.size == torch.Size(t.shape).numel() // values * nbytes
    assert number / 10 < refused < number


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda d: d.replace(b"blk.1.ffn_up", b"blk.7.ffn_up"), "must be known|must hold"),
        (lambda d: d.replace(b"llama.block_count", b"llama.block_c0unt"), "must hold"),
        (lambda d: d.replace(b"\0\0\0llama", b"\0\0\0bloom", 1), "rows apart|lacks"),
    ],
)
def test_files_that_are_no_model(path, tmp_path, change, message):
    data = change(path.read_bytes())
    assert data != path.read_bytes()
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        GGUFModel(tmp_path / "x.gguf")
