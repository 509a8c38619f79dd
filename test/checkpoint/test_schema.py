"""How a state dict lies in a file: torchao's schema, and checks on whatever a file says."""

import json

import pytest
import torch
from torch import nn

from int4q import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor
from int4q.checkpoint import schema, seal
from int4q.checkpoint.schema import check, entries, flatten, metadata, unflatten

LAYOUTS = [Int4Tensor, CudaCoalescedInt4Tensor, CpuPackedInt4Tensor]


def weight(shape=(48, 64), layout=Int4Tensor, dtype=torch.bfloat16):
    return layout.from_hp(torch.randn(shape).to(dtype), [1] * (len(shape) - 1) + [32])


def flattened(state):
    stored, described = {}, {}
    for name, t in state.items():
        parts, described[name] = flatten(name, t)
        stored |= parts
    return stored, metadata(described)


def specs(stored):
    return {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()}


def read(stored, header):
    found = entries(header, stored)
    check(found.values(), specs(stored))
    return {
        name: unflatten(e, {part: stored[n] for part, n in e.parts.items()})
        for name, e in found.items()
    }


def state():
    scaled = weight((8, 64))
    scaled.act_pre_scale = torch.rand(64)
    return {
        "a.b.weight": weight(),
        "a.experts.down_proj": weight((3, 8, 96), dtype=torch.float32),
        "a.experts.up_proj": weight((3, 8, 64)).transpose(1, 2),
        "scaled.weight": scaled,
        "a.norm.weight": torch.randn(7).half(),
        "weight": weight((4, 32)),
        "logit_scale": torch.tensor(2.0),
    }


def test_round_trip_copies_nothing():
    before = state()
    stored, header = flattened(before)
    assert stored["a.b._weight_qdata"] is before["a.b.weight"].qdata
    assert set(stored) >= {"a.b._weight_scale", "a.b._weight_zero_point", "_weight_qdata"}
    after = read(stored, header)
    assert list(after) == list(before) and "logit_scale" not in header
    for name, t in before.items():
        assert type(after[name]) is type(t) and torch.equal(after[name], t), name
    assert after["a.experts.up_proj"].block_size == [1, 32, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_stored_in_plain(layout):
    t = weight(layout=layout)
    after = read(*flattened({"m.weight": t}))["m.weight"]
    assert type(after) is Int4Tensor and torch.equal(after, t.to_int4_tensor())


def test_torchao_writes_the_same_and_reads_it():
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    ours = {name: t for name, t in state().items() if name != "weight"}
    scale = ours.pop("logit_scale")  # torchao fails on names without a dot
    theirs = {
        name: t.to_torchao() if isinstance(t, Int4Tensor) and t.grouped_dim == t.ndim - 1 else t
        for name, t in ours.items()
    }
    stored, header = flattened(ours)
    their_stored, their_header = support.flatten_tensor_state_dict(theirs)
    assert {**their_header, "format": "pt"} == header
    assert stored.keys() == their_stored.keys()
    assert all(torch.equal(stored[name], t) for name, t in their_stored.items())
    loaded, rest = support.unflatten_tensor_state_dict(stored, header)
    assert not rest and loaded.keys() == ours.keys()
    assert torch.equal(Int4Tensor.from_torchao(loaded["a.b.weight"]), ours["a.b.weight"])
    stored, header = flattened({**ours, "logit_scale": scale})
    _, rest = support.unflatten_tensor_state_dict(stored, header)
    assert rest == {"logit_scale": scale}


def test_what_cannot_be_stored():
    with pytest.raises(TypeError, match="w must be a 4-bit weight .* torchao.*int4q.adopt"):
        flatten("w", weight().to_torchao())
    with pytest.raises(TypeError, match="w must be a 4-bit weight of int4q or a plain tensor"):
        flatten("w", "text")
    with pytest.raises(ValueError, match="must not be named as the schema's own"):
        metadata({"format": "{}"})


def changed(**fields):
    described = json.loads(flatten("m.weight", weight())[1])
    data = fields.pop("data", {})
    return json.dumps({**described, "_data": {**described["_data"], **data}, **fields})


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "must describe m.weight"),
        ("{", "of m.weight must be JSON"),
        ("[" * 100_000, "of m.weight must be JSON"),
        ("[]", "must describe a Tensor or an Int4Tensor"),
        (changed(_type="Float8Tensor"), "must describe a Tensor or an Int4Tensor, got 'Float8"),
        (changed(_tensor_data_names=["qdata", "scale"]), "must have the parts"),
        (changed(_tensor_data_names=["qdata", "scale", "zero_point", "x"]), "must have the parts"),
        (changed(_data=[]), "must hold block_size, shape and activation_dtype"),
        (changed(data={"block_size": [1, 32.0]}), "must hold block_size"),
        (changed(data={"block_size": [True, 32]}), "must hold block_size"),
        (changed(data={"activation_dtype": {"_type": "torch.dtype", "_data": "int8"}}), "bfloat16"),
        (changed(data={"extra": 1}), "must hold block_size"),
        (changed(data={"block_size": [1, 64]}), "m.weight: scale of Int4Tensor must have shape"),
        (changed(data={"block_size": [1, 48]}), "group_size must be one of"),
        (changed(data={"block_size": [32, 1]}), "m.weight: the grouped dim 0 must be a multiple"),
        (changed(data={"shape": [48, 96]}), "m.weight: qdata of Int4Tensor must have shape"),
        (changed(data={"shape": [-48, 64]}), "m.weight: qdata of Int4Tensor must have shape"),
        (changed(data={"shape": [48]}), "block_size must have one entry"),
    ],
)
def test_damaged_metadata(text, message):
    stored, header = flattened({"m.weight": weight()})
    header = {k: v for k, v in header.items() if k != "m.weight"}
    if text is not None:
        header["m.weight"] = text
    with pytest.raises(ValueError, match=message):
        read(stored, header)


