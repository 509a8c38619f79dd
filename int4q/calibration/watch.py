"""Hooks on a model that runs: what its weights are multiplied with is summed up."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from int4q import errors
from int4q.calibration.moments import MIN_TOKENS, CalibrationWarning, Moments
from int4q.calibration.products import WatchedProducts
from int4q.calibration.sums import Batch, Sums
from int4q.coverage import expert_parameters, linear_parameters


def weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Full name, module and parameter of everything whose inputs are looked at."""
    for prefix, module in model.named_modules():
        for name in (*linear_parameters(module), *expert_parameters(module)):
            w = module._parameters.get(name)
            if w is not None and not isinstance(w, TorchAOBaseTensor):
                yield f"{prefix}.{name}" if prefix else name, module, w


class Gathering:
    """Watches a model within its ``with`` block.

    Args:
        model: that runs then.
        with_hessian: sum up ``x_i * x_k`` too.
        within: modules to watch; by default all.
    """

    def __init__(
        self, model: nn.Module, with_hessian: bool, within: Collection[nn.Module] | None = None
    ):
        self._model, self._with_hessian = model, with_hessian
        self._sums: dict[int, Sums] = {}  # by id of the weight: tied ones count together
        self._names: dict[str, int] = {}
        self._last: tuple[Tensor, int | None, Batch] | None = None
        self._called: dict[nn.Module, int] = {}
        self._watched: list[Tensor] = []
        for name, module, w in weights(model):
            if within is not None and module not in within:
                continue
            stacked = w.ndim == 3
            self._sums.setdefault(id(w), Sums(w.shape[0] if stacked else None))
            self._names[name] = id(w)
            called = len(linear_parameters(module)) == 1 and not _is_attentions(module)
            if called and not stacked:
                self._called[module] = id(w)
            else:
                self._watched.append(w)

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for module, key in self._called.items():
                handle = module.register_forward_pre_hook(self._hook(key), with_kwargs=True)
                stack.callback(handle.remove)
            if self._watched:
                stack.enter_context(_seen_by_torch(self._model))
                stack.enter_context(WatchedProducts(self._watched, self._report))
            self._stack = stack.pop_all()

    def __exit__(self, *exception: Any) -> None:
        self._last = None
        self._stack.close()

    def _hook(self, key: int) -> Any:
        def add(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = arguments[0] if arguments else next(iter(keywords.values()))
            self._sums[key].add(self._batch(x))

        return add

    def _report(self, w: Tensor, x: Tensor, expert: int) -> None:
        self._sums[id(w)].add(self._batch(x), expert)

    def _batch(self, x: Tensor) -> Batch:
        """The sums of ``x``, which the layer before may have taken too."""
        version = None if x.is_inference() else x._version
        if self._last is None or self._last[0] is not x or self._last[1] != version:
            self._last = x, version, Batch(x, self._with_hessian)
        return self._last[2]

    def result(self) -> dict[str, Moments]:
        """The means by name; weights of one history of inputs get one object.

        Raises:
            ValueError: some of the inputs were not finite.
        """
        shared: dict[Any, Any] = {}
        moments = {}
        for name, key in self._names.items():
            sums = self._sums[key]
            if not sums.square:
                continue
            history = sums.experts, sums.history
            if history not in shared:
                shared[history] = sums.moments()
            moments[name] = shared[history]
        bad = [n for n, m in moments.items() if not bool(m.mean_square.isfinite().all())]
        if bad:
            raise errors.value("inputs of weights must be finite", f"NaN or Inf in {bad}")
        self._warn_of_rare()
        return moments

    def _warn_of_rare(self) -> None:
        rare = {n: len(self._sums[key].rare) for n, key in self._names.items()}
        rare = {n: few for n, few in rare.items() if few and self._sums[self._names[n]].square}
        if rare:
            listed = ", ".join(f"{name} ({few})" for name, few in rare.items())
            warnings.warn(
                f"experts that met fewer than {MIN_TOKENS} tokens take the moments of their whole "
                f"layer: {listed}. More data serves them better",
                CalibrationWarning,
                stacklevel=4,
            )


def _is_attentions(module: nn.Module) -> bool:
    """Whether ``nn.MultiheadAttention`` reads the weight and never calls the module."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module is in its own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _seen_by_torch(model: nn.Module) -> Iterator[None]:
    """Products in the open: no fused attention, transformers' experts one by one."""
    held = (getattr(m, "config", None) for m in model.modules() if expert_parameters(m))
    configs: dict[int, Any] = {
        id(c): c for c in held if c is not None and hasattr(c, "_experts_implementation")
    }
    before = {key: c._experts_implementation for key, c in configs.items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for c in configs.values():
        c._experts_implementation = "eager"
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for key, c in configs.items():
            c._experts_implementation = before[key]
