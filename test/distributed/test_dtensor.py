"""DTensor on 4-bit weights: numbers of 2 and 4 ranks against those of one process."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS
from ranks import group
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from int4q import Int4WeightOnlyConfig, quantize_

two, four = group(2), group(4)
FORMATS = ("plain", "cuda_coalesced")
SUMS = {"rtol": 1e-5, "atol": 1e-5}
"""float32 sums of K products of order 1, added in another order."""


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def weight(layout, *shape):
    w = torch.randn(*shape) / shape[-1] ** 0.5
    return layout.from_hp(w, [1] * (len(shape) - 1) + [32], activation_dtype=torch.bfloat16)


# --- distribute_tensor ----------------------------------------------------------------------------


def distributed(layout, shape, dim, src):
    whole = weight(layout, *shape)
    mine = whole if src is None or dist.get_rank() == src else torch.zeros_like(whole)
    d = distribute_tensor(mine, mesh(), [Shard(dim)], src_data_rank=src)
    local = d.to_local()
    rows = torch.arange(shape[dim]).chunk(dist.get_world_size())
    rows = rows[dist.get_rank()] if dist.get_rank() < len(rows) else torch.arange(0)
    assert type(local) is layout
    assert torch.equal(local.dequantize(), whole.dequantize().index_select(dim, rows))
    assert torch.equal(d.full_tensor(), whole)
    assert torch.equal(d.redistribute(placements=[Replicate()]).to_local(), whole)
    if dim == 0 and shape[0] % dist.get_world_size() == 0:  # from one dim to another
        other = d.redistribute(placements=[Shard(1)])
        assert torch.equal(other.full_tensor(), whole)


@pytest.mark.parametrize("src", [0, None])
@pytest.mark.parametrize(
    "shape,dim",
    [((48, 128), 0), ((48, 128), 1), ((50, 128), 0), ((3, 128), 0), ((4, 32, 128), 1)],
    ids=str,
)
def test_distribute_tensor(four, layout, shape, dim, src):
    """Rows that do not divide by the ranks, and fewer rows than ranks, too."""
    four.run(distributed, layout, shape, dim, src)


def cut(layout, K):
    with pytest.raises(ValueError, match="multiple of group_size 32, got"):
        distribute_tensor(weight(layout, 8, K), mesh(), [Shard(1)])


@pytest.mark.parametrize("K", [32, 96, 160])
def test_a_shard_never_cuts_a_group(two, layout, K):
    two.run(cut, layout, K)


def replicated(layout):
    whole = weight(layout, 48, 64)
    mine = whole if dist.get_rank() == 0 else torch.zeros_like(whole)
    assert torch.equal(distribute_tensor(mine, mesh(), [Replicate()]).to_local(), whole)
    rows = torch.zeros_like(whole)[:16]  # its scales lie apart in memory in the plain layout
    dist.broadcast(rows if dist.get_rank() else whole[16:32], 0)
    assert dist.get_rank() == 0 or torch.equal(rows, whole[16:32])


def test_replicate(two, layout):
    two.run(replicated, layout)


# --- linear layers --------------------------------------------------------------------------------


def product(layout, dim, N, bias):
    """``F.linear`` and its gradient to the activation, the weight sharded along ``dim``."""
    world, K = dist.get_world_size(), 32 * dist.get_world_size() * 2
    w, b = weight(layout, N, K), torch.randn(N) if bias else None
    x, grad = torch.randn(2, 3, K), torch.randn(2, 3, N)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = F.linear(x1, w, b)
    expected.backward(grad)
    on = {"device_mesh": mesh(), "src_data_rank": None}
    wd = distribute_tensor(w, placements=[Shard(dim)], **on)
    bd = (
        distribute_tensor(b, placements=[Shard(0) if dim == 0 else Replicate()], **on)
        if bias
        else None
    )
    got = F.linear(DTensor.from_local(x2, mesh(), [Replicate()]), wd, bd)
    torch.testing.assert_close(got.full_tensor(), expected, **SUMS)
    got.backward(distribute_tensor(grad, placements=[Replicate()], **on))
    torch.testing.assert_close(x2.grad, x1.grad, **SUMS)
    assert wd.to_local().nbytes * world <= w.nbytes + 2 * K * world


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim,N", [(0, 64), (0, 50), (1, 64)])
def test_linear(two, layout, dim, N, bias):
    two.run(product, layout, dim, N, bias)


@pytest.mark.parametrize("dim,N", [(0, 64), (0, 51), (0, 3), (1, 50)])
def test_linear_on_four(four, layout, dim, N):
    four.run(product, layout, dim, N, True)


def pre_scaled(layout, dim):
    """``act_pre_scale`` is that of the shard's in features."""
    w, x = weight(layout, 64, 128), torch.randn(3, 128)
    w.act_pre_scale = torch.rand(128)
    d = distribute_tensor(w, mesh(), [Shard(dim)], src_data_rank=None)
    got = F.linear(distribute_tensor(x, mesh(), [Replicate()]), d)
    torch.testing.assert_close(got.full_tensor(), F.linear(x, w), **SUMS)
    if dim == 0:
        assert torch.equal(d.full_tensor(), w)
    else:
        with pytest.raises(ValueError, match="gathered along their out features"):
            d.full_tensor()


