"""Random 4-bit weights as kernels take them, and their values by arithmetic of the tests' own."""

from dataclasses import dataclass

import torch

from int4q.kernels.weight import Weight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ENDS = (0x87, 0x78, 0x88, 0x77)
"""Bytes that hold both ends of a nibble's range, -8 and 7, in both places."""
ELEMENT_TOLERANCE = {BF16: 2**-8, FP16: 2**-11, FP32: 2e-6}
"""Output rounding (half a unit in the last place) plus the order of float32 additions."""
NORM_TOLERANCE = {BF16: 2.2e-3, FP16: 3e-4, FP32: 3e-6}
"""``||y - expected|| / ||expected||``: rounding of the output, uniform in half a unit (0.0017 for
bfloat16), and float32 accumulation. It grows with no size of the problem."""


@dataclass(frozen=True)
class Case:
    """``x [M, K]`` times a weight ``[N, K]``, and why; scales have x's dtype by default."""

    M: int
    N: int
    K: int
    group_size: int
    dtype: torch.dtype = BF16
    scale_dtype: torch.dtype | None = None
    coalesced: bool = False
    why: str = ""

    def __str__(self):
        name = f"{self.M}x{self.N}x{self.K}-g{self.group_size}-{str(self.dtype)[6:]}"
        return f"{name}-{self.why.replace(' ', '_')}"


def random_weight(N, K, group_size, dtype, *, experts=None, coalesced=False, generator=None):
    """Another scale and zero point in every group; ``ENDS`` first in each row, last in the last."""
    stack = () if experts is None else (experts,)
    on = {"generator": generator, "device": generator.device if generator else None}
    n_groups = K // group_size
    qdata = torch.randint(-128, 128, (*stack, N, K // 2), dtype=torch.int8, **on)
    ends = torch.tensor(ENDS, dtype=torch.uint8, device=qdata.device).view(torch.int8)
    qdata[..., :4] = ends
    qdata[..., -1:, -4:] = ends
    scale = (torch.rand(*stack, n_groups, N, **on) + 0.1).to(dtype)
    zero_point = torch.randn(*stack, n_groups, N, **on).to(dtype)
    weight = Weight(qdata, scale, zero_point, group_size)
    return coalesced_scales(weight) if coalesced else weight


def coalesced_scales(weight: Weight) -> Weight:
    """The same weight with the groups of a row side by side in memory."""
    scale, zero_point = (t.mT.contiguous().mT for t in (weight.scale, weight.zero_point))
    return weight._replace(scale=scale, zero_point=zero_point)


def offset_binary(weight: Weight) -> Weight:
    """Its symmetric part: no zero points, nibbles ``q + 8``."""
    flip = torch.tensor(-0x78, dtype=torch.int8, device=weight.qdata.device)
    return Weight(weight.qdata ^ flip, weight.scale, None, weight.group_size, signed=False)


def integers(weight: Weight) -> torch.Tensor:
    """int8 ``[.., N, K]``: ``q``."""
    low, high = weight.qdata & 15, (weight.qdata >> 4) & 15
    nibbles = torch.stack([low, high], dim=-1).flatten(-2)
    return (nibbles ^ 8) - 8 if weight.signed else nibbles - 8


def values(weight: Weight) -> torch.Tensor:
    """float32 ``[.., N, K]``: ``q * scale``, rounded, then plus the zero point, rounded."""
    q = integers(weight).float().unflatten(-1, (-1, weight.group_size))
    result = q * weight.scale.float().mT.unsqueeze(-1)
    if weight.zero_point is not None:
        result = result + weight.zero_point.float().mT.unsqueeze(-1)
    return result.flatten(-2)


def check(y, expected, dtype, tolerance):
    """Each element of ``y`` within ``tolerance[dtype]`` of its own and of the mean size."""
    assert y.dtype == dtype and y.shape == expected.shape
    error = (y.double() - expected).abs()
    bound = tolerance[dtype] * (expected.abs() + expected.abs().mean())
    assert (error <= bound).all(), (error / bound).max()


def check_norm(y, expected, tolerance=NORM_TOLERANCE):
    """``y`` as a whole: ``||y - expected||`` within ``tolerance[y.dtype]`` of ``||expected||``.

    A few outputs can lie so that their rounding alone is more than the mean over many: then that
    of the exact result is the bound. (Rounded with an error of d before it, ``y`` is off by at most
    2 d more: the nearest value to the sum is no farther from it than the one nearest ``expected``.)
    """
    assert y.shape == expected.shape and y.isfinite().all()
    error, size = (y.double() - expected).norm().item(), expected.norm().item()
    rounding = (expected.to(y.dtype).double() - expected).norm().item()
    bound = max(tolerance[y.dtype] * size, rounding + 2 * tolerance[FP32] * size)
    assert error <= bound, (error, rounding, size)


def shifted(t, by=1):
    """A contiguous copy that starts ``by`` elements into its memory."""
    return torch.empty(t.numel() + by, dtype=t.dtype, device=t.device)[by:].view_as(t).copy_(t)
