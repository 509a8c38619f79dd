"""What ``calibrate`` gathers, against the inputs themselves."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int4q
from int4q import Calibration, CalibrationWarning, calibrate
from int4q.calibration import MIN_TOKENS
from int4q.calibration.data import random_ids
from int4q.coverage import contracted_dim, expert_parameters, linear_parameters

K, N, E = 32, 16, 4


class Block(nn.Module):
    """q and k share an input; o has another; the last layer is never called."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, N)
        self.never = nn.Linear(K, K)

    def forward(self, x):
        self.seen = x, torch.tanh(self.q(x) * self.k(x))
        return self.o(self.seen[1])


def batches(n=3):
    return [torch.randn(2, 5, K) * torch.linspace(0, 2, K) for _ in range(n)]


def second(x):
    x = x.flatten(0, -2).double()
    return (x.T @ x / len(x)).float()


def test_moments_of_linear_layers():
    model, data = Block(), batches()
    seen = []
    for x in data:
        model(x)
        seen.append(model.seen)
    calibration = calibrate(model, data, statistics="hessian")
    assert list(calibration) == ["q.weight", "k.weight", "o.weight"]
    for name, x in zip(("q", "o"), map(torch.cat, zip(*seen, strict=True)), strict=True):
        moments = calibration[f"{name}.weight"]
        torch.testing.assert_close(moments.hessian, second(x))
        torch.testing.assert_close(moments.mean_square, second(x).diagonal())
        assert moments.tokens == 30
    assert calibration["q.weight"] is calibration["k.weight"]
    assert calibration["q.weight"].dead == 1  # (linspace begins with 0)
    assert calibration.has_hessians and "1 inputs that were always 0" in repr(calibration)
    alone = calibrate(model, data)
    torch.testing.assert_close(alone["o.weight"].mean_square, moments.mean_square)
    assert not alone.has_hessians


def test_a_layer_that_shares_an_input_at_times():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(K, N), nn.Linear(K, N), 0

        def forward(self, x):
            self.calls += 1
            y = x if self.calls == 1 else x * 2
            self.a(x)
            x.mul_(1) if self.calls == 3 else None
            return self.b(y)

    data = batches()
    calibration = calibrate(Switch(), [x.clone() for x in data])
    x = torch.cat(data)
    torch.testing.assert_close(calibration["a.weight"].mean_square, second(x).diagonal())
    y = torch.cat([data[0], *(2 * t for t in data[1:])])
    torch.testing.assert_close(calibration["b.weight"].mean_square, second(y).diagonal())


def test_tied_weights_count_together():
    model = nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, K))
    model[2].weight = model[0].weight
    (x,) = batches(1)
    inputs = torch.cat([x, torch.tanh(model[0](x))]).detach()
    calibration = calibrate(model, [x])
    assert calibration["0.weight"] is calibration["2.weight"]
    torch.testing.assert_close(calibration["2.weight"].mean_square, second(inputs).diagonal())


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail):
    model = nn.Sequential(Block(), nn.Dropout(0.5)).train()
    model[0].o.eval()
    before = [(m.training, dict(m._forward_pre_hooks)) for m in model.modules()]
    data = [torch.randn(3, K + fail)]
    grad = torch.is_grad_enabled()
    if fail:
        with pytest.raises(RuntimeError):
            calibrate(model, data)
    else:
        calibrate(model, data)
    assert [(m.training, dict(m._forward_pre_hooks)) for m in model.modules()] == before
    assert torch.is_grad_enabled() == grad and model[0].q.weight.requires_grad
    assert model[0].q.weight.grad is None


def test_multihead_attention():
    model = nn.MultiheadAttention(K, 4, batch_first=True)
    (x,) = batches(1)
    calibration = calibrate(model, [(x, x, x)])
    torch.testing.assert_close(
        calibration["in_proj_weight"].mean_square, second(x).diagonal(), rtol=1e-5, atol=1e-6
    )
    assert "out_proj.weight" in calibration and torch.backends.mha.get_fastpath_enabled()


class Experts(nn.Module):
    """A stack ``[E, N, K]``, tokens sent to experts by their first entry."""

    def __init__(self, way):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, N, K))
        self.way = way

    def forward(self, x):
        expert = x[:, 0].long()
        if self.way == "linear":
            for e in expert.unique():
                F.linear(x[expert == e], self.w1[e])
        elif self.way == "matmul":
            for e in range(E):
                x[expert == e] @ self.w1.mT[e]
        elif self.way == "bmm":
            torch.bmm(x * (expert == torch.arange(E)[:, None])[..., None], self.w1.mT)
        else:
            order = expert.argsort()
            offs = torch.bincount(expert, minlength=E).cumsum(0).int()
            torch._grouped_mm(x[order].bfloat16(), self.w1.bfloat16().mT, offs=offs)
        return x


def routed(counts):
    x = torch.randn(sum(counts), K)
    x[:, 0] = torch.repeat_interleave(torch.arange(E), torch.tensor(counts)).float()
    return x[torch.randperm(len(x))]


