"""FSDP2 on 4-bit weights with LoRA: steps of 2 and 4 ranks against those of one process."""

import copy

import pytest
import torch
from helpers import LAYOUTS
from ranks import group
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from int4q import Int4WeightOnlyConfig, quantize_

one, two, four = group(1), group(2), group(4)
FORMATS = ("plain", "cuda_coalesced")


class LoRA(nn.Module):
    """A frozen linear layer and a trained update of low rank."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def model(fmt, N=64, dim=64):
    m = nn.Sequential(LoRA(nn.Linear(dim, N)), nn.GELU(), LoRA(nn.Linear(N, dim)))
    quantize_(
        m,
        Int4WeightOnlyConfig(
            group_size=32,
            int4_packing_format=fmt,
            activation_dtype=torch.bfloat16,
            set_inductor_config=False,
        ),
        lambda module, name: name.endswith("base"),
    )
    return m


def steps(m, batches, rows):
    """Losses of an optimizer step a batch, of which this rank sees ``rows``."""
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for x, y in batches:
        loss = (m(x[rows]) - y[rows]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def data(n=4, rows=8, dim=64):
    return [(torch.randn(rows, dim), torch.randn(rows, dim)) for _ in range(n)]


def trained(fmt, reshard):
    m, batches = model(fmt), data()
    alone = copy.deepcopy(m)
    expected = steps(alone, batches, slice(None))
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    for layer in (m[0], m[2]):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(m, mesh=mesh, reshard_after_forward=reshard)
    weight = m[0].base.weight
    assert isinstance(weight, DTensor) and type(weight.to_local()) in LAYOUTS
    assert weight.to_local().nbytes * world == alone[0].base.weight.nbytes
    got = steps(m, batches, slice(rank * 8 // world, (rank + 1) * 8 // world))
    dist.all_reduce(got)
    torch.testing.assert_close(got / world, expected)
    for (name, p), q in zip(m.named_parameters(), alone.parameters(), strict=True):
        whole = p.full_tensor()
        if p.requires_grad:
            torch.testing.assert_close(whole, q, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(whole, q), name


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_lora(two, fmt, reshard):
    """Losses and trained weights; what is frozen stays the same to the bit."""
    two.run(trained, fmt, reshard)


@pytest.mark.parametrize("fmt", FORMATS)
def test_lora_on_one_and_four(one, four, fmt):
    one.run(trained, fmt, True)
    four.run(trained, fmt, True)


def loaded(layout):
    """A state dict loaded between two forwards is what the second one gathers."""
    first, second = held(layout, (32, 64)), held(layout, (32, 64))
    m = fully_shard(Holds(first))
    assert torch.equal(m(), first)
    m.load_state_dict({"weight": fully_shard(Holds(second)).weight})
    assert torch.equal(m(), second)
    m.load_state_dict({"weight": fully_shard(Holds(first)).weight}, assign=True)
    assert torch.equal(m(), first)


def test_load_state_dict(one, two, layout):
    one.run(loaded, layout)
    two.run(loaded, layout)


def mixed(fmt):
    """Parameters gathered in bfloat16: the 4-bit weight keeps its float32 scales."""
    m, x = model(fmt), torch.randn(4, 64)
    expected = m(x)
    fully_shard(m, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    got = m(x)
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() / expected.norm() < 0.02
    assert m[0].base.weight.dtype == torch.float32


def test_mixed_precision(two):
    two.run(mixed, "plain")


def uneven(layout):
    m = model("plain" if layout is LAYOUTS[0] else "cuda_coalesced", N=62, dim=64)
    fully_shard(m)
    with pytest.raises(
        ValueError, match=r"multiple of the 4 ranks, got \[62, 64\].*ignored_params"
    ):
        m(torch.randn(4, 64))


def test_rows_that_do_not_divide_are_refused_on_every_rank(four, layout):
    four.run(uneven, layout)


def left_out():
    m = model("plain", N=62)
    x = torch.randn(4, 64)
    expected = m(x)
    fully_shard(m, ignored_params={m[0].base.weight})
    torch.testing.assert_close(m(x), expected)


def test_a_weight_left_out_stays_whole(four):
    four.run(left_out)


class Holds(nn.Module):
    """Any weight, and what it gives; the whole of it is there while forward runs."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self):
        return self.weight.clone()


def held(layout, shape, transposed=False, pre_scale=False):
    block_size = [1] * (len(shape) - 1) + [32]
    weight = layout.from_hp(torch.randn(*shape), block_size, activation_dtype=torch.bfloat16)
    weight.act_pre_scale = torch.rand(shape[-1]) if pre_scale else None
    return weight.transpose(-1, -2) if transposed else weight


def gathered(layout, shape):
    weight = held(layout, shape)
    m = Holds(weight)
    fully_shard(m)
    for _ in range(2):  # the second time into the same memory
        whole = m()
        assert type(whole) is layout and torch.equal(whole, weight)


@pytest.mark.parametrize("shape", [(4, 32, 64), (96, 256)], ids=["experts", "matrix"])
def test_the_whole_weight_is_gathered(two, layout, shape):
    two.run(gathered, layout, shape)


def refused(layout, shape, transposed, pre_scale):
    with pytest.raises(ValueError, match="fully_shard by ignored_params"):
        fully_shard(Holds(held(layout, shape, transposed, pre_scale)))


@pytest.mark.parametrize(
    "shape,transposed,pre_scale",
    [((4, 32, 64), True, False), ((32, 128), True, False), ((32, 128), False, True)],
    ids=["experts [E, K, N]", "[K, N]", "act_pre_scale"],
)
def test_what_has_no_flat_view_is_refused(two, layout, shape, transposed, pre_scale):
    two.run(refused, layout, shape, transposed, pre_scale)
