"""Adapters of peft on 4-bit weights: as on the dequantised model, with only packed bytes kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import int4q
from int4q import Int4SkipWarning, Int4Tensor, Int4WeightOnlyConfig, moe_config, quantize_
from int4q.tensor.base import Int4TensorBase

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from integrations.families import MIXTURES, build, gpt_oss, llama, llama4, mixtral  # noqa: E402

SMALL = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)
ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(18).view(2, 9) * 7 % 90 + 3
pytestmark = [
    pytest.mark.filterwarnings("ignore::int4q.Int4SkipWarning"),
    # Names that peft and this file use, and transformers renames; ranks that peft sets by itself.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pattern keys did not match:RuntimeWarning"),
]


def base(make=llama, dtype=torch.float32, config=SMALL):
    model = build(make, dtype)
    quantize_(model, moe_config(config) if make in MIXTURES else config)
    return model


def dequantized(model):
    """The same model with plain weights."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, p in module._parameters.items():
            if isinstance(p, Int4TensorBase):
                module._parameters[name] = nn.Parameter(p.dequantize(), requires_grad=False)
    return plain


def with_adapter(model, **options):
    """Adapters that change the output, the same ones each time."""
    options = dict(r=4, target_modules=ATTENTION) | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_same_training(model, plain, tolerance=1e-4):
    """float32 sums in another order, through a few layers."""
    loss, grads = loss_and_gradients(model)
    expected, expected_grads = loss_and_gradients(plain)
    assert grads.keys() == expected_grads.keys() and grads
    assert abs(loss - expected) < tolerance * expected
    for name, g in grads.items():
        assert (g - expected_grads[name]).norm() <= tolerance * expected_grads[name].norm(), name


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["plain", "cuda_coalesced", "cpu_packed"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": "all-linear"}])
def test_as_on_the_dequantised_model(fmt, options):
    dtype = torch.bfloat16 if fmt == "cuda_coalesced" else None
    config = Int4WeightOnlyConfig(
        group_size=32, int4_packing_format=fmt, activation_dtype=dtype, set_inductor_config=False
    )
    model = base(config=config)
    plain = with_adapter(dequantized(model), **options)
    assert_same_training(with_adapter(model, **options), plain)


@pytest.mark.parametrize("make", [m for m in MIXTURES if m is not llama4])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "int4q"])
def test_experts(make, implementation):
    import int4q.integrations.transformers  # noqa: F401

    model = base(make)
    plain = dequantized(model)
    model.set_experts_implementation(implementation)
    plain.set_experts_implementation("eager")
    options = dict(target_modules="all-linear", target_parameters=EXPERTS)
    assert_same_training(with_adapter(model, **options), with_adapter(plain, **options))


def test_experts_of_llama4():
    model = base(llama4)
    options = dict(target_parameters=EXPERTS)
    plain = with_adapter(dequantized(model), **options)
    assert_same_training(with_adapter(model, **options), plain)


