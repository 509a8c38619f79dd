"""NF4 and FP4 of bitsandbytes: its values as the published formulas give them, then int4's."""

import json
import os
import random
import shutil

import pytest
import torch

transformers = pytest.importorskip("transformers")

from checkpoints import llama, packed  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from int4q import Int4Tensor  # noqa: E402
from int4q.checkpoint import bitsandbytes as bnb  # noqa: E402
from int4q.checkpoint.converting import plan_folder  # noqa: E402
from int4q.checkpoint.source import Source  # noqa: E402
from int4q.checkpoint.stream import run  # noqa: E402
from int4q.cli import main  # noqa: E402

BLOCK, NESTED_BLOCK = 64, 256
UP = "model.layers.0.mlp.up_proj.weight"


def table(kind: str) -> torch.Tensor:
    """The values of the codes: quantiles of a normal distribution, or floats of 4 bits."""
    if kind == "fp4":
        values = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12
        return torch.cat([values, -values]).float()
    last = 0.9677083  # as published: (1 - 1/32 + 1 - 1/30) / 2
    positive = torch.special.ndtri(torch.linspace(last, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(last, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, torch.zeros(1), negative]).sort().values
    return (values / values.max()).float()


def stored(w: torch.Tensor, kind: str, nested: bool) -> dict[str, torch.Tensor]:
    """A weight's tensors, quantised to the nearest code, by the suffix of their names."""
    codes = table(kind)
    blocks = torch.nn.functional.pad(w.float().flatten(), (0, -w.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    nearest = (blocks / absmax[:, None]).unsqueeze(-1).sub(codes).abs().argmin(-1)
    u = nearest.flatten()[: w.numel()].to(torch.uint8)
    state = {"quant_type": kind, "blocksize": BLOCK, "shape": list(w.shape)}
    state["dtype"] = str(w.dtype).removeprefix("torch.")
    parts = {"": (u[0::2] << 4 | u[1::2])[:, None], ".quant_map": codes, ".absmax": absmax}
    if nested:
        offset, levels = absmax.mean().item(), torch.linspace(-1, 1, 256) ** 3
        rest = (absmax - offset).split(NESTED_BLOCK)
        scales = torch.stack([part.abs().max() for part in rest])
        near = [
            (p[:, None] / s - levels).abs().argmin(1) for p, s in zip(rest, scales, strict=True)
        ]
        parts[".absmax"] = torch.cat(near).to(torch.uint8)
        parts |= {".nested_absmax": scales, ".nested_quant_map": levels}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_offset": offset}
    parts[f".quant_state.bitsandbytes__{kind}"] = as_bytes(state)
    return parts


def as_bytes(state) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def formula(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Value by value."""
    key = next(key for key in parts if "quant_state" in key)
    state = json.loads(bytes(parts[key].tolist()))
    values = []
    for i in range(2 * parts[""].numel()):
        byte = int(parts[""][i // 2])
        absmax = parts[".absmax"][i // BLOCK]
        if absmax.dtype == torch.uint8:
            scale = parts[".nested_absmax"][i // BLOCK // NESTED_BLOCK]
            absmax = parts[".nested_quant_map"][int(absmax)] * scale + state["nested_offset"]
        values.append(parts[".quant_map"][byte >> 4 if i % 2 == 0 else byte & 15] * absmax)
    return torch.stack(values).view(state["shape"]).to(getattr(torch, state["dtype"]))


def checkpoint(folder, source, kind="nf4", nested=False, **told):
    """The layers of ``source`` as transformers saves them when bitsandbytes has quantised them."""
    shutil.copytree(source, folder)
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True} | told
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        for name in [n for n in state if "_proj" in n]:
            parts = stored(state.pop(name), kind, nested)
            state |= {f"{name}{suffix}": t.contiguous().clone() for suffix, t in parts.items()}
        save_file(state, file, {"format": "pt"})
    return folder


def change(folder, suffix, new):
    """Put ``new(tensor)`` in place of a tensor of ``UP``, or nothing for ``None``."""
    file = Source(folder).tensors[UP + suffix].file
    state = load_file(file)
    if (t := new(state.pop(UP + suffix))) is not None:
        state[UP + suffix] = t
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values(kind, nested, dtype):
    w = (torch.randn(10, 3363 if nested else 33) * 0.1).to(dtype)  # no whole number of blocks
    parts = stored(w, kind, nested)
    first, second = ("", ".quant_map", ".absmax"), (".nested_quant_map", ".nested_absmax")
    tensors = [parts[key] for key in first + (second if nested else ())]
    read = bnb.to_float(json.loads(bytes(list(parts.values())[-1].tolist())), *tensors)
    assert read.dtype == dtype and torch.equal(read, formula(parts))
    assert (read - w).norm() < 0.2 * w.norm()


@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_library(kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    # Rows of whole blocks: bitsandbytes 0.50 on the CPU does not undo its own blocks otherwise.
    w = (torch.randn(40, 1344) * 0.1).bfloat16()
    packed, theirs = functional.quantize_4bit(w, quant_type=kind, compress_statistics=nested)
    torch.testing.assert_close(theirs.code, table(kind), rtol=0, atol=2**-21)  # made in float32
    parts = theirs.as_dict(packed=True)
    state = json.loads(bytes(parts.pop(f"quant_state.bitsandbytes__{kind}").tolist()))
    keys = "quant_map", "absmax", *(("nested_quant_map", "nested_absmax") if nested else ())
    ours = bnb.to_float(state, packed, *(parts[key] for key in keys))
    assert torch.equal(ours, functional.dequantize_4bit(packed, theirs))


@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
def test_a_checkpoint(nested, tmp_path):
    source = llama(tmp_path / "model")
    theirs = checkpoint(tmp_path / "theirs", source, "nf4", nested)
    notes = {}
    run(plan_folder(Source(theirs), notes.__setitem__, requantize=32), tmp_path / "int4")
    assert len(notes) == 14
    assert all(how.startswith("not exact: nf4 quantised again, ") for how in notes.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    held = {name: p for name, p in model.named_parameters() if "_proj" in name}
    assert held.keys() == notes.keys()
    floats = {}
    for file in theirs.glob("*.safetensors"):
        floats |= load_file(file)
    for name, p in held.items():
        w = formula({k.removeprefix(name): t for k, t in floats.items() if k.startswith(name)})
        expected = Int4Tensor.from_hp(w, [1, 32])
        for part in ("qdata", "scale", "zero_point"):
            assert torch.equal(getattr(p, part), getattr(expected, part)), name


def test_only_on_request(tmp_path, capsys):
    source = llama(tmp_path / "model")
    theirs = checkpoint(tmp_path / "theirs", source)
    words = ["convert", str(theirs), str(tmp_path / "int4")]
    with pytest.raises(SystemExit):
        main(words)
    assert "--requantize GROUP_SIZE" in capsys.readouterr().err
    main([*words, "--requantize", "32"])
    assert "not exact: nf4 quantised again" in capsys.readouterr().out
    other = packed(tmp_path / "gptq", source, "gptq", True)
    with pytest.raises(SystemExit):
        main(["convert", str(other), str(tmp_path / "other"), "--requantize", "32"])
    assert "without --requantize" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "model.gguf", str(tmp_path / "other"), "--requantize", "32"])
    assert "--requantize is for" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


STATE = ".quant_state.bitsandbytes__nf4"


def with_state(**changes):
    return STATE, lambda t: as_bytes(json.loads(bytes(t.tolist())) | changes)


@pytest.mark.parametrize(
    "suffix,new,message",
    [
        (STATE, lambda t: t[:-1], "must be JSON"),
        (STATE, lambda t: t.float(), "must be JSON"),
        (STATE, lambda t: as_bytes([1]), "must be JSON"),
        (*with_state(shape=[64, 1 << 40]), "weight must have shape"),
        (*with_state(shape=[8192]), "must be JSON"),
        (*with_state(blocksize=1 << 40), "must be JSON"),
        (*with_state(blocksize=128), "absmax must have shape"),
        (*with_state(dtype="int8"), "must be JSON"),
        (*with_state(nested_offset=float("nan")), "must be JSON"),
        (*with_state(nested_offset=10**400), "must be JSON"),
        (*with_state(nested_blocksize=0), "must be JSON"),
        (".absmax", lambda t: t.float(), "absmax must be uint8"),
        (".absmax", lambda t: None, r"must hold .*weight\.absmax"),
        (".quant_map", lambda t: t[:8].clone(), "quant_map must have shape"),
        (".nested_absmax", lambda t: None, r"must hold .*nested_absmax"),
        ("", lambda t: t[:-1].clone(), "weight must have shape"),
    ],
)
def test_damage_is_named(suffix, new, message, tmp_path):
    theirs = checkpoint(tmp_path / "theirs", llama(tmp_path / "model"), nested=True)
    change(theirs, suffix, new)
    with pytest.raises((ValueError, TypeError), match=message):
        plan_folder(Source(theirs), lambda name, how: None, requantize=32)


def test_eight_bits_are_refused(tmp_path):
    told = {"load_in_4bit": False, "load_in_8bit": True}
    theirs = checkpoint(tmp_path / "theirs", llama(tmp_path / "model"), **told)
    with pytest.raises(ValueError, match="4 bits, got 8"):
        plan_folder(Source(theirs), lambda name, how: None, requantize=32)


def test_zeros(tmp_path):
    theirs = checkpoint(tmp_path / "theirs", llama(tmp_path / "model"))
    change(theirs, ".absmax", torch.zeros_like)
    notes = {}
    run(plan_folder(Source(theirs), notes.__setitem__, requantize=32), tmp_path / "int4")
    assert notes[UP].endswith(" 0% off")


def test_mutations(tmp_path):
    """A damaged file is refused, or read as what it now says: never a crash."""
    number = int(os.environ.get("INT4Q_MUTATIONS", "100"))
    theirs = checkpoint(tmp_path / "theirs", llama(tmp_path / "model"), nested=True)
    file = Source(theirs).tensors[UP].file
    whole, rng, refused = file.read_bytes(), random.Random(number), 0
    header = 8 + int.from_bytes(whole[:8], "little")
    state = whole.index(b'{"quant_type"')
    for _ in range(number):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            start, size = rng.choice([(0, header), (state, 150), (header, len(data) - header)])
            data[start + rng.randrange(size)] = rng.randrange(256)
        file.write_bytes(data)
        try:
            source = Source(theirs)
            for weight in bnb.weights(source, 32):
                t, _ = weight.make(*map(source.read, weight.stored))
                assert t.shape == weight.like.shape
        except (ValueError, TypeError):
            refused += 1
    assert refused > number / 3
