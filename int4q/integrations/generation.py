"""``cuda_graph_generate``: transformers' ``generate``, the forward of a token one CUDA graph.

On a CPU, where there are none, the forward runs as it is or compiled.

    model.generate(ids, custom_generate=int4q.cuda_graph_generate)

transformers' own loop leaves a GPU waiting for Python between the kernels of a token.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from int4q import errors
from int4q.integrations import decode_step
from int4q.integrations.decode_step import CapturedGraph, Eager, Step

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation import BaseStreamer

_DEVICES = ("cuda", "cpu")
_MODES = ("greedy_search", "sample")
_INPUTS = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
"""Of the arguments of a model, those that the loop knows to carry on from token to token."""
_OWN_HOOKS = "transformers."


class GraphFallbackWarning(UserWarning):
    """Tokens come from transformers' own loop, or without a graph; the message says why."""


def cuda_graph_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    compile_forward: bool = False,
    **model_kwargs: Any,
) -> Any:
    """A decoding loop for transformers' ``generate``, passed as its ``custom_generate``.

    Greedy decoding and sampling, with transformers' own logits processors, stopping criteria and
    streamers, for one prompt or a batch padded on the left: the tokens of
    ``generate(cache_implementation="static")``. The forward of a token, in eager mode, is captured
    once in a CUDA graph and replayed. Token ids, positions and the end of a sequence stay on the
    GPU: the host reads a token late whether all sequences have ended, except where a criterion of
    your own or sampling wants to know at once.

    Graphs, each with a cache of keys and values for the whole ``max_length``, are kept for the next
    call with the same batch size and a like length, the last four of a model;
    :func:`drop_cuda_graphs` frees them, as does the end of the model. A changed model is captured
    anew. Threads do not share them.

    On a CPU there are no graphs: the same loop runs the forward as it is, or compiled, and the
    attention of a token as two products, which rounds in another order.

    Where the model is on neither, or it, its cache or a request does not fit in a graph, a
    :class:`GraphFallbackWarning` says why and transformers' own loop runs; if only the capture
    fails, this one does without.

    Args:
        model: a decoder-only model of transformers. It and the next arguments are ``generate``'s.
        input_ids: int64 ``[B, L]``.
        logits_processor: as made by ``generate``.
        stopping_criteria: as made by ``generate``.
        generation_config: as completed by ``generate``.
        synced_gpus: not supported, see above.
        streamer: gets each token; ``generate`` keeps it from a ``custom_generate``, so it is looked
            up there.
        compile_forward: have ``torch.compile`` make the forward before it is captured; takes the
            compiler's time once, and rounds as its kernels do.
        model_kwargs: of the model's forward.

    Returns:
        int64 ``[B, L + new tokens]``, or what ``return_dict_in_generate`` asks for.

    Raises:
        ValueError: a way of decoding other than greedy and sampling (beams, an assistant, ..).
    """
    streamer, assistant = streamer or _given("streamer"), _given("assistant_model")
    mode = generation_config.get_generation_mode(assistant)
    if mode not in _MODES:
        raise errors.value(
            "cuda_graph_generate decodes greedily or samples, one token a sequence at a time",
            getattr(mode, "value", mode),
            "Leave custom_generate out",
        )
    request = logits_processor, stopping_criteria, generation_config
    reason = _unsuited(model, input_ids, generation_config, synced_gpus, model_kwargs)
    if reason is None:
        try:
            key, step = _step(model, input_ids, generation_config, model_kwargs, compile_forward)
        except TypeError as error:
            reason = str(error)
    if reason is not None:
        warnings.warn(f"no CUDA graph: {reason}", GraphFallbackWarning, stacklevel=4)
        return type(model)._sample(
            model, input_ids, *request, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs
        )
    had = step.runner.reason
    with torch.cuda.device(input_ids.device) if input_ids.is_cuda else nullcontext():
        result = decode(model, step, input_ids, *request, streamer, model_kwargs)
    if not generation_config.return_dict_in_generate:  # (then its cache is the caller's)
        decode_step.keep(model, key, step)
    if step.runner.reason not in (None, had):
        warnings.warn(f"no CUDA graph: {step.runner.reason}", GraphFallbackWarning, stacklevel=4)
    return result


def drop_cuda_graphs(model: Any) -> None:
    """Free the CUDA graphs and caches that :func:`cuda_graph_generate` keeps of ``model``."""
    decode_step.drop(model)


def _given(name: str) -> Any:
    """An argument of the ``generate`` that calls ``cuda_graph_generate``.

    transformers (5.23, and before) hands a callable neither its streamer nor its assistant: tokens
    would not be streamed, and whoever waits for the end of the stream would wait for ever.
    """
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame and frame.f_back else None
    return caller.f_locals.get(name) if caller and caller.f_code.co_name == "generate" else None


# --- what fits ------------------------------------------------------------------------------------


def _unsuited(
    model: Any, input_ids: Tensor, config: GenerationConfig, synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> str | None:  # fmt: skip
    """Why no graph of the model's forward can serve this call, or ``None``."""
    others = [n for n, v in model_kwargs.items() if v is not None and n not in _INPUTS]
    devices = _devices(model)
    if len(devices) > 1 or not {d.type for d in devices} <= set(_DEVICES):
        on = ", ".join(sorted(map(str, devices)))
        return f"the model is on {on}, not on one CUDA device or a CPU"
    if {input_ids.device} != devices:
        return f"the token ids are on {input_ids.device}"
    if model.config.is_encoder_decoder:
        return "an encoder-decoder model"
    if synced_gpus or (getattr(model, "_tp_size", None) or 1) > 1:
        return "the model is spread over several processes"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if config.prefill_chunk_size is not None or not model_kwargs.get("use_cache"):
        return "prefill_chunk_size, or use_cache=False"
    if getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False):
        return "a cache was passed"
    if others:
        return f"the model is given {', '.join(others)}"
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(not getattr(h, "__module__", "").startswith(_OWN_HOOKS) for h in hooks):
            return f"{name or 'the model'} has a forward hook, which a graph does not call"
    return None


