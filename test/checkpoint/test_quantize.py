"""`int4q quantize`: what transformers and torchao make, whatever happens on the way."""

import errno
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from checkpoints import contents, gpt2, llama, qwen_moe, saved  # noqa: E402
from integrations.families import gpt_oss, llama4  # noqa: E402
from kills import check_kills  # noqa: E402

from int4q import Int4Tensor, Int4WeightOnlyConfig, moe_config, quantize_  # noqa: E402
from int4q.checkpoint import inspecting  # noqa: E402
from int4q.checkpoint.quantizing import Options, plan_quantize  # noqa: E402
from int4q.checkpoint.source import Source  # noqa: E402
from int4q.checkpoint.stream import run  # noqa: E402
from int4q.checkpoint.team import Team  # noqa: E402
from int4q.checkpoint.workspace import Workspace  # noqa: E402
from int4q.cli import main  # noqa: E402

OPTIONS = Options(group_size=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("whole") / "int4"
    quantize(source, target)
    return contents(target)


def quantize(source, target, options=OPTIONS, **more):
    run(plan_quantize(Source(source), options)[0], target, max_shard_size="40KB", **more)


def same(ours, theirs):
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        other = named.pop(name)
        assert type(p.data) is type(other.data)
        parts = ("qdata", "scale", "zero_point") if hasattr(p, "qdata") else ("data",)
        assert all(torch.equal(getattr(p, part), getattr(other, part)) for part in parts), name
    assert not named


@pytest.mark.parametrize(
    "make,config",
    [(llama, Int4WeightOnlyConfig), (qwen_moe, lambda **k: moe_config(Int4WeightOnlyConfig(**k)))],
    ids=["llama", "qwen_moe"],
)
def test_transformers_loads_what_it_would_have_made(make, config, tmp_path):
    read = transformers.AutoModelForCausalLM.from_pretrained
    source = make(tmp_path / "model")
    quantize(source, tmp_path / "int4")
    told = transformers.TorchAoConfig(config(group_size=32, set_inductor_config=False))
    theirs = read(source, quantization_config=told)
    theirs.save_pretrained(tmp_path / "theirs")
    same(read(tmp_path / "int4"), read(tmp_path / "theirs"))
    files = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("int4", "theirs")]
    for file in files:  # what the two configs differ in
        text = json.dumps(file["quantization_config"])
        file["quantization_config"] = re.sub(r'"set_inductor_config": \w+', "", text)
    assert files[0] == files[1]
    assert (tmp_path / "int4" / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.filterwarnings("ignore::int4q.Int4SkipWarning")
@pytest.mark.parametrize(
    "make", [gpt2, gpt_oss, pytest.param(llama4, marks=pytest.mark.slow)], ids=lambda m: m.__name__
)
def test_weights_held_as_in_out(make, tmp_path):
    """Conv1D, and experts that are `[E, in, out]`: as `quantize_` makes them of the whole model."""
    config, source = Int4WeightOnlyConfig(group_size=32), saved(make(), tmp_path / "model")
    config = config if make is gpt2 else moe_config(config)
    read = transformers.AutoModelForCausalLM.from_pretrained
    main(["quantize", str(source), str(tmp_path / "int4"), "--group-size", "32", "--strict"])
    ours, theirs = read(tmp_path / "int4"), read(source)
    quantize_(theirs, config)
    same(ours, theirs)
    main(["quantize", str(source), str(tmp_path / "symmetric"), "--group-size", "32",
          "--algorithm", "symmetric"])  # fmt: skip
    floats = dict(read(source).named_parameters())
    turned = 0
    for name, p in read(tmp_path / "symmetric").named_parameters():
        if isinstance(p, Int4Tensor) and p.grouped_dim != p.ndim - 1:
            turned += 1
            w, sizes = floats[name].detach().mT, [1] * (p.ndim - 1) + [32]
            expected = Int4Tensor.from_hp(w, sizes, algorithm="symmetric").mT
            assert torch.equal(p.dequantize(), expected.dequantize())
    assert turned == {gpt2: 8, gpt_oss: 4, llama4: 4}[make]
    found = list(inspecting.differences(Source(tmp_path / "int4"), Source(source)))
    assert all(d.histogram[-1] < 0.02 for d in found)  # (no more than half a step off)


def test_files_are_what_safetensors_writes(expected, source, tmp_path):
    from safetensors.torch import load

    index = json.loads(expected["model.safetensors.index.json"])
    sizes = 0
    for file in set(index["weight_map"].values()):
        for name, t in load(expected[file]).items():
            assert index["weight_map"][name] == file
            sizes += t.numel() * t.element_size()
    assert index["metadata"]["total_size"] == sizes


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kills(source, expected, tmp_path, number):
    target = tmp_path / "int4"
    plan, _ = plan_quantize(Source(source), OPTIONS)
    check_kills(
        lambda: run(plan, target, max_shard_size="40KB", sync_bytes=0), target, expected, number
    )


def test_a_full_disk(source, expected, tmp_path, monkeypatch):
    target, real, left = tmp_path / "int4", os.pwrite, 20

    def pwrite(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="No space left"):
            quantize(source, target, sync_bytes=0)
    assert not target.exists()
    quantize(source, target)
    assert contents(target) == expected


def test_too_little_room_is_said_first(source, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="GB are needed and 0.00 GB are free"):
        quantize(source, tmp_path / "int4")


# --- refused --------------------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten(source, tmp_path):
    target = tmp_path / "int4"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(FileExistsError, match="never overwritten"):
        quantize(source, target)
    assert [p.name for p in tmp_path.rglob("*")] == ["int4", "precious"]


def test_two_at_once(source, tmp_path):
    with Workspace(tmp_path / "int4").locked():
        with pytest.raises(BlockingIOError, match="another process"):
            quantize(source, tmp_path / "int4")


def test_other_options_are_other_work(source, expected, tmp_path, monkeypatch):
    target = tmp_path / "int4"
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "finish", lambda self: None)
        quantize(source, target)
    with pytest.raises(ValueError, match="other options"):
        quantize(source, target, Options(group_size=64))
    quantize(source, target)
    assert contents(target) == expected


