"""The plain-Triton kernels on a CPU, under Triton's interpreter.

The interpreter is chosen when Triton is first imported, so outside of it this file runs itself in
a process of its own. The interpreter has no inline assembly; the values it checks are those of
the branches written for it, the indexing, masks and epilogues are the ones that run on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers import run_in_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.slow
    def test_under_the_interpreter():
        pytest.importorskip("triton")
        run_in_interpreter(__file__)

else:
    from dataclasses import replace
    from functools import partial
    from types import SimpleNamespace

    import weights
    from weights import BF16, ELEMENT_TOLERANCE, FP16, FP32, Case, offset_binary, values

    from int4q.kernels import reference
    from int4q.kernels.triton import dequant as triton_dequant
    from int4q.kernels.triton import fp8 as triton_fp8
    from int4q.kernels.triton import matmul as triton_matmul
    from int4q.kernels.triton import matvec as triton_matvec
    from int4q.kernels.triton import tuned
    from int4q.kernels.triton import w4a8 as triton_w4a8
    from int4q.kernels.weight import Weight

    CASES = [
        Case(5, 70, 160, 32, why="K tail, N no power of two"),
        Case(17, 130, 320, 64, FP16, why="two tiles of M and of N"),
        Case(3, 16, 512, 256, why="group wider than a K tile"),
        Case(40, 40, 384, 128, why="K split, last arrival adds"),
        Case(2, 33, 192, 32, FP32, why="float32"),
        Case(4, 24, 128, 64, BF16, FP32, why="float32 scales, bf16 activations"),
        Case(4, 24, 128, 64, FP16, BF16, why="scale dtype differs"),
        Case(1, 96, 320, 64, why="one row"),
    ]

    check = partial(weights.check, tolerance=ELEMENT_TOLERANCE)

    def parts(case, seed=0):
        """x and the weight."""
        g = torch.Generator().manual_seed(seed)
        dtype = case.scale_dtype or case.dtype
        weight = weights.random_weight(case.N, case.K, case.group_size, dtype, generator=g)
        return torch.randn(case.M, case.K, generator=g).to(case.dtype), weight

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_linear(case):
        """Weights rounded to the dtype of x; with zero points, without, offset binary."""
        x, weight = parts(case)
        bias = torch.randn(case.N).to(case.dtype)
        for used in (weight, offset_binary(weight)):
            w = values(used).to(case.dtype).double()
            check(triton_matmul.linear(x, used), x.double() @ w.t(), case.dtype)
            y = triton_matmul.linear(x, used, bias)
            check(y, x.double() @ w.t() + bias.double(), case.dtype)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_matvec(case):
        """Weights in float32; one row."""
        x, weight = parts(case)
        for used in (weight, offset_binary(weight)):
            y = triton_matvec.linear(x[:1], used)
            check(y, x[:1].double() @ values(used).double().t(), case.dtype)

    W4A8 = [
        Case(1, 7, 160, 32, why="K tail, N under a tile"),
        Case(2, 20, 384, 128, FP16, why="float16"),
        Case(3, 9, 192, 64, FP32, why="float32"),
        Case(5, 13, 64, 32, BF16, FP32, why="float32 scales"),
        Case(8, 12, 2304, 256, why="two steps of K"),
    ]

    @pytest.mark.parametrize("coalesced", [False, True])
    @pytest.mark.parametrize("case", W4A8, ids=str)
    def test_w4a8(case, coalesced):
        """The integer sums are the reference's bit for bit; float32 adds up in another order."""
        x, weight = parts(case)
        if coalesced:
            weight = weights.coalesced_scales(weight)
        sums = torch.empty(case.M, case.N, case.K // 32, dtype=torch.int32)
        bias = torch.randn(case.N).to(case.dtype) if coalesced else None
        pre_scale = torch.rand(case.K).to(case.dtype) if coalesced else None
        config = tuned.W4A8Config(4, 1 + case.K // 2000)
        more = bias, pre_scale, config, sums
        y = triton_w4a8.linear(x, weight, *more)
        x = x.float() * (pre_scale.float() if coalesced else 1)
        xq, d = reference.quantize_activation(x)
        assert torch.equal(sums.transpose(1, 2), reference.int8_dots(xq, weight.qdata))
        xq = (xq.double() * d.double().unsqueeze(-1)).flatten(1)
        w = values(weight)
        check(y, xq @ w.double().t() + (bias.double() if coalesced else 0), case.dtype)

    def test_w4a8_of_special_rows():
        """Zeros give 0, NaN and Inf a row of NaN, denormals what d = amax / 127 gives them."""
        case = Case(6, 5, 96, 32)
        x, weight = parts(case)
        x[0], x[1, 40], x[2, 3] = 0, float("nan"), float("-inf")
        x = x.float()
        x[3], x[4, 32:64] = 2e-44 * torch.randn(96), 1e-43
        x[5, :32] = torch.arange(32) * 1e33
        x[5, 32:64] = torch.arange(32) - 15.5  # halves, to even
        x[5, 32] = 127
        sums = torch.empty(6, 5, 3, dtype=torch.int32)
        y = triton_w4a8.linear(x, weight, sums=sums)
        xq, d = reference.quantize_activation(x)
        assert torch.equal(sums.transpose(1, 2), reference.int8_dots(xq, weight.qdata))
        assert (y[0] == 0).all() and y[1:3].isnan().all() and not y[3:].isnan().any()
        expected = reference.linear_int8(x, weight)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-44, equal_nan=True)

    def test_w4a8_of_slices():
        """Rows and whole groups cut from a weight, x by columns of another and transposed."""
        x, (qdata, scale, zero, *_) = parts(Case(2, 16, 256, 64))
        rows, k = slice(3, 12), slice(64, 192)
        cut = qdata[rows, 32:96], scale[1:3, rows], zero[1:3, rows]
        whole = Weight(*(t.contiguous() for t in cut), 64)
        for view in (x[:, k], x[:, k].t().contiguous().t()):
            y = triton_w4a8.linear(view, Weight(*cut, 64))
            assert torch.equal(y, triton_w4a8.linear(view.contiguous(), whole))
            check(y, reference.linear_int8(x[:, k].float(), whole).double(), BF16)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_float32_activations(case):
        """Whatever the scales' dtype; bias; one row and many."""
        case = replace(case, dtype=FP32, scale_dtype=case.scale_dtype or case.dtype)
        x, weight = parts(case)
        weight, bias = offset_binary(weight), torch.randn(case.N)
        expected = x.double() @ values(weight).double().t() + bias
        check(triton_matmul.linear(x, weight, bias), expected, FP32)
        check(triton_matvec.linear(x[:1], weight, bias), expected[:1], FP32)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_dequantize(case):
        _, weight = parts(case)
        for used in (weight, offset_binary(weight)):
            for dtype in (BF16, FP16, FP32):
                w = triton_dequant.dequantize(used, dtype)
                assert torch.equal(w, values(used).to(dtype))

    def test_any_strides():
        """Strided and transposed x, rows and groups cut from a weight, scales [N, groups]."""
        x, weight = parts(Case(6, 64, 256, 64))
        w, some = values(weight).to(BF16).double(), slice(16, 48)
        cut = weights.coalesced_scales(weight).rows(some)
        for view in (torch.stack([x, x], 1)[:, 0], x.t().contiguous().t()):
            check(triton_matmul.linear(view, cut), x.double() @ w[some].t(), BF16)
        # Columns: whole groups cut out of a wider weight.
        qdata, scale, zero, *_ = weight
        inner = Weight(qdata[:, 32:96], scale[1:3], zero[1:3], 64)
        y = triton_matmul.linear(x[:, 64:192], inner)
        check(y, x[:, 64:192].double() @ w[:, 64:192].t(), BF16)

    def test_activation_scale():
        """``act_pre_scale`` multiplies x, rounded to the dtype of x, for one row and for many."""
        case = Case(4, 32, 128, 32)
        x, weight = parts(case)
        factor = (torch.rand(case.K) + 0.5).to(BF16)
        scaled, w = (x * factor).double(), values(weight)
        y = triton_matmul.linear(x, weight, None, factor)
        check(y, scaled @ w.to(BF16).double().t(), BF16)
        y = triton_matvec.linear(x[:1], weight, None, factor)
        check(y, scaled[:1] @ w.double().t(), BF16)

    @pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
    def test_fp8_rows(dtype):
        """Bit for bit the reference's, strides and the activation's scale included."""
        x = (torch.randn(5, 300) * torch.logspace(-2, 2, 5)[:, None]).to(dtype)
        x[2] = 0
        factor = torch.rand(150) + 0.5
        for view, scale in ((x, None), (x[:, ::2], factor), (x[:, 150:], factor.to(dtype))):
            got, expected = triton_fp8.fp8_rows(view, scale), reference.fp8_rows(view, scale)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert triton_fp8.fp8_rows(x[:0])[0].shape == (0, 300)

    def test_fp8_rounding():
        """Every e4m3 value, the points halfway between two, and their float32 neighbours."""
        exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        half = (exact[1:] + exact[:-1]) / 2
        up, down = (half.nextafter(torch.tensor(v)) for v in (448.0, 0.0))
        x = torch.cat([exact, half, up, down])
        x = torch.stack([x, -x])
        values, rows = triton_fp8.fp8_rows(x)  # the largest is 448: a row's scale is 1
        assert (rows == 1).all()
        assert torch.equal(values, x.to(torch.float8_e4m3fn).float())

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_fp8_rows_that_are_not_finite():
        x = torch.randn(3, 32)
        x[0, 4], x[1, 5] = float("nan"), float("inf")
        values, rows = triton_fp8.fp8_rows(x)
        product = (values * rows).sum(1)
        assert product[:2].isnan().all() and product[2].isfinite()

    def test_slices_of_the_dequantised_weight(monkeypatch):
        """Dequantise + cuBLAS in slices: bounded memory, bias and all columns right."""
        monkeypatch.setattr(triton_dequant, "SLICE_BYTES", 300 * 128 * 2)
        case = Case(9, 600, 128, 32)
        x, weight = parts(case)
        bias = torch.randn(case.N).to(BF16)
        y = triton_dequant.linear(x, weight, bias)
        w = values(weight).to(BF16)
        check(y, x.double() @ w.double().t() + bias.double(), BF16)

    @pytest.mark.parametrize("group_size", [32, 128])
    @pytest.mark.parametrize("dtype", [BF16, FP32])
    def test_gradient_in_slices_of_columns(group_size, dtype, monkeypatch):
        """The last slice is narrower than the others; bounded memory, every column right."""
        monkeypatch.setattr(triton_dequant, "SLICE_BYTES", 48 * 300 * dtype.itemsize)
        case = Case(9, 48, 640, group_size)
        _, weight = parts(case)
        grad = torch.randn(case.M, case.N).to(dtype)
        w = values(weight).to(dtype)
        check(triton_dequant.grad_input(grad, weight), grad.double() @ w.double(), dtype)

    @pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 0)])
    def test_empty(shape):
        M, N = shape
        x, weight = parts(Case(max(M, 1), max(N, 1), 64, 32))
        x, weight = x[:M], weight.rows(slice(N))
        for run in (triton_matmul, triton_dequant, triton_w4a8):
            assert run.linear(x, weight).shape == shape
        assert triton_dequant.dequantize(weight, BF16).shape == (N, 64)
        grad = triton_dequant.grad_input(x.new_ones(shape), weight)
        assert grad.shape == (M, 64) and (N or not grad.any())

    def test_reasons():
        """Why a kernel refuses is said; under the interpreter the CPU is accepted."""
        problem = SimpleNamespace(
            op="int4_linear", device="cpu", dtype=BF16, scale_dtype=BF16, M=4, N=8, K=64,
            group_size=32, capability=None,
        )  # fmt: skip
        assert triton_matmul.unsupported(problem) is None
        assert "one row" in triton_matvec.unsupported(problem)
        assert triton_w4a8.unsupported(problem) is None
        assert "up to 8 rows" in triton_w4a8.unsupported(SimpleNamespace(M=9))
        assert f"M={tuned.DEQUANTIZE_FROM_M}" in triton_dequant.unsupported_linear(problem)
        problem.K = 80
        assert "multiple of group_size" in triton_matmul.unsupported(problem)
