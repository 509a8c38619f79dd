"""``prepare_for_inference_``: modules that hand plain tensors to compiled code, and the way back.

``torch.compile`` makes every tensor that a module uses an input of its graph. A tensor subclass
among them is taken apart again at every call and guarded by its metadata, which costs more than a
small product. A prepared module keeps its 4-bit parameter back and has the parameter's own parts
as plain buffers (:class:`Parts`, nothing copied); compiled code reads those, eager code the
parameter itself, past ``__torch_function__``.

Whatever looks at the parameters of a prepared module or changes them (``state_dict``, ``.to``,
assignment, ..) meets it as it was given: it is put back for that long, and prepared anew.
"""

from __future__ import annotations

import warnings
from collections import Counter

from torch import nn

from int4q import errors
from int4q.prepare.fused import Fusing, unfuse
from int4q.prepare.fused import fuse as fuse_layers
from int4q.prepare.modules import (
    EXPERTS,
    HELD,
    Prepared,
    as_given,
    hold,
    in_use,
    prepared,
    release,
)
from int4q.prepare.parts import Parts
from int4q.run import Int4SkipWarning, full_name, run_on
from int4q.tensor.base import Int4TensorBase

__all__ = ["EXPERTS", "Parts", "as_given", "in_use", "prepare_for_inference_", "unprepare_"]


def prepare_for_inference_(model: nn.Module, *, fuse: bool = False) -> nn.Module:
    """Let compiled code see plain tensors instead of 4-bit tensor subclasses, in place.

    Results are the same bits, in eager mode and compiled. ``module.weight``, ``state_dict()``,
    ``load_state_dict()``, ``.to()``, ``deepcopy``, ``torch.save``, :func:`int4q.summary` and
    :func:`int4q.to_coalesced_` give and take the 4-bit tensor as before; gradients reach
    activations and biases. ``named_parameters()`` does not list what is kept back, and the parts
    are among the ``named_buffers()``. What is written past the module, by ``swap_tensors`` on its
    weight, compiled code does not see.

    Linear layers are prepared (``nn.Linear``, transformers' ``Conv1D``, the layers below peft's
    adapters) and the experts of transformers under ``experts_implementation="int4q"``. A 4-bit
    weight of any other module stays as it is and works as before; an :class:`Int4SkipWarning`
    names it with the reason. Preparing again takes in what was quantised since.

    Linear layers that read the same activation (q, k and v; gate and up) can be fused: one product
    serves them all, of weights that lie one below the other in memory, of which each layer's are
    views. Which do is read from the source of the module that calls them, whatever their names:
    calls with one and the same variable, with nothing between that could change it. Weights must
    agree in layout, groups, dtypes and ``act_pre_scale``; of those that do not, a warning says so.
    A larger product may add up in another order: results are the same to rounding.

    Args:
        model: any module; its submodules are looked through.
        fuse: whether to fuse linear layers that read the same activation.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    unprepare_(model)
    modules = list(model.modules())
    with run_on(model) as run:
        for module in modules:
            for name, reason in hold(module).items():
                run.say(full_name(module, name), f"not prepared: {reason}")
        holders = Counter(id(w) for m in prepared(model) for w in m.__dict__[HELD].values())
        tied = {weight for weight, count in holders.items() if count > 1}
        for module in modules if fuse else ():
            for names, reason in fuse_layers(module, tied).items():
                run.say(full_name(module, "/".join(names)), f"not fused: {reason}")
        run.warn()
    if not any(map(_has_weights, model.modules())):
        warnings.warn("the model has no 4-bit weights to prepare", Int4SkipWarning, stacklevel=2)
    return model


def unprepare_(model: nn.Module) -> nn.Module:
    """Undo :func:`prepare_for_inference_`: the same classes, parameters and order as before.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise errors.type_("model must be a torch.nn.Module", type(model).__name__)
    for module in model.modules():
        if isinstance(module, Fusing):
            unfuse(module)
    for module in prepared(model):
        release(module)
    return model


def _has_weights(module: nn.Module) -> bool:
    held = *module._parameters.values(), *module._buffers.values()
    return isinstance(module, Prepared) or any(isinstance(t, Int4TensorBase) for t in held)
