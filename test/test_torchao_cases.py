"""torchao's own test cases, run on both classes."""

import types

import pytest
import torch
import torchao.testing.utils as torchao_cases
from conftest import LAYOUTS

# torchao's cases compile the same function for every dtype and device.
pytestmark = pytest.mark.filterwarnings("ignore:torch._dynamo hit config:UserWarning")


def _case(base, layout):
    def body(namespace):
        namespace.update(
            TENSOR_SUBCLASS=layout,
            FACTORY_FN=staticmethod(layout.from_hp),
            kwargs={"block_size": [1, 32]},
            LINEAR_MIN_SQNR=20,
            __module__=__name__,
        )
        if not torch.cuda.is_available():  # this one calls .cuda() whatever its parameters say
            namespace["test_device1_to_device2_device1_cpu_device2_cpu"] = None

    name = f"{base.__name__.removeprefix('TorchAO')}{layout.__name__}"
    cls = types.new_class(name, (base,), exec_body=body)
    globals()[name] = cls


for _base in (torchao_cases.TorchAOBasicTestCase, torchao_cases.TorchAOCompileTestCase):
    for _layout in LAYOUTS:
        _case(_base, _layout)


def setup_function():
    torch._dynamo.reset()
