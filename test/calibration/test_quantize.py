"""``quantize_`` with what a calibration knows, the algorithms of the config, smaller groups."""

import json
import warnings

import pytest
import torch
import torchao.quantization
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig

import int4q
from int4q import (
    Calibration,
    CudaCoalescedInt4Tensor,
    Int4SkipWarning,
    Int4Tensor,
    Int4WeightOnlyConfig,
    calibrate,
    gptq,
    qparams,
    quantize_,
)

K, N = 64, 32


def config(algorithm="search", **kwargs):
    return Int4WeightOnlyConfig(
        int4_choose_qparams_algorithm=algorithm,
        set_inductor_config=False,
        **{"group_size": 32, **kwargs},
    )


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, N)).to(dtype)


def data():
    return [torch.randn(256, K) * torch.logspace(-2, 1, K)]


def same(t, parts):
    qdata, scale, zero_point = parts[:3]
    plain = t.to_int4_tensor()
    assert torch.equal(plain.qdata, qdata)
    assert torch.equal(plain.scale, scale.mT) and torch.equal(plain.zero_point, zero_point.mT)


@pytest.mark.parametrize("fmt", ["plain", "cuda_coalesced", "auto"])
@pytest.mark.parametrize("algorithm", ["search", "gptq", "auto"])
def test_weights_are_those_of_the_algorithm(algorithm, fmt):
    model, before = two_layers(), two_layers()
    calibration = calibrate(model, data(), statistics="hessian")
    quantize_(model, config(algorithm, int4_packing_format=fmt), calibration=calibration)
    for i in (0, 2):
        w, moments = before[i].weight.detach(), calibration[f"{i}.weight"]
        if algorithm == "gptq":
            parts = gptq.quantize(w, 32, moments.hessian, moments.tokens)
        else:
            parts = qparams.quantize(w, 32, "search", moments.mean_square)
        same(model[i].weight, parts)
    layout = CudaCoalescedInt4Tensor if fmt == "cuda_coalesced" else Int4Tensor
    assert fmt == "auto" or type(model[0].weight) is layout


def test_activation_dtype_is_kept():
    model = two_layers(torch.bfloat16)
    settings = dict(int4_packing_format="cuda_coalesced", activation_dtype=torch.bfloat16)
    quantize_(model, config(**settings))
    assert model[0].weight.activation_dtype == torch.bfloat16


@pytest.mark.parametrize("group_size,alone", [(32, "search"), (64, "refit")])
def test_without_a_calibration(group_size, alone):
    for algorithm, expected in (("search", "search"), ("auto", alone)):
        for quantize in (quantize_, torchao.quantization.quantize_):
            model = two_layers()
            w = model[0].weight.detach().clone()
            quantize(model, config(algorithm, group_size=group_size))
            same(model[0].weight, qparams.quantize(w, group_size, expected))


def test_existing_algorithms_are_untouched():
    for algorithm in ("tinygemm", "hqq"):
        model = two_layers()
        w = model[0].weight.detach().clone()
        quantize_(model, config(algorithm))
        same(model[0].weight, qparams.quantize(w, 32, algorithm))


def test_outputs_come_closer():
    x = data()
    errors = {}
    for algorithm in ("tinygemm", "search", "gptq"):
        model, calibration = two_layers(), None
        exact = model(x[0])
        if algorithm != "tinygemm":
            calibration = calibrate(model, x, statistics="hessian")
        quantize_(model, config(algorithm, group_size=64), calibration=calibration)
        errors[algorithm] = (model(x[0]) - exact).square().mean().item()
    assert errors["gptq"] < errors["search"] < errors["tinygemm"]


@pytest.mark.parametrize("algorithm", ["search", "gptq"])
def test_a_weight_without_moments_is_named(algorithm):
    model = two_layers()
    whole = calibrate(model, data(), statistics="hessian")
    w = model[2].weight.detach().clone()
    part = Calibration({"0.weight": whole["0.weight"]})
    how = "by search: the calibration has no Hessian" if algorithm == "gptq" else "without import"
    with pytest.warns(Int4SkipWarning, match=f"^2.weight is quantised {how}"):
        quantize_(model, config(algorithm), calibration=part)
    same(model[2].weight, qparams.quantize(w, 32, "search"))


