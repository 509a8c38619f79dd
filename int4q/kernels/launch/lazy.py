"""GPU kernels are imported at their first call: what a table entry needs for that."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from int4q.kernels.weight import Weight

module: Callable[[str], ModuleType] = functools.cache(importlib.import_module)
"""``import_module``, remembered: a call through the table looks its module up every time."""


def lazy(module_name: str, function: str, **fixed) -> Callable[..., Tensor]:
    """``function`` of a module that is imported at the first call, ``fixed`` keywords added."""

    def run(*arguments):
        return getattr(module(module_name), function)(*arguments, **fixed)

    return run


def on_its_device(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run`` with the device of its first argument current, where Triton launches."""

    def guarded(first: Tensor | Weight, *rest):
        tensor = first.qdata if isinstance(first, Weight) else first
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(tensor.device):
            return run(first, *rest)

    return guarded
