"""``int4q.calibrate``: run a model and look at the inputs of its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from int4q import errors
from int4q.calibration.blocks import BlockwiseCalibration
from int4q.calibration.data import batches, limited
from int4q.calibration.moments import Calibration
from int4q.calibration.watch import Gathering, in_eval_mode

STATISTICS = ("importance", "hessian")


def calibrate(
    model: nn.Module,
    data: Tensor | Iterable[Any] | None = None,
    *,
    statistics: str = "importance",
    tokens: int | None = None,
    by_block: bool = False,
    device: torch.types.Device = None,
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
            held at once, 4 K^2 bytes a weight (for each expert of a mixture): 39 GB for a model of
            8 billion weights while it runs, 33 GB then.
        tokens: stop after the batch that reaches so many (rows of ids, or of embeddings).
        by_block: hold the moments of one block of the model at a time, and the outputs of one. The
            model runs on the first batch now, and on all of them a block at a time when
            :func:`int4q.quantize_` comes to it; keep it on its device as it is until then. Blocks
            are the modules of an outermost ``nn.ModuleList``, each called with what the one before
            returned.
        device: with ``by_block``: where blocks run, one there at a time, while the model stays
            where it is. (``device`` of :func:`int4q.quantize_` says where they are quantised.)

    Returns:
        The moments by parameter name, for :func:`int4q.quantize_` and to be saved. A weight that no
        batch reached has none. An expert with fewer than 32 tokens has those of its whole layer,
        which a :class:`CalibrationWarning` says.

    Raises:
        TypeError: ``model`` is no module, or ``data`` none of these.
        ValueError: unknown ``statistics``, a padded batch, a model without token ids and no data,
            no batch at all, inputs that are not finite (the message names the weights), or, with
            ``by_block``, a model without such blocks.
    """
    if not isinstance(model, nn.Module):
        raise errors.type_("model must be a torch.nn.Module", type(model).__name__)
    if statistics not in STATISTICS:
        raise errors.value(f"statistics must be one of {STATISTICS}", repr(statistics))
    calls = limited(batches(model, data), tokens)
    if by_block:
        return BlockwiseCalibration(model, list(calls), statistics == "hessian", device)
    if device is not None:
        raise errors.value("device is where blocks run, with by_block=True", device)
    gathering = Gathering(model, statistics == "hessian")
    with torch.no_grad(), in_eval_mode(model), gathering:
        for arguments, keywords in calls:
            model(*arguments, **keywords)
    return Calibration(gathering.result())