def test_gradient_checkpointing():
    model = with_adapter(base())
    loss, grads = loss_and_gradients(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again, checkpointed = loss_and_gradients(model)
        assert torch.equal(again, loss)
        assert all(torch.equal(g, checkpointed[n]) for n, g in grads.items())


def saved_bytes(run):
    """Storage that autograd keeps for backward, counted once: of ``run``'s graph."""
    storages = {}

    def pack(t):
        parts = t.data_tensors().values() if isinstance(t, Int4TensorBase) else [t]
        for part in parts:
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(storages.values()), out


@pytest.mark.parametrize("stack", [False, True])
def test_what_is_kept_for_backward_is_packed(layout, stack):
    shape = (3, 256, 512) if stack else (256, 512)
    w = torch.randn(shape).bfloat16()
    t = layout.from_hp(w, [1] * (w.ndim - 1) + [128])
    product = torch.bmm if stack else F.linear
    x = torch.randn(*shape[:-2], 4, 512).bfloat16().requires_grad_()
    kept, y = saved_bytes(lambda: product(x, t))
    assert kept == t.nbytes
    dense, _ = saved_bytes(lambda: product(x, w.mT if stack else w))
    assert dense == w.nbytes and kept < dense / 3.5
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_whole_model_keeps_less_than_its_weights():
    model = with_adapter(base(dtype=torch.bfloat16), target_modules="all-linear")
    plain = with_adapter(dequantized(base(dtype=torch.bfloat16)), target_modules="all-linear")
    kept, _ = saved_bytes(lambda: model(IDS, labels=IDS).loss)
    dense, _ = saved_bytes(lambda: plain(IDS, labels=IDS).loss)
    first = [f"layers.0.self_attn.{n}_proj." for n in "qkv"]  # on embeddings: no gradient to pass
    used = [p for n, p in model.named_parameters() if not any(f in n for f in first)]
    packed = [p for p in used if isinstance(p, Int4TensorBase)]
    assert len(packed) == 11
    assert dense - kept == sum(2 * p.numel() - p.nbytes for p in packed)


def test_kbit_training_leaves_the_weights():
    model = peft.prepare_model_for_kbit_training(
        base(dtype=torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[0].gradient_checkpointing
    model = with_adapter(model)
    assert loss_and_gradients(model)[1]


def test_trainer(tmp_path):
    """Of a model that was loaded, which transformers refuses for 4-bit weights of torchao."""
    pytest.importorskip("accelerate")
    base().save_pretrained(tmp_path / "base")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert loaded.is_quantized and loaded.hf_quantizer.is_trainable
    model = with_adapter(loaded, target_modules="all-linear")
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=10, learning_rate=5e-2, use_cpu=True,
        per_device_train_batch_size=4, gradient_checkpointing=True, report_to=[], seed=0,
        logging_steps=1, save_steps=10, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    saved = {p.name for p in (tmp_path / "out/checkpoint-10").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


def test_trainer_refuses_a_model_without_adapters(tmp_path):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    base().save_pretrained(tmp_path / "base")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        transformers.Trainer(model=loaded, args=arguments)


def test_distributed_data_parallel(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=store)
    try:
        model = with_adapter(base())
        loss, grads = loss_and_gradients(model)
        names = [n for n, p in model.named_parameters() if isinstance(p, Int4TensorBase)]
        parallel = nn.parallel.DistributedDataParallel
        parallel._set_params_and_buffers_to_ignore_for_model(model, names)
        again, got = loss_and_gradients(parallel(model))
        assert torch.equal(again, loss)
        assert all(torch.equal(g, got[f"module.{n}"]) for n, g in grads.items())
    finally:
        torch.distributed.destroy_process_group()


# --- adapters on disk, and merged -----------------------------------------------------------------


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("options", [{}, {"target_parameters": EXPERTS}])
def test_adapters_are_saved_and_loaded(tmp_path, options):
    model = base(mixtral)
    model.save_pretrained(tmp_path / "base")
    adapted = with_adapter(model, **options)
    adapted.save_pretrained(tmp_path / "adapter")
    assert {p.suffix for p in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted))


def test_adapters_of_transformers_itself(tmp_path):
    model = base()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=ATTENTION))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = base()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(model))


def half_steps(t):
    """Half a step of each element's group."""
    scale = t.scale.mT if isinstance(t, Int4Tensor) else t.scale
    step = scale.float().abs().repeat_interleave(t.group_size, dim=-1) / 2
    return step.transpose(t.grouped_dim, -1) if t.grouped_dim != t.ndim - 1 else step


def assert_rounded(t, exact):
    """``t`` is ``exact`` in 4 bits by min-max: half a step and the float32 arithmetic."""
    assert isinstance(t, Int4TensorBase) and not t.requires_grad
    error = (t.dequantize().float() - exact).abs()
    assert (error <= half_steps(t) * (1 + 1e-4) + 1e-6).all()


@pytest.mark.parametrize("reloaded", [False, True])
def test_merging_rounds_once(reloaded, tmp_path):
    model = base()
    if reloaded:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    plain = with_adapter(dequantized(model)).merge_and_unload()
    merged = with_adapter(model).merge_and_unload()
    names = [n for n, p in merged.named_parameters() if isinstance(p, Int4TensorBase)]
    assert len(names) == 14  # of two layers with seven, all parameters as before
    for name in names:
        assert_rounded(merged.get_parameter(name), plain.get_parameter(name).detach())
    untouched = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged.get_parameter(untouched), base().get_parameter(untouched))
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