def test_experts_by_name():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(2, K, N))  # [E, in, out]

        def forward(self, x):
            return torch.bmm(x, self.w1)

    model = nn.Sequential(Experts())
    w = model[0].w1.detach().clone()
    calibration = calibrate(model, [torch.randn(2, 50, K)], statistics="hessian")
    names = FqnToConfig({"0.w1": config("gptq", contracted_dim=-2)})
    quantize_(model, names, calibration=calibration)
    moments = calibration["0.w1"]
    same(model[0].w1.mT, gptq.quantize(w.mT, 32, moments.hessian, moments.tokens))


@pytest.mark.parametrize(
    "settings,calibration,error,message",
    [
        ("gptq", None, ValueError, "needs a calibration with Hessians.*statistics='hessian'"),
        ("gptq", "importance", ValueError, "needs a calibration with Hessians, got Calibration"),
        ("tinygemm", "importance", ValueError, r"a calibration is for .*got \['tinygemm'\]"),
        ("search", "another", ValueError, "must be of this model, got names such as 'x.weight'"),
        ("search", "misshapen", ValueError, r"0.weight: importance of \[64, 64\] must have shape"),
        ("search", {}, TypeError, "what int4q.calibrate returns, got dict"),
    ],
)
def test_calibrations_that_do_not_do(settings, calibration, error, message):
    model = two_layers()
    moments = calibrate(model, data())
    given = {
        "importance": moments,
        "another": Calibration({"x.weight": moments["0.weight"]}),
        "misshapen": Calibration({"0.weight": calibrate(nn.Linear(32, 1), [torch.ones(1, 32)])
                                  ["weight"]}),
    }  # fmt: skip
    if isinstance(calibration, str):
        calibration = given[calibration]
    with pytest.raises(error, match=message):
        quantize_(model, config(settings), calibration=calibration)


def test_auto_calibrates_a_whole_transformers_model():
    transformers = pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(shape).eval()
    w, calibration = model.model.layers[0].mlp.up_proj.weight.detach().clone(), calibrate(model)
    with pytest.warns(Int4SkipWarning):  # (the embedding; smaller groups)
        quantize_(model, config("auto", group_size=128))
    up = "model.layers.0.mlp.up_proj.weight"
    parts = qparams.quantize(w, 32, "search", calibration[up].mean_square)
    same(model.get_parameter(up), parts)
    assert model.model.layers[0].mlp.down_proj.weight.group_size == 128


@pytest.mark.parametrize("algorithm", ["search", "gptq", "auto"])
def test_json_is_readable_by_stock_torchao(algorithm):
    c = config(algorithm, group_size_fallback=True)
    assert c.int4_choose_qparams_algorithm == algorithm and algorithm in repr(c)
    read = config_from_dict(json.loads(json.dumps(config_to_dict(c))))
    assert type(read) is torchao.quantization.Int4WeightOnlyConfig
    assert (read.group_size, read.int4_choose_qparams_algorithm) == (32, "tinygemm")
    assert not hasattr(read, "group_size_fallback")


@pytest.mark.parametrize("algorithm", ["search", "gptq", "auto", "hqq"])
def test_float8_activations_take_symmetric_weights(algorithm):
    with pytest.raises(ValueError, match="symmetric weights.*got '" + algorithm):
        config(algorithm, activation_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("algorithm", ["tinygemm", "search"])
def test_smaller_groups_where_k_is_no_multiple(algorithm):
    sizes = {256: 128, 192: 64, 96: 32, 576: 64, 80: None}
    model = nn.ModuleDict({str(k): nn.Linear(k, 16) for k in sizes})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_(model, config(algorithm, group_size=128, group_size_fallback=True))
    said = sorted(str(w.message) for w in caught)
    assert len(said) == 2  # what is left (80), and what is in smaller groups
    assert "*.weight (3) are in smaller groups, as group_size 128 does not divide K" in said
    held = {w.name: w.group_size for w in int4q.summary(model, show=False).quantized}
    assert held == {f"{k}.weight": g for k, g in sizes.items() if g}


def test_smaller_groups_only_when_asked():
    model = nn.Sequential(nn.Linear(96, 16))
    with pytest.warns(Int4SkipWarning, match="K = 96 is not a multiple of group_size 64"):
        quantize_(model, config("tinygemm", group_size=64))
    assert config("tinygemm").group_size_fallback is False
