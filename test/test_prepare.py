"""``prepare_for_inference_``: the same model to its user, plain tensors to compiled code."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int4q
from int4q import (
    CpuPackedInt4Tensor,
    CudaCoalescedInt4Tensor,
    Int4SkipWarning,
    Int4Tensor,
    Int4WeightOnlyConfig,
    prepare_for_inference_,
    quantize_,
    unprepare_,
)
from int4q.tensor.base import Int4TensorBase

SMALL = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)


def coalesced(w, activation_dtype):
    return CudaCoalescedInt4Tensor.from_hp(w, [1, 32], activation_dtype)


WEIGHTS = {
    "plain": lambda w: Int4Tensor.from_hp(w, [1, 32]),
    "float8": lambda w: Int4Tensor.from_hp(w, [1, 32], torch.float8_e4m3fn),
    "coalesced int8": lambda w: coalesced(w, torch.int8),
    "coalesced W4A16": lambda w: coalesced(w, torch.bfloat16),
    "packed rows": lambda w: CpuPackedInt4Tensor.from_hp(w, [1, 32], packing="rows"),
    "packed aten": lambda w: CpuPackedInt4Tensor.from_hp(w, [1, 32], packing="aten"),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(kind="plain", dtype=torch.bfloat16, act_pre_scale=False):
    """Two linear layers, the first with a bias."""
    m = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False)).to(dtype)
    for i in (0, 2):
        t = WEIGHTS[kind](m[i].weight.detach())
        t.act_pre_scale = torch.rand(t.shape[1]) + 0.5 if act_pre_scale else None
        m[i].weight = nn.Parameter(t, requires_grad=False)
    return m


def activation(*lead, dtype=torch.bfloat16):
    return torch.randn(*lead, 64).to(dtype)


class Inputs:
    """A backend that runs the graph as it is, and keeps its inputs."""

    def __init__(self):
        self.tensors = []

    def __call__(self, graph, inputs):
        self.tensors += [t for t in inputs if isinstance(t, torch.Tensor)]
        return graph

    @property
    def subclasses(self):
        return [t for t in self.tensors if isinstance(t, Int4TensorBase)]


def compiled(m, *args):
    """The result of the compiled model, and the 4-bit tensors among its graph's inputs."""
    torch._dynamo.reset()
    inputs = Inputs()
    result = torch.compile(m, backend=inputs, fullgraph=True)(*args)
    return result, inputs.subclasses


# --- the same results, plain inputs ---------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("act_pre_scale", [False, True], ids=["", "act_pre_scale"])
def test_the_same_bits_from_plain_inputs(kind, act_pre_scale):
    m, x = model(kind, act_pre_scale=act_pre_scale), activation(2, 3)
    expected = m(x)
    result, subclasses = compiled(m, x)
    assert torch.equal(result, expected) and len(subclasses) == 2
    assert prepare_for_inference_(m) is m
    result, subclasses = compiled(m, x)
    assert torch.equal(m(x), expected) and torch.equal(result, expected) and not subclasses


def test_cuda_graphs_would_read_the_parts_in_place():
    """Inputs whose address torch does not take as fixed are copied at each replay of a graph."""
    m, x, inputs = prepare_for_inference_(model()), activation(3), Inputs()
    torch.compile(m, backend=inputs, fullgraph=True)(x)
    parts = {id(b) for b in m.buffers()}
    static = {id(t) for t in inputs.tensors if torch._dynamo.utils.get_static_address_type(t)}
    assert len(parts) == 6 and parts <= static and id(x) not in static


@pytest.mark.slow
@pytest.mark.parametrize("kind", WEIGHTS)
def test_inductor(kind):
    m, x = model(kind, torch.float32), activation(3, dtype=torch.float32)
    expected = m(x)
    result = torch.compile(prepare_for_inference_(m), fullgraph=True)(x)
    torch.testing.assert_close(result, expected)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("kind", ["plain", "coalesced int8"])
