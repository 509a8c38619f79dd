"""What FSDP2 asks of a sharded weight: which tensors to gather, and the weight made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from int4q import errors

if TYPE_CHECKING:
    from int4q.tensor.base import Int4TensorBase


class GatheredByFSDP:
    """The all-gather extensions of ``torch.distributed.fsdp.fully_shard``.

    Only the packed parts are gathered; nothing is dequantised. ``mp_policy`` says how activations
    and gradients are cast; the weight itself keeps its precision.
    """

    def fsdp_pre_all_gather(
        self: Int4TensorBase,
        mesh: Any,
        outer_size: Any,
        outer_stride: Any,
        module: Any,
        mp_policy: Any,
    ) -> tuple[tuple[Tensor, ...], Any]:
        """The parts of this rank's shard in logical order, and the shape of the whole weight.

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
        return tuple(p.movedim(-1, self.grouped_dim).contiguous() for p in parts), outer_size

    def fsdp_post_all_gather(
        self: Int4TensorBase,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: Any,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight as views of what was gathered; ``out``, made before, views it already."""
        if out is not None:
            return None
        grouped, outputs = self.grouped_dim, iter(all_gather_outputs)
        whole = self._rebuild(
            lambda c, unit: next(outputs).movedim(grouped, -1), metadata, self.block_size
        )
        return whole, ()
