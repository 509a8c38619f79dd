"""Parts that do not make one weight are refused, each with the message a user reads."""

import expecttest
import pytest
import torch

from int4q import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor


def plain_parts(N=8, K=128, group=32, dtype=torch.bfloat16):
    t = Int4Tensor.from_hp(torch.randn(N, K).to(dtype), [1, group])
    return dict(
        qdata=t.qdata, scale=t.scale, zero_point=t.zero_point, block_size=[1, group], shape=(N, K)
    )


class Messages(expecttest.TestCase):
    def check(self, expected, cls=Int4Tensor, **change):
        with pytest.raises((TypeError, ValueError)) as caught:
            cls(**{**plain_parts(), **change})
        self.assertExpectedInline(f"{caught.type.__name__}: {caught.value}", expected)

    def test_coalesced_scales_in_the_plain_tensor(self):
        self.check(
            """ValueError: scale of Int4Tensor must have shape [.., n_groups, N] = [4, 8], got [8, 4]. This is the coalesced layout [.., N, n_groups]; build a CudaCoalescedInt4Tensor and call .to_int4_tensor()""",  # noqa: E501
            scale=plain_parts()["scale"].mT,
        )

    def test_plain_scales_in_the_coalesced_tensor(self):
        self.check(
            """ValueError: scale of CudaCoalescedInt4Tensor must have shape [.., N, n_groups] = [8, 4], got [4, 8]. This is the plain layout [.., n_groups, N]; repack it with CudaCoalescedInt4Tensor.from_int4_tensor""",  # noqa: E501
            cls=CudaCoalescedInt4Tensor,
        )

    def test_zero_point_shape(self):
        self.check(
            """ValueError: zero_point of Int4Tensor must have shape [.., n_groups, N] = [4, 8], got [3, 8]""",  # noqa: E501
            zero_point=torch.zeros(3, 8).bfloat16(),
        )

    def test_zero_point_dtype(self):
        self.check(
            """TypeError: zero_point must have scale's dtype torch.bfloat16, got torch.float32""",
            zero_point=torch.zeros(4, 8),
        )

    def test_scale_dtype(self):
        self.check(
            """TypeError: scale must be float32 or float16 or bfloat16, got torch.float64""",
            scale=torch.ones(4, 8).double(),
        )

    def test_qdata_dtype(self):
        self.check(
            """TypeError: qdata must be int8, got torch.uint8""",
            qdata=torch.zeros(8, 64, dtype=torch.uint8),
        )

    def test_qdata_shape(self):
        self.check(
            """ValueError: qdata of Int4Tensor must have shape [.., N, K/2] = [8, 64], got [8, 128]""",  # noqa: E501
            qdata=torch.zeros(8, 128, dtype=torch.int8),
        )

    def test_not_a_tensor(self):
        self.check("""TypeError: scale must be a tensor, got float""", scale=1.0)

    def test_group_size(self):
        self.check(
            """ValueError: group_size must be one of (32, 64, 128, 256), got 16""",
            block_size=[1, 16],
        )

    def test_two_grouped_dims(self):
        self.check(
            """ValueError: block_size must have exactly one entry other than 1 (the group size), got [32, 32]. For a weight [N, K] in groups of 128 along K use [1, 128]""",  # noqa: E501
            block_size=[32, 32],
        )

    def test_block_size_rank(self):
        self.check(
            """ValueError: block_size must have one entry for each of the 2 dims of shape, got [1, 1, 32]""",  # noqa: E501
            block_size=[1, 1, 32],
        )

    def test_ragged_groups(self):
        self.check(
            """ValueError: the grouped dim 1 must be a multiple of group_size 32, got 100""",
            shape=(8, 100),
        )

    def test_devices(self):
        self.check(
            """ValueError: scale must be on qdata's device cpu, got meta""",
            scale=torch.ones(4, 8, device="meta").bfloat16(),
        )

    def test_act_pre_scale(self):
        self.check(
            """ValueError: act_pre_scale must be a number or a floating-point tensor of 1 or 128 (K) entries, got [8]""",  # noqa: E501
            act_pre_scale=torch.ones(8),
        )

    def test_activation_dtype(self):
        self.check(
            """ValueError: activation_dtype of Int4Tensor must be bfloat16 or float8_e4m3fn, got torch.int8""",  # noqa: E501
            activation_dtype=torch.int8,
        )


