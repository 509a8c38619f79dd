"""`int4q convert`: the values that the other format's own formula gives, in a model that loads."""

import json
import os
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from checkpoints import contents, llama, packed, qwen_moe  # noqa: E402
from kills import check_kills  # noqa: E402

from int4q import Int4Tensor  # noqa: E402
from int4q.checkpoint import foreign  # noqa: E402
from int4q.checkpoint.converting import FORMATS, plan_folder  # noqa: E402
from int4q.checkpoint.source import Source  # noqa: E402
from int4q.checkpoint.stream import run  # noqa: E402
from int4q.cli import main  # noqa: E402


def values(source: Source) -> dict[str, torch.Tensor]:
    """Every weight by its format's formula, in float64."""
    method = source.config["quantization_config"]["quant_method"]
    found = {}
    for weight in FORMATS[method](source):
        t, how = weight.make(*map(source.read, weight.stored))
        assert how == foreign.EXACT
        found[weight.name] = t.dequantize(torch.float32)
    return found


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("method", FORMATS)
def test_folders(method, symmetric, tmp_path):
    theirs = packed(tmp_path / "theirs", llama(tmp_path / "model"), method, symmetric)
    notes = {}
    run(plan_folder(Source(theirs), notes.__setitem__), tmp_path / "int4")
    expected = values(Source(theirs))
    assert len(expected) == 14 and set(notes.values()) == {foreign.EXACT}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    for name, w in expected.items():
        p = model.get_parameter(name)
        assert p.dtype == (torch.float16 if symmetric else torch.float32)
        assert torch.equal(held(p).float(), w.to(p.dtype).float())


def test_experts_become_stacks(tmp_path):
    theirs = packed(tmp_path / "theirs", qwen_moe(tmp_path / "model"), "gptq", False)
    run(plan_folder(Source(theirs), lambda name, how: None), tmp_path / "int4")
    expected = values(Source(theirs))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    experts = model.model.layers[0].mlp.experts
    prefix = "model.layers.0.mlp.experts"
    for e in range(3):
        rows = [expected[f"{prefix}.{e}.{n}_proj.weight"] for n in ("gate", "up")]
        assert torch.equal(held(experts.gate_up_proj)[e], torch.cat(rows))
        down = expected[f"{prefix}.{e}.down_proj.weight"]
        assert torch.equal(held(experts.down_proj)[e], down)


def held(p) -> torch.Tensor:
    """Values of a weight, whichever library's class transformers gave it."""
    t = p.data
    return (t if isinstance(t, Int4Tensor) else Int4Tensor.from_torchao(t)).dequantize()


def told(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "method,changes,message",
    [
        ("gptq", {"bits": 8}, "4 bits, got 8"),
        ("gptq", {"quant_method": "bitsandbytes"}, "--requantize GROUP_SIZE"),
        ("gptq", {"quant_method": "exl2"}, "must hold gptq, awq"),
        ("awq", {"version": "gemv"}, "version gemm, got gemv"),
        ("compressed-tensors", {"format": "marlin-24"}, "must be pack-quantized"),
    ],
)
def test_what_is_not_read(method, changes, message, tmp_path):
    theirs = packed(tmp_path / "theirs", llama(tmp_path / "model"), method, True)
    told(theirs, **changes)
    with pytest.raises(ValueError, match=message):
        plan_folder(Source(theirs), lambda name, how: None)


def test_act_order_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = packed(tmp_path / "theirs", llama(tmp_path / "model"), "gptq", False)
    file = Source(theirs).tensors["model.layers.0.mlp.up_proj.g_idx"].file
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.g_idx"] = torch.arange(64, dtype=torch.int32).flip(0) // 32
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match="act-order"):
        run(plan_folder(Source(theirs), lambda name, how: None), tmp_path / "int4")
    assert not (tmp_path / "int4").exists()


@pytest.mark.parametrize("number", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kills(tmp_path, number):
    theirs = packed(tmp_path / "theirs", llama(tmp_path / "model"), "gptq", False)
    plan = plan_folder(Source(theirs), lambda name, how: None)
    run(plan, tmp_path / "whole", max_shard_size="40KB")
    target = tmp_path / "target" / "int4"
    check_kills(
        lambda: run(plan, target, max_shard_size="40KB", sync_bytes=0),
        target,
        contents(tmp_path / "whole"),
        number,
    )


def test_the_command(tmp_path, capsys):
    theirs = packed(tmp_path / "theirs", llama(tmp_path / "model"), "awq", False)
    main(["convert", str(theirs), str(tmp_path / "int4")])
    assert "14       exact" in capsys.readouterr().out
    main(["inspect", str(tmp_path / "int4")])
    assert "14 weights in 4 bits (6.00 bits each)" in capsys.readouterr().out


def test_mutations(tmp_path):
    """A damaged file is refused, or read as what it now says: never a crash."""
    number = int(os.environ.get("INT4Q_MUTATIONS", "100"))
    theirs = packed(tmp_path / "theirs", llama(tmp_path / "model"), "gptq", False)
    source = Source(theirs)
    file = source.tensors["model.layers.0.mlp.up_proj.qweight"].file
    whole, rng, refused = file.read_bytes(), random.Random(number), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(number):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(header if rng.random() < 0.8 else len(data))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(data)
        try:
            for weight in FORMATS["gptq"](Source(theirs)):
                t, _ = weight.make(*map(Source(theirs).read, weight.stored))
                assert t.shape == weight.like.shape
        except (ValueError, TypeError):
            refused += 1
    assert refused > number / 3
