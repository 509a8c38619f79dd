"""4-bit weights under transformers' plans: tensor parallelism (``tp_plan``), expert parallelism.

A plan makes DTensors of the parameters of an empty model, and from then on transformers reads each
rank's part of a tensor from the checkpoint. For a weight that is quantised as it is loaded this is
what is wanted: groups lie within the rank's part. The parts of a weight that is stored quantised
would each be cut along the dim of the weight, which is another one in ``[n_groups, N]`` scales; so
these are read whole and the weight is cut, where no group is cut.

Either way the parameter ends as a DTensor over 4-bit weights: ``save_pretrained`` gathers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchao.utils import TorchAOBaseTensor

from int4q import errors
from int4q.tensor.base import Int4TensorBase


@dataclass(frozen=True)
class _Place:
    """What a plan says of one parameter: that of the DTensor it made."""

    module: nn.Module
    name: str
    planned: DTensor

    def hold(self, t: Tensor) -> None:
        self.module._parameters[self.name] = nn.Parameter(t, requires_grad=False)
        # To transformers: forward takes the local tensor, with gradients too.
        self.module._hf_quantized_needs_local_tp = True


class Shards:
    """The parameters of ``model`` that a plan shards, from before it is applied to after loading.

    Args:
        model: of transformers, empty, no plan applied yet.
        stored: names of parameters that the checkpoint holds quantised.
    """

    def __init__(self, model: nn.Module, stored: set[str]):
        self._stored = stored
        self._places: dict[str, _Place] = {}
        self._config: Any = model.config
        # The loader asks for the state dict after the plan is applied and before it reads.
        self._hook = model.register_state_dict_pre_hook(self._note)

    def _note(self, model: Any, prefix: str, keep_vars: bool) -> None:
        for name, module, parameter in _sharded(model):
            if name in self._places:  # and what it held may be loaded by now
                continue
            place = self._places[name] = _Place(module, parameter, module._parameters[parameter])
            if name in self._stored:
                self._check_not_fsdp()
                whole = torch.empty(place.planned.shape, dtype=place.planned.dtype, device="meta")
                place.hold(whole)

    def _check_not_fsdp(self) -> None:
        plan = self._config.distributed_config
        ranks = (plan.fsdp_size or 1) * (getattr(plan, "dp_replicate_size", None) or 1)
        if ranks > 1:
            raise errors.value(
                "fsdp_size and dp_replicate_size must be 1 for a model in 4 bits",
                f"{ranks} ranks",
                "Load it without, then call torch.distributed.fsdp.fully_shard",
            )

    def cut(self, name: str, weight: Int4TensorBase) -> Tensor:
        """This rank's shard of a weight read whole, or all of it if no plan shards it.

        Raises:
            ValueError: the plan would cut a group.
        """
        if name not in self._places:
            return weight
        planned = self._places[name].planned
        try:
            shard = distribute_tensor(
                weight, planned.device_mesh, planned.placements, src_data_rank=None
            )
        except ValueError as error:
            raise ValueError(f"{name} on {planned.device_mesh.size()} ranks: {error}") from error
        return nn.Parameter(shard, requires_grad=False)

    def finish(self) -> None:
        """Shards that were quantised as they were loaded, or left alone, as DTensors too."""
        self._hook.remove()
        for place in self._places.values():
            local, planned = place.module._parameters[place.name], place.planned
            int4 = isinstance(local, Int4TensorBase)
            if int4:
                self._check_not_fsdp()
            if int4 or not isinstance(local, (DTensor, TorchAOBaseTensor)):  # torchao's as they are
                shard = DTensor.from_local(
                    local.detach(),
                    planned.device_mesh,
                    planned.placements,
                    shape=planned.shape,
                    stride=planned.stride(),
                )
                place.hold(shard)
        self._places.clear()


def _sharded(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if isinstance(p, DTensor):
                yield f"{prefix}.{name}".lstrip("."), module, name
