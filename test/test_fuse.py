"""``prepare_for_inference_(fuse=True)``: linear layers of one activation, in one product."""

import copy
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
from int4q.prepare.source import calls_of_one_input

SMALL = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)


class Block(nn.Module):
    """Attention-like: three layers read ``x``, of different widths; two read ``y``."""

    def __init__(self, bias=False):
        super().__init__()
        self.q = nn.Linear(64, 96, bias=bias)
        self.k, self.v = nn.Linear(64, 32, bias=bias), nn.Linear(64, 32)
        self.gate, self.up = nn.Linear(96, 64, bias=False), nn.Linear(96, 64, bias=False)
        self.down = nn.Linear(64, 64)

    def forward(self, x):
        y = self.q(x) + torch.cat([self.k(x), self.v(x), self.v.bias.expand(*x.shape[:-1], -1)], -1)
        return self.down(F.silu(self.gate(y)) * self.up(y))


LAYOUTS = {
    "plain": Int4Tensor.from_hp,
    "float8": lambda w, g: Int4Tensor.from_hp(w, g, torch.float8_e4m3fn),
    "coalesced int8": CudaCoalescedInt4Tensor.from_hp,
    "coalesced W4A16": lambda w, g: CudaCoalescedInt4Tensor.from_hp(w, g, torch.bfloat16),
}


def model(kind="plain", bias=False, act_pre_scale=False, dtype=torch.bfloat16):
    m = nn.ModuleDict({"block": Block(bias), "other": nn.Linear(64, 64)}).to(dtype)
    scales = {K: torch.rand(K) + 0.5 for K in (64, 96)}
    for layer in m.modules():
        if isinstance(layer, nn.Linear):
            w = LAYOUTS[kind](layer.weight.detach(), [1, 32])
            w.act_pre_scale = scales[w.shape[1]] if act_pre_scale else None
            layer.weight = nn.Parameter(w, requires_grad=False)
    return m


def activation(*lead, dtype=torch.bfloat16):
    return torch.randn(*lead, 64).to(dtype)


@pytest.fixture
def products(monkeypatch):
    """Out features of each product that prepared layers make."""
    made = []
    for module in (int4q.prepare.fused, int4q.prepare.modules):
        linear = module.linear_along_groups

        def counted(x, w, bias=None, linear=linear):
            made.append(w.qdata.shape[0])
            return linear(x, w, bias)

        monkeypatch.setattr(module, "linear_along_groups", counted)
    return made


def close(a, b):
    return torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


# --- one product, the same results ----------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("act_pre_scale", [False, True], ids=["", "act_pre_scale"])
def test_one_product_for_layers_of_one_input(kind, bias, act_pre_scale, products):
    m = model(kind, bias, act_pre_scale)
    x = activation(2, 3)
    expected = m["block"](x)
    prepare_for_inference_(m, fuse=True)
    result = m["block"](x)
    assert products == [160, 128, 64]
    close(result, expected)
    with torch.inference_mode():
        close(m["block"](x.clone()), expected)
    assert products == 2 * [160, 128, 64]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_compiled(kind):
    m, x, graphs = prepare_for_inference_(model(kind), fuse=True)["block"], activation(3), []

    def backend(graph, inputs):
        graphs.append((graph, inputs))
        return graph

    torch._dynamo.reset()
    fast = torch.compile(m, backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(fast(x), m(x))
    ((graph, inputs),) = graphs
    ops = [n for n in graph.graph.nodes if "int4q.int4" in str(n.target)]
    assert len(ops) == 3
    assert not any(isinstance(t, int4q.tensor.base.Int4TensorBase) for t in inputs)
    (outputs,) = graph.graph.output_node().args
    assert len(outputs) == 1  # no share is handed on


@pytest.mark.slow
def test_inductor():
    m, x = prepare_for_inference_(model(dtype=torch.float32), fuse=True)["block"], activation(3)
    torch._dynamo.reset()
    fast = torch.compile(m, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x.float()), m(x.float()))


def test_memory_is_that_of_the_weights():
    m = model()
    before = sum(w.nbytes for w in weights(m))
    prepare_for_inference_(m, fuse=True)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for holder in (*weights(m), *(g.weight for g in groups(m["block"])))
        for t in holder.data_tensors().values()
    }
    assert sum(storages.values()) == before == sum(w.nbytes for w in weights(m))


def weights(m):
    return [layer.weight for layer in m.modules() if isinstance(layer, nn.Linear)]


def groups(block):
    return block._int4q_fused


def test_gradients_and_adapters():
    m, x = model(bias=True, dtype=torch.float32), activation(3, dtype=torch.float32)
    x.requires_grad_()
    right = torch.autograd.grad(m["block"](x).square().sum(), [x, m["block"].q.bias])
    prepare_for_inference_(m, fuse=True)
    got = torch.autograd.grad(m["block"](x).square().sum(), [x, m["block"].q.bias])
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


class GatedInPlace(Block):
    def forward(self, x):
        return F.silu(self.q(x), inplace=True).sum() + (self.k(x).mul_(2) * self.v(x)).sum()


