"""What FSDP2 asks of a sharded weight: which tensors to gather, and the weight made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from int4q import errors
from int4q.tensor.parts import Part


class GatheredByFSDP:
    """The all-gather extensions of ``torch.distributed.fsdp.fully_shard``.

    Only the packed parts are gathered; nothing is dequantised. ``mp_policy`` says how activations
    and gradients are cast; the weight itself keeps its precision.
    """

    if TYPE_CHECKING:  # what the class that has them brings
        parts: ClassVar[dict[str, Part]]
        block_size: list[int]
        shape: torch.Size
        _rebuild: Callable[..., Any]

    def fsdp_pre_all_gather(
        self,
        mesh: Any,
        outer_size: Any,
        outer_stride: Any,
        module: Any,
        mp_policy: Any,
    ) -> tuple[tuple[Tensor, ...], Any]:
        """The parts of this rank's shard in storage order; of how many ranks, and the whole shape.

        Raises:
            ValueError: on every rank, if the shards are not equal parts of the first dim.
        """
        if self.shape[0] * mesh.size() != outer_size[0]:
            raise errors.value(
                "FSDP2 shards a 4-bit weight along its first dim, a multiple of the "
                f"{mesh.size()} ranks",
                errors.dims(outer_size),
                "Keep it whole on every rank with fully_shard(..., ignored_params={weight})",
            )
        parts = [part.swap(getattr(self, name)) for name, part in self.parts.items()]
        return tuple(part.contiguous() for part in parts), (mesh.size(), outer_size)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: Any,
        *,
        out: Any = None,
    ) -> tuple[Any, tuple[Tensor, ...]] | None:
        """The whole weight as views of what was gathered; ``out``, made before, is that already.

        On one rank, where torch hands on the first part only, it is the shard.
        """
        ranks, shape = metadata
        if out is not None:
            if ranks == 1:
                out.data = self
            return None
        if ranks == 1:
            return self, ()
        outputs = iter(all_gather_outputs)
        return self._rebuild(lambda c, unit: next(outputs), shape, self.block_size), ()
