"""A small suite of every GPU kernel, to be run under NVIDIA's checker:

    compute-sanitizer --tool memcheck  python test/kernels/sanitizer_suite.py
    compute-sanitizer --tool racecheck python test/kernels/sanitizer_suite.py
    compute-sanitizer --tool initcheck python test/kernels/sanitizer_suite.py
    compute-sanitizer --tool synccheck python test/kernels/sanitizer_suite.py

(with PYTORCH_NO_CUDA_MEMORY_CACHING=1, which gives every tensor an allocation of its own). Tails in
every dim, both layouts, groups 32 and 128; each result is compared with the reference. Numbers as
arguments run a part: the shape of that index, or the stacks of weights after the last one.
"""

import sys

import torch
import torch.nn.functional as F

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, kernel_preference
from int4q.kernels import reference
from int4q.kernels.cuda import decode as cuda_decode
from int4q.kernels.cuda import experts as cuda_experts
from int4q.kernels.cuda import warp_specialised as cuda_warp_specialised
from int4q.kernels.cuda.warp_specialised_config import Config
from int4q.kernels.triton import experts as triton_experts
from int4q.kernels.triton import fp8 as triton_fp8
from int4q.kernels.triton import gluon_experts, gluon_matmul
from int4q.kernels.triton import matmul as triton_matmul
from int4q.kernels.triton import matvec as triton_matvec
from int4q.kernels.weight import Weight
from int4q.packing import signed_to_offset

SHAPES = [(1, 7, 160), (3, 100, 320), (8, 64, 256), (13, 33, 192), (40, 130, 384), (300, 200, 256)]

WARP_SPECIALISED = [
    Config(*cut, scale_sums=scale_sums)
    for cut in ((1, 1, 1, True), (4,), (2, 2, 2), (1, 1, 4))
    for scale_sums in (False, True)
]


def check(name, got, expected, bound):
    error = float((got.double() - expected).abs().max() / expected.abs().max())
    print(f"{name}: {error:.1e}")
    if not error < bound:
        raise SystemExit(f"{name} is wrong")


