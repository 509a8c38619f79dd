"""The plain-Triton products with stacks of weights on a CPU, under Triton's interpreter.

The interpreter is chosen when Triton is first imported, so outside of it this file runs itself in
a process of its own (see test_interpret.py).
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
    from dataclasses import dataclass
    from functools import partial

    import weights
    from weights import BF16, ELEMENT_TOLERANCE, FP16, FP32

    from int4q.kernels import registry, routing
    from int4q.kernels.triton import experts as triton_experts
    from int4q.kernels.triton import experts_plan as triton_plan
    from int4q.kernels.triton import routing as triton_routing

    @dataclass(frozen=True)
    class Case:
        N: int
        K: int
        group_size: int
        ends: tuple[int, ...]
        T: int
        dtype: torch.dtype = BF16
        coalesced: bool = False
        why: str = ""

        def __str__(self):
            return f"{self.T}x{self.N}x{self.K}-g{self.group_size}-{self.why}"

    CASES = [
        Case(70, 160, 32, (3, 3, 20, 41), 45, why="tails, an empty expert, rows of none"),
        Case(33, 192, 64, (0, 0, 5), 5, FP16, True, why="all on the last, coalesced"),
        Case(24, 96, 32, (5, 5), 5, FP32, why="all on the first, float32"),
        Case(16, 512, 256, (1, 2, 40), 40, why="two blocks of an expert"),
        Case(16, 64, 64, (0, 0), 3, why="rows of none only"),
        Case(24, 64, 32, tuple(range(1, 41)), 40, why="40 experts, one row each"),
    ]

    def parts(case, seed=0):
        g = torch.Generator().manual_seed(seed)
        E = len(case.ends)
        stack = weights.random_weight(
            case.N, case.K, case.group_size, case.dtype, experts=E, coalesced=case.coalesced,
            generator=g,
        )  # fmt: skip
        x = torch.randn(case.T, case.K, generator=g).to(case.dtype)
        offs = torch.tensor(case.ends, dtype=torch.int32)
        return x, stack, offs, weights.values(stack).to(case.dtype).double()

    def grouped(x, w, ends):
        y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64)
        for expert, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            y[start:end] = x[start:end].double() @ w[expert].t()
        return y

    check = partial(weights.check, tolerance=ELEMENT_TOLERANCE)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_grouped_mm(case):
        x, stack, offs, w = parts(case)
        y = triton_experts.int4_grouped_mm(x, stack, offs)
        check(y, grouped(x, w, case.ends), case.dtype)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_grouped_mm_backward(case):
        _, stack, offs, w = parts(case)
        grad = torch.randn(case.T, case.N).to(case.dtype)
        y = triton_experts.int4_grouped_mm_backward(grad, stack, offs)
        check(y, grouped(grad, w.mT, case.ends), case.dtype)

    @pytest.mark.parametrize("M", [0, 1, 3, 20])
    def test_bmm_and_backward(M):
        case = CASES[0]
        _, stack, _, w = parts(case)
        x = torch.randn(4, M, 160).bfloat16()
        check(triton_experts.int4_bmm(x, stack), x.double() @ w.mT, BF16)
        grad = torch.randn(4, 70, M).bfloat16().mT  # strided
        check(triton_experts.int4_bmm_backward(grad, stack), grad.double() @ w, BF16)

    @pytest.mark.parametrize("dtype", [BF16, FP32])
    def test_act_pre_scale_multiplies_first(dtype):
        x, stack, offs, w = parts(CASES[0])
        factor = torch.rand(160).to(dtype) + 0.5
        scaled = (x.float() * factor.float()).bfloat16()  # one rounding, in the kernel too
        y = triton_experts.int4_grouped_mm(x, stack, offs, factor)
        check(y, grouped(scaled, w, CASES[0].ends), BF16)
        x, scaled = (t[:12].unflatten(0, (4, 3)) for t in (x, scaled))
        check(triton_experts.int4_bmm(x, stack, factor), scaled.double() @ w.mT, BF16)

    def test_the_ops_come_here():
        """Under the interpreter the ops of a CPU tensor can be sent to these kernels."""
        x, stack, offs, w = parts(CASES[0])
        with registry.kernel_preference("triton"):
            y = torch.ops.int4q.int4_grouped_mm(x, *stack[:4], offs)
        check(y, grouped(x, w, CASES[0].ends), BF16)

    def test_plan_of_blocks():
        """Every row of an expert in one block; what no router gives stays inside of x."""
        for ends, T in [((3, 3, 20, 41), 45), ((0, 0), 5), ((9, 2, 99, 7), 12), ((-4, 30), 30)]:
            x = torch.zeros(T, 32)
            rows = triton_plan.Rows(T, len(ends), torch.tensor(ends, dtype=torch.int32))
            _, plan = triton_plan.plan_experts(x, rows, torch.zeros(T, 8), 8, arrange=False)
            blocks, covered = int(plan[0, 0]), []
            assert blocks <= rows.max_blocks(8)
            for tile, (expert, first, begin, end) in enumerate(plan[1 : 1 + blocks].tolist()):
                low = begin + (tile - first) * 8
                covered += [(row, expert) for row in range(low, min(low + 8, end))]
            rising = torch.tensor(ends).clamp(0, T).cummax(0).values
            expected = [
                (row, int(torch.searchsorted(rising, row, right=True)))
                for row in range(int(rising[-1]))
            ]
            assert covered == expected

    @pytest.mark.parametrize(
        "case", [(1, 8, 128, 128), (7, 2, 5, 8), (40, 8, 20, 20), (0, 2, 4, 4)]
    )
    def test_permute_and_combine(case):
        """Both kernels are their definitions; rows of experts held elsewhere are not read."""
        T, top_k, n_experts, everywhere = case
        scores = torch.rand(T, everywhere, generator=torch.Generator().manual_seed(T))
        weights, index = scores.topk(top_k)
        got = triton_routing.permute(index, n_experts)
        expected = routing.permute(index, n_experts)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        y = torch.randn(T * top_k, 48).to(BF16)
        y[expected[1][-1] :] = float("nan")
        args = y, expected[2], index, weights, n_experts
        out = triton_routing.combine(*args)
        torch.testing.assert_close(out, routing.combine(*args), rtol=2**-7, atol=1e-6)
