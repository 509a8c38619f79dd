"""Distributed checkpoints of 4-bit weights, read by other numbers of ranks; pipeline stages."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import group
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from int4q import (
    Int4SkipWarning,
    Int4WeightOnlyConfig,
    load_file,
    quantize_,
    save_file,
    to_coalesced_,
    to_plain_,
)

# What a load in one process says of itself.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
two, four = group(2), group(4)
FORMATS = ("plain", "cuda_coalesced")


def model(fmt, seed=0):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64)).requires_grad_(False)
    quantize_(
        m,
        Int4WeightOnlyConfig(
            group_size=32,
            int4_packing_format=fmt,
            activation_dtype=torch.bfloat16,
            set_inductor_config=False,
        ),
    )
    return m


def sharded(m, how):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "fsdp":
        return fully_shard(m, mesh=mesh)
    return parallelize_module(m, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def save(path, fmt, how):
    dcp.save(get_model_state_dict(sharded(model(fmt), how)), checkpoint_id=path)


def load(path, fmt, how):
    m = sharded(model(fmt, seed=1), how)
    state = get_model_state_dict(m)
    dcp.load(state, checkpoint_id=path)
    check(m, fmt)


def check(m, fmt):
    for (name, p), q in zip(m.named_parameters(), model(fmt).parameters(), strict=True):
        assert torch.equal(p.full_tensor() if hasattr(p, "full_tensor") else p, q), name


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("how", ["tensor", "fsdp"])
def test_two_ranks_to_four_and_one(two, four, tmp_path, fmt, how):
    path = str(tmp_path / "checkpoint")
    two.run(save, path, fmt, how)
    four.run(load, path, fmt, how)
    two.run(load, path, fmt, "fsdp" if how == "tensor" else "tensor")
    read_alone(path, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
def test_four_ranks_to_one(four, tmp_path, fmt):
    path = str(tmp_path / "checkpoint")
    four.run(save, path, fmt, "tensor")
    read_alone(path, fmt)
    m = model("cuda_coalesced" if fmt == "plain" else "plain", seed=1)  # into the other layout
    state = m.state_dict()
    dcp.load(state, checkpoint_id=path, no_dist=True)
    assert torch.equal(m[0].weight.dequantize(), model(fmt)[0].weight.dequantize())


def read_alone(path, fmt):
    m = model(fmt, seed=1)
    state = m.state_dict()
    dcp.load(state, checkpoint_id=path, no_dist=True)
    check(m, fmt)


# --- int4q's own ways to a model's weights --------------------------------------------------------


def saved(path, fmt, how):
    m = sharded(model(fmt), how)
    with pytest.raises(TypeError, match=r"plain tensor, got .*DTensor. Gather the shards with"):
        save_file(m, path)
    whole = get_model_state_dict(m, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        save_file(whole, path)
        loaded = load_file(path)
        expected = model(fmt).state_dict()["0.weight"]
        assert torch.equal(loaded["0.weight"], expected.to_int4_tensor())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("how", ["tensor", "fsdp"])
def test_save_file_takes_gathered_shards(two, tmp_path, fmt, how):
    pytest.importorskip("safetensors")
    two.run(saved, str(tmp_path / "model.safetensors"), fmt, how)


def sharded_first():
    plain = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64)).requires_grad_(False)
    for m, reason in (
        (plain, "sharded .*before it is sharded"),
        (model("plain"), "quantised already"),
    ):
        sharded(m, "tensor")
        with pytest.warns(Int4SkipWarning, match=reason):
            quantize_(m, Int4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    for convert in (to_coalesced_, to_plain_):
        with pytest.raises(ValueError, match="must be whole .*weight, sharded"):
            convert(m)


def test_quantising_comes_before_sharding(two):
    two.run(sharded_first)


# --- pipeline stages ------------------------------------------------------------------------------


def staged(fmt):
    m, x = model(fmt), torch.randn(8, 128)
    expected, rank = m(x), dist.get_rank()
    part = m[:1] if rank == 0 else m[1:]
    stage = PipelineStage(part, rank, dist.get_world_size(), torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=4)
    got = schedule.step(x) if rank == 0 else schedule.step()
    assert rank == 0 or torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_pipeline_stages(two, fmt):
    two.run(staged, fmt)
