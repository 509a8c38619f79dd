"""Other formats against the formulas that define them, or against their own library."""

import pytest
import torch

from int4q import Int4Tensor
from int4q.checkpoint import awq, compressed_tensors, executorch, foreign, gguf, gptq

N, K, GROUP = 24, 256, 128
WORD = 8  # values in an int32


def packed(u, order=range(WORD)):
    """[R, C] in 0..15 -> int32 [R, C/8], as the formats' own packers do it, word by word."""
    words = torch.zeros(u.shape[0], u.shape[1] // WORD, dtype=torch.int64)
    for column in range(words.shape[1]):
        for i, j in enumerate(order):
            words[:, column] |= u[:, column * WORD + j].long() << (4 * i)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def values():
    u = torch.randint(0, 16, (N, K))
    u[0, :16] = torch.arange(16)  # every value in every nibble
    zero = torch.randint(1, 16, (N, K // GROUP))
    scale = (torch.rand(N, K // GROUP) * 0.1 + 0.01).to(torch.float16)
    return u, zero, scale


def expected(u, zero, scale):
    wide = [t.repeat_interleave(GROUP, dim=1).double() for t in (zero, scale)]
    return (u.double() - wide[0]) * wide[1]


def check(t, u, zero, scale, dtype=torch.float32):
    assert type(t) is Int4Tensor and t.shape == (N, K) and t.dtype == dtype
    torch.testing.assert_close(
        t.dequantize(torch.float32).double(), expected(u, zero, scale), rtol=0, atol=0
    )


def test_words_are_packed_and_unpacked():
    u = torch.randint(0, 16, (5, 64), dtype=torch.int8)
    assert torch.equal(foreign.pack_int32(u), packed(u))
    assert torch.equal(foreign.unpack_int32(packed(u)), u)
    assert torch.equal(foreign.unpack_int32(packed(u, awq.ORDER), awq.ORDER), u)


@pytest.mark.parametrize("v2", [False, True])
def test_gptq(v2):
    u, zero, scale = values()
    parts = packed(u)  # [N, K/8]: along K
    qzeros = packed((zero if v2 else zero - 1).T)
    g_idx = torch.arange(K, dtype=torch.int32) // GROUP
    t = gptq.to_int4(parts.T.contiguous(), qzeros, scale.T.contiguous(), g_idx, v2=v2)
    check(t, u, zero, scale)


def test_symmetric_gptq_keeps_its_scales():
    u, _, scale = values()
    zero = torch.full_like(scale, 8, dtype=torch.int64)
    t = gptq.to_int4(packed(u).T.contiguous(), packed(zero.T - 1), scale.T.contiguous())
    check(t, u, zero, scale, torch.float16)
    assert not t.zero_point.any()


def test_gptq_with_act_order_is_refused():
    u, zero, scale = values()
    parts = packed(u).T.contiguous(), packed(zero.T - 1), scale.T.contiguous()
    g_idx = torch.arange(K, dtype=torch.int32).flip(0) // GROUP
    with pytest.raises(ValueError, match="act-order"):
        gptq.to_int4(*parts, g_idx)


def test_awq():
    u, zero, scale = values()
    parts = packed(u.T, awq.ORDER), packed(zero.T, awq.ORDER), scale.T.contiguous()
    check(awq.to_int4(*parts), u, zero, scale)


def test_executorch():
    u, zero, scale = values()
    qdata = (u[:, 0::2] | u[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    t = executorch.to_int4(qdata, scale.bfloat16(), zero.bfloat16())
    check(t, u, zero, scale.bfloat16())


@pytest.mark.parametrize("module", [gptq, awq])
@pytest.mark.parametrize(
    "change,error",
    [
        (lambda w, z, s: (w.float(), z, s), TypeError),
        (lambda w, z, s: (w[:, :-1], z, s), ValueError),
        (lambda w, z, s: (w, z[:-1], s), ValueError),
        (lambda w, z, s: (w, z, s.double()), TypeError),
    ],
)
def test_parts_that_do_not_fit(module, change, error):
    u, zero, scale = values()
    if module is gptq:
        parts = packed(u).T.contiguous(), packed(zero.T - 1), scale.T.contiguous()
    else:
        parts = packed(u.T, awq.ORDER), packed(zero.T, awq.ORDER), scale.T.contiguous()
    with pytest.raises(error):
        module.to_int4(*change(*parts))


# --- against the formats' own libraries -----------------------------------------------------------


def compressed(symmetric, strategy="group", dtype=torch.bfloat16):
    ct = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    args = ct.quantization.QuantizationArgs(
        num_bits=4, symmetric=symmetric, strategy=strategy,
        group_size=GROUP if strategy == "group" else None,
    )  # fmt: skip
    scheme = ct.quantization.QuantizationScheme(targets=["Linear"], weights=args)
    columns = K // GROUP if strategy == "group" else 1
    state = {
        "weight": torch.randn(N, K, dtype=dtype),
        "weight_scale": torch.rand(N, columns, dtype=dtype) * 0.1 + 0.1,
    }
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-8, 8, (N, columns), dtype=torch.int8)
    library = PackedQuantizationCompressor
    stored = library.compress(state, scheme)
    return library, scheme, stored, library.decompress(dict(stored), scheme)["weight"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_compressed_tensors(symmetric, strategy):
    _, _, stored, theirs = compressed(symmetric, strategy)
    parts = [stored[k] for k in ("weight_packed", "weight_scale")]
    parts += [] if symmetric else [stored["weight_zero_point"]]
    t = compressed_tensors.to_int4(*parts, group_size=GROUP)
    assert t.dtype == (torch.bfloat16 if symmetric else torch.float32)
    assert torch.equal(t.dequantize(torch.bfloat16), theirs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_and_back(symmetric):
    library, scheme, stored, theirs = compressed(symmetric)
    parts = [stored[k] for k in ("weight_packed", "weight_scale")]
    parts += [] if symmetric else [stored["weight_zero_point"]]
    t = compressed_tensors.to_int4(*parts, group_size=GROUP)
    back = compressed_tensors.from_int4(t, symmetric=symmetric)
    assert torch.equal(back["weight_packed"], stored["weight_packed"])
    read = library.decompress(back, scheme)["weight"]
    assert torch.equal(read.bfloat16(), theirs)


def test_free_zero_points_are_not_compressed_tensors():
    t = Int4Tensor.from_hp(torch.randn(32, 256), [1, 128])
    with pytest.raises(ValueError, match="whole multiples"):
        compressed_tensors.from_int4(t, symmetric=False)


def blocks(kind):
    """Random bytes with halves that are finite, [N, 4, bytes], and what `gguf` makes of them."""
    library = pytest.importorskip("gguf")
    per_block, nbytes = gguf.BLOCKS[kind]
    made = torch.randint(0, 256, (N, 4, nbytes), dtype=torch.uint8)
    halves = 2 if kind == "Q4_0" else 4
    some = torch.randn(N, 4, halves // 2).half() * 0.01
    made[..., :halves] = some.view(torch.uint8)
    theirs = library.dequantize(made.flatten(1).numpy(), library.GGMLQuantizationType[kind])
    return made, torch.from_numpy(theirs)


@pytest.mark.parametrize("kind", gguf.FROM)
def test_gguf(kind):
    made, theirs = blocks(kind)
    t = gguf.FROM[kind](made)
    assert t.group_size == 32 and t.dtype == torch.float32
    how = gguf.exactness(t, made, kind)
    ours = t.dequantize()
    if kind == "Q4_K":  # d * s and dmin * t have 17 bits each: their sum may need more than 24
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(theirs.abs().max()) * 2**-23)
        rows = [gguf.exactness(gguf.FROM[kind](row[None]), row[None], kind) for row in made]
        exact = torch.tensor([row == foreign.EXACT for row in rows])
        assert exact.any() and torch.equal(ours[exact], theirs[exact])
    else:
        assert how == foreign.EXACT and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind,back", [("Q4_0", gguf.to_q4_0), ("Q4_1", gguf.to_q4_1)])
def test_gguf_and_back(kind, back):
    made, _ = blocks(kind)
    assert torch.equal(back(gguf.FROM[kind](made)), made)


def test_what_gguf_cannot_hold():
    t = Int4Tensor.from_hp(torch.randn(32, 256), [1, 32])
    half = t.scale.half().float()
    for scale, zero_point, kind, message in [
        (t.scale, t.zero_point, "Q4_1", "every scale in GGUF must be a float16"),
        (half, t.zero_point, "Q4_0", "no zero points"),
        (half, t.zero_point, "Q4_1", "every minimum in GGUF must be a float16"),
        (1e6 * half, t.zero_point, "Q4_1", "larger ones"),
    ]:
        with pytest.raises(ValueError, match=message):
            gguf.halves(scale, zero_point, kind)
    with pytest.raises(ValueError, match="larger ones"):
        gguf.halves(1e6 * half, t.zero_point, "Q4_1", rounded=True)
    with pytest.raises(ValueError, match="in groups along K"):
        gguf.to_q4_1(t.t())


def test_larger_groups_are_several_blocks():
    w = torch.randn(3, 32, 256, dtype=torch.bfloat16)
    t = Int4Tensor.from_hp(w, [1, 1, 128], algorithm="symmetric")
    back = gguf.from_q4_0(gguf.to_q4_0(t))
    assert back.group_size == 32
    assert torch.equal(back.dequantize(), t.dequantize(torch.float32))


def test_rounded_on_request():
    """Half of float16's last bit of the scale at most eight times, half of the minimum's once."""
    t = Int4Tensor.from_hp(torch.randn(32, 256), [1, 128])
    back = gguf.from_q4_1(gguf.to_q4_1(t, rounded=True))
    off = (back.dequantize() - t.dequantize()).abs().unflatten(1, (2, 128)).amax(-1).mT
    minimum = t.zero_point - 8 * t.scale
    bound = 2**-11 * (8 * t.scale + minimum.abs()) + 2**-20
    assert (off <= bound).all() and (off > 0).any()


def test_a_rounded_zero_point_is_said():
    made, _ = blocks("Q4_1")
    made[0, 0, :4] = torch.tensor([1e-7, 60000.0]).half().view(torch.uint8)
    assert "1 of" in gguf.exactness(gguf.from_q4_1(made), made, "Q4_1")
