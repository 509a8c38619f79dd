"""torch.compile and torch.export see ordinary ops; opcheck on each of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int4q import (
    CpuPackedInt4Tensor,
    CudaCoalescedInt4Tensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    quantize_,
)

LAYOUTS = [Int4Tensor, CudaCoalescedInt4Tensor, CpuPackedInt4Tensor]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parts(lead=(), dtype=torch.float32):
    t = Int4Tensor.from_hp(torch.randn(*lead, 16, 64).to(dtype), [1] * (len(lead) + 1) + [32])
    return t.qdata, t.scale, t.zero_point, 32


def cases():
    offs = torch.tensor([2, 5], dtype=torch.int32)
    x, x3 = torch.randn(5, 64, requires_grad=True), torch.randn(2, 3, 64, requires_grad=True)
    xb = torch.randn(5, 64).bfloat16().requires_grad_()
    bias = torch.randn(16, requires_grad=True)
    two, three = parts(), parts((2,))
    coalesced = two[0], two[1].mT.contiguous(), two[2].mT.contiguous(), 32
    packed = CpuPackedInt4Tensor.from_hp(torch.randn(16, 64), [1, 32], packing="aten")
    index = torch.tensor([[0, 2], [1, 0], [2, 1]])
    position = torch.tensor([0, 4, 2, 1, 5, 3], dtype=torch.int32)
    routed = torch.randn(6, 4, requires_grad=True), position, index, torch.rand(3, 2), 2
    return {
        "experts_combine": routed,
        "experts_permute": (index, 2),
        "int4_linear": (x, *two, bias),
        "int4_linear_fp8": (x, *two, bias),
        "fp8_rows": (x, torch.rand(64)),
        "int4_linear_backward": (torch.randn(5, 16), *two),
        "int4_plain_mm": (x, *coalesced, bias, torch.rand(64)),
        "int4_bmm": (x3, *three, torch.rand(64)),
        "int4_bmm_backward": (torch.randn(2, 3, 16), *three),
        "int4_grouped_mm": (x, *three, offs, torch.rand(64)),
        "int4_grouped_mm_backward": (torch.randn(5, 16), *three, offs),
        "int4_cpu_packed_linear": (x, packed.qdata, packed.scale_and_zero, 32),
        "int4_cpu_unpack": (packed.qdata,),
        "cpu_linear": (xb.detach(), *two, True, bias.detach(), None, False, 16, 5),
        "linear_q4gsw": (x, two[0].view(torch.uint8), two[1], 32, bias),
        "linear_q4gsw_backward": (torch.randn(5, 16), two[0].view(torch.uint8), two[1], 32),
        "dequant_w4_to_bf16": (two[0], coalesced[1].bfloat16(), 32),
        "int4_matmul": (xb, two[0], coalesced[1].bfloat16(), 32),
        "int4_matvec": (xb[:1].detach().requires_grad_(), two[0], coalesced[1].bfloat16(), 32),
    }


@pytest.mark.parametrize("op", sorted(cases()))
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.int4q, op).default, cases()[op])


def test_every_op_is_checked():
    defined = {
        n.removeprefix("int4q::")
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("int4q::")
        # The twins of the ops on a GPU share schema, fake and Python with them.
        and not n.startswith(("int4q::cuda_", "int4q::plan_", "int4q::test_"))
    }
    assert defined == set(cases())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_model_is_the_eager_one(layout):
    m = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16))
    for i in (0, 2):
        m[i].weight = nn.Parameter(
            layout.from_hp(m[i].weight.detach(), [1, 32]), requires_grad=False
        )
    x = torch.randn(3, 64)
    compiled = torch.compile(m, fullgraph=True)
    # GELU is fused by the compiler: float32 rounding apart.
    torch.testing.assert_close(compiled(x), m(x), rtol=1e-5, atol=1e-5)


def test_compiled_gradient(layout):
    t = layout.from_hp(torch.randn(16, 64), [1, 32])

    def loss(x):
        return F.linear(x, t).square().mean()

    x = torch.randn(3, 64, requires_grad=True)
    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(compiled, eager)


def test_compiled_shape_ops(layout):
    t = layout.from_hp(torch.randn(2, 16, 64), [1, 1, 32])

    def f(t, x):
        part = t.transpose(1, 2).transpose(1, 2)[1][4:12, :32]
        return F.linear(x, torch.cat([part, part]))

    x = torch.randn(3, 32)
    assert torch.equal(torch.compile(f, fullgraph=True)(t, x), f(t, x))


def test_compiled_reshape_copies_where_a_view_cannot_be(layout):
    t = layout.from_hp(torch.randn(16, 64), [1, 32])

    def f(x):
        return x * t.reshape(-1).dequantize()

    x = torch.randn(16 * 64)
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x))


def test_compiled_products_by_keyword(layout):
    t, bias = layout.from_hp(torch.randn(16, 64), [1, 32], torch.bfloat16), torch.randn(16)

    def f(x):
        out = torch.mm(x, t.t(), out=torch.empty(3, 16))
        return torch.addmm(bias, mat1=x, mat2=t.t(), beta=0.5), F.linear(x, weight=t), out

    x = torch.randn(3, 64)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), f(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_with_a_dynamic_batch(tmp_path, layout):
    m = nn.Sequential(nn.Linear(64, 32))
    fmt = {Int4Tensor: "plain", CudaCoalescedInt4Tensor: "cuda_coalesced"}.get(layout, "cpu_packed")
    quantize_(m, Int4WeightOnlyConfig(group_size=32, int4_packing_format=fmt))
    batch = torch.export.Dim("batch", min=1, max=512)
    with torch.no_grad():
        program = torch.export.export(m, (torch.randn(4, 64),), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "m.pt2")
        loaded = torch.export.load(tmp_path / "m.pt2").module()
        for M in (1, 7, 40):
            x = torch.randn(M, 64)
            assert torch.equal(loaded(x), m(x))
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert any(t.startswith("int4q.") for t in targets), targets


def test_dequantize_compiles_to_the_same_bits(layout):
    for dtype in (torch.float32, torch.bfloat16):
        t = layout.from_hp(torch.randn(8, 64).to(dtype), [1, 32])
        assert torch.equal(torch.compile(lambda a: a.dequantize())(t), t.dequantize())
