"""Weights at the ends of their dtype, and the bound on the error of every other one."""

import pytest
import torch

from int4q import Int4Tensor, qparams
from int4q.packing import unpack_nibbles

GROUP = 32
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY = [*qparams.ALGORITHMS, *qparams.SEARCHES]


def fbgemm(groups):
    """``int4_row_quantize_zp`` as fbgemm writes it; max - min overflows beyond half of float32."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    q = ((groups - low) / scale).round().clamp(0, 15) - 8
    return q.to(torch.int8), scale, low + scale * 8


def largest(dtype):
    return torch.finfo(dtype).max


def magnitudes(dtype):
    """Groups of every size that the dtype holds, centred and not, with zeros among them."""
    info, rows = torch.finfo(dtype), []
    for size in torch.logspace(-44, 38, 83, dtype=torch.float64).tolist():
        if size > info.max / 8:
            break
        for shift in (0, 1, -3):
            rows.append((torch.randn(8, GROUP, dtype=torch.float64).clamp(-4, 4) + shift) * size)
    w = torch.cat(rows).to(dtype)
    w[::5, ::3] = 0
    return w


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinary_weights_are_fbgemms_bytes(dtype):
    w = magnitudes(dtype)
    if dtype == torch.float16:  # (zeros that fbgemm gives back as 6e-8: below)
        w = w[w.float().amax(1) - w.float().amin(1) > 1e-6]
    t = Int4Tensor.from_hp(w, [1, GROUP])
    q, scale, zero_point = fbgemm(w.float())
    assert torch.equal(unpack_nibbles(t.qdata), q)
    assert torch.equal(t.scale.mT, scale.to(dtype))
    assert torch.equal(t.zero_point.mT, zero_point.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_bound(dtype):
    """Half a step of the grid, and the rounding of scale, zero point and value to the dtype."""
    w = magnitudes(dtype)
    t = Int4Tensor.from_hp(w, [1, GROUP])
    info = torch.finfo(dtype)

    def rounding(x):  # half a unit in the last place
        return (x.abs() * info.eps / 2).clamp(min=info.tiny * info.eps / 2)

    step, zero_point = fbgemm(w.double())[1:]
    values = t.dequantize().double()
    bound = step / 2 + 8 * rounding(step) + rounding(zero_point) + rounding(values)
    # Float32 arithmetic on the way: a few roundings of the largest weight of the group.
    bound += 4 * 2**-24 * w.double().abs().amax(1, keepdim=True)
    assert ((values - w.double()).abs() <= bound).all()


def ramp(dtype):
    half = torch.linspace(0, 1, GROUP // 2, dtype=torch.float64) * largest(dtype)
    return torch.cat([-half, half]).to(dtype)


EXTREMES = {
    "from end to end": ramp,
    "both ends": lambda dtype: torch.tensor([1.0, -1.0] * 16).to(dtype) * largest(dtype),
    "all largest": lambda dtype: torch.full((GROUP,), largest(dtype), dtype=dtype),
    "all smallest": lambda dtype: torch.full((GROUP,), -largest(dtype), dtype=dtype),
    "near the largest": lambda dtype: torch.linspace(0.99, 1, GROUP).to(dtype) * largest(dtype),
    "at the largest": lambda dtype: torch.linspace(0.9992, 1, GROUP).to(dtype) * largest(dtype),
    "near the smallest": lambda dtype: torch.linspace(-1, -0.99, GROUP).to(dtype) * largest(dtype),
    "one outlier": lambda dtype: torch.tensor([0.0] * 31 + [1]).to(dtype) * largest(dtype),
    "97 %": lambda dtype: ramp(dtype) * 0.97,
}


@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXTREMES)
def test_the_largest_weights_stay_finite(name, dtype, algorithm):
    """Within a step and a half of their grid, instead of half a step."""
    w = EXTREMES[name](dtype)[None].expand(3, GROUP)
    assert w.isfinite().all()
    t = Int4Tensor.from_hp(w, [1, GROUP], algorithm=algorithm)
    values = t.dequantize()
    assert values.isfinite().all()
    zero_point, exact = t.zero_point.mT.double(), w.double()
    step = (exact.amax(1) - exact.amin(1)) / 15
    if algorithm.startswith("symmetric"):
        step = exact.abs().amax(1) / 7
    unit = torch.finfo(dtype).eps * zero_point.abs().amax(1).clamp(min=largest(dtype) / 2)
    error = (values.double() - exact).abs().amax(1)
    assert (error <= 1.5 * step + unit).all()


@pytest.mark.parametrize("algorithm", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(dtype, algorithm):
    w = torch.zeros(3, 2 * GROUP, dtype=dtype)
    w[1, :GROUP] = torch.randn(GROUP)  # (a group of zeros beside another one)
    t = Int4Tensor.from_hp(w, [1, GROUP], algorithm=algorithm)
    values = t.dequantize()
    assert not values[0].any() and not values[1, GROUP:].any() and not values[2].any()
    assert values[1, :GROUP].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused(dtype, value):
    w = torch.zeros(3, GROUP, dtype=dtype)
    w[1, 5] = value
    with pytest.raises(ValueError, match="must be finite, got NaN or Inf"):
        Int4Tensor.from_hp(w, [1, GROUP])
