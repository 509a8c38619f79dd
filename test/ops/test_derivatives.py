"""Derivatives by every way torch has, against torch on the dequantised weight in float32.

The products are linear in the activation, so each derivative is one or two of them: sums of at
most 64 float32 terms in another order.
"""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import func

from int4q import CpuPackedInt4Tensor, CudaCoalescedInt4Tensor, Int4Tensor

N, K = 48, 64

WEIGHTS = {
    "plain": lambda w: Int4Tensor.from_hp(w, [1, 32]),
    "coalesced": lambda w: CudaCoalescedInt4Tensor.from_hp(w, [1, 32], torch.bfloat16),
    "rows": lambda w: CpuPackedInt4Tensor.from_hp(w, [1, 32], packing="rows"),
    "aten": lambda w: CpuPackedInt4Tensor.from_hp(w, [1, 32], packing="aten"),
}
# Activations are rounded at run time; derivatives pass straight through the rounding.
ROUNDED = {
    "int8": lambda w: CudaCoalescedInt4Tensor.from_hp(w, [1, 32]),
    "float8": lambda w: Int4Tensor.from_hp(w, [1, 32], torch.float8_e4m3fn),
}


def dual(f, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent


def cube(f):
    return lambda v: f(v).pow(3).sum()


LINEAR = {
    "jvp": lambda f, x: func.jvp(f, (x,), (x.cos(),))[1],
    "dual level": lambda f, x: dual(f, x, x.cos()),
    "dual level, no_grad": torch.no_grad()(lambda f, x: dual(f, x, x.cos())),
    "jacfwd": lambda f, x: func.jacfwd(f)(x[0]),
    "jacrev": lambda f, x: func.jacrev(f)(x[0]),
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.ones(len(x), N))[0],
    "jvp by two backwards": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos())[1],
    "jacobian, forward mode": lambda f, x: torch.autograd.functional.jacobian(
        f, x[0], vectorize=True, strategy="forward-mode"
    ),
}
SMOOTH = {
    "grad": lambda f, x: func.grad(cube(f))(x),
    "per-sample grad": lambda f, x: func.vmap(func.grad(cube(f)))(x),
    "vmap": lambda f, x: func.vmap(f)(x),
    "vmap over columns": lambda f, x: func.vmap(f, in_dims=1, out_dims=1)(x.T.contiguous()),
    "vmap of vmap": lambda f, x: func.vmap(func.vmap(f))(x[None]),
    "vmap of jvp": lambda f, x: func.vmap(lambda v: func.jvp(f, (v,), (v.cos(),))[1])(x),
    "hessian": lambda f, x: func.hessian(cube(f))(x[0]),
    "reverse of forward": lambda f, x: func.jacrev(func.jacfwd(cube(f)))(x[0]),
    "forward of forward": lambda f, x: func.jacfwd(func.jacfwd(cube(f)))(x[0]),
    "grad of grad": lambda f, x: func.grad(lambda v: func.grad(cube(f))(v).square().sum())(x),
    "hessian by autograd": lambda f, x: torch.autograd.functional.hessian(
        cube(f), x[0], vectorize=True
    ),
}


