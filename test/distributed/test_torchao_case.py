"""torchao's tensor-parallel case on both layouts: its own code, on CPU ranks in place of GPUs."""

import inspect
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from ranks import group
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.overrides import TorchFunctionMode

from int4q import Int4WeightOnlyConfig

two = group(2)


class OnCpu(TorchFunctionMode):
    """Runs what names "cuda" on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def cpu(a):
            return "cpu" if isinstance(a, (str, torch.device)) and "cuda" in str(a) else a

        return func(*map(cpu, args), **{k: cpu(v) for k, v in (kwargs or {}).items()})


class CpuMesh(DeviceMesh):
    device_type = property(lambda self: "cpu", lambda self, kind: None)


def mesh():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mesh.__class__ = CpuMesh
    return mesh


def case(fmt, dtype):
    import torchao.testing.utils as torchao_cases

    cls = torchao_cases.TorchAOTensorParallelTestCase
    self = SimpleNamespace(
        rank=dist.get_rank(),
        build_device_mesh=mesh,
        colwise_shard=cls.colwise_shard,
        rowwise_shard=cls.rowwise_shard,
        QUANT_METHOD_FN=Int4WeightOnlyConfig,
        QUANT_METHOD_KWARGS={"int4_packing_format": fmt, "set_inductor_config": False},
    )
    self.quantize = lambda m: cls.quantize(self, m)
    torch._dynamo.reset()
    with mock.patch("torch.cuda.device_count", lambda: 1), OnCpu():
        test = next(getattr(cls, name) for name in dir(cls) if name.startswith("test_tp"))
        inspect.unwrap(test)(self, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", ["plain", "cuda_coalesced"])
def test_tp(two, fmt, dtype):
    two.run(case, fmt, dtype)
