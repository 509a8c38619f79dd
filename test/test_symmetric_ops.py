"""int4_matmul, int4_matvec, dequant_w4_to_bf16 against plain Python and precision-matched GEMMs."""

import struct

import pytest
import torch
import torch.nn.functional as F

from int4q.kernels import reference

GROUPS = [32, 64, 128, 256]


def weight(N, K, group_size, device="cpu"):
    """Random nibbles with both ends in each position, and another scale in every group."""
    w_packed = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8)
    w_packed[0, :4] = torch.tensor([0x00, -1, 0x0F, -16], dtype=torch.int8)
    n_groups = K // group_size
    w_scale = (1 + torch.arange(N * n_groups).view(N, n_groups) % 97).bfloat16() / 1024
    return w_packed.to(device), w_scale.to(device)


def python_value(byte: int, high: bool, scale: float) -> float:
    """One weight by hand: float32 product, rounded to bfloat16 by its bits."""
    u = (byte & 0xFF) >> 4 if high else byte & 0x0F
    bits = struct.unpack("<I", struct.pack("<f", (u - 8) * scale))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


@pytest.mark.parametrize("N,K,group_size", [(3, 64, 32), (7, 160, 32), (5, 256, 128)])
def test_dequant_is_the_plain_python_result(device, N, K, group_size):
    w_packed, w_scale = weight(N, K, group_size, device)
    got = torch.ops.int4q.dequant_w4_to_bf16(w_packed, w_scale, group_size)
    rows, scales = w_packed.tolist(), w_scale.float().tolist()
    expected = [
        [python_value(rows[n][k // 2], k % 2, scales[n][k // group_size]) for k in range(K)]
        for n in range(N)
    ]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.cpu(), torch.tensor(expected).bfloat16())


SHAPES = [  # M, N, K: tails in K (160, 192, 320), in N, M = 0 and 1
    (0, 16, 64), (1, 7, 160), (2, 33, 192), (5, 100, 320), (17, 64, 1024), (130, 48, 512),
]  # fmt: skip


@pytest.mark.parametrize("M,N,K", SHAPES)
def test_matmul_is_a_gemm_on_bf16_rounded_weights(device, M, N, K):
    group_size = max(g for g in GROUPS if K % g == 0)
    w_packed, w_scale = weight(N, K, group_size, device)
    x = torch.randn(M, K).bfloat16().to(device)
    y = torch.ops.int4q.int4_matmul(x, w_packed, w_scale, group_size)
    w = reference.dequantize_symmetric(w_packed, w_scale, group_size).double()
    expected = F.linear(x.double(), w)
    assert y.dtype == torch.bfloat16 and y.shape == (M, N)
    # One rounding to bf16 (2^-8) and float32 sums, element by element and whatever M is.
    bound = expected.abs() * 2**-8 + 2**-20 * F.linear(x.double().abs(), w.abs())
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    "N,K,group_size",
    [(1, 32, 32), (7, 160, 32), (33, 192, 64), (100, 320, 64), (48, 2048, 128), (5, 512, 256)],
)
def test_matvec_keeps_weights_in_float32(device, N, K, group_size):
    w_packed, w_scale = weight(N, K, group_size, device)
    x = torch.randn(1, K).bfloat16().to(device)
    y = torch.ops.int4q.int4_matvec(x, w_packed, w_scale, group_size).double()
    q = reference._symmetric_values(w_packed, w_scale, group_size).double()
    expected = x.double() @ q.T
    # Half a unit in the last place of bf16 for the output itself, 1e-3 of its scale for the sums.
    bound = expected.abs() * 2**-8 + 1e-3 * expected.abs().max()
    assert ((y - expected).abs() <= bound).all()


def test_strided_inputs(device):
    w_packed, w_scale = weight(12, 256, 32, device)
    x = torch.randn(256, 6).bfloat16().to(device).t()
    part, scales = w_packed[2:9, 32:96], w_scale[2:9, 2:6]
    y = torch.ops.int4q.int4_matmul(x[:, 64:192], part, scales, 32)
    expected = torch.ops.int4q.int4_matmul(
        x[:, 64:192].contiguous(), part.contiguous(), scales.contiguous(), 32
    )
    # The same sums; a kernel may take another order for another layout.
    torch.testing.assert_close(y, expected)
    got = torch.ops.int4q.dequant_w4_to_bf16(part, scales, 32)
    whole = torch.ops.int4q.dequant_w4_to_bf16(w_packed, w_scale, 32)
    assert torch.equal(got, whole[2:9, 64:192])


def test_gradient_reaches_the_activation():
    w_packed, w_scale = weight(16, 64, 32)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    torch.ops.int4q.int4_matmul(x, w_packed, w_scale, 32).sum().backward()
    w = reference.dequantize_symmetric(w_packed, w_scale, 32).double()
    expected = torch.ones(3, 16, dtype=torch.float64) @ w
    assert (x.grad.double() - expected).abs().max() <= 6e-3 * expected.abs().max()


W, S = weight(8, 128, 32)
X = torch.ones(2, 128).bfloat16()
BAD = {
    "w dtype": ((X, W.view(torch.uint8), S, 32), TypeError, r"w_packed must be int8 \[N, K/2\]"),
    "w rank": ((X, W[0], S, 32), TypeError, r"w_packed must be int8 \[N, K/2\]"),
    "group 0": ((X, W, S, 0), ValueError, "group_size must be positive"),
    "group -1": ((X, W, S, -1), ValueError, "group_size must be positive"),
    "group 48": ((X, W, S, 48), ValueError, "divide K, got 48 for K 128"),
    "scale layout": ((X, W, S.mT, 32), ValueError, r"\[N, n_groups\] = \[8, 4\], got \[4, 8\]"),
    "scale dtype": ((X, W, S.double(), 32), TypeError, "w_scale must be float32"),
    "scale device": ((X, W, S.to("meta"), 32), ValueError, "w_scale must be on cpu"),
    "x dtype": ((X.float(), W, S, 32), TypeError, "x must be bfloat16, got torch.float32"),
    "x K": ((X[:, :64], W, S, 32), ValueError, "with K = 128"),
    "x rank": ((X[None], W, S, 32), ValueError, r"x must have shape \[M, K\]"),
    "x device": ((X.to("meta"), W, S, 32), ValueError, "on the weight's device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        torch.ops.int4q.int4_matmul(*arguments)


def test_matvec_takes_one_row():
    with pytest.raises(ValueError, match="takes one row.*Use int4_matmul"):
        torch.ops.int4q.int4_matvec(X, W, S, 32)