def test_when_n_equals_n_groups_the_class_decides():
    parts = plain_parts(N=4, K=128)  # scale [4, 4] in both layouts
    plain, coalesced = Int4Tensor(**parts), CudaCoalescedInt4Tensor(**parts)
    turned = {**parts, "scale": parts["scale"].mT, "zero_point": parts["zero_point"].mT}
    assert not torch.equal(plain.dequantize(), coalesced.dequantize())
    assert torch.equal(plain.dequantize(), CudaCoalescedInt4Tensor(**turned).dequantize())


def test_neither_class_is_the_other():
    assert not issubclass(CudaCoalescedInt4Tensor, Int4Tensor)
    assert not issubclass(Int4Tensor, CudaCoalescedInt4Tensor)
    assert CudaCoalescedInt4Tensor._ATEN_OP_TABLE is not Int4Tensor._ATEN_OP_TABLE


FROM_HP = {
    "integer": (torch.zeros(8, 64, dtype=torch.int32), [1, 32], TypeError, "w must be float32"),
    "float64": (torch.zeros(8, 64).double(), [1, 32], TypeError, "w must be float32"),
    "rank": (torch.zeros(8, 64), [1, 1, 32], ValueError, "one entry for each of the 2 dims"),
    "vector": (torch.zeros(64), [32], ValueError, "2 or more"),
    "axis": (torch.zeros(64, 8), [32, 1], ValueError, "along the last dim.*Transpose w first"),
    "ragged": (torch.zeros(8, 100), [1, 32], ValueError, "multiple of group_size 32, got 100"),
    "nan": (torch.full((8, 64), float("nan")), [1, 32], ValueError, "must be finite"),
    "inf": (torch.zeros(8, 64).index_fill(0, torch.tensor([3]), float("-inf")), [1, 32], ValueError,
            "must be finite"),
    "group": (torch.zeros(8, 64), [1, 48], ValueError, "group_size must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", FROM_HP)
def test_from_hp_refuses(layout, case):
    w, block_size, error, message = FROM_HP[case]
    with pytest.raises(error, match=message):
        layout.from_hp(w, block_size)


def test_from_hp_refuses_a_quantised_weight_and_an_unknown_algorithm(layout):
    t = layout.from_hp(torch.randn(8, 64), [1, 32])
    with pytest.raises(TypeError, match="quantised already"):
        layout.from_hp(t, [1, 32])
    with pytest.raises(ValueError, match="algorithm must be one of .*'magic'"):
        layout.from_hp(torch.randn(8, 64), [1, 32], algorithm="magic")


@pytest.mark.parametrize("convert", [CudaCoalescedInt4Tensor, CpuPackedInt4Tensor])
def test_conversions_take_plain_only(convert):
    with pytest.raises(TypeError, match="t must be an int4q.Int4Tensor"):
        convert.from_int4_tensor(torch.zeros(8, 64))


CPU_PACKED = {
    "N": (torch.randn(24, 64), lambda t: t, "N must be a multiple of 16"),
    "stack": (torch.randn(2, 16, 64), lambda t: t, "holds a weight \\[N, K\\]"),
    "transposed": (torch.randn(16, 64), torch.t, "holds a weight \\[N, K\\]"),
}


@pytest.mark.parametrize("case", CPU_PACKED)
def test_cpu_packed_refuses(case):
    w, change, message = CPU_PACKED[case]
    t = change(Int4Tensor.from_hp(w, [1] * (w.ndim - 1) + [32]))
    with pytest.raises(ValueError, match=message):
        CpuPackedInt4Tensor.from_int4_tensor(t, "aten")


def test_cpu_packed_keeps_its_shape_and_its_device():
    t = CpuPackedInt4Tensor.from_hp(torch.randn(16, 64), [1, 32], packing="aten")
    for op in (torch.t, lambda x: x[0], lambda x: x.view(2, 8, 64), lambda x: x[:, :32]):
        with pytest.raises(ValueError, match="keeps its shape.*to_int4_tensor"):
            op(t)
    parts = t.data_tensors()
    with pytest.raises(ValueError, match="qdata must be uint8 \\[16, 32\\]"):
        CpuPackedInt4Tensor(parts["qdata"][:8], parts["scale_and_zero"], [1, 32], (16, 64), "aten")
    with pytest.raises(ValueError, match="packing must be one of"):
        CpuPackedInt4Tensor.from_hp(torch.randn(16, 64), [1, 32], packing="columns")


def test_repr_is_one_line(layout):
    text = repr(layout.from_hp(torch.randn(8, 64), [1, 32]))
    assert layout.__name__ in text and "shape=(8, 64)" in text and "\n" not in text
