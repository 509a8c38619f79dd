"""Mixtures of experts: presets, transformers' models under every experts implementation."""

import copy
import functools
import inspect
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchao.quantization
from helpers import LAYOUTS
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig

import int4q
from int4q import Int4SkipWarning, Int4Tensor, Int4WeightOnlyConfig, moe_config, quantize_
from int4q.tensor.base import Int4TensorBase

transformers = pytest.importorskip("transformers")
SMALL = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "int4q")
TINY = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=96,
)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **TINY, intermediate_size=128, moe_intermediate_size=96, num_experts=6,
        num_experts_per_tok=2, mlp_only_layers=[1],
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(
        **TINY, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def gpt_oss():
    """Experts ``[E, in, out]`` with biases, gate and up interleaved."""
    config = transformers.GptOssConfig(
        **TINY, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def llama4():
    """Experts ``[E, in, out]`` by ``bmm``; square ones, which a wrong axis would not stop."""
    config = transformers.Llama4TextConfig(
        **TINY, intermediate_size=64, intermediate_size_mlp=128, num_local_experts=4,
        num_experts_per_tok=1, interleave_moe_layer_step=1,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


MODELS = (qwen3_moe, mixtral, gpt_oss, llama4)


@functools.cache
def trained_like(make):
    """Random weights, biases too, of the size that lets every part of the output matter."""
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        p.requires_grad_(False).normal_(std=0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
    return model


def pair(make, config):
    """A quantised model, and the same one with its weights dequantised."""
    quantised = copy.deepcopy(trained_like(make))
    quantize_(quantised, config)
    plain = copy.deepcopy(trained_like(make))
    for name, p in quantised.named_parameters():
        if isinstance(p, Int4TensorBase):
            plain.get_parameter(name).copy_(p.dequantize())
    return quantised, plain


def logits(model):
    ids = torch.arange(26, device=model.device).view(2, 13) * 7 % 96
    with torch.no_grad():
        return model(ids).logits


def assert_close(got, expected, tolerance=1e-5):
    """float32 sums of at most 128 products in another order; the layers multiply the error."""
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance, error


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_experts_implementation(make, implementation, device):
    import int4q.integrations.transformers  # noqa: F401

    quantised, plain = (model.to(device) for model in pair(make, moe_config(SMALL)))
    if make is not llama4:  # Llama 4 has one implementation only
        quantised.set_experts_implementation(implementation)
        plain.set_experts_implementation("eager")
    # A GPU's decode kernels take float32 activations in 16-bit fixed point.
    tolerance = 1e-5 if device == "cpu" else 1e-3
    assert_close(logits(quantised), logits(plain), tolerance)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("packing", ["cuda_coalesced", "auto"])
def test_other_layouts(make, packing):
    config = Int4WeightOnlyConfig(
        group_size=32, int4_packing_format=packing, activation_dtype=torch.bfloat16
    )
    quantised, plain = pair(make, moe_config(config))
    assert_close(logits(quantised), logits(plain))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
    quantised, plain = pair(qwen3_moe, moe_config(SMALL))
    quantised, plain = quantised.bfloat16(), plain.bfloat16()
    quantised.set_experts_implementation(implementation)
    plain.set_experts_implementation("eager")
    # bfloat16 rounds every activation to 2^-9; the experts chosen are the same.
    assert_close(logits(quantised), logits(plain), tolerance=3e-2)


def held(model):
    return {n for n, p in model.named_parameters() if isinstance(p, Int4TensorBase)}


EXPERTS_OF = {
    qwen3_moe: {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"},
    mixtral: {
        f"model.layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")
    },
}
EXPERTS_OF[gpt_oss] = EXPERTS_OF[mixtral]
EXPERTS_OF[llama4] = {n.replace("mlp", "feed_forward") for n in EXPERTS_OF[mixtral]}


@pytest.mark.parametrize("make", MODELS)
def test_what_the_preset_takes_and_what_the_report_says(make):
    quantised, plain = pair(make, moe_config(SMALL))
    linears = {
        f"{name}.weight"
        for name, m in plain.named_modules()
        if isinstance(m, nn.Linear) and "router" not in name and name != "lm_head"
    }
    assert held(quantised) == EXPERTS_OF[make] | linears
    if make is llama4:
        assert any("shared_expert" in n for n in linears)
    summary = int4q.summary(quantised, show=False)
    assert {w.name for w in summary.quantized} == held(quantised)
    left = {w.name for w in summary.skipped}
    routers = {
        n for n, p in plain.named_parameters() if n.endswith(("gate.weight", "router.weight"))
    }
    assert routers and left == routers | {"lm_head.weight", "model.embed_tokens.weight"}
    for name in EXPERTS_OF[make]:
        assert quantised.get_parameter(name).shape == plain.get_parameter(name).shape
        transposed = make in (gpt_oss, llama4)
        assert quantised.get_parameter(name).grouped_dim == (1 if transposed else 2)

    quantised, _ = pair(make, moe_config(SMALL, linears=False))
    assert held(quantised) == EXPERTS_OF[make]
    other = Int4WeightOnlyConfig(group_size=64, set_inductor_config=False)
    quantised, _ = pair(make, moe_config(SMALL, linears=other))
    sizes = {quantised.get_parameter(n).group_size for n in EXPERTS_OF[make]}
    assert sizes == {32}
    assert quantised.model.layers[0].self_attn.q_proj.weight.group_size == 64


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        **TINY | dict(num_hidden_layers=4), intermediate_size=64, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def jamba():
    config = transformers.JambaConfig(
        **TINY | dict(num_hidden_layers=4), intermediate_size=64, num_experts=4,
        use_mamba_kernels=False, mamba_dt_rank=32, attn_layer_period=4, attn_layer_offset=3,
        expert_layer_period=2, expert_layer_offset=1,
    )  # fmt: skip
    return transformers.JambaForCausalLM(config)


STATES = {  # the projections of the layers that keep a state: in 4 bits, and not
    qwen3_next: ("linear_attn", ("in_proj_qkvz", "out_proj"), ("in_proj_ba",)),
    jamba: ("mamba", ("in_proj", "out_proj"), ("x_proj", "dt_proj")),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", STATES)
def test_layers_with_a_state(make):
    quantised, plain = pair(make, moe_config(SMALL))
    part, taken, kept = STATES[make]
    layers = [n for n, _ in plain.named_modules() if n.endswith(part)]
    assert layers
    names = held(quantised)
    for layer in layers:
        assert all(f"{layer}.{name}.weight" in names for name in taken)
        assert all(f"{layer}.{name}.weight" not in names for name in kept)
    left = {
        n.removesuffix(".weight").rpartition(".")[2]
        for n, m in plain.named_modules()
        if isinstance(m, nn.Linear) and f"{n}.weight" not in names
    }
    assert left <= {"lm_head", "gate", "router", "shared_expert_gate", *kept}
    assert_close(logits(quantised), logits(plain), tolerance=3e-2)


@pytest.mark.filterwarnings("ignore:Config Deprecation. _default is deprecated")
def test_a_linear_layer_that_the_preset_does_not_name_is_reported():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.gate = nn.Linear(64, 64), nn.Linear(64, 4)
            self.experts, self.attention = Experts(), nn.MultiheadAttention(64, 4)
            self.new_proj, self.table = nn.Linear(64, 64), nn.Embedding(9, 64)

    for config, unnamed in (
        (moe_config(SMALL), True),
        (FqnToConfig({**moe_config(SMALL).fqn_to_config, "_default": SMALL}), False),
    ):
        model = nn.ModuleList([Block(), Block()])
        with pytest.warns(Int4SkipWarning) as caught:
            quantize_(model, config)
        (message,) = [str(w.message) for w in caught]
        assert "*.attention.in_proj_weight (2)" in message
        assert ("*.new_proj.weight (2)" in message) == unnamed
        assert message.endswith("are left alone: the config does not name it")
        assert ("0.new_proj.weight" in held(model)) == (not unnamed)
    # Names alone, without a word about the others, are a choice.
    model = nn.ModuleList([Block()])
    quantize_(model, FqnToConfig({r"re:.*q_proj.weight": SMALL}))
    assert held(model) == {"0.q_proj.weight"}


def test_the_preset_survives_json():
    read = config_from_dict(json.loads(json.dumps(config_to_dict(moe_config(SMALL)))))
    assert list(read.fqn_to_config) == list(moe_config(SMALL).fqn_to_config)
    assert list(read.fqn_to_config.values())[-1] is None


def test_preset_arguments():
    with pytest.raises(TypeError, match="config must be an Int4WeightOnlyConfig"):
        moe_config("plain")
    with pytest.raises(TypeError, match="linears must be an Int4WeightOnlyConfig"):
        moe_config(SMALL, linears=128)
    with pytest.raises(ValueError, match="contracted_dim must be -1, -2 or None, got 1"):
        moe_config(SMALL, contracted_dim=1)
    experts, linears, kept = moe_config(SMALL, contracted_dim=-2).fqn_to_config.values()
    assert experts.contracted_dim == -2 and linears.contracted_dim is None and kept is None


def test_a_plain_config_says_that_it_leaves_experts():
    model = copy.deepcopy(trained_like(mixtral))
    with pytest.warns(Int4SkipWarning) as caught:
        quantize_(model, SMALL)
    (message,) = [str(w.message) for w in caught if "experts" in str(w.message)]
    assert (
        "model.layers.*.mlp.experts.gate_up_proj (2), model.layers.*.mlp.experts.down_proj (2) "
        "are left alone: a stack of experts" in message
    )
    assert "int4q.moe_config()" in message
    skipped = {w.name: w.reason for w in int4q.summary(model, show=False).skipped}
    assert all("int4q.moe_config()" in skipped[n] for n in EXPERTS_OF[mixtral])


# --- which dim is contracted ----------------------------------------------------------------------


class Experts(nn.Module):
    """Llama 4's own code: ``w1, w3 [E, D, F]`` and ``w2 [E, F, D]`` by ``bmm``."""

    def __init__(self, E=2, D=64, F=96, dtype=torch.float32):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, D, F, dtype=dtype) / 8)
        self.w2 = nn.Parameter(torch.randn(E, F, D, dtype=dtype) / 8)
        self.w3 = nn.Parameter(torch.randn(E, D, F, dtype=dtype) / 8)
        self.scales = nn.Parameter(torch.ones(E, F, dtype=dtype))

    def forward(self, x):
        middle = F.silu(torch.bmm(x, self.w1)) * torch.bmm(x, self.w3)
        return torch.bmm(middle, self.w2)


def is_experts(module, name):
    return isinstance(module, Experts)


@pytest.mark.parametrize("quantize", [quantize_, torchao.quantization.quantize_])
@pytest.mark.parametrize("layout", ["plain", "cuda_coalesced"])
def test_plain_3d_parameters(quantize, layout):
    model = nn.ModuleDict({"experts": Experts(), "other": nn.Linear(64, 32)})
    original = copy.deepcopy(model["experts"])
    config = Int4WeightOnlyConfig(
        group_size=32,
        int4_packing_format=layout,
        activation_dtype=torch.bfloat16,
        contracted_dim=-2,
    )
    quantize(model, config, is_experts)
    assert held(model) == {"experts.w1", "experts.w2", "experts.w3"}
    for name in ("w1", "w2", "w3"):
        w, q = getattr(original, name), getattr(model["experts"], name)
        assert q.shape == w.shape and q.block_size == [1, 32, 1]
        by_hand = type(q).from_hp(w.transpose(1, 2), [1, 1, 32], torch.bfloat16)
        assert torch.equal(q.transpose(1, 2), by_hand)
        getattr(original, name).data = q.dequantize()
    x = torch.randn(2, 5, 64)
    assert_close(model["experts"](x), original(x))
    named = nn.ModuleDict({"experts": Experts()})
    quantize_(named, moe_config(config))
    assert held(named) == {"experts.w1", "experts.w2", "experts.w3"}


def test_nothing_is_guessed_from_shapes():
    """A module that declares nothing has its groups along the last dim, whatever its shapes."""
    model = nn.ModuleDict({"experts": Experts(D=64, F=64)})
    quantize_(model, moe_config(SMALL))
    assert model["experts"].w1.grouped_dim == 2
    model = nn.ModuleDict({"experts": Experts(D=64, F=64)})
    model["experts"].is_transposed = True
    quantize_(model, moe_config(SMALL))
    assert model["experts"].w1.grouped_dim == 1
    model = nn.ModuleDict({"experts": Experts(D=64, F=64)})
    model["experts"].is_transposed = True
    quantize_(model, moe_config(SMALL, contracted_dim=-1))
    assert model["experts"].w1.grouped_dim == 2


def test_contracted_dim_of_a_matrix():
    m = nn.Sequential(nn.Linear(50, 64))
    config = Int4WeightOnlyConfig(
        group_size=32, contracted_dim=-2, int4_packing_format="cpu_packed"
    )
    with pytest.warns(Int4SkipWarning, match="not cpu_packed: its groups run along dim 0"):
        quantize_(m, config)
    assert type(m[0].weight) is Int4Tensor and m[0].weight.block_size == [32, 1]
    with pytest.warns(Int4SkipWarning, match="K = 50 is not a multiple"):
        quantize_(m := nn.Sequential(nn.Linear(64, 50)), config)
    assert type(m[0].weight) is nn.Parameter


def test_a_module_with_nothing_to_quantise():
    with pytest.raises(ValueError, match="must have a weight or stacks of experts"):
        quantize_(nn.Sequential(nn.ReLU()), SMALL, lambda module, name: name == "0")


# --- Llama 4's resharding ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reshard", ["whole", "by expert"])
def test_llama4_resharding_gives_the_same_bits(layout, reshard):
    """transpose, reshape to 2-D, unflatten, transpose back; also cut and joined over experts."""
    E, D, F_ = 4, 64, 96
    experts = Experts(E, D, F_)
    for name in ("w1", "w2", "w3"):
        w = getattr(experts, name).detach().transpose(1, 2)
        quantised = layout.from_hp(w, [1, 1, 32], torch.bfloat16)
        setattr(experts, name, nn.Parameter(quantised, requires_grad=False))
    x = torch.randn(E, 5, D)
    before = experts(x)
    for name in ("w1", "w2", "w3"):
        w = getattr(experts, name)
        n = w.shape[-2]
        flat = w.transpose(1, 2).reshape(-1, n).contiguous()
        assert flat.shape == (w.shape[0] * w.shape[2], n)
        if reshard == "by expert":
            half = flat.shape[0] // 2
            flat = torch.cat([flat.narrow(0, 0, half), flat.narrow(0, half, half)])
        back = flat.unflatten(0, (E, -1)).squeeze(dim=0).transpose(1, 2).contiguous()
        if reshard == "by expert":
            back = torch.cat([back.narrow(0, 0, 1), back[1:3], back.narrow(0, 3, 1)])
        assert torch.equal(back, w)
        setattr(experts, name, nn.Parameter(back, requires_grad=False))
    assert torch.equal(experts(x), before)


# --- the implementation "int4q" -----------------------------------------------------------------


def experts_module(make=qwen3_moe):
    import int4q.integrations.transformers  # noqa: F401

    quantised, plain = pair(make, moe_config(SMALL))
    for model in (quantised, plain):
        model.set_experts_implementation("int4q")
    return quantised.model.layers[0].mlp.experts, plain.model.layers[0].mlp.experts


def route(T=7, E=6, top_k=2, highest=None):
    torch.manual_seed(1)
    scores = torch.rand(T, highest or E).topk(top_k)
    return torch.randn(T, 64), scores.indices, scores.values.softmax(-1)


@pytest.mark.parametrize("make,E", [(qwen3_moe, 6), (mixtral, 4), (gpt_oss, 4)])
@pytest.mark.parametrize("T", [0, 1, 7, 200])
def test_int4q_experts(make, E, T):
    quantised, plain = experts_module(make)
    args = route(T, E)
    got = quantised(*args)
    plain.config._experts_implementation = "eager"
    expected = plain(*args)
    assert got.shape == expected.shape == (T, 64) and got.dtype == expected.dtype
    if T:
        assert_close(got, expected)
        assert torch.equal(got, quantised(*args))  # nothing adds in an order of its own


def test_int4q_experts_all_tokens_to_one():
    quantised, plain = experts_module()
    x, index, weights = route(9)
    index = torch.full_like(index, 5)
    index[:, 1] = 0
    plain.config._experts_implementation = "eager"
    assert_close(quantised(x, index, weights), plain(x, index, weights))


@pytest.mark.parametrize("make,E", [(qwen3_moe, 6), (gpt_oss, 4)])
def test_int4q_experts_held_elsewhere_add_nothing(make, E):
    quantised, _ = experts_module(make)
    x, index, weights = route(9, E, highest=E + 1)
    assert (index == E).any()
    expected = quantised(x, index.clamp(max=E - 1), weights.masked_fill(index == E, 0))
    quantised._is_expert_parallel = True  # what transformers sets where the case can occur
    assert_close(quantised(x, index.masked_fill(index == E, E), weights.clone()), expected)


def test_int4q_experts_left_in_bfloat16_run_too():
    _, plain = experts_module()
    args = route()
    got = plain(*args)
    plain.config._experts_implementation = "eager"
    assert_close(got, plain(*args))


def test_int4q_experts_pass_gradients():
    quantised, plain = experts_module()
    plain.config._experts_implementation = "eager"
    x, index, weights = route()
    grads = []
    for module in (quantised, plain):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        module(leaves[0], index, leaves[1]).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected)


def test_int4q_experts_without_a_gate_and_with_a_norm():
    from transformers.integrations.moe import use_experts_implementation

    import int4q.integrations.transformers  # noqa: F401

    if "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
        pytest.skip(f"transformers {transformers.__version__} has no norm behind its experts")

    @use_experts_implementation(has_gate=False, has_post_expert_norm=True)
    class Plain(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = 6, F.gelu
            self.up_proj = nn.Parameter(torch.randn(6, 96, 64) / 8)
            self.down_proj = nn.Parameter(torch.randn(6, 64, 96) / 8)
            self.post_expert_norm = nn.LayerNorm(64)

        def forward(self, x, index, weights):
            out = torch.zeros_like(x)
            for t, k in torch.cartesian_prod(*(torch.arange(s) for s in index.shape)):
                e = index[t, k]
                y = F.linear(F.gelu(F.linear(x[t], self.up_proj[e])), self.down_proj[e])
                out[t] += self.post_expert_norm(y) * weights[t, k]
            return out

    config = transformers.PreTrainedConfig(experts_implementation="int4q")
    model = nn.ModuleDict({"experts": Plain(config)}).requires_grad_(False)
    quantize_(model, moe_config(SMALL))
    assert held(model) == {"experts.up_proj", "experts.down_proj"}
    got = model["experts"](*route())
    config._experts_implementation = "eager"
    assert_close(got, model["experts"](*route()))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["int4q", "grouped_mm", "batched_mm"])
def test_compiles_in_one_graph(implementation):
    """For any number of tokens: nothing looks at the data."""
    quantised, _ = experts_module()
    quantised.config._experts_implementation = implementation
    torch._dynamo.reset()
    compiled = torch.compile(quantised, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9):
        args = route(T)
        assert_close(compiled(*args), quantised(*args))


@pytest.mark.slow
def test_importing_int4q_leaves_transformers_alone():
    code = (
        "import sys, int4q; assert 'transformers' not in sys.modules;"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known;"
        "assert 'int4q' not in known;"
        "import int4q.integrations.transformers; assert 'int4q' in known"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- by way of transformers -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_from_pretrained_quantises_the_same(make, tmp_path):
    model = copy.deepcopy(trained_like(make))
    model.save_pretrained(tmp_path)
    config = transformers.TorchAoConfig(moe_config(SMALL))
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    quantize_(model, moe_config(SMALL))
    assert held(loaded) == held(model)
    for name in held(model):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name)), name
    assert torch.equal(logits(loaded), logits(model))


def test_by_exact_parameter_name():
    name = "model.layers.0.mlp.experts.down_proj"
    quantised, _ = pair(mixtral, FqnToConfig({name: SMALL}))
    assert held(quantised) == {name}
