"""Cases for the CUDA C++ linear kernels, and what each kernel computes, in float64.

A reference rounds the operands exactly as its kernel does and multiplies in float64. What is left
is float32 accumulation and the rounding of the output: tight, and the same for every K, M and
layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import weights
from torch import Tensor

from int4q.kernels.cuda import decode, warp_specialised
from int4q.kernels.cuda.warp_specialised_config import choose_config
from int4q.kernels.launch.planner import Parts, Planner
from int4q.kernels.weight import Weight

BF16, FP16, FP32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
SPACING = {BF16: 2**-7, FP16: 2**-10, FP32: 2**-23}
"""The largest distance of two neighbouring numbers, relative to their size."""
FP16_SUBNORMAL = 6e-8
"""The distance of float16 numbers near 0."""


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group_size: int = 128
    x: torch.dtype = BF16
    scale: torch.dtype = BF16
    activation: torch.dtype | None = None  # for the decode kernels; None: not given
    coalesced: bool = False
    extras: bool = False  # bias and act_pre_scale
    symmetric: bool = False

    @property
    def choices(self) -> dict[str, torch.dtype]:
        """The kernel's keyword arguments."""
        return {} if self.activation is None else {"activation": self.activation}

    def __str__(self):
        dtypes = (self.x, self.scale, *self.choices.values())
        flags = [flag for flag in ("coalesced", "extras", "symmetric") if getattr(self, flag)]
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        return "-".join([f"{self.M}x{self.N}x{self.K}-g{self.group_size}", *names, *flags])


def inputs(case: Case, device: str = "cuda") -> Parts:
    """Both ends of a nibble's range in every position; other scales and zeros in every group."""
    g = torch.Generator(device).manual_seed(0)
    weight = weights.random_weight(
        case.N, case.K, case.group_size, case.scale, coalesced=case.coalesced, generator=g
    )
    weight.qdata[::3, 0::2], weight.qdata[1::3, 1::2] = 0x78, 0x87 - 256
    weight.scale.mul_(0.02)
    weight.zero_point.mul_(0.05)
    if case.symmetric:
        weight = weights.offset_binary(weight)
    x = torch.randn(case.M, case.K, device=device, generator=g).to(case.x)
    if not case.extras:
        return Parts(x, weight, None, None)
    bias = torch.randn(case.N, device=device, generator=g).to(case.x)
    pre_scale = (torch.rand(case.K, device=device, generator=g) + 0.5).to(case.x)
    return Parts(x, weight, bias, pre_scale)


@dataclass(frozen=True)
class Kernel:
    """A kernel under test.

    Attributes:
        linear: runs it.
        operands: ``(parts, **choices)`` -> x ``[M, K]``, the weight ``[N, K]`` and the weight's sum
            of absolute terms, as the kernel multiplies them: float64.
        float32: error of its sums, relative to the sum of all absolute terms.
    """

    linear: Planner
    operands: Callable[..., tuple[Tensor, Tensor, Tensor]]
    float32: float

    def check(self, out: Tensor, parts: Parts, **choices) -> None:
        """``out`` is the product of ``parts`` to the kernel's precision."""
        x, w, size = self.operands(parts, **choices)
        exact = x @ w.mT
        if parts.bias is not None:
            exact = exact + parts.bias.double()
        dtype = parts.x.dtype
        assert out.dtype == dtype and out.shape == exact.shape
        assert not out.isnan().any()
        # Half a spacing for the output, and the sums.
        bound = exact.abs() * SPACING[dtype] * 0.51 + x.abs() @ size.mT * self.float32
        bound += FP16_SUBNORMAL if dtype == FP16 else 0
        worst = ((out.double() - exact).abs() / bound).max().item()
        assert worst <= 1, f"error is {worst:.2f} of the bound"

    def run(self, case: Case, config=None) -> None:
        """A case is right, and repeats bit for bit."""
        parts = inputs(case)
        choices = case.choices if config is None else {**case.choices, "config": config}
        outs = [self.linear(*parts, **choices) for _ in range(2)]
        self.check(outs[0], parts, **choices)
        assert torch.equal(*outs)


def decode_operands(parts: Parts, activation: torch.dtype = BF16, config=None):
    """x as integers times their scales; the weight as it is."""
    x = parts.x.float()
    if parts.pre_scale is not None:
        x = x * parts.pre_scale.float()
    product, zero = terms(parts.weight)
    return quantised(x, activation), product + zero, product.abs() + zero.abs()


def warp_specialised_operands(parts: Parts, config=None):
    """x rounded to its dtype; the weight too, unless it is sums that are scaled."""
    if config is None:
        weight = parts.weight
        sms = torch.cuda.get_device_properties(parts.x.device).multi_processor_count
        sizes = len(parts.x), weight.N, weight.K, weight.group_size
        config = choose_config(*sizes, weight.zero_point is None, sms)
    x, w = parts.x, sum(terms(parts.weight))
    if parts.pre_scale is not None:
        x = (x.float() * parts.pre_scale.float()).to(x.dtype)
    if not config.scale_sums:
        w = w.float().to(x.dtype).double()
    return x.double(), w, w.abs()


def terms(weight: Weight) -> tuple[Tensor, Tensor]:
    """float64 ``[N, K]``: ``q * scale``, and the zero points."""
    zero_point = weight.zero_point
    if zero_point is None:
        zero_point = torch.zeros_like(weight.scale)
    scale, zero = (
        t.double().repeat_interleave(weight.group_size, 0).mT for t in (weight.scale, zero_point)
    )
    return weights.integers(weight) * scale, zero


def quantised(x: Tensor, activation: torch.dtype) -> Tensor:
    """float64: float32 x as integers of 16 or 8 bits times a float32 scale a block."""
    block, top = (32, 127.0) if activation == INT8 else (128, 32639.0)
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    amax = blocks.abs().amax(-1, keepdim=True)
    top = x.new_tensor(top)  # a number would turn the divisions into products
    if activation == INT8:
        d = amax / top
        q = torch.where(d > 0, (blocks / d).round().clamp(-127, 127), 0.0)
    else:
        amax = amax.clamp(min=1e-30)
        d = amax / top
        q = (blocks.double() * (top / amax).double()).round()
    return (q.double() * d.double()).flatten(1)[:, : x.shape[1]]


DECODE = Kernel(decode.linear, decode_operands, 2**-20)
# 2 ** -18: some weights lie between two numbers of x's dtype, and float32 rounds them first here.
WARP_SPECIALISED = Kernel(warp_specialised.linear, warp_specialised_operands, 2**-18)
