"""``int4q.calibrate``: run a model and look at the inputs of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from int4q import errors
from int4q.calibration.moments import MIN_TOKENS, Calibration, CalibrationWarning
from int4q.calibration.products import WatchedProducts
from int4q.calibration.sums import Batch, Sums
from int4q.coverage import expert_parameters, linear_parameters

STATISTICS = ("importance", "hessian")
ROWS, LENGTH = 4, 512
"""Of the random ids that stand in for data."""


def calibrate(
    model: nn.Module,
    data: Tensor | Iterable[Any] | None = None,
    *,
    statistics: str = "importance",
    tokens: int | None = None,
) -> Calibration:
    """Run ``model`` and gather the second moments of the inputs of its weights.

    Weights of linear layers (the output head too), stacks of experts, each expert by its own
    tokens, and the projections of ``nn.MultiheadAttention``; sums in float32, on the device of the
    inputs. The model runs as it is, without gradients and in eval mode, and is left as it was.

    Args:
        model: unquantised; on the devices where it runs.
        data: token ids ``[n, T]`` of any integer dtype, run a row at a time; or an iterable of
            batches, each a tensor or a tuple (positional arguments of the model) or a mapping
            (keyword arguments), without padding. ``None``: 4 x 512 random ids, uniform over
            the vocabulary without the special tokens that the model's config names, always the
            same; nearly as good as text for ``"importance"``, not for ``"hessian"``.
        statistics: ``"importance"``: ``E[x_k ** 2]``, K numbers an input, for ``"search"``;
            ``"hessian"``: ``E[x_i * x_k]`` too, K * K numbers, for ``"gptq"``. All of them are
            held at once: 4 K^2 bytes a weight (for each expert of a mixture) while the model runs,
            39 GB for one of 8 billion weights, then one for those that share an input, 33 GB.
        tokens: stop after the batch that reaches so many (rows of ids, or of embeddings).

    Returns:
        The moments by parameter name, for :func:`int4q.quantize_` and to be saved. A weight that no
        batch reached has none. An expert with fewer than 32 tokens has those of its whole layer,
        which a :class:`CalibrationWarning` says.

    Raises:
        TypeError: ``model`` is no module, or ``data`` none of these.
        ValueError: unknown ``statistics``, a padded batch, a model without token ids and no data,
            no batch at all, or inputs that are not finite (the message names the weights).
    """
    if not isinstance(model, nn.Module):
        raise errors.type_("model must be a torch.nn.Module", type(model).__name__)
    if statistics not in STATISTICS:
        raise errors.value(f"statistics must be one of {STATISTICS}", repr(statistics))
    batches = _batches(model, data)
    gathering = _Gathering(model, statistics == "hessian")
    seen, met = 0, False
    with torch.no_grad(), _in_eval_mode(model), gathering:
        for arguments, keywords in batches:
            model(*arguments, **keywords)
            met = True
            seen += _count(arguments, keywords)
            if tokens is not None and seen >= tokens:
                break
    if not met:
        raise errors.value("data must hold one batch at least", "none")
    return gathering.result()


class _Gathering:
    """Watches a model within its ``with`` block."""

    def __init__(self, model: nn.Module, with_hessian: bool):
        self._model, self._with_hessian = model, with_hessian
        self._sums: dict[int, Sums] = {}  # by id of the weight: tied ones count together
        self._names: dict[str, int] = {}
        self._last: tuple[Tensor, int | None, Batch] | None = None
        self._called: dict[nn.Module, int] = {}
        self._watched: list[Tensor] = []
        for prefix, module in model.named_modules():
            for name in (*linear_parameters(module), *expert_parameters(module)):
                w = module._parameters.get(name)
                if w is None or isinstance(w, TorchAOBaseTensor):
                    continue
                stacked = w.ndim == 3
                self._sums.setdefault(id(w), Sums(w.shape[0] if stacked else None))
                self._names[f"{prefix}.{name}" if prefix else name] = id(w)
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

    def result(self) -> Calibration:
        """The means; weights of one history of inputs get one object."""
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
        return Calibration(moments)

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


# --- the model while it is watched ----------------------------------------------------------------


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
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


# --- data -----------------------------------------------------------------------------------------

_Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def random_ids(model: nn.Module, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """int64 ``[rows, length]``, uniform over the vocabulary without special tokens.

    Always the same; shorter where the model has fewer positions.

    Raises:
        ValueError: the model takes no token ids, as far as transformers' conventions tell.
    """
    embedding = _ids_embedding(model)
    if embedding is None:
        raise errors.value(
            "without data the model must be one of transformers that takes input_ids",
            type(model).__name__,
            "Pass data=, an iterable of batches such as the model is called with",
        )
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    allowed = torch.ones(min(embedding.num_embeddings, config.vocab_size), dtype=torch.bool)
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_ids")) and value is not None:
            special = torch.tensor(value).flatten()
            allowed[special[(special >= 0) & (special < len(allowed))]] = False
    ids = allowed.nonzero().squeeze(1)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    generator = torch.Generator().manual_seed(0)
    return ids[torch.randint(len(ids), (rows, length), generator=generator)]


def _ids_embedding(model: nn.Module) -> nn.Embedding | None:
    """The embedding of the ids that a model of transformers takes first, if it does."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return embedding if isinstance(embedding, nn.Embedding) else None


def takes_random_ids(model: nn.Module) -> bool:
    """Whether :func:`calibrate` can run the model as it is held, without data."""
    held = all(p.device.type != "meta" for p in model.parameters())
    return held and _ids_embedding(model) is not None


def _batches(model: nn.Module, data: Tensor | Iterable[Any] | None) -> Iterator[_Call]:
    if data is None:
        data = random_ids(model)
    device = next((p.device for p in model.parameters()), None)
    if isinstance(data, Tensor):
        if data.ndim != 2 or data.is_floating_point() or data.dtype == torch.bool:
            raise errors.type_(
                "data must be token ids [n, T] of an integer dtype, or an iterable of batches",
                f"{data.dtype} {errors.dims(data.shape)}",
                "Pass [data] for one batch",
            )
        return _calls(model, (row[None].long() for row in data), device)
    if isinstance(data, (str, Mapping)) or not isinstance(data, Iterable):
        raise errors.type_(
            "data must be token ids [n, T] or an iterable of batches", type(data).__name__
        )
    return _calls(model, data, device)


def _calls(model: nn.Module, data: Iterable[Any], device: Any) -> Iterator[_Call]:
    twofold = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    for batch in data:
        if isinstance(batch, Mapping):
            call: _Call = (), {name: _moved(t, device) for name, t in batch.items()}
        elif isinstance(batch, (tuple, list)):
            call = tuple(_moved(t, device) for t in batch), {}
        elif isinstance(batch, Tensor):
            ids = _moved(batch, device)
            decoder = twofold is True and not ids.is_floating_point()
            call = (ids,), {"decoder_input_ids": ids} if decoder else {}
        else:
            raise errors.type_("a batch must be a tensor, a tuple or a mapping", batch)
        mask = call[1].get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            raise errors.value(
                "a batch must hold no padding",
                "an attention_mask with zeros",
                "Pass texts one at a time, or cut them to one length",
            )
        yield call


def _moved(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


def _count(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> int:
    """Rows of the first input: ids ``[B, T]``, embeddings ``[B, T, K]``."""
    first = next((t for t in (*arguments, *keywords.values()) if isinstance(t, Tensor)), None)
    if first is None:
        return 0
    return first.numel() if not first.is_floating_point() else first.numel() // first.shape[-1]