def test_cuda_graphs(kind):
    m, x = model(kind).cuda(), activation(1).cuda()
    with torch.no_grad():
        expected = m(x)
        fast = torch.compile(prepare_for_inference_(m), mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            assert torch.equal(fast(x), expected)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_autocast_and_biases_of_another_shape(kind):
    m, x = model(kind), activation(3, dtype=torch.float32)
    m[0].bias = nn.Parameter(torch.randn(3, 96))
    context = torch.autocast("cpu", torch.bfloat16)
    with context:
        expected = m(x)
        prepare_for_inference_(m)
        assert expected.dtype == torch.bfloat16 and torch.equal(m(x), expected)
        assert torch.equal(compiled(m, x)[0], expected)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_gradients_to_activation_and_bias(kind):
    m, x = model(kind, torch.float32), activation(3, dtype=torch.float32).requires_grad_()
    wanted = (x, m[0].bias)
    expected = torch.autograd.grad(m(x).square().sum(), wanted)
    prepare_for_inference_(m)
    for y in (m(x), compiled(m, x)[0]):
        for got, right in zip(torch.autograd.grad(y.square().sum(), wanted), expected, strict=True):
            assert torch.equal(got, right)


def test_a_mode_of_torch_functions_still_sees_the_layer():
    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen, m, x = [], prepare_for_inference_(model()), activation(3)
    expected = m(x)
    with Record():
        assert torch.equal(m(x), expected)
    assert seen.count(F.linear) == 2


# --- to its user it is what it was ----------------------------------------------------------------


def snapshot(m):
    """Everything registered, by identity and in order."""
    return [
        (name, type(sub), list(sub.__dict__), list(sub._parameters.items()), list(sub._modules))
        for name, sub in m.named_modules()
    ]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_way_back_gives_the_same_objects(kind):
    m = model(kind)
    before, names = snapshot(m), list(dict(m.named_parameters()))
    prepare_for_inference_(m)
    assert isinstance(m[0], nn.Linear) and m[0].weight is before[1][3][0][1]
    assert (
        unprepare_(m) is m and snapshot(m) == before and list(dict(m.named_parameters())) == names
    )
    assert not m[0].weight._is_held
    assert snapshot(unprepare_(m)) == before


def test_nothing_is_copied():
    m = prepare_for_inference_(model())
    for name, part in m[0].weight.data_tensors().items():
        assert getattr(m[0].weight_parts, name) is part
    assert "weight" not in dict(m[0].named_parameters())
    assert {n for n, _ in m.named_buffers()} == {
        f"{i}.weight_parts.{name}" for i in (0, 2) for name in ("qdata", "scale", "zero_point")
    }


@pytest.mark.parametrize("kind", WEIGHTS)
def test_state_dict_is_the_same(kind):
    m = model(kind)
    before = m.state_dict()
    prepare_for_inference_(m)
    after = m.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert type(after["0.weight"]) is type(m[0].weight)
    assert m.state_dict(keep_vars=True)["0.weight"] is m[0].weight
    file = io.BytesIO()
    torch.save(after, file)
    file.seek(0)
    other = prepare_for_inference_(model(kind))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = activation(3)
    assert torch.equal(other(x), m(x)) and torch.equal(compiled(other, x)[0], m(x))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_weight_reaches_compiled_code(kind, assign):
    m, other, x = prepare_for_inference_(model(kind)), model(kind), activation(3)
    fast = torch.compile(m, backend="eager", fullgraph=True)
    assert torch.equal(fast(x), m(x)) and not torch.equal(m(x), other(x))
    m.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(m(x), other(x)) and torch.equal(fast(x), other(x))


def test_looking_and_loading_compile_nothing_anew():
    m, x, graphs = prepare_for_inference_(model()), activation(3), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    fast = torch.compile(m, backend=backend, fullgraph=True)
    fast(x)
    int4q.summary(m, show=False)
    m.load_state_dict(m.state_dict(), assign=True)
    prepare_for_inference_(unprepare_(m.to("cpu")))
    fast(x)
    assert len(graphs) == 1


def test_an_assigned_weight_reaches_compiled_code():
    m, other, x = prepare_for_inference_(model()), model(), activation(3)
    fast = torch.compile(m, backend="eager", fullgraph=True)
    fast(x)
    m[0].weight, m[0].bias, m[2].weight = other[0].weight, other[0].bias, other[2].weight
    assert m[0].weight is other[0].weight and torch.equal(fast(x), other(x))
    plain = nn.Parameter(torch.randn(32, 96).bfloat16())
    m[2].weight = plain
    assert type(m[2]) is nn.Linear and m[2].weight is plain
    assert torch.equal(fast(x), F.linear(F.relu(m[0](x)), plain))
    del m[0].weight
    assert not hasattr(m[0], "weight")


def test_a_weight_for_one_call():
    m, other, x = prepare_for_inference_(model()), model(), activation(3)
    before, given = m(x), {"0.weight": other[0].weight, "2.weight": torch.randn(32, 96).bfloat16()}

    def call(x):
        return torch.func.functional_call(m, given, (x,))

    expected = F.linear(F.relu(F.linear(x, given["0.weight"], m[0].bias)), given["2.weight"])
    assert torch.equal(call(x), expected)
    assert torch.equal(torch.compile(call, backend="eager")(x), expected)
    assert torch.equal(m(x), before)


def test_data_is_refused_where_compiled_code_would_not_see_it():
    m, other = prepare_for_inference_(model()), model()
    with pytest.raises(ValueError, match="the weight of a prepared module keeps its parts"):
        m[0].weight.data = other[0].weight
    unprepare_(m)
    m[0].weight.data = other[0].weight
    assert torch.equal(m[0].weight, other[0].weight)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_dtype(kind):
    m, right, x = prepare_for_inference_(model(kind)), model(kind), activation(3).half()
    right.load_state_dict(m.state_dict())
    m.half(), right.half()
    assert m[0].weight.dtype == torch.float16
    assert torch.equal(m(x), right(x)) and torch.equal(compiled(m, x)[0], right(x))


@pytest.mark.gpu
def test_device():
    m, x = prepare_for_inference_(model()), activation(3)
    m.cuda()
    assert m[0].weight.device.type == m[0].weight_parts.qdata.device.type == "cuda"
    result, subclasses = compiled(m, x.cuda())
    assert torch.equal(result, m(x.cuda())) and not subclasses


def test_meta_and_back():
    m = prepare_for_inference_(model())
    state = m.state_dict()
    m.to("meta")
    assert m[0].weight_parts.qdata.is_meta
    m.load_state_dict(state, assign=True)
    assert m[0].weight_parts.qdata is m[0].weight.qdata and not m[0].weight.is_meta


def through_pickle(m):
    return pickle.loads(pickle.dumps(m))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_are_prepared_and_hold_the_weight_once(kind, copied):
    m, x = prepare_for_inference_(model(kind)), activation(3)
    again = copied(m)
    assert type(again[0]) is type(m[0]) and again[0].weight is not m[0].weight
    for name, part in again[0].weight.data_tensors().items():
        assert getattr(again[0].weight_parts, name) is part
    expected = copied(unprepare_(m))(x)  # (a pickle of a CPU-packed weight is packed anew)
    assert torch.equal(again(x), expected) and torch.equal(compiled(again, x)[0], expected)
    assert torch.equal(unprepare_(again)(x), expected)


def test_summary_and_layouts():
    m, x = model(), activation(3)
    before = int4q.summary(m, show=False)
    prepare_for_inference_(m)
    assert int4q.summary(m, show=False) == before
    int4q.to_coalesced_(m, torch.int8)
    assert type(m[0].weight) is CudaCoalescedInt4Tensor
    result, subclasses = compiled(m, x)
    assert torch.equal(result, m(x)) and not subclasses
    int4q.to_plain_(m)
    assert type(m[0].weight) is Int4Tensor and int4q.summary(m, show=False) == before


def test_tied_weights_stay_tied():
    m = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).bfloat16()
    m[1].weight = m[0].weight
    quantize_(m, SMALL)
    x = activation(3)
    expected = m(x)
    prepare_for_inference_(m)
    assert m[0].weight is m[1].weight and m[0].weight_parts.qdata is m[1].weight_parts.qdata
    again = copy.deepcopy(m)
    assert again[0].weight is again[1].weight
    m.float()
    assert m[0].weight is m[1].weight and m[1].weight_parts.scale.dtype == torch.float32
    unprepare_(m).bfloat16()
    assert m[0].weight is m[1].weight and torch.equal(m(x), expected)


