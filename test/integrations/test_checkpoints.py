"""Models of transformers, quantised on load or before, saved and loaded again: bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig
from torchao.quantization import Int4Tensor as TorchAOInt4Tensor

import int4q
from int4q import Int4SkipWarning, Int4Tensor, Int4WeightOnlyConfig, moe_config, quantize_
from int4q.tensor.base import Int4TensorBase

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

from integrations.families import (  # noqa: E402
    FAMILIES,
    MIXTURES,
    bert,
    build,
    clip,
    gemma3,
    llama,
    mixtral,
    output,
    qwen3,
    whisper,
)

SMALL = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)
pytestmark = pytest.mark.filterwarnings("ignore::int4q.Int4SkipWarning")


def config_for(make):
    return moe_config(SMALL) if make in MIXTURES else SMALL


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Family -> (its model quantised on load, the folder of its first checkpoint), made once."""
    made = {}

    def get(make):
        if make not in made:
            folder = tmp_path_factory.mktemp(make.__name__)
            hp = build(make)
            hp.save_pretrained(folder / "hp")
            config = transformers.TorchAoConfig(config_for(make))
            model = type(hp).from_pretrained(folder / "hp", quantization_config=config)
            model.save_pretrained(folder / "first")
            made[make] = model, folder / "first"
        return made[make]

    return get


