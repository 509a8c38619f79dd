"""``int4q.kernels``: the ops of the contract as documented Python functions."""

import inspect

import pytest
import torch

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, kernels
from int4q.packing import signed_to_offset

GROUP = 32
T = Int4Tensor.from_hp(torch.randn(24, 96).bfloat16(), [1, GROUP])
STACK = Int4Tensor.from_hp(torch.randn(3, 24, 96).bfloat16(), [1, 1, GROUP])
COALESCED = CudaCoalescedInt4Tensor.from_int4_tensor(T)
SYMMETRIC = signed_to_offset(T.qdata), T.scale.mT
X = torch.randn(4, 96).bfloat16()


def parts(t):
    return t.qdata, t.scale, t.zero_point, GROUP


CALLS = {
    "dequant_w4_to_bf16": ((*SYMMETRIC, GROUP), (24, 96), torch.bfloat16),
    "int4_matmul": ((X, *SYMMETRIC, GROUP), (4, 24), torch.bfloat16),
    "int4_matvec": ((X[:1], *SYMMETRIC, GROUP), (1, 24), torch.bfloat16),
    "int4_plain_mm": ((X, *parts(COALESCED)), (4, 24), torch.bfloat16),
    "int4_linear": ((X, *parts(T)), (4, 24), torch.bfloat16),
    "int4_bmm": ((X.expand(3, -1, -1), *parts(STACK)), (3, 4, 24), torch.bfloat16),
    "int4_grouped_mm": (
        (X, *parts(STACK), torch.tensor([1, 1, 4], dtype=torch.int32)), (4, 24), torch.bfloat16,
    ),
    "linear_q4gsw": (
        (X.float(), SYMMETRIC[0].view(torch.uint8), T.scale, GROUP), (4, 24), torch.float32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_each_op_has_a_documented_function(name):
    function, op = getattr(kernels, name), getattr(torch.ops.int4q, name)
    arguments, shape, dtype = CALLS[name]
    y = function(*arguments)
    assert y.shape == shape and y.dtype == dtype
    assert torch.equal(y, op(*arguments))
    # The same arguments, defaults included, and each of them in the docstring.
    schema = op.default._schema.arguments
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters] == [a.name for a in schema]
    for p, a in zip(parameters, schema, strict=True):
        assert p.default == (a.default_value if a.has_default_value() else p.empty)
    for section in ("Args:", "Returns:", *(p.name for p in parameters)):
        assert section in function.__doc__, section


def test_every_argument_is_passed_on():
    bias, pre_scale = torch.randn(24).bfloat16(), (torch.rand(96) + 0.5).bfloat16()
    for name, weight in (("int4_linear", T), ("int4_plain_mm", COALESCED)):
        got = getattr(kernels, name)(X, *parts(weight), bias, pre_scale)
        assert torch.equal(got, getattr(torch.ops.int4q, name)(X, *parts(weight), bias, pre_scale))
        for others in ((None, pre_scale), (bias, None)):
            assert not torch.equal(got, getattr(kernels, name)(X, *parts(weight), *others))
    w4a16 = kernels.int4_plain_mm(X, *parts(COALESCED), bias, pre_scale, False)
    assert torch.equal(w4a16, torch.ops.int4q.int4_plain_mm(
        X, *parts(COALESCED), bias, pre_scale, False))  # fmt: skip
    assert not torch.equal(w4a16, kernels.int4_plain_mm(X, *parts(COALESCED), bias, pre_scale))


@pytest.mark.parametrize("name", ["dequant_w4_to_bf16", "int4_matmul", "int4_matvec"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_symmetric_ops_take_bf16_scales_only(name, dtype):
    arguments = list(CALLS[name][0])
    arguments[-2] = arguments[-2].to(dtype)
    message = rf"w_scale must be bfloat16, got {dtype}\. Call \.bfloat16\(\) on it"
    with pytest.raises(TypeError, match=message):
        getattr(kernels, name)(*arguments)
    with pytest.raises(TypeError, match=message):  # the fake refuses the same
        getattr(kernels, name)(*(a.to("meta") if torch.is_tensor(a) else a for a in arguments))