def test_again_and_what_was_quantised_since():
    m = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).bfloat16()
    quantize_(m[:1], SMALL)
    prepare_for_inference_(m)
    before = snapshot(m)
    assert snapshot(prepare_for_inference_(m)) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the one that is quantised already
        quantize_(m, SMALL)
    assert type(m[1]) is nn.Linear
    prepare_for_inference_(m)
    assert compiled(m, activation(3))[1] == []


def test_hooks_stay():
    m, x, seen = model(), activation(3), []
    m[0].register_forward_hook(lambda module, args, output: seen.append(output))
    prepare_for_inference_(m)(x)
    assert len(seen) == 1 and seen[0].shape == (3, 96)


def test_a_forward_that_was_kept_runs_before_and_after():
    m, x = prepare_for_inference_(model()), activation(3)
    kept, expected = m[0].forward, m[0](x)
    assert torch.equal(kept(x), expected)
    unprepare_(m)
    assert torch.equal(kept(x), expected)


def test_export_holds_the_parts_once(tmp_path):
    m, x = prepare_for_inference_(model()), activation(3)
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(m, (x,), dynamic_shapes=({0: rows},))
    held = [*program.state_dict.values(), *program.constants.values()]
    assert not any(isinstance(t, Int4TensorBase) for t in held)
    parts = [m[0].bias.nbytes, m[0].weight.nbytes, m[2].weight.nbytes]
    assert sum(t.nbytes for t in held) == sum(parts)
    torch.export.save(program, tmp_path / "m.pt2")
    again = torch.export.load(tmp_path / "m.pt2").module()
    for M in (1, 5):
        x = activation(M)
        assert torch.equal(again(x), m(x))