def contents(folder):
    """Tensors and metadata of all files of a checkpoint."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
    return tensors, metadata


def assert_same_contents(folder, other):
    (a, metadata), (b, other_metadata) = contents(folder), contents(other)
    assert a.keys() == b.keys() and metadata == other_metadata
    for name, t in a.items():
        assert t.dtype == b[name].dtype and torch.equal(t, b[name]), name


def weights(model):
    return {n: p for n, p in model.named_parameters() if isinstance(p, Int4TensorBase)}


def assert_same_weights(model, other):
    a, b = weights(model), weights(other)
    assert a.keys() == b.keys() and a
    assert all(type(b[name]) is Int4Tensor and torch.equal(a[name], b[name]) for name in a)


# --- round and round ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FAMILIES)
def test_three_times_round(make, loaded, tmp_path):
    model, folder = loaded(make)
    expected, configs = output(model, make), []
    for i in range(3):
        again = type(model).from_pretrained(folder)
        assert_same_weights(model, again)
        assert torch.equal(output(again, make), expected)
        again.save_pretrained(tmp_path / str(i))
        assert_same_contents(folder, tmp_path / str(i))
        folder = tmp_path / str(i)
        configs.append((folder / "config.json").read_text())
    assert configs[1] == configs[2] == configs[0]


@pytest.mark.parametrize("make", [llama, *MIXTURES, clip])
def test_sharded(make, loaded, tmp_path):
    model, whole = loaded(make)
    folder = whole
    for i in range(2):
        type(model).from_pretrained(folder).save_pretrained(tmp_path / str(i), max_shard_size="9KB")
        folder = tmp_path / str(i)
        assert len(list(folder.glob("*.safetensors"))) > 3
        assert_same_contents(whole, folder)
    assert_same_weights(model, type(model).from_pretrained(folder))


@pytest.mark.parametrize("make", FAMILIES)
def test_without_transformers(make, loaded):
    """The files are those of ``load_file`` and ``load_into_``."""
    model, folder = loaded(make)
    state = int4q.load_file(folder)
    for name, t in weights(model).items():
        assert torch.equal(state[name], t)
    other = build(make)
    for p in other.parameters():
        p.zero_()
    int4q.load_into_(other, folder)
    assert_same_weights(model, other)
    assert torch.equal(output(other, make), output(model, make))


@pytest.mark.parametrize("make", [f for f in FAMILIES if f not in (bert, clip, whisper)])
def test_generate(make, loaded):
    model, folder = loaded(make)
    ways = dict(max_new_tokens=6, do_sample=False)
    tokens = model.generate(torch.arange(3, 11).view(1, 8), **ways)
    again = type(model).from_pretrained(folder, device_map="cpu")
    assert tokens.shape[1] > 8
    assert torch.equal(again.generate(torch.arange(3, 11).view(1, 8), **ways), tokens)


# --- quantised first ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FAMILIES)
def test_quantised_first(make, loaded, tmp_path):
    model = build(make)
    quantize_(model, config_for(make))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_weights(model, again)
    assert torch.equal(output(again, make), output(model, make))
    on_load = loaded(make)[0]
    both = weights(model).keys() & weights(on_load).keys()
    assert both and all(torch.equal(weights(model)[n], weights(on_load)[n]) for n in both)


@pytest.mark.parametrize("fmt", ["cuda_coalesced", "cpu_packed", "auto"])
@pytest.mark.parametrize("prepared", [False, True])
def test_every_layout_is_saved_in_plain(fmt, prepared, tmp_path):
    plain, model = build(llama), build(llama)
    quantize_(plain, SMALL)
    quantize_(model, Int4WeightOnlyConfig(group_size=32, int4_packing_format=fmt))
    if prepared:
        int4q.prepare_for_inference_(model)
    for m, name in ((plain, "plain"), (model, "other")):
        m.save_pretrained(tmp_path / name)
    assert_same_contents(tmp_path / "plain", tmp_path / "other")
    assert (tmp_path / "plain/config.json").read_text() == (
        tmp_path / "other/config.json"
    ).read_text()


def test_what_was_kept_is_saved(tmp_path):
    """Router and head by default, and what a filter leaves out."""
    model = build(mixtral)
    quantize_(model, moe_config(SMALL, linears=False))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    kept = saved["modules_to_not_convert"]
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn.q_proj"} <= set(kept)
    assert not any("experts" in name or "embed" in name for name in kept)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.quantization_config.modules_to_not_convert == kept
    again.save_pretrained(tmp_path / "again")
    text = (tmp_path / "again/config.json").read_text()
    assert json.loads(text)["quantization_config"]["modules_to_not_convert"] == kept


@pytest.mark.parametrize("make", [llama, mixtral, whisper])
def test_the_config_makes_the_same_weights(make, tmp_path):
    """What is derived from the weights, with several group sizes too, says how to make them."""
    model = build(make)
    model.save_pretrained(tmp_path)
    k_proj = "0.self_attn.k_proj"
    wide = Int4WeightOnlyConfig(group_size=64, set_inductor_config=False)
    quantize_(model, wide, lambda m, name: name.endswith(k_proj))
    quantize_(model, config_for(make))
    config = model.config.quantization_config
    assert isinstance(config.quant_type, FqnToConfig)
    on_load = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert_same_weights(model, on_load)
    assert on_load.config.quantization_config.to_dict() == config.to_dict()


def test_a_model_of_one_layer_type_has_a_plain_config(loaded):
    config = loaded(llama)[0].config.quantization_config
    assert type(config.quant_type) is Int4WeightOnlyConfig
    model = build(llama)
    quantize_(model, SMALL)
    config = model.config.quantization_config
    assert config.quant_type.group_size == 32 and config.modules_to_not_convert == ["lm_head"]


def test_a_quantised_model_is_cast_as_before():
    model = build(llama)
    quantize_(model, SMALL)
    assert model.half().model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    assert model.float().model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_quantised_in_two_steps(tmp_path):
    model = build(mixtral)
    quantize_(model, moe_config(SMALL, linears=False))
    quantize_(model, SMALL, lambda m, name: name.endswith("v_proj"))
    kept = model.config.quantization_config.modules_to_not_convert
    assert "model.layers.0.self_attn.q_proj" in kept
    assert "model.layers.0.self_attn.v_proj" not in kept
    model.save_pretrained(tmp_path)
    assert_same_weights(model, type(model).from_pretrained(tmp_path))


def test_the_inner_model_alone(tmp_path):
    """Quantised by itself, in a model that is saved whole: ``adopt`` tells transformers."""
    model = build(llama)
    quantize_(model.model.layers, SMALL)
    with pytest.raises(TypeError, match="int4q.adopt"):
        model.save_pretrained(tmp_path)
    assert int4q.adopt(model) is model
    model.save_pretrained(tmp_path)
    assert_same_weights(model, type(model).from_pretrained(tmp_path))


def test_tied_embeddings_stay_tied(loaded, tmp_path):
    for make in (qwen3, gemma3):
        model, folder = loaded(make)
        again = type(model).from_pretrained(folder)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        again.save_pretrained(tmp_path / make.__name__)
        assert not any(name.startswith("lm_head") for name in contents(folder)[0])


# --- other ways to hold a model -------------------------------------------------------------------


def test_offloaded_weights_are_saved(loaded, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, folder = loaded(mixtral)
    again = type(model).from_pretrained(folder)
    accelerate.cpu_offload(again, execution_device="cpu")
    assert all(p.is_meta for p in weights(again).values())
    assert torch.equal(output_of_offloaded(again), output(model, mixtral))
    again.save_pretrained(tmp_path)
    assert_same_contents(folder, tmp_path)


def output_of_offloaded(model):
    with torch.no_grad():
        return model(torch.arange(18).view(2, 9) * 7 % 90 + 3).logits


def test_a_device_map(loaded, tmp_path):
    pytest.importorskip("accelerate")
    model, folder = loaded(llama)
    again = type(model).from_pretrained(folder, device_map={"": "cpu"})
    assert torch.equal(output(again, llama), output(model, llama))
    again.save_pretrained(tmp_path)
    assert_same_contents(folder, tmp_path)
    with pytest.raises(ValueError, match="disk offload"):
        type(model).from_pretrained(folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_float16_activations_on_a_bfloat16_checkpoint(loaded):
    model, folder = loaded(llama)
    again = type(model).from_pretrained(folder, dtype=torch.float16)
    assert again.model.embed_tokens.weight.dtype == torch.float16
    assert_same_weights(model, again)
    y, expected = output(again, llama).float(), output(model, llama).float()
    assert ((y - expected).norm() / expected.norm()) < 2e-2  # bfloat16 rounds to 2^-9 each time


# --- torchao's own weights ------------------------------------------------------------------------


def as_torchao(model):
    """The model as a process without int4q loads it."""
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    shared = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if isinstance(p, Int4Tensor):
                theirs = nn.Parameter(p.to_torchao(), requires_grad=False)
                module._parameters[name] = shared.setdefault(id(p), theirs)
    config = model.config.quantization_config
    model.hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    return model


def test_adopt_copies_nothing(loaded, tmp_path):
    model, folder = loaded(llama)
    theirs = as_torchao(type(model).from_pretrained(folder))
    theirs.model.layers[1].self_attn.q_proj.weight = theirs.model.layers[0].self_attn.q_proj.weight
    before = theirs.model.layers[0].self_attn.q_proj.weight
    assert type(before) is TorchAOInt4Tensor and not theirs.hf_quantizer.is_trainable
    assert int4q.adopt(theirs) is theirs
    after = theirs.model.layers[0].self_attn.q_proj.weight
    assert isinstance(after, Int4Tensor) and isinstance(after, nn.Parameter)
    for name, part in after.data_tensors().items():
        assert part.data_ptr() == getattr(before, name).data_ptr()
    assert theirs.model.layers[1].self_attn.q_proj.weight is after
    assert theirs.hf_quantizer.is_trainable
    theirs.model.layers[1].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    theirs.save_pretrained(tmp_path)
    assert_same_contents(folder, tmp_path)


def test_adopt_any_module():
    t = Int4Tensor.from_hp(torch.randn(8, 64), [1, 32])
    module = nn.Linear(64, 8)
    module.weight = nn.Parameter(t.to_torchao(), requires_grad=False)
    module.register_buffer("other", t.to_torchao())
    int4q.adopt(module)
    assert torch.equal(module.weight.detach(), t) and torch.equal(module.other, t)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got Int4Tensor"):
        int4q.adopt(t)
    module.weight = nn.Parameter(t.to("meta").to_torchao(), requires_grad=False)
    with pytest.raises(ValueError, match="Import int4q before the model is loaded"):
        int4q.adopt(module)


def test_damaged_parts_are_refused(loaded, tmp_path):
    from safetensors.torch import save_file

    _, folder = loaded(llama)
    tensors, metadata = contents(folder)
    name = "model.layers.0.mlp.up_proj._weight_scale"
    turned = tensors.pop(name).mT.contiguous()
    for damaged in ({**tensors, name: turned}, tensors):
        save_file(damaged, tmp_path / "model.safetensors", metadata)
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(RuntimeError, match="during automatic conversion"):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="must have shape|must be stored as"):
            int4q.load_file(tmp_path)


def test_other_quantised_tensors_are_saved_too(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = build(llama)
    quantize_(model, SMALL, lambda m, name: name.endswith("q_proj"))
    config = torchao.Int8WeightOnlyConfig(version=2)
    quantize_(model, config, lambda m, name: name.endswith("k_proj"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_weights(model, again)
    theirs = again.model.layers[0].self_attn.k_proj.weight
    assert type(theirs).__name__ == "Int8Tensor"
    assert torch.equal(theirs.qdata, model.model.layers[0].self_attn.k_proj.weight.qdata)


# --- the Hub --------------------------------------------------------------------------------------


def test_push_to_hub(loaded, tmp_path, monkeypatch):
    """What goes up: the card's tags and the config; nothing leaves this process."""
    from transformers import modeling_utils

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": f"someone/{repo_id}"})

    class Card:
        def save(self, path):
            assert path.endswith("README.md")

    tags, uploaded = [], []
    monkeypatch.setattr(modeling_utils, "hf_api", Api, raising=False)
    monkeypatch.setattr(modeling_utils, "create_repo", Api().create_repo, raising=False)
    monkeypatch.setattr(
        modeling_utils,
        "create_and_tag_model_card",
        lambda repo_id, given, **kwargs: (tags.extend(given), Card())[1],
    )
    model = loaded(llama)[0]
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *a, **k: uploaded.append(folder)
    )
    model.save_pretrained(tmp_path / "tiny", push_to_hub=True)
    assert tags == ["int4q", "torchao", "4-bit"] and uploaded
    saved = json.loads((tmp_path / "tiny/config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "torchao"
    assert saved["quant_type"]["default"]["_type"] == "Int4WeightOnlyConfig"
    assert saved["quant_type"]["default"]["_data"]["group_size"] == 32


# --- processes of their own -----------------------------------------------------------------------


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_fresh_process_saves_the_same(loaded, tmp_path):
    folders = {make.__name__: str(loaded(make)[1]) for make in FAMILIES}
    code = (
        "import sys, json, int4q, transformers\n"
        "for name, folder in json.loads(sys.argv[1]).items():\n"
        "    config = transformers.AutoConfig.from_pretrained(folder)\n"
        "    cls = getattr(transformers, config.architectures[0])\n"
        "    cls.from_pretrained(folder).save_pretrained(sys.argv[2] + '/' + name)\n"
    )
    run(code, json.dumps(folders), tmp_path)
    for name, folder in folders.items():
        assert_same_contents(Path(folder), tmp_path / name)


@pytest.mark.slow
def test_a_stock_process_reads_it(loaded, tmp_path):
    """Without int4q a checkpoint holds torchao's class; with it, later, the same bits again."""
    folders = {m.__name__: str(loaded(m)[1]) for m in (llama, gemma3, mixtral, clip)}
    code = (
        "import sys, json, torch, transformers\n"
        "from torchao.quantization import Int4Tensor as Theirs\n"
        "for name, folder in json.loads(sys.argv[1]).items():\n"
        "    config = transformers.AutoConfig.from_pretrained(folder)\n"
        "    cls = getattr(transformers, config.architectures[0])\n"
        "    model = cls.from_pretrained(folder)\n"
        "    theirs = [p for p in model.parameters() if type(p) is Theirs]\n"
        "    assert theirs and 'int4q' not in sys.modules\n"
        "    globals()[name] = model\n"
        "import int4q\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    model = int4q.adopt(globals()[name])\n"
        "    assert not any(type(p) is Theirs for p in model.parameters())\n"
        "    model.save_pretrained(sys.argv[2] + '/' + name)\n"
    )
    run(code, json.dumps(folders), tmp_path)
    for name, folder in folders.items():
        assert_same_contents(Path(folder), tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["int4q", "transformers.quantizers.auto"])
def test_whichever_is_imported_first(first):
    second = {"int4q": "transformers.quantizers.auto"}.get(first, "int4q")
    run(
        f"import sys, {first}, {second}\n"
        "from transformers.quantizers import auto\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['torchao'].__module__.startswith('int4q')\n"
        "assert not any(type(f).__module__.startswith('int4q') for f in sys.meta_path)\n"
        "import inspect; assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto)\n"
    )


def test_skips_are_said_on_load(tmp_path):
    hp = build(llama)
    hp.save_pretrained(tmp_path)
    wide = Int4WeightOnlyConfig(group_size=128, set_inductor_config=False)
    with pytest.warns(Int4SkipWarning, match="K = 64 is not a multiple of group_size 128"):
        type(hp).from_pretrained(tmp_path, quantization_config=transformers.TorchAoConfig(wide))