def test_shares_changed_in_place():
    m, x = GatedInPlace(), activation(3, dtype=torch.float32).requires_grad_()
    quantize_(m, SMALL)
    right = torch.autograd.grad(m(x), x)
    prepare_for_inference_(m, fuse=True)
    torch.testing.assert_close(torch.autograd.grad(m(x), x), right)
    with torch.no_grad():
        torch.testing.assert_close(m(x), unprepare_(copy.deepcopy(m))(x))


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
def test_below_adapters(products):
    peft = pytest.importorskip("peft")
    m, x = model(dtype=torch.float32)["block"], activation(3, dtype=torch.float32)
    config = peft.LoraConfig(target_modules=["q", "v"], init_lora_weights=False)
    m = peft.get_peft_model(m, config)
    expected = m(x)
    prepare_for_inference_(m, fuse=True)
    torch.testing.assert_close(m(x), expected)
    assert products == [160, 128, 64]


# --- a share goes to who it is for ----------------------------------------------------------------


def test_layers_called_by_other_code_multiply_by_themselves(products):
    m, x = prepare_for_inference_(model(), fuse=True)["block"], activation(3)
    right = unprepare_(copy.deepcopy(m))
    for change in range(2):
        assert torch.equal(m.q(x), right.q(x)) and torch.equal(m.k(x), right.k(x))
        x += change
    assert products == 2 * [96, 32]
    assert torch.equal(m.v(activation(2)[:0]), right.v(activation(2)[:0]))


def test_an_input_of_its_own_is_multiplied():
    m, x = model(), activation(3)
    m["block"].k.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    expected = m["block"](x)
    prepare_for_inference_(m, fuse=True)
    close(m["block"](x), expected)


def test_an_error_leaves_nothing_behind():
    m = prepare_for_inference_(model(), fuse=True)["block"]
    with pytest.raises((RuntimeError, ValueError)):
        m(activation(3)[:, :32])
    hook = m.v.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        m(activation(3))
    hook.remove()
    assert all(not g.is_open and g._shares is None for g in groups(m))


class Rebinds(Block):
    def forward(self, x):
        q = self.q(x)
        x = x + 1
        return q, self.k(x), self.v(x)


class InPlace(Block):
    def forward(self, x):
        q = self.q(x)
        x.add_(1)
        return q, self.k(x), self.v(x)


class InPlaceAlias(Block):
    def forward(self, x):
        y = x.view(-1)
        q = self.q(x)
        y[0] = 1
        return q, self.k(x), self.v(x)


class Passed(Block):
    def forward(self, x):
        q = self.q(x)
        F.relu(x, inplace=True)
        return q, self.k(x), self.v(x)


class Conditional(Block):
    def forward(self, x, more=True):
        q = self.q(x)
        if more:
            return q, self.k(x), self.v(x)
        return q


class Twice(Block):
    def forward(self, x):
        return self.q(x), self.k(x), self.v(x), self.q(x)


KNOWN = {
    Block: (("q", "k", "v"), ("gate", "up")), Rebinds: (("k", "v"),), InPlace: (("k", "v"),),
    InPlaceAlias: (("k", "v"),), Passed: (("k", "v"),), Conditional: (("k", "v"),),
    Twice: (("k", "v"),), nn.Linear: (), nn.ReLU: (),
}  # fmt: skip


@pytest.mark.parametrize("cls", KNOWN, ids=lambda cls: cls.__name__)
def test_what_the_source_says(cls):
    assert calls_of_one_input(cls) == KNOWN[cls]


@pytest.mark.parametrize("cls", [Rebinds, InPlace, InPlaceAlias, Passed, Conditional, Twice])
def test_whatever_the_source_says_results_are_right(cls):
    m, x = cls().bfloat16(), activation(3)
    quantize_(m, SMALL)
    expected = m(x.clone())
    prepare_for_inference_(m, fuse=True)
    for a, b in zip(m(x.clone()), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("name", "known"),
    {
        "llama.modeling_llama.LlamaAttention": [("q_proj", "k_proj", "v_proj")],
        "llama.modeling_llama.LlamaMLP": [("gate_proj", "up_proj")],
        "qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention": [("q_proj", "k_proj", "v_proj")],
        "bert.modeling_bert.BertSelfAttention": [("query", "key", "value")],
        "t5.modeling_t5.T5Attention": [("k", "v")],  # q may read another sequence
    }.items(),
)
def test_architectures(name, known):
    module, cls = name.rsplit(".", 1)
    module = pytest.importorskip(f"transformers.models.{module}")
    assert list(calls_of_one_input(getattr(module, cls))) == known


# --- what stays apart -----------------------------------------------------------------------------


def packed(m):
    w = m["block"].k.weight.detach()
    m["block"].k.weight = nn.Parameter(CpuPackedInt4Tensor.from_int4_tensor(w), False)


def shared(m):
    m["block"].k.weight = m["block"].v.weight


def scaled(m):
    m["block"].k.weight.act_pre_scale = 2.0


def cast(m):
    m["block"].k.half()


def broadcast_bias(m):
    m["block"].v.bias = nn.Parameter(torch.zeros(3, 32).bfloat16())


