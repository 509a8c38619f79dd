"""The bytes: against a derivation of the format in plain Python that shares no code with int4q."""

import struct

import numpy as np
import pytest
import torch

from int4q import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor
from int4q.packing import offset_to_signed, pack_nibbles, signed_to_offset, unpack_nibbles


def bf16(value: np.float32) -> np.float32:
    """Round a float32 to bfloat16 (nearest, ties to even), by its bits."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.float32(struct.unpack("<f", struct.pack("<I", bits))[0])


def derive(w: np.ndarray, group_size: int):
    """One weight at a time, float32 arithmetic: (bytes [N, K/2], scale, zero_point [G, N])."""
    N, K = w.shape
    packed = np.zeros((N, K // 2), np.int8)
    scale = np.zeros((K // group_size, N), np.float32)
    zero = np.zeros_like(scale)
    for n in range(N):
        for g in range(K // group_size):
            group = w[n, g * group_size : (g + 1) * group_size].astype(np.float32)
            low, high = group.min(), group.max()
            s = np.float32(max(high - low, np.float32(1e-6)) / np.float32(15))
            scale[g, n], zero[g, n] = s, np.float32(low + np.float32(8) * s)
            for i, value in enumerate(group):
                u = int(min(max(np.rint(np.float32(np.float32(value - low) / s)), 0), 15))
                k = g * group_size + i
                byte = (u - 8) & 0xF
                packed[n, k // 2] |= np.array(byte << (4 * (k % 2)), np.uint8).astype(np.int8)
    return packed, scale, zero


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_bytes_equal_the_independent_derivation(group_size):
    w = torch.randn(5, 512)
    w[0, :group_size] = 0.25  # a constant group: scale is the floor 1e-6 / 15
    packed, scale, zero = derive(w.numpy(), group_size)
    t = Int4Tensor.from_hp(w, [1, group_size])
    assert torch.equal(t.qdata, torch.from_numpy(packed))
    assert torch.equal(t.scale, torch.from_numpy(scale))
    assert torch.equal(t.zero_point, torch.from_numpy(zero))


def test_bfloat16_scales_are_the_float32_ones_rounded():
    w = torch.randn(4, 64).bfloat16()
    packed, scale, zero = derive(w.float().numpy(), 32)
    t = Int4Tensor.from_hp(w, [1, 32])
    assert torch.equal(t.qdata, torch.from_numpy(packed))
    assert t.scale.float().tolist() == [[float(bf16(v)) for v in row] for row in scale]
    assert t.zero_point.float().tolist() == [[float(bf16(v)) for v in row] for row in zero]


def test_rows_quantised_in_pieces_are_the_rows_quantised_at_once(monkeypatch):
    w = torch.randn(37, 128)
    whole = Int4Tensor.from_hp(w, [1, 32])
    monkeypatch.setattr("int4q.qparams._CHUNK_ELEMENTS", 5 * 128)
    assert torch.equal(Int4Tensor.from_hp(w, [1, 32]), whole)


def test_nibble_endpoints_in_each_position():
    q = torch.tensor([[-8, 7, 7, -8, 0, -1, 1, -7]], dtype=torch.int8)
    packed = pack_nibbles(q)
    assert [b & 0xFF for b in packed[0].tolist()] == [0x78, 0x87, 0xF0, 0x91]
    assert torch.equal(unpack_nibbles(packed), q)


def test_every_byte_round_trips():
    qdata = torch.arange(-128, 128, dtype=torch.int8).view(4, 64)
    assert torch.equal(pack_nibbles(unpack_nibbles(qdata)), qdata)
    assert torch.equal(offset_to_signed(signed_to_offset(qdata)), qdata)
    offset = unpack_nibbles(signed_to_offset(qdata)) & 0xF
    assert torch.equal(offset, unpack_nibbles(qdata) + 8)


def test_unsigned_bytes_flip_the_same_bits():
    packed = torch.arange(256, dtype=torch.uint8)
    signed = signed_to_offset(packed.view(torch.int8))
    assert torch.equal(signed_to_offset(packed).view(torch.int8), signed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 64)])
def test_layouts_hold_the_same_values(dtype, shape):
    w = torch.randn(shape).to(dtype)
    block_size = [1] * (len(shape) - 1) + [32]
    plain = Int4Tensor.from_hp(w, block_size)
    coalesced = CudaCoalescedInt4Tensor.from_int4_tensor(plain)
    assert torch.equal(coalesced, CudaCoalescedInt4Tensor.from_hp(w, block_size))
    assert coalesced.qdata is plain.qdata
    assert coalesced.scale.is_contiguous() and coalesced.scale.shape[-2:] == (
        shape[-2],
        shape[-1] // 32,
    )
    assert torch.equal(coalesced.to_int4_tensor(), plain)
    assert torch.equal(coalesced.dequantize(), plain.dequantize())


@pytest.mark.parametrize("N", [16, 48, 64, 80, 128, 240])
@pytest.mark.parametrize("packing", ["rows", "aten"])
def test_cpu_packed_round_trip_is_lossless(N, packing):
    plain = Int4Tensor.from_hp(torch.randn(N, 128).bfloat16(), [1, 32])
    packed = CpuPackedInt4Tensor.from_int4_tensor(plain, packing)
    assert torch.equal(packed.to_int4_tensor(), plain)
    assert torch.equal(packed.dequantize(), plain.dequantize())


def test_quantisation_error_is_half_a_step():
    w = torch.randn(8, 256)
    t = Int4Tensor.from_hp(w, [1, 64])
    half_step = t.scale.mT.repeat_interleave(64, dim=1) / 2
    # One float32 rounding of q * scale + zero_point on top of the half step.
    assert ((t.dequantize() - w).abs() <= half_step * (1 + 1e-5) + 1e-6).all()


def test_hqq_never_loses_to_min_max_on_its_own_norm():
    w = torch.randn(64, 256)
    w[torch.rand_like(w) < 0.01] *= 8  # outliers are what it is for

    def error(algorithm):
        t = Int4Tensor.from_hp(w, [1, 64], algorithm=algorithm)
        return (t.dequantize() - w).abs().pow(0.7).mean()

    assert error("hqq") < error("tinygemm")


def test_symmetric_has_no_zero_point_and_covers_the_range():
    w = torch.randn(8, 128)
    t = Int4Tensor.from_hp(w, [1, 32], algorithm="symmetric")
    assert not t.zero_point.any()
    step = t.scale.mT.repeat_interleave(32, dim=1)
    assert ((t.dequantize() - w).abs() <= step / 2 * (1 + 1e-5)).all()


def test_torchao_round_trip_copies_nothing():
    t = Int4Tensor.from_hp(torch.randn(8, 64).bfloat16(), [1, 32])
    theirs = t.to_torchao()
    assert type(theirs).__module__.startswith("torchao")
    back = Int4Tensor.from_torchao(theirs)
    assert back.qdata is t.qdata and back.scale is t.scale and back.zero_point is t.zero_point
    assert torch.equal(back, t)


def test_to_torchao_refuses_a_lazy_transpose():
    t = Int4Tensor.from_hp(torch.randn(8, 64), [1, 32]).t()
    with pytest.raises(ValueError, match="Transpose it back first"):
        t.to_torchao()
    with pytest.raises(TypeError, match="t must be a torchao"):
        Int4Tensor.from_torchao(torch.zeros(2, 2))
