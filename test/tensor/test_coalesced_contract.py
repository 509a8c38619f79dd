"""What ``int4_plain_mm`` and ``CudaCoalescedInt4Tensor`` refuse at run time, and in which words."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, KernelPreference, kernel_preference
from int4q.kernels import reference, registry
from int4q.packing import unpack_nibbles

N, K, GROUP = 8, 128, 32
COALESCED = CudaCoalescedInt4Tensor.from_hp(torch.randn(N, K), [1, GROUP])
PLAIN = COALESCED.to_int4_tensor()
REPACK = r"CudaCoalescedInt4Tensor\.from_int4_tensor"
GOOD = dict(
    x=torch.randn(2, K), qdata=COALESCED.qdata, scale=COALESCED.scale,
    zero_point=COALESCED.zero_point, group_size=GROUP, bias=torch.randn(N),
    act_pre_scale=torch.rand(K),
)  # fmt: skip
SHAPE = r"must have shape \[N, n_groups\] = \[8, 4\], got "
OP = {
    "plain scale": (dict(scale=PLAIN.scale), ValueError, rf"scale {SHAPE}\[4, 8\]\. .*{REPACK}"),
    "plain zero_point": (
        dict(zero_point=PLAIN.zero_point), ValueError, rf"zero_point {SHAPE}\[4, 8\]\. .*{REPACK}"),
    "both plain": (dict(scale=PLAIN.scale, zero_point=PLAIN.zero_point), ValueError, REPACK),
    "another group": (dict(group_size=64), ValueError, r"\[N, n_groups\] = \[8, 2\], got \[8, 4\]"),
    "scale rank 1": (dict(scale=COALESCED.scale[0]), ValueError, rf"scale {SHAPE}\[4\]"),
    "scale rank 3": (dict(scale=COALESCED.scale[None]), ValueError, rf"scale {SHAPE}\[1, 8, 4\]"),
    "zero_point rank": (
        dict(zero_point=COALESCED.zero_point[None]), ValueError, rf"{SHAPE}\[1, 8, 4\]"),
    "scale rows": (dict(scale=COALESCED.scale[:7]), ValueError, rf"scale {SHAPE}\[7, 4\]"),
    "group zero": (dict(group_size=0), ValueError, "group_size must be positive, got 0"),
    "group negative": (dict(group_size=-32), ValueError, "group_size must be positive, got -32"),
    "group of no multiple": (
        dict(group_size=48), ValueError, "K must be a multiple of group_size 48, got 128"),
    "group under 32": (
        dict(group_size=16, scale=torch.ones(N, 8), zero_point=torch.ones(N, 8)), ValueError,
        "group_size must be a multiple of 32, .* int8 scale, got 16"),
    "K no multiple of 32": (
        dict(x=torch.ones(1, 48), qdata=torch.zeros(N, 24, dtype=torch.int8)), ValueError,
        "K must be a multiple of group_size 32, got 48"),
    "qdata uint8": (dict(qdata=COALESCED.qdata.view(torch.uint8)), TypeError,
                    r"qdata must be int8 with 2 dims, got torch.uint8 \[8, 64\]"),
    "qdata rank": (dict(qdata=COALESCED.qdata[None]), TypeError,
                   r"qdata must be int8 with 2 dims, got torch.int8 \[1, 8, 64\]"),
    "scale float64": (dict(scale=COALESCED.scale.double()), TypeError,
                      "scale must be float32 or float16 or bfloat16"),
    "zero_point half": (dict(zero_point=COALESCED.zero_point.half()), TypeError,
                        "the same for scale and zero_point, got torch.float16"),
    "scale device": (dict(scale=COALESCED.scale.to("meta")), ValueError,
                     "scale must be on qdata's device cpu, got meta"),
    "zero_point device": (dict(zero_point=COALESCED.zero_point.to("meta")), ValueError,
                          "zero_point must be on qdata's device cpu, got meta"),
    "x device": (dict(x=torch.ones(1, K, device="meta")), (ValueError, RuntimeError), "device"),
    "x dtype": (dict(x=torch.ones(1, K, dtype=torch.int8)), TypeError, "x must be float32"),
    "x width": (dict(x=torch.ones(1, 64)), ValueError, r"last dim of x must be 128.*\[1, 64\]"),
    "x scalar": (dict(x=torch.ones(())), ValueError, r"last dim of x must be 128"),
    "bias": (dict(bias=torch.ones(9)), ValueError, r"bias must have shape \[8\], got \[9\]"),
    "act_pre_scale": (dict(act_pre_scale=torch.ones(9)), ValueError, "must have 128 entries"),
}  # fmt: skip


@pytest.mark.parametrize("case", OP)
def test_the_op_refuses(case):
    change, error, message = OP[case]
    with pytest.raises(error, match=message):
        torch.ops.int4q.int4_plain_mm(*{**GOOD, **change}.values())


@pytest.mark.parametrize("case", [c for c in OP if "device" not in c])
def test_tracing_refuses_the_same(case):
    """The fake raises too: a wrong graph is never captured."""
    change, error, message = OP[case]
    arguments = [
        a.to("meta") if isinstance(a, torch.Tensor) else a for a in {**GOOD, **change}.values()
    ]
    with pytest.raises(error, match=message):
        torch.ops.int4q.int4_plain_mm(*arguments)


def test_what_is_right_is_taken():
    y = torch.ops.int4q.int4_plain_mm(*GOOD.values())
    x = GOOD["x"] * GOOD["act_pre_scale"]
    exact = F.linear(x, COALESCED.dequantize(), GOOD["bias"])
    torch.testing.assert_close(y, exact, rtol=0, atol=2e-2 * float(exact.abs().max()))


def test_activations_are_rounded_half_to_even_in_blocks_of_32():
    x = torch.zeros(1, 64)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -126.5])  # d = 1
    x[0, 32:34] = torch.tensor([-254.0, 3.0])  # d = 2: another block, another scale
    xq, d = reference.quantize_activation(x)
    assert d.tolist() == [[1.0, 2.0]] and xq.dtype == torch.int8
    assert xq[0, 0, :6].tolist() == [127, 0, 2, 2, 0, -126] and not xq[0, 0, 6:].any()
    assert xq[0, 1, :2].tolist() == [-127, 2]
    for odd in (float("nan"), float("inf")):
        x[0, 40] = odd
        xq, d = reference.quantize_activation(x)
        assert d[0, 0] == 1 and d[0, 1].isnan() and not xq[0, 1].any()


def test_integer_sums_of_the_reference_are_plain_integer_arithmetic():
    x = torch.randn(3, K)
    xq, _ = reference.quantize_activation(x)
    q = unpack_nibbles(COALESCED.qdata).long()
    dots = reference.int8_dots(xq, COALESCED.qdata)
    assert dots.dtype == torch.int32 and dots.shape == (3, K // 32, N)
    for b in range(K // 32):
        expected = xq[:, b].long() @ q[:, 32 * b : 32 * b + 32].T
        assert torch.equal(dots[:, b].long(), expected)


FIELDS = ["qdata", "scale", "zero_point", "block_size", "shape"]
TENSOR = {
    "plain scale": (dict(scale=PLAIN.scale), ValueError,
                    rf"scale of CudaCoalescedInt4Tensor must have shape \[.., N, n_groups\] = "
                    rf"\[8, 4\], got \[4, 8\]\. .*repack it with {REPACK}"),
    "plain zero_point": (dict(zero_point=PLAIN.zero_point), ValueError, REPACK),
    "scale rank": (dict(scale=COALESCED.scale[None]), ValueError, r"\[8, 4\], got \[1, 8, 4\]"),
    "qdata width": (dict(qdata=COALESCED.qdata[:, 1:]), ValueError, r"\[8, 64\], got \[8, 63\]"),
    "qdata dtype": (dict(qdata=COALESCED.qdata.view(torch.uint8)), TypeError, "must be int8, got"),
    "scale dtype": (dict(scale=COALESCED.scale.double()), TypeError, "scale must be float32 or"),
    "zero_point dtype": (dict(zero_point=COALESCED.zero_point.half()), TypeError,
                         "zero_point must have scale's dtype torch.float32, got torch.float16"),
    "scale device": (dict(scale=COALESCED.scale.to("meta")), ValueError,
                     "scale must be on qdata's device cpu, got meta"),
    "group": (dict(block_size=[1, 48]), ValueError, r"group_size must be one of .*, got 48"),
    "group of both dims": (dict(block_size=[2, 32]), ValueError, "exactly one entry other than 1"),
    "K": (dict(shape=[8, 80], qdata=torch.zeros(8, 40, dtype=torch.int8)), ValueError,
          "must be a multiple of group_size 32, got 80"),
    "no tensor": (dict(scale=1.0), TypeError, "scale must be a tensor, got float"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSOR)
def test_the_tensor_refuses(case):
    change, error, message = TENSOR[case]
    good = {name: getattr(COALESCED, name) for name in FIELDS}
    with pytest.raises(error, match=message):
        CudaCoalescedInt4Tensor(*{**good, **change}.values())


def test_the_plain_tensor_refuses_coalesced_parts():
    with pytest.raises(ValueError, match=r"\[4, 8\], got \[8, 4\]\. .*\.to_int4_tensor\(\)"):
        Int4Tensor(COALESCED.qdata, COALESCED.scale, PLAIN.zero_point, [1, GROUP], [N, K])


# --- which op, which kernels ----------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("M", [1, 8, 9, 64])
@pytest.mark.parametrize("rows", [4, 24])  # N = 4 is also n_groups: the shapes say nothing
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_each_layout_reaches_its_own_op(M, rows, dtype):
    plain = Int4Tensor.from_hp(torch.randn(rows, K), [1, GROUP])
    coalesced = CudaCoalescedInt4Tensor.from_int4_tensor(plain, dtype)
    x = torch.randn(M, K)
    for weight, own, other in (
        (plain, "int4q.int4_linear.default", "int4q.int4_plain_mm.default"),
        (coalesced, "int4q.int4_plain_mm.default", "int4q.int4_linear.default"),
    ):
        with Recorder() as recorder:
            y = F.linear(x, weight)
        assert own in recorder.ops and other not in recorder.ops
        bound = 2e-2 if dtype == torch.int8 and weight is coalesced else 1e-5
        exact = F.linear(x, plain.dequantize())
        torch.testing.assert_close(y, exact, rtol=0, atol=bound * float(exact.abs().max()))


def test_no_fbgemm_kernel_serves_the_coalesced_layout():
    """fbgemm reads ``[n_groups, N]`` only; with N == n_groups no shape check would save it."""
    for op in ("int4_plain_mm", "int4_plain_mm_w4a16"):
        assert all(k.backend is not KernelPreference.FBGEMM for k in registry.kernels(op))
    for dtype in (torch.int8, torch.bfloat16):
        t = CudaCoalescedInt4Tensor.from_hp(torch.randn(4, K), [1, GROUP], dtype)
        with kernel_preference("fbgemm"), pytest.raises(ValueError, match="no fbgemm kernel"):
            F.linear(torch.randn(1, K), t)


def test_int8_kernels_serve_the_coalesced_layout_only():
    for op in ("int4_linear", "int4_plain_mm_w4a16"):
        assert not [k.name for k in registry.kernels(op) if "w4a8" in k.name]
    assert [k.name for k in registry.kernels("int4_plain_mm") if "w4a8" in k.name] == [
        "cuda_decode_w4a8", "triton_w4a8", "cpu_native_w4a8", "reference_w4a8",
    ]  # fmt: skip


def test_the_gradient_passes_through_scale_bias_and_layout():
    x = torch.randn(3, K, requires_grad=True)
    bias = torch.randn(N, requires_grad=True)
    pre = torch.rand(K)
    parts = COALESCED.qdata, COALESCED.scale, COALESCED.zero_point, GROUP
    for int8 in (True, False):
        y = torch.ops.int4q.int4_plain_mm(x, *parts, bias, pre, int8)
        grad_x, grad_bias = torch.autograd.grad(y.sum(), (x, bias))
        torch.testing.assert_close(grad_x, (COALESCED.dequantize().sum(0) * pre).expand(3, -1))
        assert torch.equal(grad_bias, torch.full((N,), 3.0))
