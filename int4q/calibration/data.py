"""What a model is run on to calibrate it: batches as the user holds them, or random ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from int4q import errors

ROWS, LENGTH = 4, 512
"""Of the random ids that stand in for data."""
Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a model."""


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


def batches(model: nn.Module, data: Tensor | Iterable[Any] | None) -> Iterator[Call]:
    """Positional and keyword arguments of every call of the model.

    Raises:
        TypeError, ValueError: ``data`` is not what :func:`int4q.calibrate` takes.
    """
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


def _calls(model: nn.Module, data: Iterable[Any], device: Any) -> Iterator[Call]:
    twofold = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    for batch in data:
        if isinstance(batch, Mapping):
            call: Call = (), {name: _moved(t, device) for name, t in batch.items()}
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


def limited(calls: Iterable[Call], tokens: int | None) -> Iterator[Call]:
    """``calls`` up to the one that reaches so many tokens, all without a limit.

    Raises:
        ValueError: there is none.
    """
    seen, met = 0, False
    for call in calls:
        yield call
        met = True
        seen += _count(*call)
        if tokens is not None and seen >= tokens:
            break
    if not met:
        raise errors.value("data must hold one batch at least", "none")


def _count(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> int:
    """Rows of the first input: ids ``[B, T]``, embeddings ``[B, T, K]``."""
    first = next((t for t in (*arguments, *keywords.values()) if isinstance(t, Tensor)), None)
    if first is None:
        return 0
    return first.numel() if not first.is_floating_point() else first.numel() // first.shape[-1]
