"""DTensor over 4-bit weights, where handlers by type do not reach: the key of compiled graphs.

torch keeps compiled graphs on disk under a hash of their inputs. DTensor's says nothing of the
local tensor, so that weights of another layout, group size or activation dtype but the same logical
shape would find each other's graphs. Importing this module adds what the weight says of itself.
"""

from __future__ import annotations

from torch.distributed.tensor import DTensor

from int4q.tensor.base import Int4TensorBase

_of_torch = getattr(DTensor, "_stable_hash_for_caching", None)


def _stable_hash_for_caching(self: DTensor) -> str:
    key, local = _of_torch(self), self._local_tensor
    return key + local._stable_hash_for_caching() if isinstance(local, Int4TensorBase) else key


if _of_torch is not None:  # not yet in torch 2.11
    DTensor._stable_hash_for_caching = _stable_hash_for_caching