def test_a_small_update_is_lost_in_four_bits_and_kept_in_a_dequantised_model(tmp_path):
    """Weights are on the grid that the sum is rounded to."""
    model = with_adapter(base())
    model.save_pretrained(tmp_path)
    expected = logits(model)
    plain = model.unload().dequantize()
    assert not any(isinstance(p, Int4TensorBase) for p in plain.parameters())
    assert not getattr(plain, "is_quantized", False)
    merged = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    exact = (logits(merged) - expected).norm()
    rounded = (logits(with_adapter(base()).merge_and_unload()) - expected).norm()
    assert exact < 1e-5 * expected.norm() < 1e-2 * expected.norm() < rounded


@pytest.mark.xfail(strict=True, reason="peft merges DoRA into torchao's tensors without magnitudes")
def test_merging_dora():
    model = base()
    plain = with_adapter(dequantized(model), use_dora=True).merge_and_unload()
    merged = with_adapter(model, use_dora=True).merge_and_unload()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_rounded(merged.get_parameter(name), plain.get_parameter(name).detach())


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_merging_into_experts(make):
    model = base(make)
    options = dict(target_parameters=EXPERTS)
    plain = with_adapter(dequantized(model), **options).merge_and_unload()
    merged = with_adapter(model, **options).merge_and_unload(safe_merge=make is mixtral)
    experts = [n for n, p in merged.named_parameters() if isinstance(p, Int4TensorBase)]
    for name in experts:
        assert_rounded(merged.get_parameter(name), plain.get_parameter(name).detach())
    assert sum("experts" in name for name in experts) == 4


def test_merging_what_does_not_fit_a_group_keeps_the_weight():
    """A weight that can no longer be quantised is a parameter in high precision, and says so."""
    linear = nn.Linear(48, 8)
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight + 1
    with pytest.warns(Int4SkipWarning, match="not a multiple of group_size 32"):
        torch_quantize(linear)
    assert torch.equal(linear.state_dict()["weight"], weight + 1)


def torch_quantize(module):
    from torchao.quantization import quantize_ as of_torchao

    of_torchao(module, SMALL)


@pytest.mark.parametrize("option", ["pissa", "olora"])
def test_starts_from_the_weight_are_refused(option):
    with pytest.raises(NotImplementedError, match=r"Int4Tensor. Use .dequantize\(\) first"):
        with_adapter(base(), init_lora_weights=option)


# --- sums -----------------------------------------------------------------------------------------


def test_sums_are_plain(layout):
    t, other = layout.from_hp(torch.randn(8, 64), [1, 32]), torch.randn(8, 64)
    w = t.dequantize()
    for got, expected in (
        (t + other, w + other),
        (other + t, other + w),
        (t - other, w - other),
        (other - t, other - w),
        (t + t, w + w),
        (t + 1, w + 1),
        (torch.add(t, other, alpha=2), w + 2 * other),
    ):
        assert type(got) is torch.Tensor and torch.equal(got, expected)
    delta = other.requires_grad_()
    (t + delta).sum().backward()
    assert torch.equal(delta.grad, torch.ones(8, 64))


@pytest.mark.parametrize("turned", [False, True])
def test_sums_in_place_round_again(layout, turned):
    t, other = layout.from_hp(torch.randn(3, 8, 64), [1, 1, 32]), torch.randn(3, 8, 64)
    if turned:
        t, other = t.transpose(1, 2), other.transpose(1, 2)
    qdata, exact = t.qdata, t.dequantize() + 2 * other
    assert t.add_(other, alpha=2) is t and t.qdata is qdata
    assert_rounded(t, exact)
    exact = t.dequantize() - other
    t -= other
    assert_rounded(t, exact)
    plain = torch.zeros(t.shape)
    plain += t
    assert torch.equal(plain, t.dequantize())
    t.act_pre_scale = 2
    with pytest.raises(ValueError, match="a weight with act_pre_scale takes no sum in place"):
        t += other


def test_is_finite(layout):
    t = layout.from_hp(torch.randn(8, 64), [1, 32])
    assert torch.isfinite(t).all()
    t.scale[0, 0] = torch.inf
    assert not t.isfinite().all()


def test_adopted_models_train(tmp_path):
    """Loaded as torchao's, then adopted."""
    model = base()
    for module in model.modules():
        if isinstance(module._parameters.get("weight"), Int4Tensor):
            theirs = nn.Parameter(module.weight.to_torchao(), requires_grad=False)
            module._parameters["weight"] = theirs
    with pytest.raises(TypeError, match="only supports int8 weights"):
        with_adapter(copy.deepcopy(model))
    assert loss_and_gradients(with_adapter(int4q.adopt(model)))[1]