def _devices(model: Any) -> set[torch.device]:
    return {t.device for t in (*model.parameters(), *model.buffers())}


def _step(
    model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any],
    is_compiled: bool,
) -> tuple[Any, Step]:  # fmt: skip
    """A step with room for the call, a kept one if there is one, and the key to keep it under."""
    length = cache_length(config.max_length - 1)
    positions, device = model_kwargs.get("position_ids"), input_ids.device.type
    key = (
        length, len(input_ids), model_kwargs.get("attention_mask") is None,
        None if positions is None else positions[..., -1:].shape, is_compiled,
        torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device), decode_step.state_of(model),
    )  # fmt: skip
    step = decode_step.take(model, key)
    if step is None:
        cache = decode_step.static_cache(model, length)
        runner = CapturedGraph() if input_ids.is_cuda else Eager()
        step = Step(cache, length, runner, is_compiled)
    return key, step


def cache_length(tokens: int) -> int:
    """Room for ``tokens``, rounded up by an eighth at most (256 at least): few lengths to keep."""
    unit = max(256, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // unit) * unit


# --- the loop -------------------------------------------------------------------------------------


@torch.no_grad()
def decode(
    model: Any,
    step: Step,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> Any:
    """Tokens until the criteria are met, each of one ``step``."""
    batch, length = input_ids.shape
    sequences = input_ids.new_empty(batch, config.max_length)
    sequences[:, :length] = input_ids
    unfinished = torch.ones(batch, dtype=torch.long, device=input_ids.device)
    ends_early = any(hasattr(c, "eos_token_id") for c in stopping_criteria)
    pad = config._pad_token_tensor
    scores: list[Tensor] = []
    raw: list[Tensor] = []
    stop = _stop_check(config, stopping_criteria, input_ids, streamer)

    logits = step.prefill(model, input_ids, model_kwargs)
    while True:
        logits = logits.to(torch.float32, copy=True)  # (a processor may work in place)
        processed = logits_processor(sequences[:, :length], logits)
        if config.output_logits:
            raw.append(logits)
        if config.output_scores:
            scores.append(processed)
        tokens = _selected(processed, config.do_sample)
        if ends_early:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        sequences[:, length] = tokens
        length += 1
        unfinished &= ~stopping_criteria(sequences[:, :length], tuple(scores) or None)
        if stop(unfinished, tokens) or length == config.max_length:
            break
        logits = step(model, tokens)
    surplus = stop.finish()
    found = sequences[:, : length - surplus].clone()
    if not config.return_dict_in_generate:
        return found
    from transformers.generation import GenerateDecoderOnlyOutput

    count = length - surplus - input_ids.shape[1]
    return GenerateDecoderOnlyOutput(
        sequences=found,
        scores=tuple(scores[:count]) if config.output_scores else None,
        logits=tuple(raw[:count]) if config.output_logits else None,
        past_key_values=step.cache,
    )


def _selected(scores: Tensor, do_sample: bool | None) -> Tensor:
    if do_sample:
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
    return scores.argmax(dim=-1)


class StopNow:
    """Waits for the device after each token."""

    def __init__(self, streamer: BaseStreamer | None):
        self.streamer = streamer

    def __call__(self, unfinished: Tensor, tokens: Tensor) -> bool:
        """Whether to stop after ``tokens [B]``; ``unfinished [B]`` says which sequences go on."""
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        return not unfinished.any()

    def finish(self) -> int:
        """End the stream; returns how many tokens are too many."""
        if self.streamer is not None:
            self.streamer.end()
        return 0


class StopLater(StopNow):
    """Learns of a token's end with the next one, so that the device has work all the time.

    Two sets of page-locked buffers take turns: one is being written, one is read.
    """

    def __init__(self, streamer: BaseStreamer | None, batch: int):
        super().__init__(streamer)
        self._slots = [
            (
                torch.empty((), dtype=torch.bool, pin_memory=True),
                torch.empty(batch, dtype=torch.long, pin_memory=True),
                torch.cuda.Event(),
            )
            for _ in range(2)
        ]
        self._count = 0
        self._over = False

    def __call__(self, unfinished: Tensor, tokens: Tensor) -> bool:
        """As :meth:`StopNow.__call__`, of the token before."""
        going_on, on_host, done = self._slots[self._count % 2]
        going_on.copy_(unfinished.any(), non_blocking=True)
        on_host.copy_(tokens, non_blocking=True)
        done.record()
        self._count += 1
        self._over = self._count > 1 and not self._read(self._count)
        return self._over

    def _read(self, slot: int) -> bool:
        going_on, tokens, done = self._slots[slot % 2]
        done.synchronize()
        if self.streamer is not None:
            self.streamer.put(tokens.clone())
        return bool(going_on)

    def finish(self) -> int:
        """As :meth:`StopNow.finish`; a token that was on its way at the end is one too many."""
        if not self._over:
            self._read(self._count - 1)
        super().finish()
        return int(self._over)


def _stop_check(
    config: GenerationConfig, criteria: Any, input_ids: Tensor, streamer: BaseStreamer | None
) -> StopNow:
    from transformers.generation import EosTokenCriteria, MaxLengthCriteria

    known = all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in criteria)
    waits_anyway = config.do_sample or input_ids.device.type != "cuda"
    if not known or waits_anyway or config.return_dict_in_generate:  # (with a cache as it is)
        return StopNow(streamer)
    return StopLater(streamer, len(input_ids))