# --- what is left ---------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) + 1


def quantised(module, name="weight"):
    w = getattr(module, name).detach()
    w = Int4Tensor.from_hp(w, [1] * (w.ndim - 1) + [32])
    setattr(module, name, nn.Parameter(w, requires_grad=False))
    return module


def transposed():
    layer = nn.Linear(64, 64)
    w = Int4Tensor.from_hp(torch.randn(64, 64), [1, 32]).t()
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


def replaced_forward():
    layer = quantised(nn.Linear(64, 64))
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    return layer


def in_a_buffer():
    module = nn.Module()
    module.register_buffer("table", Int4Tensor.from_hp(torch.randn(64, 64), [1, 32]))
    return module


LEFT = {
    "an embedding reads single rows": (lambda: quantised(nn.Embedding(64, 64)), "weight"),
    "OwnForward has a forward of its own": (lambda: quantised(OwnForward(64, 64)), "weight"),
    "MultiheadAttention has a forward of its own": (
        lambda: quantised(nn.MultiheadAttention(64, 4), "in_proj_weight"), "in_proj_weight"),
    "its groups do not run along the dim that is summed over": (transposed, "weight"),
    "the forward of its module was replaced": (replaced_forward, "weight"),
    "a buffer": (in_a_buffer, "table"),
}  # fmt: skip


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_is_named_and_works(reason):
    make, name = LEFT[reason]
    m = nn.ModuleDict({"layer": make(), "linear": quantised(nn.Linear(64, 64))})
    left, kind = getattr(m["layer"], name), type(m["layer"])
    with pytest.warns(Int4SkipWarning, match=f"^layer.{name} is not prepared: {reason}"):
        prepare_for_inference_(m)
    assert type(m["layer"]) is kind and getattr(m["layer"], name) is left
    assert type(m["linear"]) is not nn.Linear


def test_attention_reads_a_prepared_projection():
    m, x = nn.MultiheadAttention(64, 4, batch_first=True), torch.randn(2, 5, 64)
    quantised(m.out_proj)
    expected = m(x, x, x)[0]
    assert torch.equal(prepare_for_inference_(m)(x, x, x)[0], expected)


def test_nothing_to_prepare():
    with pytest.warns(Int4SkipWarning, match="no 4-bit weights to prepare"):
        prepare_for_inference_(nn.Linear(64, 64))
    for call in (prepare_for_inference_, unprepare_):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
            call(3)


