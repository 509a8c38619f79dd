"""An op that the C++ core runs from plans on a CPU, for the stand-in of a driver."""

from __future__ import annotations

import torch
from fake_cuda import launch

from int4q import errors
from int4q.kernels.core import library
from int4q.kernels.launch.record import planned

_core = library.load()[0]


class TwoLaunches:
    """An op ``(x [M, K], w [N, K/2], bias?, factor, flag) -> [M, N]`` of two launches."""

    def __init__(self):
        self.first = self.second = 0
        self.runs = 0
        self.planned = planned(self.body)

    def use(self, fake):
        self.first, self.second = fake.function(*[8] * 5, 4, 4, 128), fake.function(8, 8, 4)
        self.runs = 0

    def body(self, x, w, bias=None, factor=5, flag=False):
        if factor < 0:
            raise errors.value("factor must not be negative", factor)
        out = x.new_empty((x.shape[0], w.shape[0]))
        part = x.new_empty((3, 5), dtype=torch.float32)
        count = torch.empty(9, dtype=torch.int32)
        tensors = x, w[1:], bias, part, count
        launch(self.first, tensors, factor, int(flag), dependent=True, box=w)
        launch(self.second, (part, out), x.shape[0], grid=(8, x.shape[0], 1))
        return out

    def __call__(self, *args):
        self.runs += 1
        return self.body(*args)


SCHEMA = "(Tensor x, Tensor w, Tensor? bias=None, int factor=5, bool flag=False) -> Tensor"
LETTERS = "TTOii"
LIBRARY = torch.library.Library("int4q", "FRAGMENT")


def register(name, run, schema, letters, outputs=1):
    for one in (name, f"plan_{name}"):
        LIBRARY.define(one + schema)
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    plan = library.planning(_core, run, letters, outputs)
    LIBRARY.impl(f"plan_{name}", plan, "CompositeExplicitAutograd")
    library.launcher(_core, name, f"int4q::plan_{name}", letters, "CPU")
    return getattr(torch.ops.int4q, name).default


TWO = TwoLaunches()
OP = None if _core is None else register("test_two_launches", TWO, SCHEMA, LETTERS)


def parts(M=2, seed=0):
    torch.manual_seed(seed)
    w = torch.randint(-128, 128, (4, 8), dtype=torch.int8)
    return torch.randn(M, 16, dtype=torch.bfloat16), w


def named(seen, **tensors):
    """Launches with addresses by their names: two runs of one kind are equal."""
    names = {t.data_ptr().to_bytes(8, "little"): name for name, t in tensors.items()}
    scratch: dict[bytes, str] = {}

    def name(parameter):
        if len(parameter) == 128:
            return name(parameter[:8]), parameter[8:]
        if len(parameter) == 8 and any(parameter):
            return names.get(parameter) or scratch.setdefault(parameter, f"scratch{len(scratch)}")
        return parameter

    return [s._replace(parameters=tuple(map(name, s.parameters))) for s in seen]
