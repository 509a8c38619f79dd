"""What ``quantize_`` takes, what it leaves alone and says so; ties, training, adapters."""

import copy
import io
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torchao.quantization
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

import int4q
from int4q import Int4SkipWarning, Int4Tensor, Int4WeightOnlyConfig, quantize_
from int4q.config import FORMATS
from int4q.tensor.base import Int4TensorBase

SMALL = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)
COMPUTED = "computed from other parameters"
RECURRENT = "torch's recurrent kernels read the bytes"
NOT_LINEAR = "not the weight of a linear layer"
TRAINED = "in training, unlike the frozen weights"
ADAPTER = "an adapter's; merge the adapter first"


def linear_pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def held(model: nn.Module) -> set[str]:
    named = model.named_parameters(remove_duplicate=False)
    return {n for n, p in named if isinstance(p, Int4TensorBase)}


def quantized(model: nn.Module, *arguments) -> list[str]:
    """Quantise in place; the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Int4SkipWarning)
        quantize_(model, *(arguments or (SMALL,)))
    return [str(w.message) for w in caught if w.category is Int4SkipWarning]


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with plain weights of the same values."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, p in module._parameters.items():
            if isinstance(p, Int4TensorBase):
                module._parameters[name] = nn.Parameter(p.dequantize())
    return plain


def assert_close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, error


# --- what is taken and what is left ---------------------------------------------------------------


class Custom(nn.Module):
    """Parameters that no class names: a matrix, a stack, vectors in two dims, a bias a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 64))
        self.token = nn.Parameter(torch.randn(1, 1, 64))
        self.head_bias = nn.Parameter(torch.randn(4, 16))
        self.indices = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)
        self.up = nn.Linear(64, 32)


def pruned() -> nn.Module:
    layer = nn.Linear(64, 64)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


class Upper(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


def parametrized() -> nn.Module:
    layer = nn.Linear(64, 64)
    parametrize.register_parametrization(layer, "weight", Upper())
    return layer


def old(norm: Callable) -> Callable[[], nn.Module]:
    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(nn.Linear(64, 64))

    return make


@dataclass
class Case:
    """A layer at name ``0``: the weights that become 4-bit, and those left with their reason."""

    make: Callable[[], nn.Module]
    taken: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)


