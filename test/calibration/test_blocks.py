"""Moments by block: those of the whole model, one block at a time."""

import warnings
import weakref

import pytest
import torch
from torch import nn

from int4q import Int4WeightOnlyConfig, calibrate, quantize_
from int4q.calibration import Moments
from int4q.tensor.base import Int4TensorBase

K, DEPTH = 32, 4


class Block(nn.Module):
    """Takes what the model says of its place, as attention masks of some models do."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, 2 * K), nn.Linear(2 * K, K)

    def forward(self, x, scale=1.0):
        return (x + self.down(torch.relu(self.up(x) * scale)), None)


class Model(nn.Module):
    def __init__(self, between=lambda x: x):
        super().__init__()
        self.first = nn.Linear(K, K)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.last = nn.Linear(K, K)
        self.heads = nn.ModuleList(nn.Linear(K, K) for _ in range(2))  # side by side: no chain
        self.between = between

    def forward(self, x):
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = self.between(block(x, scale=0.5 + i)[0])
        return [head(self.last(x)) for head in self.heads]


def data(n=3):
    return [torch.randn(2, 5, K) * torch.logspace(-1, 1, K) for _ in range(n)]


def assert_same(by_block, whole):
    assert set(by_block) >= set(whole)
    for name, moments in by_block.items():
        for field, value in vars(moments).items():
            assert torch.equal(value, getattr(whole[name], field)), name


def test_moments_are_those_of_the_whole_model():
    model, batches = Model(), data()
    whole = calibrate(model, batches, statistics="hessian")
    assert_same(calibrate(model, iter(batches), statistics="hessian", by_block=True), whole)
    moved = calibrate(model, batches, statistics="hessian", by_block=True, device="cpu")
    assert_same(moved, whole)
    alone = calibrate(model, batches, by_block=True, tokens=11)
    assert "block 0 of 4, without Hessians" in repr(alone) and not alone.has_hessians
    later = alone["blocks.2.up.weight"]  # those before it run, and nothing is gathered
    assert later.hessian is None and later.tokens == 20 and "block 2 of 4" in repr(alone)
    assert torch.equal(alone["first.weight"].mean_square, calibrate(model, batches[:2])[
        "first.weight"].mean_square)  # fmt: skip


TINY = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=96, vocab_size=99)  # fmt: skip
FAMILIES = {
    "LlamaForCausalLM": dict(**TINY, num_hidden_layers=3),
    "Gemma3ForCausalLM": dict(  # two kinds of mask and of positions
        **TINY, num_hidden_layers=3, sliding_window=64, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "MixtralForCausalLM": dict(**TINY, num_hidden_layers=2, num_local_experts=3),
    "BertModel": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
                      intermediate_size=96),
    "T5ForConditionalGeneration": dict(  # two chains; the first block makes all position biases
        vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_weights_are_the_same(name):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)

    def quantised(by_block):
        torch.manual_seed(0)
        model = cls(cls.config_class(**FAMILIES[name])).eval()
        config = Int4WeightOnlyConfig(
            group_size=32, int4_choose_qparams_algorithm="gptq", set_inductor_config=False
        )
        ids = torch.randint(99, (2, 128))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # (what is left alone; experts with few tokens)
            calibration = calibrate(model, ids, statistics="hessian", by_block=by_block)
            quantize_(model, config, calibration=calibration)
        return {n: p for n, p in model.named_parameters() if isinstance(p, Int4TensorBase)}

    whole, by_block = quantised(False), quantised(True)
    assert list(whole) == list(by_block) and len(whole) >= 8
    for n in whole:
        assert torch.equal(whole[n].qdata, by_block[n].qdata), n
        assert torch.equal(whole[n].scale, by_block[n].scale), n


def test_one_block_is_held_at_a_time():
    calibration = calibrate(Model(), data(), statistics="hessian", by_block=True)
    held: list[weakref.ref] = []
    for i in range(DEPTH):
        name = f"blocks.{i}.up.weight"
        moments = calibration[name]
        assert all(r() is None for r in held), f"Hessians of a block before {i}"
        assert isinstance(moments, Moments) and calibration[name] is moments
        held = [weakref.ref(calibration[f"blocks.{i}.{n}.weight"].hessian) for n in ("up", "down")]
        del moments
    assert calibration["heads.1.weight"].tokens == 30
    assert len(calibration._chains[0].outputs) == 3  # of one block
    with pytest.raises(ValueError, match=r"in the order of the blocks, got blocks\.3\.up\.weight"):
        calibration["blocks.3.up.weight"]
    assert "never.weight" not in calibration


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail):
    model = Model().train()
    model.blocks[1].eval()
    own = model.blocks[2].forward = model.blocks[2].forward  # as accelerate's hooks do
    batches = [*data(1), torch.randn(1, K + 1)] if fail else data()
    calibration = calibrate(model, batches, by_block=True)
    if fail:
        with pytest.raises(RuntimeError):
            calibration["blocks.0.up.weight"]
    else:
        dict(calibration)
    assert model.blocks[2].__dict__["forward"] is own and "forward" not in model.blocks[0].__dict__
    assert model.training and model.blocks[0].training and not model.blocks[1].training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


class Counting(Model):
    """Runs otherwise each time."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x * self.calls)


@pytest.mark.parametrize(
    "model,got",
    [
        (nn.Sequential(nn.Linear(K, K)), "got none"),
        (Model(between=lambda x: x + 1), "got none"),  # each would be added as often as it runs
        (Counting(), "number 0 gives something else when it runs alone"),
    ],
)
def test_models_without_a_chain_of_blocks(model, got):
    with pytest.raises(ValueError, match=f"{got}. Calibrate with by_block=False"):
        calibrate(model, data(), by_block=True)


def test_blocks_that_some_batches_do_not_call():
    class Early(Model):
        def forward(self, x):
            return super().forward(x) if len(x) > 1 else self.first(x)

    calibration = calibrate(Early(), [*data(2), torch.randn(1, K)], by_block=True)
    with pytest.raises(ValueError, match="some batches do not call"):
        calibration["blocks.0.up.weight"]


def test_what_it_is_not_for(tmp_path):
    calibration = calibrate(Model(), data(), by_block=True)
    with pytest.raises(ValueError, match="cannot be saved"):
        calibration.save(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="device is where blocks run, with by_block=True"):
        calibrate(Model(), data(), device="cpu")


@pytest.mark.gpu
def test_blocks_run_elsewhere_one_at_a_time():
    width, depth = 1024, 8
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(depth))

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, batches = Chain(), [torch.randn(256, width)]
    whole = calibrate(model, batches, statistics="hessian")
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")  # (cuBLAS's workspace)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    by_block = calibrate(model, batches, statistics="hessian", by_block=True, device="cuda")
    for name, moments in by_block.items():
        assert moments.hessian.is_cuda
        scale = whole[name].hessian.diagonal().mean()
        torch.testing.assert_close(
            moments.hessian.cpu() / scale, whole[name].hessian / scale, rtol=1e-3, atol=1e-3
        )
    matrix = width * width * 4
    assert torch.cuda.max_memory_allocated() - before < 6 * matrix  # of 16 in all
    assert all(not p.is_cuda for p in model.parameters())
