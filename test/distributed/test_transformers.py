"""transformers' tensor and expert parallelism on 4-bit models, against one process."""

import functools

import pytest
import torch
from ranks import group
from torch import distributed as dist
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    # transformers: its own way of saying that tp_plan moves into a config.
    pytest.mark.filterwarnings("ignore:Passing `tp_plan`:FutureWarning"),
]
two, four = group(2), group(4)
IDS = torch.arange(10)[None]
KINDS = ("llama", "qwen3_moe", "mixtral")
DISTRIBUTED = pytest.importorskip("transformers.distributed").DistributedConfig
EP = {"ep_size": 2} if hasattr(DISTRIBUTED, "ep_size") else {"enable_expert_parallel": True}
PARALLEL = {
    "tensor": {"tp_plan": "auto"},
    "experts": {"distributed_config": {"tp_size": 2, **EP}},
    "experts by int4q": {
        "distributed_config": {"tp_size": 2, **EP},
        "experts_implementation": "int4q",
    },
}
BF16 = 0.02
"""Relative error of bfloat16 logits: o and down are rounded before they are added over ranks."""


def made(kind, **sizes):
    import transformers

    common = {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    experts = {
        "llama": {},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }[kind]
    config = transformers.AutoConfig.for_model(kind, **common | experts | sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).bfloat16()


def config(fmt, kind, group_size=32):
    from transformers import TorchAoConfig

    from int4q import Int4WeightOnlyConfig, moe_config

    c = Int4WeightOnlyConfig(
        group_size=group_size,
        int4_packing_format=fmt,
        activation_dtype=torch.bfloat16,
        set_inductor_config=False,
    )
    return TorchAoConfig(c if kind == "llama" else moe_config(c))


def load(path, **kwargs):
    from transformers import AutoModelForCausalLM

    import int4q.integrations.transformers  # noqa: F401  (experts_implementation="int4q")

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **kwargs)


def weights(model):
    """Name -> 4-bit weight, whole."""
    from int4q.tensor.base import Int4TensorBase

    whole = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }
    return {name: p for name, p in whole.items() if isinstance(p, Int4TensorBase)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Kind -> paths of the model in 16 and in 4 bits, and what one process makes of it."""

    @functools.cache
    def make(kind):
        path = tmp_path_factory.mktemp(kind)
        made(kind).save_pretrained(path / "16")
        model = load(path / "16", quantization_config=config("plain", kind))
        model.save_pretrained(path / "4")
        with torch.no_grad():
            logits = model(IDS).logits
        tokens = model.generate(IDS, max_new_tokens=5, do_sample=False)
        return path, logits, tokens, weights(model)

    return make


def parallel(path, kind, fmt, stored, how, expected):
    logits, tokens, whole = expected
    given = {} if stored else {"quantization_config": config(fmt, kind)}
    model = load(path / ("4" if stored else "16"), **given, **PARALLEL[how])
    got = weights(model)
    assert got.keys() == whole.keys() and got
    for name, weight in got.items():
        assert torch.equal(weight.to_int4_tensor(), whole[name]), name
        local = model.get_parameter(name).to_local()
        assert local.nbytes * dist.get_world_size() == weight.nbytes, name
    with torch.no_grad():
        error = (model(IDS).logits - logits).norm() / logits.norm()
    assert error < BF16, error
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), tokens)
    again = path / f"again-{fmt}-{stored}-{how}-{dist.get_world_size()}"
    model.save_pretrained(again)
    dist.barrier()
    reloaded = weights(load(again))
    assert all(torch.equal(reloaded[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize("stored", [False, True], ids=["on load", "stored"])
@pytest.mark.parametrize(
    "kind,how",
    [
        ("llama", "tensor"),
        ("qwen3_moe", "tensor"),
        ("qwen3_moe", "experts"),
        ("qwen3_moe", "experts by int4q"),
        ("mixtral", "tensor"),
    ],
)
def test_plans(two, checkpoints, kind, how, stored):
    """Quantised on load and stored in 4 bits: bytes, logits, tokens, and saved from shards."""
    path, *expected = checkpoints(kind)
    two.run(parallel, path, kind, "plain", stored, how, expected)


def test_coalesced(two, checkpoints):
    path, *expected = checkpoints("llama")
    two.run(parallel, path, "llama", "cuda_coalesced", False, "tensor", expected)


def test_four_ranks(four, checkpoints):
    path, *expected = checkpoints("llama")
    four.run(parallel, path, "llama", "plain", True, "tensor", expected)


def refused(path, kwargs, error, message):
    with pytest.raises(error, match=message):
        load(path, **kwargs)


def test_a_plan_that_cuts_groups_is_refused(two, tmp_path):
    """transformers logs what the weights say, and raises this."""
    made("llama", intermediate_size=96).save_pretrained(tmp_path / "16")
    model = load(tmp_path / "16", quantization_config=config("plain", "llama"))
    model.save_pretrained(tmp_path / "4")
    message = "automatic conversion of the weights"
    two.run(refused, tmp_path / "4", {"tp_plan": "auto"}, RuntimeError, message)


def test_fsdp_by_transformers_is_refused(two, checkpoints):
    path, *_ = checkpoints("llama")
    plan = {"distributed_config": {"fsdp_size": 2}}
    two.run(refused, path / "4", plan, ValueError, "fsdp_size and dp_replicate_size must be 1")