CASES = {
    "linear": Case(lambda: nn.Linear(64, 32), {"0.weight"}),
    "one output": Case(lambda: nn.Linear(64, 1), {"0.weight"}),
    "ragged": Case(lambda: nn.Linear(50, 8), left={"0.weight": "K = 50 is not a multiple"}),
    "attention": Case(
        lambda: nn.MultiheadAttention(64, 4), {"0.in_proj_weight", "0.out_proj.weight"}
    ),
    "cross attention": Case(
        lambda: nn.MultiheadAttention(64, 4, kdim=96, vdim=40),
        {"0.q_proj_weight", "0.k_proj_weight", "0.out_proj.weight"},
        {"0.v_proj_weight": "K = 40 is not a multiple of group_size 32"},
    ),
    "lstm": Case(
        lambda: nn.LSTM(64, 64),
        left={"0.weight_ih_l0": RECURRENT, "0.weight_hh_l0": RECURRENT},
    ),
    "gru cell": Case(
        lambda: nn.GRUCell(64, 64), left={"0.weight_ih": RECURRENT, "0.weight_hh": RECURRENT}
    ),
    "embedding": Case(lambda: nn.Embedding(9, 64), left={"0.weight": NOT_LINEAR}),
    "conv1d": Case(lambda: nn.Conv1d(64, 64, 32), left={"0.weight": NOT_LINEAR}),
    "conv2d": Case(lambda: nn.Conv2d(64, 64, 3), left={"0.weight": NOT_LINEAR}),
    "bilinear": Case(lambda: nn.Bilinear(64, 64, 8), left={"0.weight": NOT_LINEAR}),
    "custom": Case(Custom, {"0.up.weight"}, {"0.table": NOT_LINEAR}),
    "norms": Case(lambda: nn.Sequential(nn.LayerNorm(64), nn.BatchNorm1d(64))),
    "parametrization": Case(parametrized, left={"0.weight": COMPUTED}),
    "orthogonal": Case(
        lambda: parametrizations.orthogonal(nn.Linear(64, 64)), left={"0.weight": COMPUTED}
    ),
    "weight_norm": Case(
        lambda: parametrizations.weight_norm(nn.Linear(64, 64)), left={"0.weight": COMPUTED}
    ),
    "spectral_norm": Case(
        lambda: parametrizations.spectral_norm(nn.Linear(64, 64)), left={"0.weight": COMPUTED}
    ),
    "old weight_norm": Case(old(nn.utils.weight_norm), left={"0.weight": COMPUTED}),
    "old spectral_norm": Case(old(nn.utils.spectral_norm), left={"0.weight": COMPUTED}),
    "pruning": Case(pruned, left={"0.weight": COMPUTED}),
    "pruned projection": Case(
        lambda: prune.l1_unstructured(nn.MultiheadAttention(64, 4), "in_proj_weight", 0.5),
        {"0.out_proj.weight"},
        {"0.in_proj_weight": COMPUTED},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_weight_is_taken_or_named(name):
    case = CASES[name]
    model = nn.Sequential(case.make(), nn.Linear(64, 64)).eval()
    messages = quantized(model)
    assert held(model) == case.taken | {"1.weight"}
    for left, reason in case.left.items():
        assert any(left in m and "left alone" in m and reason in m for m in messages)
    assert len(messages) == len(set(case.left.values()))  # one a cause
    summary = int4q.summary(model, show=False)
    assert {w.name for w in summary.quantized} == held(model)
    reasons = {w.name: w.reason for w in summary.skipped}
    assert case.left.keys() <= reasons.keys()
    assert all(reason in reasons[left] for left, reason in case.left.items())
    others = reasons.keys() - case.left.keys()  # what a computed weight is made of
    assert all(reasons[other] == "a weight is computed from it" for other in others)


LAYERS = ("parametrization", "weight_norm", "spectral_norm", "old weight_norm",
          "old spectral_norm", "pruning", "lstm", "conv1d", "gru cell")  # fmt: skip


@pytest.mark.parametrize("how", ["filter", "torchao's filter", "name"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_explicit_choice_of_what_cannot_be_is_named_too(name, how):
    model = nn.Sequential(CASES[name].make()).eval()
    x = torch.randn(2, 64, 40) if name == "conv1d" else torch.randn(3, 64)
    expected = model(x)
    target = type(model[0])
    with pytest.warns(Int4SkipWarning) as caught:
        if how == "filter":
            quantize_(model, SMALL, lambda m, _: isinstance(m, target))
        elif how == "torchao's filter":
            torchao.quantization.quantize_(model, SMALL, lambda m, _: isinstance(m, target))
        else:
            quantize_(model, FqnToConfig({r"re:0\.weight\w*": SMALL, "0": SMALL}))
    reason = {"lstm": RECURRENT, "gru cell": RECURRENT, "conv1d": "a convolution"}
    assert all(reason.get(name, COMPUTED) in str(w.message) for w in caught)
    assert not held(model)
    got = model(x)
    first = (t[0] if isinstance(t, tuple) else t for t in (got, expected))
    assert torch.equal(*first)


def test_computed_weights_have_no_memory_and_no_ties():
    """Each is made when it is asked for, perhaps where the one before has been."""
    model = nn.Sequential(*(parametrized() for _ in range(5)))
    quantized(model)
    summary = int4q.summary(model, show=False)
    assert all(w.tied_to is None for w in summary.skipped) and len(summary.skipped) == 10
    assert summary.bytes_before == sum(4 * p.numel() for p in model.parameters())


def test_many_weights_of_one_cause_make_one_line():
    blocks = [nn.ModuleDict({"a": nn.Linear(50, 8), "b": nn.Linear(50, 8)}) for _ in range(12)]
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks), "x2": nn.Linear(50, 8)})
    (message,) = quantized(model)
    assert message == (
        "layers.*.a.weight (12), layers.*.b.weight (12), x2.weight are left alone: "
        "K = 50 is not a multiple of group_size 32"
    )


def test_a_shared_module_is_taken_once_and_silently():
    layer = nn.Linear(64, 64)
    for filter_fn in (None, lambda m, _: isinstance(m, nn.Linear)):
        layer = nn.Linear(64, 64)
        model = nn.Sequential(layer, nn.ReLU(), layer)
        assert not quantized(model, SMALL, filter_fn)
        assert isinstance(layer.weight, Int4Tensor)


def test_other_configs_are_told_what_they_do_not_take():
    model = nn.Sequential(nn.Linear(64, 64), nn.MultiheadAttention(64, 4))
    (message,) = quantized(model, Int8WeightOnlyConfig())
    assert message == ("1.in_proj_weight is left alone: Int8WeightOnlyConfig takes nn.Linear only")
    assert type(model[0].weight) is not nn.Parameter
    assert type(model[1].out_proj.weight) is not nn.Parameter


def test_device_moves_everything():
    model = nn.Sequential(nn.Linear(64, 32, device="meta"), nn.LayerNorm(32))
    quantize_(model, SMALL, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"} and held(model) == {"0.weight"}


# --- ties -----------------------------------------------------------------------------------------


CHOICES = {
    "default": lambda: (SMALL,),
    "filter": lambda: (SMALL, lambda m, _: isinstance(m, nn.Linear)),
    "names": lambda: (FqnToConfig({r"re:\d\.weight": SMALL}),),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", ["plain", "cuda_coalesced", "cpu_packed"])
def test_tied_linears_stay_tied(choice, layout):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    model[2].weight = model[0].weight
    config = Int4WeightOnlyConfig(32, False, layout)
    arguments = CHOICES[choice]()
    if choice == "names":
        arguments[0].fqn_to_config[r"re:\d\.weight"] = config
    else:
        arguments = (config, *arguments[1:])
    assert not quantized(model, *arguments)
    assert model[0].weight is model[2].weight and isinstance(model[0].weight, Int4TensorBase)
    assert model[1].weight is not model[0].weight and len(list(model.parameters())) == 2
    state = model.state_dict()
    assert state["0.weight"].data_ptr() == state["2.weight"].data_ptr()
    summary = int4q.summary(model, show=False)
    assert [w.tied_to for w in summary.quantized] == [None, None, "0.weight"]
    console = Console(record=True, width=200, file=io.StringIO())
    int4q.summary(model, console=console)
    text = console.export_text()
    assert "2 weights in 4 bits" in text and "2.weight (tied to 0.weight)" in text
    assert summary.bytes_before == 2 * 64 * 64 * 4
    assert summary.bytes_after == sum(p.nbytes for p in model.parameters())
    assert copy.deepcopy(model)[0].weight is not model[0].weight
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 64)
    assert torch.equal(other(x), model(x))


class Tied(nn.Module):
    """One weight at a Linear and somewhere else."""

    def __init__(self, other):
        super().__init__()
        self.first, self.other = nn.Linear(64, 64, bias=False), other
        self.other.weight = self.first.weight


def conv1d(out, in_):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(out, in_)
    nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("make,reason", [
    (lambda: nn.Embedding(64, 64), "tied to the embedding 'other'"),
    (lambda: conv1d(64, 64), "tied to 'other'"),
])  # fmt: skip
def test_what_is_tied_to_another_kind_of_layer_stays(make, reason):
    """Quantising one end would untie it; along another dim it would be another weight."""
    model = Tied(make())
    messages = quantized(model)
    assert any("first.weight" in m and reason in m for m in messages)
    assert not held(model) and model.first.weight is model.other.weight
    listed = {w.name: w.tied_to for w in int4q.summary(model, show=False).skipped}
    assert listed == {"first.weight": None, "other.weight": "first.weight"}


def test_a_filter_that_takes_one_end_is_told_that_it_unties():
    model = Tied(nn.Embedding(64, 64))
    (message,) = quantized(model, SMALL, lambda m, name: name == "first")
    assert message == (
        "other.weight is left alone: tied to first.weight, which was chosen alone: "
        "they are two weights now"
    )
    assert held(model) == {"first.weight"}
    reasons = {w.name: w.reason for w in int4q.summary(model, show=False).skipped}
    assert "tied to first.weight" in reasons["other.weight"]


def test_no_original_is_kept_alive():
    """The memory of one weight is free before the next is quantised."""
    model = linear_pair()
    alive = []

    references = [weakref.ref(p) for p in (model[0].weight, model[1].weight)]
    quantise = int4q.config.quantize_tensor

    def watched(*arguments):
        alive.append([r() is not None for r in references])
        return quantise(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("int4q.config.quantize_tensor", watched)
        quantize_(model, SMALL)
    assert alive == [[True, True], [False, True]]


# --- training and adapters ------------------------------------------------------------------------


class Lora(nn.Module):
    """A frozen layer and two small trained ones, under names that may say so or not."""

    def __init__(self, a="lora_A", b="lora_B"):
        super().__init__()
        self.base = nn.Linear(64, 64).requires_grad_(False)
        setattr(self, a, nn.Linear(64, 32, bias=False))
        setattr(self, b, nn.Linear(32, 64, bias=False))
        self.names = a, b

    def forward(self, x):
        a, b = (getattr(self, name) for name in self.names)
        return self.base(x) + b(a(x))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("a,b,frozen,reason", [
    ("lora_A", "lora_B", False, ADAPTER),
    ("lora_A", "lora_B", True, ADAPTER),
    ("lora_a", "lora_b", True, ADAPTER),
    ("down", "up", False, TRAINED),
])  # fmt: skip
def test_trained_weights_and_adapters_stay(choice, a, b, frozen, reason):
    model = nn.Sequential(Lora(a, b), nn.Linear(64, 64).requires_grad_(False))
    if frozen:
        model.requires_grad_(False)
    arguments = CHOICES[choice]()
    if choice == "names":
        arguments = (FqnToConfig({r"re:.*\.weight": SMALL}),)
    (message,) = quantized(model, *arguments)
    assert message.startswith(f"0.{a}.weight, 0.{b}.weight are left alone: {reason}")
    assert held(model) == {"0.base.weight", "1.weight"}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == (set() if frozen else {f"0.{a}.weight", f"0.{b}.weight"})
    if not frozen:
        model(torch.randn(3, 64)).sum().backward()
        assert all(getattr(model[0], name).weight.grad is not None for name in (a, b))


def test_a_new_model_is_not_in_training():
    """All trainable, all frozen, or with something else frozen: every linear layer is taken."""
    for change in (
        lambda m: m,
        lambda m: m.requires_grad_(False),
        lambda m: m[2].requires_grad_(False),  # (a fixed table of positions)
    ):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Embedding(9, 64))
        change(model)
        quantized(model)
        assert held(model) == {"0.weight", "1.weight"}
    model = linear_pair()
    quantize_(model, SMALL, lambda m, name: name == "0")
    assert len(quantized(model)) == 1 and held(model) == {"0.weight", "1.weight"}


ADAPTERS = {
    "LoraConfig": dict(r=32, target_modules=["a", "e"]),
    "DoRA": dict(r=32, target_modules=["a"], use_dora=True),
    "AdaLoraConfig": dict(init_r=32, target_modules=["a"], total_step=10),
    "LoHaConfig": dict(r=32, target_modules=["a"]),
    "LoKrConfig": dict(r=32, target_modules=["a"]),
    "OFTConfig": dict(oft_block_size=32, target_modules=["a"]),
    "IA3Config": dict(target_modules=["a"], feedforward_modules=[]),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_peft(name, trained):
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a, self.b = nn.Embedding(9, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, ids):
            return self.b(self.a(self.e(ids)))

    config = peft.LoraConfig if name == "DoRA" else getattr(peft, name)
    model = peft.get_peft_model(Model(), config(**ADAPTERS[name]))
    if not trained:
        model.requires_grad_(False)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    quantized(model)
    base = "base_model.model"
    assert held(model) == {f"{base}.a.base_layer.weight", f"{base}.b.weight"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    if trained and name != "DoRA":  # (which takes the norm of the base weight by itself)
        model(torch.tensor([[1, 2]])).sum().backward()


# --- attention ------------------------------------------------------------------------------------


ATTENTIONS = {
    "plain": {},
    "batch_first": dict(batch_first=True),
    "no bias": dict(bias=False, batch_first=True),
    "kdim, vdim": dict(kdim=96, vdim=32),
    "bias_k, bias_v": dict(add_bias_kv=True, add_zero_attn=True),
    "bfloat16": dict(dtype=torch.bfloat16, batch_first=True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", ["plain", "cuda_coalesced", "cpu_packed"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_multihead_attention(name, layout, context, training):
    options = ATTENTIONS[name]
    dtype = options.get("dtype", torch.float32)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # bf16: rounded after each of 4 products
    model = nn.MultiheadAttention(64, 4, **options).train(training)
    config = Int4WeightOnlyConfig(32, False, layout, activation_dtype=torch.bfloat16)
    messages = quantized(model, config)
    assert len(held(model)) == (4 if "kdim" in options else 2)
    if layout == "cpu_packed" and "kdim" not in options:  # it cannot be sliced
        assert "in_proj_weight is held in the plain layout, not cpu_packed" in messages[0]
    assert type(model.out_proj.weight) is FORMATS[layout]
    plain = dequantized(model)
    x = torch.randn(5, 3, 64, dtype=dtype)
    key = torch.randn(5, 3, options.get("kdim", 64), dtype=dtype)
    value = torch.randn(5, 3, options.get("vdim", 64), dtype=dtype)
    inputs = [(x, key, value), (x[0], key[0], value[0])]
    if "kdim" not in options:
        inputs += [(x, x, x), (x, key, key)]
    for arguments in inputs:
        for kwargs in (
            dict(),
            dict(need_weights=False),
            dict(average_attn_weights=False),
        ):
            with context():
                got, weights = model(*arguments, **kwargs)
                expected, expected_weights = plain(*arguments, **kwargs)
            assert_close(got, expected, tolerance)
            assert (weights is None) == (expected_weights is None)
            if weights is not None:
                assert_close(weights, expected_weights, tolerance)


def test_attention_passes_gradients_and_compiles():
    model = nn.MultiheadAttention(64, 4, batch_first=True)
    quantize_(model, SMALL)
    plain = dequantized(model)
    grads = []
    for m in (model, plain):
        x = torch.linspace(-1, 1, 2 * 5 * 64).view(2, 5, 64).requires_grad_()
        m(x, x, x)[0].square().sum().backward()
        grads += [x.grad, m.in_proj_bias.grad]
    assert_close(grads[0], grads[2])
    assert_close(grads[1], grads[3])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        assert_close(compiled(x, x, x)[0], plain(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_transformer_encoder(context):
    """Its fast paths read raw weights: they step aside for 4-bit ones."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    quantize_(model, SMALL)
    assert len(held(model)) == 2 * 4
    plain = dequantized(model)
    x, padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    with context():
        assert_close(model(x), plain(x))
        assert_close(model(x, mask=causal, is_causal=True), plain(x, mask=causal, is_causal=True))
        got = model(x, src_key_padding_mask=padding)
        assert_close(got[~padding], plain(x, src_key_padding_mask=padding)[~padding])


# --- transformers' Conv1D -------------------------------------------------------------------------


@pytest.mark.parametrize("layout,cls", [
    ("plain", Int4Tensor), ("cuda_coalesced", int4q.CudaCoalescedInt4Tensor), ("auto", Int4Tensor),
])  # fmt: skip
def test_conv1d_is_quantised_along_its_input(layout, cls):
    model = nn.Sequential(conv1d(96, 64))
    original = model[0].weight.detach().clone()
    config = Int4WeightOnlyConfig(
        32, False, layout, activation_dtype=torch.bfloat16 if layout != "auto" else None
    )
    assert not quantized(model, config)
    w = model[0].weight
    assert type(w) is cls and w.shape == (64, 96) and w.block_size == [32, 1]
    by_hand = cls.from_hp(original.t(), [1, 32], torch.bfloat16)
    assert torch.equal(w.t(), by_hand)
    x = torch.randn(2, 3, 64)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert_close(model(x), dequantized(model)(x))


def test_gpt2_is_quantised_whole():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    messages = quantized(model)
    assert held(model) == {
        f"transformer.h.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert len(messages) == 2  # the tables, and the head that is tied to one
    assert any("lm_head.weight is left alone: tied to the embedding" in m for m in messages)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert_close(model(ids).logits, dequantized(model)(ids).logits)


# --- process-wide settings ------------------------------------------------------------------------


@pytest.mark.parametrize("set_inductor_config", [True, False])
def test_inductors_options_are_set_where_asked_for_and_nothing_else_is(
    monkeypatch, set_inductor_config
):
    inductor = torch._inductor.config

    def recommended():  # what torchao 0.17 does
        inductor.coordinate_descent_tuning = True
        torch.set_float32_matmul_precision("high")

    monkeypatch.setattr("int4q.config.recommended_inductor_config_setter", recommended)
    before = torch.get_float32_matmul_precision()
    model = nn.Sequential(nn.Linear(64, 64))
    with inductor.patch(coordinate_descent_tuning=False):
        quantize_(model, Int4WeightOnlyConfig(32, set_inductor_config))
        assert inductor.coordinate_descent_tuning == set_inductor_config
    assert torch.get_float32_matmul_precision() == before == "highest"
