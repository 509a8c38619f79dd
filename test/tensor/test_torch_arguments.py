"""Every way that torch takes the arguments of a product, against torch on dequantised weights.

A case is a function of the weight. What torch computes is computed, in the same dtype; what torch
refuses is refused.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from int4q import CudaCoalescedInt4Tensor
from int4q.tensor.base import Int4TensorBase

# ruff: noqa: E501 (one case a line reads better)

torch.manual_seed(0)
N, K, B = 48, 64, 3
X, Z, V = torch.randn(5, K), torch.randn(5, N), torch.randn(K)
X3, X4 = torch.randn(B, 5, K), torch.randn(2, B, 5, K)
BIAS, ROWS, NAN = torch.randn(N), torch.randn(5, N), torch.full((N,), float("nan"))
SUM3 = torch.randn(B, 5, N)


def weights(layout, *shape):
    torch.manual_seed(1)
    w = torch.randn(shape)
    return layout.from_hp(w, [1] * (len(shape) - 1) + [32], activation_dtype=torch.bfloat16)


MATRIX = {
    "linear keywords": lambda w: F.linear(input=X, weight=w, bias=BIAS),
    "linear weight keyword": lambda w: F.linear(X, weight=w),
    "linear bias [1, N]": lambda w: F.linear(X, w, BIAS[None]),
    "linear bias [M, N]": lambda w: F.linear(X, w, ROWS),
    "linear bias 0-d": lambda w: F.linear(X, w, torch.tensor(2.0)),
    "linear 3-D, bias [1, N]": lambda w: F.linear(X3, w, BIAS[None]),
    "linear out": lambda w: F.linear(X, w, out=torch.zeros(5, N)),
    "mm keywords": lambda w: torch.mm(input=X, mat2=w.t()),
    "mm other spelling": lambda w: torch.mm(x=X, mat2=w.t()),
    "mm method keyword": lambda w: X.mm(mat2=w.t()),
    "mm weight first": lambda w: torch.mm(w, mat2=X.t()),
    "mm 1-D": lambda w: torch.mm(V, w.t()),
    "mm 3-D": lambda w: torch.mm(X3, w.t()),
    "matmul keywords": lambda w: torch.matmul(input=X, other=w.t()),
    "matmul other spelling": lambda w: torch.matmul(x1=X, x2=w.t()),
    "matmul method keyword": lambda w: X.matmul(other=w.t()),
    "matmul 1-D": lambda w: V @ w.t(),
    "matmul 1-D, contracts N": lambda w: V[:N] @ w,
    "matmul 4-D": lambda w: X4 @ w.t(),
    "matmul integer": lambda w: torch.ones(5, N, dtype=torch.int32) @ w,
    "matmul 0-d": lambda w: torch.matmul(torch.tensor(1.0), w),
    "weight first, 1-D": lambda w: w @ V,
    "weight first, 3-D": lambda w: w @ X3.mT,
    "row @ matrix": lambda w: w[0] @ X.t(),
    "vector @ row": lambda w: X @ w[0],
    "mv": lambda w: torch.mv(w, V),
    "mv keywords": lambda w: torch.mv(input=w, vec=V),
    "mv of a matrix": lambda w: torch.mv(w, X),
    "addmv": lambda w: torch.addmv(BIAS, w, V, beta=0.5, alpha=2),
    "addmm": lambda w: torch.addmm(BIAS, X, w.t()),
    "addmm keywords": lambda w: torch.addmm(input=BIAS, mat1=X, mat2=w.t(), beta=0.5, alpha=2),
    "addmm beta 0, NaN": lambda w: torch.addmm(NAN, X, w.t(), beta=0),
    "addmm alpha 0": lambda w: torch.addmm(BIAS, X, w.t(), alpha=0),
    "addmm widens": lambda w: torch.addmm(ROWS, X[:1], w.t()),
    "addmm wrong N": lambda w: torch.addmm(torch.randn(N + 1), X, w.t()),
    "addmm 3-D bias": lambda w: torch.addmm(SUM3, X, w.t()),
    "addmm 0-d bias": lambda w: torch.addmm(torch.tensor(1.5), X, w.t()),
    "addmm method": lambda w: ROWS.addmm(X, w.t(), alpha=3),
    "addmm weight first": lambda w: torch.addmm(torch.randn(N, 1), w, X.t(), beta=0),
    "addmm_": lambda w: ROWS.clone().addmm_(X, w.t(), beta=2),
    "addmm_ of a row": lambda w: BIAS.clone().addmm_(X, w.t()),
}  # fmt: skip

STACK = {
    "bmm keywords": lambda w: torch.bmm(input=X3, mat2=w.mT),
    "bmm method": lambda w: X3.bmm(mat2=w.mT),
    "bmm one batch": lambda w: torch.bmm(X3[:1], w.mT),
    "bmm weight first, one batch": lambda w: torch.bmm(w, X3.mT[:1]),
    "matmul": lambda w: X3 @ w.mT,
    "matmul broadcasts a matrix": lambda w: X @ w.mT,
    "matmul broadcasts one batch": lambda w: X3[:1] @ w.mT,
    "matmul broadcasts one weight": lambda w: X3 @ w[:1].mT,
    "matmul matrix, one weight": lambda w: X @ w[:1].mT,
    "matmul vector": lambda w: V @ w.mT,
    "matmul 4-D": lambda w: X4 @ w.mT,
    "matmul 4-D, one weight": lambda w: X4 @ w[:1].mT,
    "matmul no rows": lambda w: X3[:, :0] @ w.mT,
    "matmul wrong batch": lambda w: torch.randn(2, 5, K) @ w.mT,
    "weight first": lambda w: w @ X3.mT,
    "weight first, matrix": lambda w: w @ X.t(),
    "weight first, vector": lambda w: w @ V,
    "weight first, 4-D": lambda w: w @ X4.mT,
    "contracts N": lambda w: torch.randn(B, 5, N, generator=torch.Generator().manual_seed(2)) @ w,
    "baddbmm": lambda w: torch.baddbmm(SUM3, X3, w.mT, beta=0.5, alpha=2),
    "baddbmm keywords": lambda w: torch.baddbmm(input=BIAS, batch1=X3, batch2=w.mT),
    "baddbmm beta 0, NaN": lambda w: torch.baddbmm(NAN, X3, w.mT, beta=0),
    "baddbmm_": lambda w: SUM3.clone().baddbmm_(X3, w.mT),
    "addbmm": lambda w: torch.addbmm(ROWS, X3, w.mT, beta=2),
    "addbmm_": lambda w: ROWS.clone().addbmm_(X3, w.mT, alpha=2),
}  # fmt: skip


def check(call, t):
    try:
        expected = call(t.dequantize())
    except (RuntimeError, TypeError):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call(t)
        return
    got = call(t)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    # Sums of 64 float32 products (and of 3 x 64) in another order.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", MATRIX)
def test_a_matrix(layout, case, grad):
    with torch.set_grad_enabled(grad):
        check(MATRIX[case], weights(layout, N, K))


@pytest.mark.parametrize("case", STACK)
def test_a_stack(layout, case):
    check(STACK[case], weights(layout, B, N, K))


OUT = {
    "mm": (lambda w, out: torch.mm(X, w.t(), out=out), (5, N)),
    "matmul": (lambda w, out: torch.matmul(X3, w.t(), out=out), (B, 5, N)),
    "bmm": (lambda w, out: torch.bmm(X[None], w.t()[None], out=out), (1, 5, N)),
    "addmm": (lambda w, out: torch.addmm(BIAS, X, w.t(), out=out), (5, N)),
    "mv": (lambda w, out: torch.mv(w, V, out=out), (N,)),
}


@pytest.mark.parametrize("case", OUT)
def test_out_is_filled_and_returned(layout, case):
    call, shape = OUT[case]
    t = weights(layout, N, K)
    for out in (
        torch.full(shape, float("nan")),
        torch.empty(0),
        torch.zeros(*shape[::-1]).permute(*range(len(shape))[::-1]),
    ):
        expected = torch.empty(0)
        call(t.dequantize(), expected)
        strides = out.stride() if out.numel() else expected.stride()
        assert call(t, out) is out and out.stride() == strides
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(TypeError, match="written to must be torch.float32"):
        call(t, torch.zeros(shape, dtype=torch.float64))


def test_out_takes_no_gradient(layout):
    t, x = weights(layout, N, K), X.clone().requires_grad_()
    for a, out in ((x, torch.zeros(5, N)), (X, torch.zeros(5, N, requires_grad=True))):
        with pytest.raises(ValueError, match="out= takes no operand that requires a gradient"):
            torch.mm(a, t.t(), out=out)


def test_what_is_added_has_the_dtype_of_the_activation(layout):
    t, x = weights(layout, N, K).bfloat16(), X.bfloat16()
    got = torch.addmm(BIAS, x, t.t())
    assert got.dtype == torch.bfloat16
    # One rounding each of the product, the bias, and the sum.
    torch.testing.assert_close(
        got, torch.addmm(BIAS.bfloat16(), x, t.dequantize().t()), rtol=2**-6, atol=0.1
    )
    assert F.linear(x, t, BIAS[None]).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="what is added must be a plain tensor"):
        torch.addmm(t, x, t.t())


def test_gradients_of_what_is_added(layout):
    t = weights(layout, N, K)
    grads = []
    for w in (t, t.dequantize()):
        x, bias = X.clone().requires_grad_(), BIAS.clone().requires_grad_()
        torch.addmm(bias, x, w.t(), beta=2, alpha=3).square().sum().backward()
        rows = ROWS.clone()
        rows.addmm_(x, w.t())
        rows.square().sum().backward()
        grads.append((x.grad, bias.grad))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-3)


def named_like_torch():
    """Handlers of aten ops that are bound by Python, and the op."""
    table = Int4TensorBase._ATEN_OP_TABLE[Int4TensorBase]
    for op, wrapper in table.items():
        handler = inspect.getclosurevars(inspect.unwrap(wrapper)).nonlocals.get("handler")
        if handler is not None:
            yield op, handler


def test_handlers_bear_the_names_of_torchs_schema():
    renamed = {"self": "input"}
    seen = 0
    for op, handler in named_like_torch():
        names = [renamed.get(a.name, a.name) for a in op._schema.arguments]
        own = list(inspect.signature(handler).parameters)
        assert [n for n in names if n in own] == own, op
        required = [
            n for n, p in inspect.signature(handler).parameters.items() if p.default is p.empty
        ]
        assert required == names[: len(required)], op
        seen += 1
    assert seen >= 9


UNREGISTERED = {
    "repeat": lambda w: w.repeat(2, 1),
    "embedding bag": lambda w: F.embedding_bag(torch.tensor([[0, 1]]), w),
    "bilinear": lambda w: F.bilinear(torch.randn(2, N), torch.randn(2, K), w[None]),
    "another dtype's bytes": lambda w: w.view(torch.int16),
}  # fmt: skip


def test_as_strided_keeps_the_strides(layout):
    w = layout.from_hp(torch.randn(N, K), [1, 32])
    assert torch.equal(w.as_strided((N, K), (K, 1)), w)
    for size, stride, offset in (((2, 2), (1, 1), 0), ((N, K), (1, N), 0), ((N, K), (K, 1), 1)):
        with pytest.raises(ValueError, match="as_strided of a 4-bit weight must keep"):
            w.as_strided(size, stride, offset)


@pytest.mark.parametrize("case", UNREGISTERED)
def test_an_op_that_is_not_there_says_so(layout, case):
    rule = rf"aten\.\w+\.\w+ is not implemented for {layout.__name__}. Use .dequantize\(\) first"
    with pytest.raises(NotImplementedError, match=rule):
        UNREGISTERED[case](weights(layout, N, K))


def test_unsafe_split_is_split(layout):
    t = weights(layout, N, K)
    for got, expected in (
        (t.unsafe_split(16), t.split(16)),
        (torch.unsafe_split_with_sizes(t, [32, 16]), t.split([32, 16])),
    ):
        assert len(got) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_ravel(layout):
    t = weights(layout, N, K)
    for flat in (t.ravel(), torch.ravel(input=t)):
        assert type(flat) is layout and torch.equal(flat.dequantize(), t.dequantize().ravel())


def test_int8_activations_do_not_change_the_binding():
    t = CudaCoalescedInt4Tensor.from_hp(torch.randn(N, K), [1, 32])
    assert torch.equal(torch.mm(input=X, mat2=t.t()), F.linear(X, t))
    assert isinstance(torch.mv(t, V), Tensor)
