"""The config, its handler, the default filter, and the report."""

import contextlib
import json
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torchao.quantization
from rich.console import Console
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig

import int4q
from int4q import (
    CpuPackedInt4Tensor,
    CudaCoalescedInt4Tensor,
    Int4SkipWarning,
    Int4Tensor,
    Int4WeightOnlyConfig,
    quantize_,
)

SMALL = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)


def test_defaults_are_torchaos():
    ours, theirs = Int4WeightOnlyConfig(), torchao.quantization.Int4WeightOnlyConfig()
    for name in (
        "group_size",
        "int4_packing_format",
        "int4_choose_qparams_algorithm",
        "set_inductor_config",
        "version",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(version=1), "version must be 2, got 1"),
        (dict(group_size=48), "group_size must be one of"),
        (dict(int4_packing_format="preshuffled"), "int4_packing_format must be one of"),
        (dict(int4_choose_qparams_algorithm="awq"), "algorithm must be one of"),
        (
            dict(activation_dtype=torch.int8),
            "activation_dtype of 'plain' must be bfloat16 or float8",
        ),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        Int4WeightOnlyConfig(**arguments)


@pytest.mark.parametrize("fmt", ["plain", "cuda_coalesced", "cpu_packed", "auto"])
def test_json_is_readable_by_stock_torchao(fmt):
    config = Int4WeightOnlyConfig(
        group_size=64, int4_packing_format=fmt, int4_choose_qparams_algorithm="hqq"
    )
    assert config.int4_packing_format == fmt and fmt in repr(config)
    read = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert type(read) is torchao.quantization.Int4WeightOnlyConfig
    assert (read.group_size, read.int4_packing_format, read.version) == (64, "plain", 2)
    assert read.int4_choose_qparams_algorithm == "hqq"


@pytest.mark.parametrize(
    "fmt,cls",
    [
        ("plain", Int4Tensor),
        ("cuda_coalesced", CudaCoalescedInt4Tensor),
        ("cpu_packed", CpuPackedInt4Tensor),
    ],
)
@pytest.mark.parametrize("quantize", [quantize_, torchao.quantization.quantize_])
def test_formats(fmt, cls, quantize):
    m = nn.Sequential(nn.Linear(64, 32))
    quantize(m, Int4WeightOnlyConfig(group_size=32, int4_packing_format=fmt))
    assert type(m[0].weight) is cls and isinstance(m[0].weight, nn.Parameter)
    assert not m[0].weight.requires_grad


@pytest.mark.parametrize("packing,cls", [("rows", Int4Tensor), ("aten", CpuPackedInt4Tensor)])
def test_auto_takes_the_layout_of_the_fastest_cpu_kernel(monkeypatch, packing, cls):
    monkeypatch.setattr("int4q.kernels.cpu.preferred_packing", lambda: packing)
    m = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 7))
    quantize_(m, Int4WeightOnlyConfig(group_size=32, int4_packing_format="auto"))
    assert type(m[0].weight) is cls and type(m[1].weight) is Int4Tensor


def test_auto_takes_the_coalesced_layout_for_int8_activations_only():
    for dtype, layout in ((torch.int8, CudaCoalescedInt4Tensor), (None, Int4Tensor)):
        m = nn.Linear(64, 24)  # (N = 24: no CPU packs it)
        config = Int4WeightOnlyConfig(32, int4_packing_format="auto", activation_dtype=dtype)
        quantize_(m, config)
        assert type(m.weight) is layout
        assert m.weight.activation_dtype == (dtype or torch.bfloat16)


def test_activation_dtype_reaches_the_tensor():
    m = nn.Sequential(nn.Linear(64, 32))
    quantize_(
        m,
        Int4WeightOnlyConfig(
            group_size=32, int4_packing_format="cuda_coalesced", activation_dtype=torch.bfloat16
        ),
    )
    assert m[0].weight.activation_dtype == torch.bfloat16


def test_what_cannot_be_quantised_is_left_with_one_warning_each():
    m = nn.ModuleDict({
        "ragged": nn.Linear(50, 8), "wide": nn.Linear(64, 8).double(),
        "done": nn.Linear(64, 8), "good": nn.Linear(64, 8),
    })  # fmt: skip
    quantize_(m, SMALL, filter_fn=lambda mod, name: name == "done")
    with pytest.warns(Int4SkipWarning) as caught:
        quantize_(m, SMALL)
    messages = sorted(str(w.message) for w in caught)
    assert len(messages) == 3
    assert "done.weight is left alone: quantised already (Int4Tensor)" in messages[0]
    assert "wide.weight is left alone: dtype torch.float64 is not" in messages[2]
    assert "ragged.weight is left alone: K = 50 is not a multiple" in messages[1]
    assert type(m["good"].weight) is Int4Tensor
    assert type(m["ragged"].weight) is nn.Parameter


def test_nan_names_the_module():
    m = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
    with torch.no_grad():
        m[1].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"1\.weight: a weight to quantise must be finite"):
        quantize_(m, SMALL)


def test_cpu_packed_falls_back_to_plain_and_says_so(monkeypatch):
    monkeypatch.setattr("int4q.kernels.cpu.preferred_packing", lambda: "aten")
    m = nn.Sequential(nn.Linear(64, 8))
    with pytest.warns(Int4SkipWarning, match="0.weight is held in the plain layout.*N = 8"):
        quantize_(m, Int4WeightOnlyConfig(group_size=32, int4_packing_format="cpu_packed"))
    assert type(m[0].weight) is Int4Tensor


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 48, 64))
        self.router = nn.Linear(64, 4)