@pytest.mark.parametrize("way", ["linear", "matmul", "bmm", "grouped"])
def test_experts_by_their_own_tokens(way):
    model, counts = Experts(way), [40, MIN_TOKENS, MIN_TOKENS - 1, 0]
    if way == "grouped":
        model.bfloat16()
    x = routed(counts)
    x = x.bfloat16().float()
    with pytest.warns(CalibrationWarning, match=r"w1 \(2\)"):
        moments = calibrate(model, [x], statistics="hessian")["w1"]
    assert moments.tokens.tolist() == counts
    for e in range(E):
        own = x[x[:, 0] == e] if counts[e] >= MIN_TOKENS else x
        torch.testing.assert_close(moments.hessian[e], second(own), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            moments.mean_square[e], second(own).diagonal(), rtol=1e-4, atol=1e-5
        )


def test_a_transformers_mixture():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, vocab_size=50,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = model.config._experts_implementation
    calibration = calibrate(model, statistics="hessian")
    assert model.config._experts_implementation == before
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1 and "norm" not in n}
    left = {n for n in matrices - set(calibration) if "embed" not in n and "gate.weight" not in n}
    assert not left
    for layer in range(2):
        moments = calibration[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        assert moments.tokens.sum() == 2 * 4 * 512 and moments.mean_square.shape == (3, 32)
        down = calibration[f"model.layers.{layer}.mlp.experts.down_proj"]
        assert torch.equal(down.tokens, moments.tokens) and down.hessian.shape == (3, 64, 64)


TINY = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
EXPERTS = dict(num_key_value_heads=2, head_dim=16, intermediate_size=96, num_local_experts=4)
FAMILIES = {
    "GPT2LMHeadModel": dict(n_embd=64, n_layer=1, n_head=4, vocab_size=99, bos_token_id=1,
                            eos_token_id=1),
    "GptOssForCausalLM": dict(**TINY, **EXPERTS, num_experts_per_tok=2),
    "Llama4ForCausalLM": dict(**TINY, **EXPERTS, intermediate_size_mlp=64, pad_token_id=0),
    "T5ForConditionalGeneration": dict(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=1,
                                       num_heads=4),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_a_family_is_reached(name):
    """Conv1D, experts [E, in, out], experts given zeros for what is not theirs, a decoder."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**FAMILIES[name])).eval()
    calibration = calibrate(model)
    for prefix, module in model.named_modules():
        for own in (*linear_parameters(module), *expert_parameters(module)):
            w, moments = getattr(module, own), calibration[f"{prefix}.{own}"]
            assert moments.mean_square.shape[-1] == w.shape[contracted_dim(module, w)]
            per_token = 2 if "Oss" in name and w.ndim == 3 else 1
            assert moments.tokens.sum() == 4 * 512 * per_token


def test_random_ids():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=40, max_position_embeddings=100, bos_token_id=3, eos_token_id=[5, 7],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = random_ids(model)
    assert ids.shape == (4, 100) and ids.dtype == torch.int64
    assert set(ids.flatten().tolist()) == set(range(40)) - {3, 5, 7}
    assert torch.equal(ids, random_ids(model))
    a, b = calibrate(model), calibrate(model, ids.int())
    for name in a:
        assert torch.equal(a[name].mean_square, b[name].mean_square)
    assert a["model.layers.0.mlp.up_proj.weight"].tokens == 400
    assert calibrate(model, ids, tokens=150)["lm_head.weight"].tokens == 200
    keywords = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    c = calibrate(model, keywords)["lm_head.weight"].mean_square
    torch.testing.assert_close(c, a["lm_head.weight"].mean_square)
    keywords[0]["attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="no padding"):
        calibrate(model, keywords)


@pytest.mark.parametrize(
    "data,error,message",
    [
        (None, ValueError, "without data the model must be .* Pass data="),
        (torch.randn(4, K), TypeError, r"token ids \[n, T\]"),
        (torch.ones(4, dtype=torch.int64), TypeError, r"token ids \[n, T\]"),
        ("some text", TypeError, "iterable of batches, got str"),
        (7, TypeError, "iterable of batches, got int"),
        (["some text"], TypeError, "a batch must be a tensor, a tuple or a mapping"),
        ([], ValueError, "one batch at least"),
        ([torch.full((2, K), float("nan"))], ValueError, r"finite, got NaN or Inf in \['q.weight'"),
    ],
)
def test_data_that_does_not_do(data, error, message):
    with pytest.raises(error, match=message):
        calibrate(Block(), data)


def test_other_arguments_that_do_not_do():
    with pytest.raises(TypeError, match="torch.nn.Module"):
        calibrate("model")
    with pytest.raises(ValueError, match="statistics must be one of"):
        calibrate(Block(), batches(), statistics="fisher")


def test_save_and_load(tmp_path):
    calibration = calibrate(Block(), batches(), statistics="hessian")
    calibration.save(tmp_path / "c.pt")
    read = Calibration.load(tmp_path / "c.pt")
    assert list(read) == list(calibration)
    for name, moments in calibration.items():
        for field, value in vars(moments).items():
            assert torch.equal(getattr(read[name], field), value)
    q, k = read["q.weight"], read["k.weight"]
    assert q.hessian.data_ptr() == k.hessian.data_ptr()  # written once
    torch.save([1], tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must hold a calibration"):
        Calibration.load(tmp_path / "other.pt")


def test_no_warning_without_rare_experts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(Experts("linear"), [routed([MIN_TOKENS] * E)])
    assert int4q.calibrate is calibrate
