"""The tensor subclasses."""

from int4q.tensor import attention  # noqa: F401  (registered before subclasses exist)
from int4q.tensor.coalesced_int4_tensor import CudaCoalescedInt4Tensor
from int4q.tensor.cpu_packed_int4_tensor import CpuPackedInt4Tensor
from int4q.tensor.int4_tensor import Int4Tensor

__all__ = ["CpuPackedInt4Tensor", "CudaCoalescedInt4Tensor", "Int4Tensor"]