def test_expert_parameters_quantise_by_name():
    m = nn.ModuleDict({"experts": Experts()})
    config = FqnToConfig(OrderedDict({r"re:.*gate_up_proj": SMALL}))
    quantize_(m, config)
    experts = m["experts"]
    assert type(experts.gate_up_proj) is Int4Tensor and experts.gate_up_proj.shape == (4, 48, 64)
    assert type(experts.router.weight) is nn.Parameter
    (left,) = int4q.summary(m, show=False).skipped
    assert left.name == "experts.router.weight"
    # A plain config does not reach 3-D parameters, and says so.
    m = nn.ModuleDict({"experts": Experts()})
    with pytest.warns(Int4SkipWarning, match="experts.gate_up_proj is left alone"):
        quantize_(m, SMALL)
    (left,) = int4q.summary(m, show=False).skipped
    assert left.name == "experts.gate_up_proj" and "int4q.moe_config()" in left.reason
    m = nn.ModuleDict({"experts": Experts()})
    quantize_(m, config)
    experts = m["experts"]
    with pytest.raises(ValueError, match="must have a parameter 'nothing'"):
        from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER as handlers

        handlers[Int4WeightOnlyConfig](experts, SMALL, parameter_name="nothing")


class TinyLM(nn.Module):
    """What transformers calls a model with an output head, without transformers."""

    def __init__(self, tied):
        super().__init__()
        self.embed_tokens = nn.Embedding(96, 64)
        self.mlp = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 96, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_output_embeddings(self):
        return self.lm_head


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_and_tied_embeddings_are_kept(tied):
    m = TinyLM(tied)
    reason = "tied to the embedding 'embed_tokens'" if tied else "the model's output head"
    with pytest.warns(Int4SkipWarning) as caught:
        quantize_(m, SMALL)
    head, table = sorted((str(w.message) for w in caught), reverse=True)
    assert head.startswith(f"lm_head.weight is left alone: {reason}")
    assert table == "embed_tokens.weight is left alone: not the weight of a linear layer"
    assert type(m.mlp.weight) is Int4Tensor and type(m.lm_head.weight) is nn.Parameter
    assert (m.lm_head.weight is m.embed_tokens.weight) == tied
    table, head = int4q.summary(m, show=False).skipped
    assert head.name == "lm_head.weight" and reason in head.reason
    assert table.name == "embed_tokens.weight" and table.tied_to is None
    assert head.tied_to == ("embed_tokens.weight" if tied else None)
    m = TinyLM(tied)
    with pytest.warns(Int4SkipWarning) if tied else contextlib.nullcontext():
        quantize_(m, SMALL, filter_fn=lambda mod, name: name == "lm_head")
    assert type(m.lm_head.weight) is Int4Tensor


@pytest.mark.slow
def test_a_real_transformers_model_keeps_its_head_and_generates():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=True,
    )
    m = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with pytest.warns(Int4SkipWarning) as caught:
        quantize_(m, SMALL)
    assert {str(w.message).split()[0] for w in caught} == {
        "lm_head.weight", "model.embed_tokens.weight"
    }  # fmt: skip
    assert len(int4q.summary(m, show=False).quantized) == 14
    ids = torch.arange(5)[None]
    out = m.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert out.shape == (1, 8)


def test_summary_counts_bytes():
    m = nn.Sequential(nn.Linear(128, 64), nn.Linear(50, 7)).to(torch.bfloat16)
    with pytest.warns(Int4SkipWarning):
        quantize_(m, SMALL)
    console = Console(record=True, width=100, file=open("/dev/null", "w"))
    s = int4q.summary(m, console=console)
    console.file.close()
    text = console.export_text()
    assert "1 weights in 4 bits (5.00 bits each" in text and "K = 50 is not a multiple" in text
    (w,) = s.quantized
    assert (w.name, w.kind, w.shape, w.group_size) == ("0.weight", "Int4Tensor", (64, 128), 32)
    assert w.bytes_before == 64 * 128 * 2 and w.bytes_after == 64 * 128 * 5 // 8
    assert w.bits_per_weight == s.bits_per_weight == 5.0
    rest = 2 * (64 + 50 * 7 + 7)
    assert s.bytes_before == w.bytes_before + rest and s.bytes_after == w.bytes_after + rest


def test_summary_of_an_untouched_model(capsys):
    s = int4q.summary(nn.Sequential(nn.Linear(8, 8, bias=False)))
    assert s.skipped[0].reason == "not selected" and s.bytes_before == s.bytes_after == 256
    assert "0 weights in 4 bits" in capsys.readouterr().out


IMPORT = """
import sys, time, io, contextlib
import torch, torchao
out, err = io.StringIO(), io.StringIO()
before = set(sys.modules)  # torch takes Triton itself where it is installed
start = time.perf_counter()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    import int4q
elapsed = time.perf_counter() - start
assert not out.getvalue() and not err.getvalue(), (out.getvalue(), err.getvalue())
heavy = {"triton", "fbgemm_gpu", "transformers", "wgpu", "matplotlib"} & (set(sys.modules) - before)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
print(elapsed)
"""


@pytest.mark.slow
def test_import_is_light_and_silent():
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        times.append(float(done.stdout.split()[-1]))
    assert min(times) < 0.3, times  # seconds on top of torch and torchao; the best of three
