"""``save_file``, ``load_file``, ``load_into_``: bit for bit, or a clear error."""

import json
import os
import stat

import pytest
import torch
from checkpoint.fuzz import run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import int4q
from int4q import (
    CudaCoalescedInt4Tensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    load_file,
    load_into_,
    prepare_for_inference_,
    quantize_,
    save_file,
)

safetensors = pytest.importorskip("safetensors.torch")
FORMATS = ["plain", "cuda_coalesced", "cpu_packed"]


class Tied(nn.Module):
    """An embedding tied to the head, two linear layers that share a weight, buffers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.up, self.again = nn.Linear(64, 64), nn.Linear(64, 64)
        self.again.weight = self.up.weight
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.head(self.again(self.up(self.embed(x))))


def model(fmt="plain", dtype=torch.bfloat16):
    torch.manual_seed(1)
    m = Tied().to(dtype)
    if fmt is not None:
        config = Int4WeightOnlyConfig(group_size=32, int4_packing_format=fmt)
        quantize_(m, config, lambda module, name: name in ("up", "again"))
    return m


def same(a, b):
    return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_model_round_trips(tmp_path, fmt, prepared):
    m, path, x = model(fmt), tmp_path / "m.safetensors", torch.arange(5)
    if prepared:
        prepare_for_inference_(m)
    save_file(m, path)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    state = load_file(path)
    assert state.keys() == m.state_dict().keys()
    assert state["embed.weight"] is state["head.weight"]
    assert state["up.weight"] is state["again.weight"] and type(state["up.weight"]) is Int4Tensor
    loaded = load_into_(model(None), path)
    assert type(loaded.up.weight) is Int4Tensor and not loaded.up.weight.requires_grad
    assert loaded.up.weight is loaded.again.weight
    assert loaded.head.weight is loaded.embed.weight and loaded.embed.weight.requires_grad
    assert isinstance(loaded.embed.weight, nn.Parameter) and "steps" in dict(loaded.named_buffers())
    assert torch.equal(loaded(x), (int4q.to_plain_(m))(x))


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_quantised_model_keeps_its_layout(tmp_path, fmt):
    m, path = model(), tmp_path / "m.safetensors"
    save_file(m, path)
    other = model(fmt, torch.float32)
    if fmt == "cuda_coalesced":
        int4q.to_coalesced_(other, torch.bfloat16)
    before = other.up.weight
    prepare_for_inference_(other)
    load_into_(other, path)
    after = other.up.weight
    assert type(after) is type(before) and after.activation_dtype == before.activation_dtype
    assert same(after.to_int4_tensor(), m.up.weight.detach()) and other.again.weight is after


def test_into_a_model_on_the_meta_device(tmp_path):
    m, path = model(), tmp_path / "m.safetensors"
    save_file(m.state_dict(), path)
    with torch.device("meta"):
        empty = Tied()
    load_into_(empty, path)
    assert all(not t.is_meta and t.device.type == "cpu" for t in empty.state_dict().values())
    assert same(empty.up.weight, m.up.weight) and empty.cache.is_meta
    assert all(t.is_meta for t in load_file(path, "meta").values())


def test_a_file_may_have_one_name_of_tied_weights(tmp_path):
    """As transformers leaves the others out."""
    m, path = model(), tmp_path / "m.safetensors"
    state = {k: v for k, v in m.state_dict().items() if k not in ("embed.weight", "again.weight")}
    save_file(state, path)
    loaded = load_into_(model(None), path)
    assert loaded.head.weight is loaded.embed.weight and loaded.up.weight is loaded.again.weight
    assert same(loaded.embed.weight.detach(), m.embed.weight.detach())


def test_tensors_of_one_memory_that_are_not_the_same(tmp_path):
    whole = torch.randn(4, 8)
    state = {"q": whole[:2], "k": whole[2:], "all": whole, "turned": whole.t(), "none": whole[:0],
             "empty": torch.empty(0, 8)}  # fmt: skip
    save_file(state, tmp_path / "m")
    assert all(torch.equal(load_file(tmp_path / "m")[k], t) for k, t in state.items())


def test_reading_is_lazy_and_private(tmp_path):
    m, path = model(), tmp_path / "m.safetensors"
    save_file(m, path)
    whole, state = path.read_bytes(), load_file(path, checksums=False)
    state["up.weight"].qdata.zero_()
    assert path.read_bytes() == whole
    save_file({"new": torch.zeros(3)}, path)  # another file under the name
    assert same(state["embed.weight"], m.embed.weight.detach())


sizes = st.integers(1, 5)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_any_state_dict_round_trips(tmp_path_factory, data, dtype):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    names = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(
        lambda n: n not in ("format", "int4q", "tensor_names", "__metadata__")),
        min_size=1, max_size=4, unique=True)  # fmt: skip
    state = {}
    for name in data.draw(names):
        N, G, group = data.draw(sizes), data.draw(sizes), data.draw(st.sampled_from([32, 64]))
        stack = data.draw(st.lists(sizes, max_size=2))
        w = torch.randn(*stack, N, G * group).to(dtype)
        t = Int4Tensor.from_hp(w, [1] * (w.ndim - 1) + [group])
        if data.draw(st.booleans()):
            t.act_pre_scale = torch.rand(G * group)
        kinds = [t, t.transpose(0, -1), CudaCoalescedInt4Tensor.from_int4_tensor(t), w, w[0].long()]
        state[name] = data.draw(st.sampled_from(kinds))
    try:
        save_file(state, path)
    except ValueError as error:
        assert "a name of its own" in str(error)
        return
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    for name, t in state.items():
        plain = t.to_int4_tensor() if isinstance(t, CudaCoalescedInt4Tensor) else t
        assert same(loaded[name], plain), name


# --- transformers' and torchao's files ------------------------------------------------------------


def test_stock_tools_read_the_file(tmp_path):
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    m, path = model(), tmp_path / "m.safetensors"
    save_file(m, path)
    with safetensors.safe_open(path, "pt") as file:
        stored, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()
    theirs, rest = support.unflatten_tensor_state_dict(
        {n: t for n, t in stored.items() if n != "steps"},
        metadata | {"tensor_names": json.dumps(["embed.weight", "up.weight", "up.bias"])},
    )
    assert set(rest) == {"again.bias"}
    assert same(Int4Tensor.from_torchao(theirs["up.weight"]), m.up.weight.detach())


def test_a_folder_of_several_files(tmp_path):
    m = model()
    save_file(m, tmp_path / "whole")
    with safetensors.safe_open(tmp_path / "whole", "pt") as file:
        stored, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()
    del metadata["int4q"]  # as transformers writes it
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(sorted(stored))}
    for file in set(files.values()):
        part = {n: stored[n] for n in stored if files[n] == file}
        safetensors.save_file(part, tmp_path / file, metadata)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert same(load_file(tmp_path)["up.weight"], m.up.weight.detach())
    loaded = load_into_(model(None), tmp_path)
    assert loaded.head.weight is loaded.embed.weight
    for text in ("{", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../x"}}', "[]"):
        index.write_text(text)
        with pytest.raises(ValueError, match="must have a weight_map"):
            load_file(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": next(iter(files.values()))}}))
    with pytest.raises(ValueError, match="must be stored as"):
        load_file(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path)
    os.rename(tmp_path / "whole", tmp_path / "model.safetensors")
    assert load_file(tmp_path).keys() == m.state_dict().keys()


def test_files_of_two_checkpoints(tmp_path):
    names = {"m.a": "1.safetensors", "m.b": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for name, file in names.items():
        save_file({name: torch.zeros(1)}, tmp_path / file)
    with pytest.raises(ValueError, match="2.safetensors: the files .* must have the same metadata"):
        load_file(tmp_path)
    save_file({"m.a": torch.zeros(1)}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match="a tensor must be in one file, got m.a in two"):
        load_file(tmp_path)


# --- errors ---------------------------------------------------------------------------------------


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"of the user")
    t = Int4Tensor.from_hp(torch.randn(8, 32), [1, 32])
    for error, message, state in (
        (TypeError, "must be a torch.nn.Module or a state dict, got list", [t]),
        (TypeError, "a must be a tensor, got str", {"a": "b"}),
        (TypeError, "int4q.adopt", {"a": t.to_torchao()}),
        (ValueError, "a must have values, got one on the meta device", {"a": t.to("meta")}),
        (ValueError, "under a name of its own, got .'_a_qdata'", {"_a_qdata": t.qdata, "a": t}),
        (ValueError, "schema's own metadata, got .'format'", {"format": t}),
    ):
        with pytest.raises(error, match=message):
            save_file(state, path)
    assert path.read_bytes() == b"of the user" and os.listdir(tmp_path) == [path.name]


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    before = path.read_bytes()

    def fails(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        save_file({"a": torch.ones(1)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_others_may_read_the_file(tmp_path):
    previous = os.umask(0o022)
    try:
        save_file({"a": torch.zeros(1)}, tmp_path / "m")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat(tmp_path / "m").st_mode) == 0o644


def test_into_another_model(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)
    m = nn.Sequential(nn.Linear(64, 32))
    before = m[0].weight
    with pytest.raises(ValueError, match=r"'0.bias', '0.weight'\] only in the model, \['again"):
        load_into_(m, path)
    narrow = Tied()
    narrow.up = narrow.again = nn.Linear(32, 64)
    with pytest.raises(ValueError, match=r"weight must have the model's shape \[64, 32\], got"):
        load_into_(narrow, path)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        load_into_({}, path)
    assert m[0].weight is before


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="'tensor_names', got .* safetensors.torch.load_file"):
        load_file(path)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="m.safetensors: a checkpoint must be a safetensors file"):
        load_file(path)
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "none")


def test_damaged_bytes_of_a_tensor(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(model(), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    m = model(None)
    before = m.up.weight
    for load in (load_file, lambda p: load_into_(m, p)):
        with pytest.raises(ValueError, match="must match its checksum, got other bytes"):
            load(path)
    assert m.up.weight is before
    assert load_file(path, checksums=False).keys() == m.state_dict().keys()


def test_damaged_files(tmp_path):
    seen = run(1000, seed=0, folder=tmp_path)
    assert sum(seen.values()) == 1000
    for kind in ("sealed, flip_a_bit", "sealed, change_the_metadata", "no seal, rename"):
        assert seen[f"{kind}: refused"] > 10


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path):
    assert sum(run(10_000, seed=1, folder=tmp_path).values()) == 10_000
