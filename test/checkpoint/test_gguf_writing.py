"""GGUF files that int4q writes: what `gguf` reads in them, and what is refused."""

import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

import gguf_files  # noqa: E402
from checkpoints import llama  # noqa: E402

import int4q  # noqa: E402
from int4q import Int4Tensor, export  # noqa: E402
from int4q.checkpoint import gguf as formats  # noqa: E402
from int4q.checkpoint.gguf_model import GGUFModel  # noqa: E402
from int4q.cli import main  # noqa: E402

Q4_1 = gguf.GGMLQuantizationType.Q4_1
_OURS = ("GGUF.", "general.file_type", "general.quantization_version")


def fields(path):
    """Its metadata, types and values."""
    return {
        key: (field.types, field.contents())
        for key, field in gguf.GGUFReader(path).fields.items()
        if not key.startswith(_OURS)
    }


@pytest.mark.parametrize(
    "architecture,experts",
    [
        ("llama", False),
        ("llama", True),
        ("qwen2", False),
        ("qwen2moe", True),
        ("qwen3moe", True),
        ("gemma2", False),
    ],
)
def test_there_and_back(architecture, experts, tmp_path, capsys):
    """From a file to a folder to a file: the same names, values and metadata."""
    factors = torch.ones(8).numpy()
    source = gguf_files.write(
        tmp_path / "x.gguf", architecture, experts, down=Q4_1, extra={"rope_freqs.weight": factors}
    )
    main(["convert", str(source), str(tmp_path / "int4"), "--dtype", "float32"])
    main(["convert", str(tmp_path / "int4"), str(tmp_path / "back.gguf"), "--verbose"])
    assert "blk.1.attn_q.weight" in capsys.readouterr().out
    before, after = gguf_files.values(source), gguf_files.values(tmp_path / "back.gguf")
    assert before.keys() == after.keys()
    for name, w in before.items():
        assert torch.equal(w, after[name]), name
    assert fields(source) == fields(tmp_path / "back.gguf")
    kinds = [{t.name: t.tensor_type for t in gguf.GGUFReader(p).tensors if t.name.startswith("blk")}
             for p in (source, tmp_path / "back.gguf")]  # fmt: skip
    assert kinds[0] == kinds[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float checkpoint, and a GGUF file of such a model."""
    folder = tmp_path_factory.mktemp("model")
    config = GGUFModel(gguf_files.write(folder / "like.gguf")).config
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "float")
    return folder


def test_what_was_quantised_symmetrically(folder, tmp_path):
    """Exact in Q4_0, groups of 64 too; read by transformers it is the model that was written."""
    int4, made = str(tmp_path / "int4"), tmp_path / "made.gguf"
    main(["quantize", str(folder / "float"), int4, "--algorithm", "symmetric",
          "--group-size", "64"])  # fmt: skip
    notes = export.gguf(int4, made, metadata=folder / "like.gguf")
    assert sorted(set(notes.values())) == ["BF16, exact", "F32, exact", "Q4_0, exact"]
    ours = transformers.AutoModelForCausalLM.from_pretrained(int4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=made.name, dtype=torch.float32
    )
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        exact = p.dequantize(torch.float32) if isinstance(p, Int4Tensor) else p.float()
        assert torch.equal(exact, q), name
    _, tokenizer = int4q.load(made)
    assert tokenizer("#$%")["input_ids"] == int4q.load(folder / "like.gguf")[1]("#$%")["input_ids"]


def test_rounded_on_request_only(folder, tmp_path, capsys):
    int4, made = str(tmp_path / "int4"), tmp_path / "made.gguf"
    main(["quantize", str(folder / "float"), int4, "--group-size", "32"])
    command = ["convert", int4, str(made), "--metadata", str(folder / "like.gguf")]
    with pytest.raises(SystemExit):
        main(command)
    assert "_proj.weight: every minimum" in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.glob("*made*"))
    main([*command, "--round"])
    assert "Q4_1, rounded, 0.0" in capsys.readouterr().out
    ours, theirs = transformers.AutoModelForCausalLM.from_pretrained(int4), int4q.load(made)[0]
    for name, p in ours.named_parameters():
        if isinstance(p, Int4Tensor):
            exact = p.dequantize(torch.float32)
            off = theirs.get_parameter(name).dequantize() - exact
            assert off.norm() < 1e-3 * exact.norm()


def test_what_is_refused(folder, tmp_path):
    int4, other = tmp_path / "int4", tmp_path / "other"
    quantize = ["--algorithm", "symmetric", "--group-size", "32"]
    main(["quantize", str(folder / "float"), str(int4), *quantize])
    main(["quantize", str(llama(tmp_path / "llama")), str(other), *quantize])
    like, made = folder / "like.gguf", tmp_path / "made.gguf"
    with pytest.raises(ValueError, match="--metadata FILE.gguf"):
        export.gguf(int4, made)
    with pytest.raises(ValueError, match="of this model: intermediate_size is 128, got 256"):
        export.gguf(other, made, metadata=like)
    scaled = gguf_files.write(
        tmp_path / "scaled.gguf",
        told=lambda writer: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
            writer.add_rope_scaling_factor(2.0),
        ),
    )
    with pytest.raises(ValueError, match="rope_type is default, got linear"):
        export.gguf(int4, made, metadata=scaled)
    with pytest.raises(ValueError, match="4-bit checkpoint"):
        export.gguf(folder / "float", made, metadata=like)
    made.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="never overwritten"):
        export.gguf(int4, made, metadata=like)
    assert made.read_bytes() == b"mine"
    for flags in (["--round"], ["--metadata", str(like)], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            main(["convert", str(int4), str(tmp_path / "folder"), *flags])


def test_half_a_file_is_never_there(folder, tmp_path, monkeypatch):
    main(["quantize", str(folder / "float"), str(tmp_path / "int4"), "--algorithm", "symmetric"])
    calls = []

    def full(t, rounded):
        calls.append(t)
        if len(calls) == 3:
            raise OSError("no space left on device")
        return formats.to_q4_0(t)

    monkeypatch.setitem(formats.TO, "Q4_0", full)
    with pytest.raises(OSError, match="no space"):
        export.gguf(tmp_path / "int4", tmp_path / "made.gguf", metadata=folder / "like.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]
