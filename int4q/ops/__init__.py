"""The ``torch.library`` ops of the namespace ``int4q``: schema, checks, fake, gradient.

Each op takes a weight's parts (never a tensor subclass), checks them, and hands them to the
kernel that :func:`int4q.kernels.registry.choose` picks; importing this package registers all.
Weights are 2-D (``qdata`` int8 ``[N, K/2]``, ``scale`` and ``zero_point`` ``[n_groups, N]``) or
stacks of them with one more leading dim. The weight takes no gradient; activations and bias do.
"""

from int4q.ops import (  # noqa: F401  (registered)
    cpu_packed,
    experts,
    fp8,
    lowering,
    q4gsw,
    routing,
    symmetric,
)
from int4q.ops.define import SCALE_DTYPES
from int4q.ops.experts import run_stack
from int4q.ops.linear import coalesced_linear, linear_parts
from int4q.ops.routing import experts_combine, experts_permute

__all__ = [
    "SCALE_DTYPES",
    "coalesced_linear",
    "experts_combine",
    "experts_permute",
    "linear_parts",
    "run_stack",
]