def damage(folder, what):
    index = folder / "model.safetensors.index.json"
    read = json.loads(index.read_text())
    shard = folder / read["weight_map"]["model.norm.weight"]
    match what:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "missing shard":
            shard.unlink()
        case "header":
            shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
        case "dtype":
            shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"XX16"', 1))
        case "elsewhere":
            other = next(f for f in set(read["weight_map"].values()) if f != shard.name)
            read["weight_map"]["model.norm.weight"] = other
        case "not named":
            del read["weight_map"]["model.norm.weight"]
        case "traversal":
            read["weight_map"]["model.norm.weight"] = "../outside.safetensors"
        case "no json":
            read = None
    index.write_text("{" if read is None else json.dumps(read))


@pytest.mark.parametrize(
    "what,message",
    [
        ("truncated", r"model-\d.*safetensors is damaged"),
        ("missing shard", r"names model-\d.*no such file"),
        ("header", r"model-\d.*safetensors is damaged"),
        ("dtype", "XX16|dtype"),
        ("elsewhere", "says that model.norm.weight is in"),
        ("not named", "must name every tensor.*model.norm.weight"),
        ("traversal", r"\.\./outside"),
        ("no json", "index.json must be JSON"),
    ],
)
def test_damage_is_named(tmp_path, what, message):
    source = llama(tmp_path / "model")
    damage(source, what)
    with pytest.raises(ValueError, match=message):
        quantize(source, tmp_path / "int4")
    assert not (tmp_path / "int4").exists()


def test_a_missing_tensor_and_a_wrong_shape_are_named(source, tmp_path):
    read = Source(source)
    del read.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="must hold model.layers.1.mlp.up_proj.weight"):
        plan_quantize(read, OPTIONS)
    read = Source(source)
    read.config["hidden_size"] = 32
    config = tmp_path / "model"
    config.mkdir()
    for path in source.iterdir():
        (config / path.name).write_bytes(path.read_bytes())
    (config / "config.json").write_text(json.dumps(read.config))
    with pytest.raises(ValueError, match=r"must make model\..* of shape"):
        plan_quantize(Source(config), OPTIONS)