@pytest.mark.parametrize("names", [None, "{}", "[1]", '["m.weight", "m.weight"]', '["other"]'])
def test_damaged_names(names):
    stored, header = flattened({"m.weight": weight()})
    del header[schema.NAMES]
    if names is not None:
        header[schema.NAMES] = names
    with pytest.raises(ValueError, match="metadata|tensor_names"):
        read(stored, header)


def test_stored_tensors_must_fit_the_metadata():
    stored, header = flattened({"m.weight": weight(), "n": torch.zeros(2)})
    qdata = stored.pop("m._weight_qdata")
    with pytest.raises(ValueError, match="m.weight must be stored as m._weight_qdata, got no such"):
        read(stored, header)
    with pytest.raises(ValueError, match="qdata must be int8"):
        read({**stored, "m._weight_qdata": qdata.view(torch.uint8)}, header)
    with pytest.raises(ValueError, match="must be described, got 'm.x', unknown"):
        read({**stored, "m._weight_qdata": qdata, "m.x": qdata}, header)
    described = {"m.w": flatten("m.w", weight())[1], "m._w_qdata": flatten("x", qdata)[1]}
    stored = flatten("m.w", weight())[0]
    with pytest.raises(ValueError, match="belong to one weight, got m._w_qdata twice"):
        read(stored, metadata(described))


def test_is_schema():
    assert schema.is_schema(flattened({"w": nn.Parameter(torch.zeros(1))})[1])
    assert not schema.is_schema(None) and not schema.is_schema({"format": "pt"})


# --- the seal -------------------------------------------------------------------------------------


def sealed():
    stored, header = flattened({"m.weight": weight(), "n": torch.tensor(2.0)})
    sums = {name: seal.checksum(t) for name, t in stored.items()}
    return stored, seal.seal(header, specs(stored), seal.Seal({"o": "n"}, sums))


def test_a_seal_fits_its_file_only():
    stored, header = sealed()
    found = seal.unseal(header, specs(stored))
    assert found.tied == {"o": "n"} and found.crc32.keys() == stored.keys()
    for name, t in stored.items():
        seal.verify(name, t, found.crc32[name])
    stored["m._weight_qdata"][3, 5] ^= 1
    with pytest.raises(ValueError, match="m._weight_qdata must match its checksum"):
        seal.verify("m._weight_qdata", stored["m._weight_qdata"], found.crc32["m._weight_qdata"])
    assert seal.unseal({"format": "pt"}, {}) is None


def test_a_changed_header_breaks_the_seal():
    stored, header = sealed()
    del_name = {k: v for k, v in header.items() if k != "m.weight"}
    for damaged in (del_name, {**header, "m.weight": header["m.weight"] + " "}):
        with pytest.raises(ValueError, match="a file's header must match its checksum"):
            seal.unseal(damaged, specs(stored))
    other = {**specs(stored), "n": (torch.int32, ())}
    with pytest.raises(ValueError, match="a file's header must match its checksum"):
        seal.unseal(header, other)
    body = json.loads(header[schema.SEAL])
    for change in ({"tied": {}}, {"crc32": {}}, {"header": 0}, {"more": 1}):
        with pytest.raises(ValueError, match="a file's header must match its checksum"):
            seal.unseal({**header, schema.SEAL: json.dumps(body | change)}, specs(stored))
    for text, message in (
        ("{", "must be a JSON object"),
        ("[]", "must be a JSON object"),
        ('{"version": 2}', "version of a checkpoint must be 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            seal.unseal({**header, schema.SEAL: text}, specs(stored))