def compare(call, f, reference, *args):
    got, expected = call(f, *args), call(reference, *args)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert expected.norm() > 0
    assert (got - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("case", LINEAR | SMOOTH)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scaled", [False, True])
def test_linear(kind, case, scaled):
    t, x, bias = WEIGHTS[kind](torch.randn(N, K)), torch.randn(5, K), torch.randn(N)
    s = torch.rand(K) + 0.5 if scaled else torch.ones(K)
    if scaled:
        t.act_pre_scale = s
    w = t.dequantize() * s
    call = (LINEAR | SMOOTH)[case]
    compare(call, lambda v: F.linear(v, t, bias), lambda v: F.linear(v, w, bias), x)


@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("kind", ROUNDED)
def test_linear_with_rounded_activations(kind, case):
    t, x, bias = ROUNDED[kind](torch.randn(N, K)), torch.randn(5, K), torch.randn(N)
    w = t.dequantize()
    compare(LINEAR[case], lambda v: F.linear(v, t, bias), lambda v: F.linear(v, w, bias), x)


@pytest.mark.parametrize("kind", WEIGHTS | ROUNDED)
def test_bias(kind):
    t, x, bias = (WEIGHTS | ROUNDED)[kind](torch.randn(N, K)), torch.randn(K), torch.randn(N)
    jacobian = func.jacfwd(lambda b: F.linear(x, t, b))(bias)
    assert torch.equal(jacobian, torch.eye(N))
    assert torch.equal(func.jacrev(lambda b: F.linear(x, t, b))(bias), torch.eye(N))
    both = func.jvp(lambda v, b: F.linear(v, t, b), (x, bias), (x, bias))[1]
    torch.testing.assert_close(both, F.linear(x, t.dequantize(), bias), rtol=1e-5, atol=1e-4)


def grouped(x, w, offs):
    ends = offs.tolist()
    rows = zip([0, *ends], ends, strict=False)
    return torch.cat([x[start:end] @ w[e].T for e, (start, end) in enumerate(rows)])


OF_A_BATCH = ("jvp", "dual level", "jvp by two backwards", "grad", "grad of grad")
OF_THE_FIRST = ("jacfwd", "hessian", "reverse of forward", "forward of forward")


@pytest.mark.parametrize("case", OF_A_BATCH + OF_THE_FIRST)
def test_stacks(layout, case):
    t = layout.from_hp(torch.randn(3, N, K), [1, 1, 32], activation_dtype=torch.bfloat16)
    w, turned, offs = t.dequantize(), t.mT, torch.tensor([1, 1, 4], dtype=torch.int32)
    lead = (1,) if case in OF_THE_FIRST else ()
    call, x, rows = (LINEAR | SMOOTH)[case], torch.randn(*lead, 3, 2, K), torch.randn(*lead, 4, K)
    compare(call, lambda v: torch.bmm(v, t), lambda v: v @ w.mT, x)
    product = torch._grouped_mm
    compare(call, lambda v: product(v, turned, offs=offs), lambda v: grouped(v, w, offs), rows)


def test_matmul_of_a_weight_turned_inside(layout):
    t = layout.from_hp(torch.randn(N, K), [1, 32], activation_dtype=torch.bfloat16)
    w, x = t.dequantize(), torch.randn(5, K)
    for call in (LINEAR["jvp"], LINEAR["jacfwd"], SMOOTH["grad"], SMOOTH["hessian"]):
        compare(call, lambda v: v @ t.t(), lambda v: v @ w.t(), x)


def test_a_tangent_of_the_weight_is_refused():
    t, x = Int4Tensor.from_hp(torch.randn(N, K), [1, 32]), torch.randn(2, K)
    rest = t.zero_point, t.group_size

    def product(scale):
        return torch.ops.int4q.int4_linear(x, t.qdata, scale, *rest)

    with pytest.raises(ValueError, match="derivatives in x and bias only, got a tangent of scale"):
        func.jvp(product, (t.scale,), (t.scale,))


def test_vmap_over_weights_is_a_loop():
    t = Int4Tensor.from_hp(torch.randn(3, N, K), [1, 1, 32])
    x, g = torch.randn(3, 2, K), t.group_size

    def product(v, q, s, z):
        return torch.ops.int4q.int4_linear(v, q, s, z, g)

    got = func.vmap(product)(x, t.qdata, t.scale, t.zero_point)
    torch.testing.assert_close(got, torch.bmm(x, t), rtol=1e-5, atol=1e-4)


def test_compiled_forward_mode_is_the_eager_one(layout):
    t, x = (
        layout.from_hp(torch.randn(N, K), [1, 32], activation_dtype=torch.bfloat16),
        torch.randn(2, K),
    )

    def tangent(v):
        return func.jvp(lambda u: F.linear(u, t), (v,), (v.cos(),))[1]

    torch._dynamo.reset()
    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), F.linear(x.cos(), t.dequantize()), rtol=1e-5, atol=1e-4)