APART = {
    "CPU-packed weights keep their shape": packed,
    "they share one weight": shared,
    "they differ in act_pre_scale": scaled,
    "they differ in dtype": cast,
    "a bias is not one number an out feature": broadcast_bias,
}


@pytest.mark.parametrize("reason", APART)
def test_what_stays_apart_is_named_and_works(reason, products):
    m, x = model(), activation(3)
    APART[reason](m)
    expected = m["block"](x)
    with pytest.warns(Int4SkipWarning, match=f"^block.q/k/v is not fused: {reason}"):
        prepare_for_inference_(m, fuse=True)
    assert len(groups(m["block"])) == 1
    close(m["block"](x), expected)
    assert products == [96, 32, 32, 128, 64]


def test_not_asked_for_nothing_is_fused():
    m = prepare_for_inference_(model())
    assert type(m["block"]) is Block and not hasattr(m["block"], "_int4q_fused")


# --- to its user the model is as before -----------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_state_and_back(kind):
    m, x = model(kind), activation(3)
    before, expected = m.state_dict(), m["block"](x)
    held = weights(m)
    prepare_for_inference_(m, fuse=True)
    assert all(a is b for a, b in zip(weights(m), held, strict=True))
    state = m.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert int4q.summary(m, show=False) == int4q.summary(unprepare_(copy.deepcopy(m)), show=False)
    unprepare_(m)
    assert type(m["block"]) is Block and not hasattr(m["block"].q, "_int4q_fused")
    assert torch.equal(m["block"](x), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_fused(assign, products):
    m, other, x = prepare_for_inference_(model(), fuse=True), model(), activation(3)
    m["block"](x)
    m.load_state_dict(other.state_dict(), assign=assign)
    products.clear()
    close(m["block"](x), other["block"](x))
    assert products == [160, 128, 64]


def test_cast_and_converted_weights_are_fused(products):
    m, x = prepare_for_inference_(model(), fuse=True), activation(3)
    expected = m["block"](x)
    m.float()
    close(m["block"](x.float()).bfloat16(), expected)
    int4q.to_coalesced_(m, torch.bfloat16)
    close(m["block"](x.float()).bfloat16(), expected)
    assert products == 3 * [160, 128, 64]


def test_an_assigned_weight_ends_a_group(products):
    m, x = prepare_for_inference_(model(), fuse=True)["block"], activation(3)
    m.k.weight = nn.Parameter(torch.zeros(32, 64).bfloat16())
    right = unprepare_(copy.deepcopy(m))
    products.clear()
    close(m(x), right(x))
    assert products == [96, 32, 128, 64]


def test_a_new_bias_counts(products):
    m, x = prepare_for_inference_(model(), fuse=True)["block"], activation(3)
    m.q.bias = nn.Parameter(torch.randn(96).bfloat16())
    close(m(x), unprepare_(copy.deepcopy(m))(x))
    assert products == [160, 128, 64]


def through_pickle(m):
    return pickle.loads(pickle.dumps(m))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_are_fused(copied, products):
    m, x = prepare_for_inference_(model(), fuse=True), activation(3)
    expected = m["block"](x)
    again = copied(m)
    assert torch.equal(again["block"](x), expected) and products == 2 * [160, 128, 64]
    assert groups(again["block"])[0].layers[0] is again["block"].q
    assert again["block"].q.weight is not m["block"].q.weight
    alone = copied(m["block"].q)
    assert alone._int4q_fused is None and torch.equal(alone(x), m["block"].q(x))


def test_saved_and_loaded(tmp_path):
    m = prepare_for_inference_(model(), fuse=True)
    torch.save(m.state_dict(), tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    other = model()
    other.load_state_dict(state)
    x = activation(3)
    assert torch.equal(other["block"](x), unprepare_(m)["block"](x))


@pytest.mark.slow
def test_a_transformers_model_is_saved_as_before(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=96, intermediate_size=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hp")
    m = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hp", quantization_config=transformers.TorchAoConfig(SMALL)
    )
    ids = torch.arange(6).view(1, 6)
    expected = m(ids).logits
    prepare_for_inference_(m, fuse=True)
    assert type(m.model.layers[1].mlp).__name__ == "FusingLlamaMLP"
    torch.testing.assert_close(m(ids).logits, expected)
    m.save_pretrained(tmp_path / "fused")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert all(map(torch.equal, weights(again), weights(m)))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("kind", ["plain", "coalesced int8"])
def test_on_a_gpu(kind, products):
    m, x = model(kind, bias=True), activation(1)
    m.cuda()
    with torch.no_grad():
        for M in (1, 8, 200):
            x = activation(M).cuda()
            expected = unprepare_(m)["block"](x)
            close(prepare_for_inference_(m, fuse=True)["block"](x), expected)
        assert products == 3 * [160, 128, 64]
        torch._dynamo.reset()
        fast = torch.compile(m["block"], mode="reduce-overhead", fullgraph=True)
        x = activation(1).cuda()
        for _ in range(4):
            close(fast(x), m["block"](x))