# --- peft, transformers ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
def test_adapters_train_on_a_prepared_base():
    peft = pytest.importorskip("peft")
    m, x = model(dtype=torch.float32), activation(3, dtype=torch.float32)
    m = peft.get_peft_model(m, peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    adapter = [p for p in m.parameters() if p.requires_grad]
    expected, right = m(x), torch.autograd.grad(m(x).square().sum(), adapter)
    prepare_for_inference_(m)
    result, subclasses = compiled(m, x)
    assert torch.equal(m(x), expected) and torch.equal(result, expected) and not subclasses
    got = torch.autograd.grad(m(x).square().sum(), adapter)
    assert all(map(torch.equal, got, right))


def llama(transformers, tiny):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny, intermediate_size=128))


def gpt2(transformers, tiny):
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def qwen3_moe(transformers, tiny):
    import int4q.integrations.transformers  # noqa: F401

    config = transformers.Qwen3MoeConfig(
        **tiny, intermediate_size=128, moe_intermediate_size=96, num_experts=6,
        num_experts_per_tok=2, mlp_only_layers=[1],
    )  # fmt: skip
    m = transformers.Qwen3MoeForCausalLM(config)
    m.set_experts_implementation("int4q")
    return m


def transformers_model(make):
    transformers = pytest.importorskip("transformers")
    tiny = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=96,
    )  # fmt: skip
    m = make(transformers, tiny).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Int4SkipWarning)
        quantize_(m, int4q.moe_config(SMALL) if make is qwen3_moe else SMALL)
    return m


def test_conv1d_under_a_mode_and_with_another_weight():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    m, x = nn.Sequential(conv1d(96, 64)), activation(2, 3, dtype=torch.float32)
    quantize_(m, SMALL)
    expected = m(x)
    prepare_for_inference_(m)
    assert isinstance(m[0], conv1d) and torch.equal(m(x), expected)
    with torch.device("cpu"):  # a mode
        assert torch.equal(m(x), expected)
    other = torch.randn(64, 96)
    result = torch.func.functional_call(m, {"0.weight": other}, (x,))
    torch.testing.assert_close(result, x @ other + m[0].bias)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gpt2, qwen3_moe])
def test_transformers(make):
    m, ids = transformers_model(make), torch.randint(0, 96, (2, 7))
    generate = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    logits, tokens = m(ids).logits, m.generate(ids, **generate)
    output, subclasses = compiled(m, ids)
    assert subclasses
    expected = output.logits

    prepare_for_inference_(m)
    output, subclasses = compiled(m, ids)
    assert torch.equal(output.logits, expected) and not subclasses
    assert torch.equal(m(ids).logits, logits)
    for cache in ({}, {"cache_implementation": "static"}):
        assert torch.equal(m.generate(ids, **generate, **cache), tokens)
    assert torch.equal(copy.deepcopy(m)(ids).logits, logits)
    unprepare_(m)
    assert torch.equal(m(ids).logits, logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_of_another_implementation_are_named(implementation):
    m, ids = transformers_model(qwen3_moe), torch.randint(0, 96, (2, 7))
    m.set_experts_implementation(implementation)
    expected = m(ids).logits
    with pytest.warns(Int4SkipWarning, match=r"down_proj are not prepared: experts need set_exp"):
        prepare_for_inference_(m)
    assert torch.equal(m(ids).logits, expected)
    m.set_experts_implementation("int4q")
    assert not compiled(prepare_for_inference_(m), ids)[1]


def stored(folder):
    """Tensors and metadata of a saved model."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


@pytest.mark.slow
def test_a_model_quantised_on_load_is_saved_as_before(tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16)
    tiny |= dict(num_key_value_heads=2, vocab_size=96)
    llama(transformers, tiny).save_pretrained(tmp_path / "hp")
    config = transformers.TorchAoConfig(SMALL)
    m = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hp", quantization_config=config
    )
    m.save_pretrained(tmp_path / "before")
    prepare_for_inference_(m)
    m.save_pretrained(tmp_path / "after")
    before, metadata = stored(tmp_path / "before")
    after, metadata_after = stored(tmp_path / "after")
    assert after.keys() == before.keys() and metadata_after == metadata
    assert any(name.endswith("qdata") for name in before)
    assert all(torch.equal(after[name], before[name]) for name in before)