@pytest.mark.parametrize("dim", [0, 1])
def test_act_pre_scale(two, layout, dim):
    two.run(pre_scaled, layout, dim)


# --- parallelize_module ---------------------------------------------------------------------------


class Block(nn.Module):
    """Norm, attention's and a feed-forward's linear layers, two residuals."""

    def __init__(self, dim=128, inner=256):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.qkv, self.o = nn.Linear(dim, inner, bias=False), nn.Linear(inner, dim)
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim, bias=False)

    def forward(self, x):
        x = x + self.o(torch.tanh(self.qkv(self.norm(x))))
        return x + self.down(F.silu(self.up(self.norm(x))))


PLAN = {
    "qkv": ColwiseParallel(),
    "o": RowwiseParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}
SEQUENCE_PLAN = {
    "norm": SequenceParallel(use_local_output=False),
    "qkv": ColwiseParallel(input_layouts=Shard(1)),
    "o": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
}


def quantized(module, fmt):
    quantize_(
        module,
        Int4WeightOnlyConfig(
            group_size=32,
            int4_packing_format=fmt,
            activation_dtype=torch.bfloat16,
            set_inductor_config=False,
        ),
    )
    return module


@torch.no_grad()
def parallelized(fmt, sequence):
    m, x = quantized(Block(), fmt), torch.randn(2, 8, 128)
    expected = m(x)
    parallelize_module(m, mesh(), SEQUENCE_PLAN if sequence else PLAN)
    assert isinstance(m.up.weight, DTensor) and not m.up.weight.requires_grad
    x = distribute_tensor(x, mesh(), [Shard(1)]) if sequence else x
    got = m(x)
    got = got.full_tensor() if sequence else got
    torch.testing.assert_close(got, expected, **SUMS)
    again = m.to(torch.bfloat16)(x.to(torch.bfloat16))
    again = again.full_tensor() if sequence else again
    assert (again.float() - expected).norm() / expected.norm() < 0.02  # bfloat16


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_parallelize_module(two, fmt, sequence):
    two.run(parallelized, fmt, sequence)


def test_parallelize_module_on_four(four):
    four.run(parallelized, "plain", True)


@torch.no_grad()
def with_fsdp(fmt):
    """A mesh of two dims: FSDP2 over what tensor parallelism has sharded."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    m, x = quantized(Block(), fmt), torch.randn(2, 8, 128)
    expected = m(x)
    parallelize_module(m, both["tensor"], PLAN)
    fully_shard(m, mesh=both["data"])
    for _ in range(2):
        torch.testing.assert_close(m(x), expected, **SUMS)


@pytest.mark.parametrize("fmt", FORMATS)
def test_fsdp_over_tensor_parallel(four, fmt):
    four.run(with_fsdp, fmt)


# --- compiled graphs ------------------------------------------------------------------------------


@torch.no_grad()
def compiled(fmt):
    torch._dynamo.reset()
    m, x = quantized(Block(), fmt), torch.randn(2, 8, 128)
    expected = m(x)
    parallelize_module(m, mesh(), PLAN)
    torch.testing.assert_close(torch.compile(m)(x), expected, **SUMS)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
def test_compiled(two, fmt):
    two.run(compiled, fmt)


def keys():
    """Weights of one logical shape that must not find each other's compiled graphs."""
    plain, coalesced = LAYOUTS
    w, at = torch.randn(64, 64), {"device_mesh": mesh(), "placements": [Shard(0)]}
    weights = [
        plain.from_hp(w, [1, 32]),
        plain.from_hp(w, [1, 64]),
        coalesced.from_hp(w, [1, 32]),
        coalesced.from_hp(w, [1, 32], activation_dtype=torch.bfloat16),
        plain.from_hp(w, [1, 32]).transpose(0, 1),
    ]
    hashes = [distribute_tensor(t, **at)._stable_hash_for_caching() for t in weights]
    assert len(set(hashes)) == len(hashes)
    again = distribute_tensor(weights[0], **at)._stable_hash_for_caching()
    assert again == hashes[0]


@pytest.mark.skipif(
    not hasattr(DTensor, "_stable_hash_for_caching"), reason="this torch has no key of DTensor's"
)
def test_compiled_graphs_are_told_apart(two):
    two.run(keys)
