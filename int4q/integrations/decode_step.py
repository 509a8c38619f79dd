"""One token's forward pass over buffers that stay in place, and how it is run.

What follows a model around from one call of ``generate`` to the next is here; the loop is in
``generation.py``.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from int4q.integrations.decode_attention import attention_of_one_token
from int4q.prepare.modules import HELD

KEPT = 4
"""Steps kept a model: each has a cache of keys and values of its own."""
_PLAIN = {bool, int, float, str, type(None)}
_CONTAINERS = (dict, list, tuple, set)
_NO_FACT = vars(nn.Module()).keys() - {"training", "_parameters", "_buffers"} | {HELD}
"""Module attributes that say nothing more: children, hooks (with which no graph is captured), and
weights whose parts are buffers too."""

_CAPTURE = threading.Lock()  # torch waits for the device before it captures, which ends another's
_STEPS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Step]] = weakref.WeakKeyDictionary()


# --- runners --------------------------------------------------------------------------------------


class Eager:
    """Runs a step as it is."""

    reason: str | None = None

    def __call__(self, forward: Callable[[], Tensor]) -> Tensor:
        """The result of ``forward``."""
        return forward()


class CapturedGraph:
    """Runs a step once as it is, captures it in a CUDA graph the next time, then replays that.

    The first run loads kernels and makes their plans, which a capture may not do. Where a capture
    fails, the step goes on being run as it is, and ``reason`` says why.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor

    def __call__(self, forward: Callable[[], Tensor]) -> Tensor:
        """What ``forward`` gives, in the same memory from the second call on."""
        if self.reason or not self._is_warm:
            self._is_warm = True
            return forward()
        if self._graph is None:
            try:
                self._graph, self._output = _captured(forward)
            except RuntimeError as error:
                self.reason = str(error).split("\n")[0]
                # torch's random numbers stay those of a capture until one ends well.
                _captured(lambda: torch.zeros(1, device="cuda"))
                return forward()
        self._graph.replay()
        return self._output


def _captured(forward: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph, own = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # torch's is all threads'
    with _CAPTURE, torch.cuda.graph(graph, None, own, "thread_local"):
        output = forward()
    return graph, output


# --- the step -------------------------------------------------------------------------------------


def static_cache(model: Any, length: int) -> Any:
    """A ``StaticCache`` none of whose layers counts on the host, or ``TypeError``.

    A sliding window's layer would (it rolls once it is full). It gets the whole length instead:
    the mask, which goes by absolute positions, leaves out what is beyond the window.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=model.config, max_cache_len=length)
    layers = []
    for layer in cache.layers:
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            raise TypeError(f"its cache has layers of {type(layer).__name__}")
        layers.append(StaticLayer(max_cache_len=length))
    if not isinstance(getattr(layers[0], "cumulative_length", None), Tensor):
        raise TypeError("this version of transformers counts a static cache's tokens on the host")
    cache.layers = layers
    return cache


class Step:
    """The buffers of one token's forward: a cache of keys and values, token ids, positions, mask.

    Args:
        cache: of :func:`static_cache`, for ``length`` tokens.
        length: of the cache.
        runner: :class:`CapturedGraph` or :class:`Eager`.
        is_compiled: whether ``torch.compile`` makes the forward.
    """

    def __init__(self, cache: Any, length: int, runner: Any, is_compiled: bool = False):
        self.cache, self.length = cache, length
        self.runner = runner
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None
        self._call = _compiled() if is_compiled else _logits

    def prefill(self, model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """The prompt's forward; returns the logits ``[B, V]`` after its last token."""
        self.cache.reset()
        self._start(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
        model_kwargs = {**model_kwargs, "past_key_values": self.cache}
        inputs = model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=True, **model_kwargs
        )
        return _logits(model, inputs)

    def __call__(self, model: Any, tokens: Tensor) -> Tensor:
        """The forward of ``tokens`` int64 ``[B]``; the logits ``[B, V]`` are overwritten next."""
        self.ids.copy_(tokens.unsqueeze(1))
        return self.runner(lambda: self._forward(model))

    def _start(self, input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
        """Fill the buffers, which are made by the first prompt."""
        if self.ids is None:
            self.ids = torch.empty_like(input_ids[:, -1:])
            self.mask = None if mask is None else mask.new_empty(len(mask), self.length)
            self.positions = None if positions is None else positions[..., -1:].clone()
        if mask is not None:  # tokens to come are seen; the causal mask leaves out those after
            self.mask.fill_(1)[:, : mask.shape[1]] = mask
        if positions is not None:
            self.positions.copy_(positions[..., -1:] + 1)

    def _forward(self, model: Any) -> Tensor:
        with attention_of_one_token(model) if self.ids.is_cpu else nullcontext():
            inputs = model.prepare_inputs_for_generation(
                self.ids,
                past_key_values=self.cache,
                attention_mask=self.mask,
                position_ids=self.positions,
                use_cache=True,
            )
            # transformers multiplies few tokens by its experts in another way than a prompt.
            with getattr(model, "_optimize_model_for_decode", nullcontext)():
                logits = self._call(model, inputs)
        if self.positions is not None:
            self.positions += 1
        return logits


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs, return_dict=True).logits
    return logits[:, -1]


def _compiled() -> Callable[..., Tensor]:
    """:func:`_logits` compiled for one step alone, and not checked against the model at each token.

    A step is kept under all that the guards of a graph would look at (:func:`state_of`); looking
    takes as long as some layers do. Graphs belong to a function's code, so each has its own.
    """
    own = types.FunctionType(_logits.__code__.replace(), globals())
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "size_asserts": False}
    return torch.compile(own, dynamic=False, options=options)


# --- kept from one call to the next ---------------------------------------------------------------


def take(model: nn.Module, key: Any) -> Step | None:
    """A kept step, which then is the caller's alone: two threads never share buffers."""
    return _STEPS.setdefault(model, {}).pop(key, None)


def keep(model: nn.Module, key: Any, step: Step) -> None:
    """Have :func:`take` find ``step``; of a model's steps the last ``KEPT`` stay."""
    steps = _STEPS.setdefault(model, {})
    steps[key] = step
    for oldest in list(steps)[:-KEPT]:
        steps.pop(oldest, None)


def drop(model: nn.Module) -> None:
    """Free the graphs and caches that are kept of a model."""
    _STEPS.pop(model, None)


def state_of(model: nn.Module) -> int:
    """A hash of all that a graph of the model's forward has in it besides the values of weights.

    Where each tensor lies, and what its modules say of themselves in plain attributes
    (``training``, the active adapter, ..): where any of it differs, so would a new graph.
    """
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    return hash(tuple(map(_facts, (*modules, *configs.values()))))


def _facts(holder: Any) -> Any:
    items = vars(holder).items()
    return type(holder), *(_fact(item) for item in items if item[0] not in _NO_FACT)


def _fact(item: tuple[Any, Any]) -> Any:
    name, value = item
    if type(value) in _PLAIN:
        return name, value
    if isinstance(value, _CONTAINERS):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return (name, *map(_fact, items)) if value else name
    if isinstance(value, nn.Module):  # (its own facts are among them)
        return name
    return (name, _place(value)) if isinstance(value, Tensor) else (name, id(value))


def _place(t: Tensor) -> Any:
    if hasattr(t, "__tensor_flatten__"):
        return tuple(_place(getattr(t, name)) for name in t.__tensor_flatten__()[0])
    return t.data_ptr(), t.shape, t.stride(), t.dtype