def test_nan_names_its_weight(tmp_path):
    from safetensors.torch import load_file, save_file

    source = llama(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    shard = Source(source).tensors[name].file
    state = load_file(shard)
    state[name][3, 5] = float("nan")
    save_file(state, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}: .*finite"):
        quantize(source, tmp_path / "int4")


def test_a_quantised_checkpoint_is_not_quantised_again(source, tmp_path):
    quantize(source, tmp_path / "int4")
    with pytest.raises(ValueError, match="a quantised one"):
        quantize(tmp_path / "int4", tmp_path / "again")


def test_an_unknown_architecture(tmp_path):
    source = llama(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(ValueError, match="architecture of transformers, got Other"):
        quantize(source, tmp_path / "int4")


# --- which ----------------------------------------------------------------------------------------


def test_include_and_exclude(source):
    options = Options(group_size=32, include=("lm_head",), exclude=(r"layers\.0\.",))
    plan, coverage = plan_quantize(Source(source), options)
    assert "lm_head.weight" in coverage.quantized
    assert len(coverage.quantized) == 8 and "lm_head._weight_qdata" in plan.specs
    assert not any(".layers.0." in name for name in coverage.quantized)
    assert all(left.expected for left in coverage.left)
    with pytest.raises(ValueError, match="model.norm.weight is not"):
        plan_quantize(Source(source), Options(include=("model.norm",)))


def test_a_tied_head_stays_tied(tmp_path):
    source = llama(tmp_path / "model", tie_word_embeddings=True)
    _, coverage = plan_quantize(Source(source), OPTIONS)
    assert {left.name for left in coverage.left} == {"model.embed_tokens.weight"}


def test_groups_that_do_not_fit_are_unexpected(tmp_path):
    source = llama(tmp_path / "model", head_dim=12)  # o_proj contracts 48
    _, coverage = plan_quantize(Source(source), OPTIONS)
    left = [item for item in coverage.left if not item.expected]
    assert {item.name.split(".")[-2] for item in left} == {"o_proj"}
    with pytest.raises(SystemExit):
        main(["quantize", str(source), str(tmp_path / "int4"), "--strict"])
    assert not (tmp_path / "int4").exists()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"algorithm": "gptq"}, "one by one"),
        ({"preset": "sparse"}, "preset must be"),
        ({"include": ("(",)}, "regular expression"),
        ({"group_size": 48}, "group_size must be"),
    ],
)
def test_options(source, options, message):
    with pytest.raises(ValueError, match=message):
        plan_quantize(Source(source), Options(**options))


# --- shared ---------------------------------------------------------------------------------------


def test_shares_are_alike_and_complete():
    sizes = [random.Random(0).randrange(1, 1000) for _ in range(200)]
    parts = [Team(rank, 4).share(sizes) for rank in range(4)]
    assert [i for part in parts for i in part] == list(range(200))
    loads = [sum(sizes[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= 2 * max(sizes)
    assert [len(Team(rank, 4).share([5])) for rank in range(4)].count(1) == 1


@pytest.mark.slow
def test_torchrun(source, expected, tmp_path):
    import subprocess
    import sys

    from helpers import ROOT

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "-m", "int4q", "quantize", str(source), str(tmp_path / "int4"), "--group-size", "32",
               "--max-shard-size", "40KB"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = contents(tmp_path / "int4")
    made.pop("README.md")
    assert made == expected


def test_the_command(source, expected, tmp_path, capsys):
    arguments = ["quantize", str(source), str(tmp_path / "int4"), "--group-size", "32"]
    main([*arguments, "--dry-run"])
    assert "14 weights in 4 bits (5.00 bits each" in capsys.readouterr().out
    assert not (tmp_path / "int4").exists()
    main([*arguments, "--max-shard-size", "40KB"])
    made = contents(tmp_path / "int4")
    assert b"int4q quantize model int4 --group-size 32" in made.pop("README.md")
    assert made == expected
    with pytest.raises(SystemExit):
        main(arguments)
    assert "exists already" in capsys.readouterr().err