def experts() -> None:
    """Every kernel of a stack of weights: empty experts, one with many rows, rows of none."""
    for ends, N, K in (((1, 1, 4, 7), 68, 160), ((0, 90, 90, 100), 136, 384)):
        group_size = 128 if K % 128 == 0 else 32
        T, offs = ends[-1] + 3, torch.tensor(ends, dtype=torch.int32, device="cuda")
        x = torch.randn(T, K).bfloat16().cuda()
        plain = Int4Tensor.from_hp(torch.randn(4, N, K).bfloat16(), [1, 1, group_size])
        w = plain.dequantize(torch.float64).cuda()
        exact = torch.zeros(T, N, dtype=torch.float64, device="cuda")
        back = torch.zeros(T, K, dtype=torch.float64, device="cuda")
        for expert, (low, high) in enumerate(zip((0, *ends), ends, strict=False)):
            exact[low:high] = x[low:high].double() @ w[expert].t()
            back[low:high] = exact[low:high].bfloat16().double() @ w[expert]
        coalesced = CudaCoalescedInt4Tensor.from_int4_tensor(plain, torch.bfloat16)
        for name, t in (("plain", plain.cuda()), ("coalesced", coalesced.cuda())):
            weight = Weight(*t._weight_parts(), group_size)
            for run in (cuda_experts, gluon_experts, triton_experts):
                y = run.int4_grouped_mm(x, weight, offs)
                check(f"{run.__name__} {name} T={T}", y, exact, 1e-2)
            grad = exact.bfloat16()
            y = triton_experts.int4_grouped_mm_backward(grad, weight, offs)
            check(f"gradient {name} T={T}", y, back, 1e-2)
            batch = x[: T // 4 * 4].view(4, -1, K)
            check(f"bmm {name}", torch.bmm(batch, t), batch.double() @ w.mT, 1e-2)


def symmetric(shape, x, plain) -> None:
    """The ops on symmetric weights, by every kernel that takes them, and their gradients."""
    group_size, M = plain.group_size, x.shape[0]
    packed, scale = signed_to_offset(plain.qdata).cuda(), plain.scale.mT.contiguous().cuda()
    weight = Weight(packed, scale.mT, None, group_size, signed=False)
    w = reference.dequantize(weight, torch.bfloat16)
    parts = packed, scale, group_size
    got = torch.ops.int4q.dequant_w4_to_bf16(*parts)
    check(f"dequant_w4_to_bf16 {shape}", got, w.double(), 1e-9)
    exact = x.double() @ w.double().mT
    check(f"int4_matmul {shape}", torch.ops.int4q.int4_matmul(x, *parts), exact, 1e-2)
    runs = {"Gluon": gluon_matmul.linear, "Triton": triton_matmul.linear}
    if M <= cuda_warp_specialised.MAX_M:
        runs["warp-specialised"] = cuda_warp_specialised.linear
    if M <= cuda_decode.MAX_M:
        runs["decode"] = cuda_decode.linear_rounded
    for name, run in runs.items():
        check(f"int4_matmul {name} {shape}", run(x, weight), exact, 1e-2)
    if M <= cuda_decode.MAX_M:
        turned = weight._replace(scale=scale.mT.contiguous())  # no copy fits these scales
        for config in (cuda_decode.Config(4, 3, 2, 1), cuda_decode.Config(2, 2, 3, 2)):
            for same in (weight, turned):
                got = cuda_decode.linear_rounded(x, same, config)
                check(f"int4_matmul {config} {shape}", got, exact, 1e-2)
    row = x[:1].contiguous()
    check(f"int4_matvec {shape}", torch.ops.int4q.int4_matvec(row, *parts), exact[:1], 1e-2)
    check(f"int4_matvec Triton {shape}", triton_matvec.linear(row, weight), exact[:1], 1e-2)

    weights, scales = packed.view(torch.uint8), scale.mT
    got = torch.ops.int4q.linear_q4gsw(x.float(), weights, scales, group_size)
    check(f"linear_q4gsw {shape}", got, exact, 1e-2)
    got = torch.ops.int4q.linear_q4gsw_backward(exact.float(), weights, scales, group_size)
    check(f"linear_q4gsw_backward {shape}", got, exact @ w.double(), 1e-2)
    values, rows = triton_fp8.fp8_rows(x)
    expected = reference.fp8_rows(x)
    check(f"fp8 rows {shape}", values * rows, (expected[0] * expected[1]).double(), 1e-9)


def on_two_streams(x, weight):
    """What one stream computes while another does the same, and what it computes alone."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    alone = F.linear(x, weight)
    torch.cuda.synchronize()
    both = []
    for stream in streams:
        with torch.cuda.stream(stream):
            both.append(F.linear(x, weight))
    torch.cuda.synchronize()
    return torch.cat(both), torch.cat([alone, alone]).double()


def main(sections: list[int]) -> None:
    torch.manual_seed(0)
    if len(SHAPES) in sections:
        experts()
    for M, N, K in (SHAPES[i] for i in sections if i < len(SHAPES)):
        group_size = 128 if K % 128 == 0 else 32
        w = torch.randn(N, K).bfloat16()
        x = torch.randn(M, K).bfloat16().cuda()
        plain = Int4Tensor.from_hp(w, [1, group_size])
        exact = F.linear(x.double(), plain.dequantize(torch.float64).cuda())
        a16 = CudaCoalescedInt4Tensor.from_int4_tensor(plain, torch.bfloat16)
        a8 = CudaCoalescedInt4Tensor.from_int4_tensor(plain)
        shape = f"M={M} N={N} K={K} g{group_size}"
        for name, t, bound in (("plain", plain, 1e-2), ("a16", a16, 1e-2), ("a8", a8, 5e-2)):
            for call in ("first", "again"):  # the second is a replay, on another copy
                check(f"{name} {shape} {call}", F.linear(x, t.cuda()), exact, bound)
        check(f"two streams {shape}", *on_two_streams(x, a8.cuda()), 1e-9)
        with kernel_preference("triton"):
            for call in ("first", "again"):
                check(f"triton {shape} {call}", F.linear(x, plain.cuda()), exact, 1e-2)
            check(f"triton a8 {shape}", F.linear(x, a8.cuda()), exact, 5e-2)
            check(f"triton a16 {shape}", F.linear(x, a16.cuda()), exact, 1e-2)
        if M <= cuda_warp_specialised.MAX_M:  # every way to share the work, whatever the route
            weight = Weight(*plain.cuda()._weight_parts(), group_size)
            for config in WARP_SPECIALISED:
                got = cuda_warp_specialised.linear(x, weight, config=config)
                check(f"warp-specialised {config} {shape}", got, exact, 1e-2)
        symmetric(shape, x, plain)
        dequantized = plain.cuda().dequantize()
        check(f"dequantize {shape}", dequantized.cpu(), plain.dequantize(torch.float64), 1e-2)
        parts = (exact.bfloat16(), *plain.cuda()._weight_parts(), group_size)
        got = torch.ops.int4q.int4_linear_backward(*parts)
        back = exact.bfloat16().double() @ plain.cuda().dequantize(torch.float64)
        check(f"gradient {shape}", got, back, 1e-2)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main([int(section) for section in sys.argv[1:]] or list(range(len(SHAPES) + 1)))
