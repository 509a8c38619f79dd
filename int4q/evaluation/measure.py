"""``int4q.evaluate``: perplexity, and how the next-token distributions differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from int4q import errors
from int4q.evaluation.layers import Layer, compare_layers

_POSITIONS = 256  # whose distributions are in float32 at a time


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        tokens: that were predicted.
        perplexity: ``exp`` of the mean negative log-likelihood of a token.
        reference_perplexity: of the original; ``None``, as all that follows, without one.
        kl: mean KL(original || model) of the next-token distributions, in nats.
        kl_error: standard error of ``kl``.
        top1: share of positions where both find the same token likeliest.
        layers: every 4-bit weight, the outputs on the first window.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    layers: tuple[Layer, ...] = ()

    def worst(self, n: int = 5) -> list[Layer]:
        """The ``n`` layers of the least SQNR, of outputs where that is known."""

        def sqnr(layer: Layer) -> float:
            return layer.weight_sqnr if layer.output_sqnr is None else layer.output_sqnr

        return sorted(self.layers, key=sqnr)[:n]

    def to_json(self) -> str:
        """All of it; what is not finite as ``null``."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: plain(v) for name, v in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return json.dumps(plain(asdict(self)), indent=1)


def evaluate(
    model: nn.Module,
    data: str | Tensor | Sequence[str | Tensor],
    *,
    tokenizer: Any = None,
    reference: nn.Module | None = None,
    window: int = 512,
    stride: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a causal language model on texts, alone and against the original.

    Windows of ``window`` tokens slide over each text by ``stride``; every token but the first of a
    text is predicted once, by the window in which it has most before it (the usual definition of
    perplexity for models of bounded context). Both models see one window at a time, and their
    logits are dropped before the next one.

    Args:
        model: called with ids ``[1, T]``; returns logits ``[1, T, V]`` or an object with them.
        data: a text or several (with ``tokenizer``), token ids ``[T]`` or several, or ``[n, T]``.
        tokenizer: called with a text; ``["input_ids"]`` of the result are its ids.
        reference: the original, on any device.
        window: at least 2 tokens.
        stride: 1 to ``window - 1``; by default half of ``window``.
        progress: show a bar.

    Raises:
        TypeError: ``data`` is none of these, or text without a tokenizer.
        ValueError: a window or stride out of range, or no text of two tokens or more.
    """
    if window < 2:
        raise errors.value("window must be 2 tokens at least", window)
    stride = window // 2 if stride is None else stride
    if not 1 <= stride < window:
        raise errors.value(f"stride must be 1 to {window - 1} (window - 1)", stride)
    windows = [w for ids in _ids(data, tokenizer) for w in _windows(ids, window, stride)]
    if not windows:
        raise errors.value("data must hold a text of two tokens at least", "none")
    sums = _Sums()
    with torch.no_grad(), _eval_mode(model, reference), Progress(disable=not progress) as bar:
        for ids, first in bar.track(windows, description="windows"):
            sums.add(ids[first:], _logits(model, ids, first), _logits(reference, ids, first))
        layers: list[Layer] = []
        if reference is not None:
            layers = compare_layers(model, reference, lambda m: _logits(m, *windows[0]))
    return sums.evaluation(layers)


class _Sums:
    """Over the predicted tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.nll = self.reference_nll = self.kl = self.kl_square = self.same = 0.0
        self.compared = False

    def add(self, ids: Tensor, logits: Tensor | None, reference: Tensor | None) -> None:
        """``ids [n]``, and the logits ``[n, V]`` that predict them."""
        if logits is None:
            return
        self.tokens += len(ids)
        for start in range(0, len(ids), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            q = F.log_softmax(logits[part].float(), -1)
            self.nll += F.nll_loss(q, ids[part].to(q.device), reduction="sum").item()
            if reference is None:
                continue
            self.compared = True
            p = F.log_softmax(reference[part].float(), -1).to(q.device)
            self.reference_nll += F.nll_loss(p, ids[part].to(p.device), reduction="sum").item()
            kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).double()
            self.kl += kl.sum().item()
            self.kl_square += kl.square().sum().item()
            self.same += (p.argmax(-1) == q.argmax(-1)).sum().item()

    def evaluation(self, layers: list[Layer]) -> Evaluation:
        n = self.tokens
        alone = Evaluation(n, _exp(self.nll / n))
        if not self.compared:
            return alone
        kl = self.kl / n
        variance = max(0.0, self.kl_square / n - kl * kl)
        return Evaluation(
            n,
            alone.perplexity,
            _exp(self.reference_nll / n),
            kl,
            math.sqrt(variance / n),
            self.same / n,
            tuple(layers),
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _logits(model: nn.Module | None, ids: Tensor, first: int) -> Tensor | None:
    """Logits ``[len(ids) - first, V]`` that predict ``ids[first:]``; ``None`` without a model."""
    if model is None:
        return None
    device = next((p.device for p in model.parameters()), ids.device)
    output = model(ids[None].to(device))
    logits: Tensor = getattr(output, "logits", output)
    return logits[0, first - 1 : -1]


def _windows(ids: Tensor, window: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Windows of ``ids``, and from where on their tokens are predicted."""
    done = 1  # (nothing comes before the first token)
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        if end > done:
            yield ids[start:end], done - start
        done = end
        if end == len(ids):
            return


def _ids(data: Any, tokenizer: Any) -> Iterator[Tensor]:
    """int64 ``[T]`` of every text."""
    if isinstance(data, str):
        if tokenizer is None:
            raise errors.type_("text needs a tokenizer=", "None")
        yield torch.as_tensor(tokenizer(data)["input_ids"], dtype=torch.int64).flatten()
    elif isinstance(data, Tensor) and data.ndim == 1 and not data.is_floating_point():
        yield data.long().cpu()
    elif isinstance(data, (list, tuple)) or (isinstance(data, Tensor) and data.ndim == 2):
        for each in data:
            yield from _ids(each, tokenizer)
    else:
        got = f"{data.dtype} tensor" if isinstance(data, Tensor) else type(data).__name__
        raise errors.type_("data must be texts, or token ids [T] or [n, T]", got)


@contextmanager
def _eval_mode(*models: nn.Module | None) -> Iterator[None]:
    modes = {m: m.training for model in models if model is not None for m in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
