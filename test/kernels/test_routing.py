"""Which op and which kernel: decided by class and declared facts, tested without a GPU."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, KernelPreference
from int4q.kernels import registry
from int4q.kernels.registry import Kernel, Problem, choose


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "int4q":
            self.ops.append(func._schema.name.removeprefix("int4q::"))
        return func(*args, **(kwargs or {}))


def ops_of(call):
    with Recorder() as recorder:
        call()
    return recorder.ops


@pytest.mark.parametrize("N", [4, 24])  # N = 4 is also n_groups: the shapes say nothing
@pytest.mark.parametrize("M", [1, 64])
def test_the_class_decides_the_op(M, N):
    w, x = torch.randn(N, 128), torch.randn(M, 128)
    plain = Int4Tensor.from_hp(w, [1, 32])
    coalesced = CudaCoalescedInt4Tensor.from_hp(w, [1, 32])
    w4a16 = CudaCoalescedInt4Tensor.from_hp(w, [1, 32], activation_dtype=torch.bfloat16)
    assert ops_of(lambda: F.linear(x, plain)) == ["int4_linear"]
    assert ops_of(lambda: F.linear(x, coalesced)) == ["int4_plain_mm"]
    assert ops_of(lambda: F.linear(x, w4a16)) == ["int4_plain_mm"]


def test_the_coalesced_op_rejects_plain_metadata_at_run_time():
    t = Int4Tensor.from_hp(torch.randn(8, 128), [1, 32])
    with pytest.raises(
        ValueError,
        match=r"scale must have shape \[N, n_groups\] = \[8, 4\], got "
        r"\[4, 8\]. Repack .* CudaCoalescedInt4Tensor.from_int4_tensor",
    ):
        torch.ops.int4q.int4_plain_mm(torch.randn(1, 128), t.qdata, t.scale, t.zero_point, 32)


def test_the_plain_op_rejects_coalesced_metadata():
    t = CudaCoalescedInt4Tensor.from_hp(torch.randn(8, 128), [1, 32])
    with pytest.raises(ValueError, match=r"\[.., n_groups, N\] = \[4, 8\], got \[8, 4\]"):
        torch.ops.int4q.int4_linear(torch.randn(1, 128), t.qdata, t.scale, t.zero_point, 32)


PLAIN = Int4Tensor.from_hp(torch.randn(8, 128), [1, 32])
OP_ERRORS = {
    "qdata dtype": (dict(qdata=PLAIN.qdata.view(torch.uint8)), TypeError, "qdata must be int8"),
    "qdata rank": (dict(qdata=PLAIN.qdata[0]), TypeError, "with 2 dims"),
    "group zero": (dict(group_size=0), ValueError, "group_size must be positive, got 0"),
    "group negative": (dict(group_size=-32), ValueError, "group_size must be positive"),
    "group ragged": (dict(group_size=48), ValueError, "multiple of group_size 48, got 128"),
    "zero dtype": (dict(zero_point=PLAIN.zero_point.half()), TypeError, "same for scale and zero"),
    "scale dtype": (dict(scale=PLAIN.scale.double()), TypeError, "scale must be float32"),
    "scale device": (dict(scale=PLAIN.scale.to("meta")), ValueError, "on qdata's device"),
    "x dtype": (dict(x=torch.ones(1, 128, dtype=torch.int8)), TypeError, "x must be float32"),
    "x width": (dict(x=torch.ones(1, 64)), ValueError, "last dim of x must be 128"),
    "x scalar": (dict(x=torch.ones(())), ValueError, "last dim of x must be 128"),
    "bias": (dict(bias=torch.ones(9)), ValueError, "bias must have shape \\[8\\], got \\[9\\]"),
}


@pytest.mark.parametrize("case", OP_ERRORS)
def test_op_arguments(case):
    change, error, message = OP_ERRORS[case]
    good = dict(
        x=torch.ones(1, 128),
        qdata=PLAIN.qdata,
        scale=PLAIN.scale,
        zero_point=PLAIN.zero_point,
        group_size=32,
        bias=None,
    )
    with pytest.raises(error, match=message):
        torch.ops.int4q.int4_linear(*{**good, **change}.values())


def problem(**change):
    base = Problem("int4_linear", "cpu", torch.bfloat16, torch.bfloat16, 1, 4096, 4096, 128)
    return dataclasses.replace(base, **change)


def test_choose_is_pure_and_reads_one_table():
    for M in (1, 8, 64, 128, 4096):
        first = choose(problem(M=M))
        assert first is choose(problem(M=M))
        assert first.unsupported(problem(M=M)) is None
        earlier = registry.kernels("int4_linear")
        earlier = earlier[: earlier.index(first)]
        assert all(k.unsupported(problem(M=M)) for k in earlier)
    assert choose(problem(device="xpu")).name == "reference"
    assert choose(problem(dtype=torch.float64)).name in ("cpu_blocked", "reference")


def test_a_refusal_carries_every_reason():
    reasons = {name: why for name, _, why in registry.explain(problem(device="xpu"))}
    assert reasons["reference"] is None
    assert all("runs on" in why for name, why in reasons.items() if name != "reference")
    with pytest.raises(ValueError, match="no triton kernel in this build|preference 'triton'"):
        choose(problem(), KernelPreference.TRITON)
    with pytest.raises(ValueError, match="op must be one of"):
        choose(problem(op="int4_softmax"))


def test_a_kernel_table_validates_itself():
    kernel = Kernel("a", KernelPreference.TORCH, lambda p: None, torch.clone)
    with pytest.raises(ValueError, match="names of test_op must be unique"):
        registry.register("test_op", kernel, kernel)
    with pytest.raises(ValueError, match="belongs to one backend"):
        dataclasses.replace(kernel, backend=KernelPreference.AUTO)


@pytest.fixture
def fresh_routes():
    registry.route.cache_clear()
    registry._warn_slow.cache_clear()
    yield
    registry.route.cache_clear()
    registry._warn_slow.cache_clear()


def routed(**change):
    return registry.route(KernelPreference.AUTO, *dataclasses.astuple(problem(**change)))


@pytest.mark.parametrize("M", [1, 8, 64, 4096])
@pytest.mark.parametrize("op", ["int4_linear", "int4_plain_mm", "int4_linear_backward"])
def test_a_slow_kernel_is_named_once_for_each_cause(monkeypatch, fresh_routes, op, M):
    monkeypatch.setattr("int4q.kernels.cpu.native.load", lambda: (None, "not built"))
    cause = "plain torch" if op == "int4_plain_mm" and M <= 8 else "not built"
    with pytest.warns(registry.SlowKernelWarning, match=f"^{op} runs on cpu by .*: .*{cause}"):
        routed(op=op, M=M)
    routed(op=op, M=M, N=8192)  # warnings are errors here: a second one would fail


def test_a_slow_kernel_is_fine_for_a_small_weight(monkeypatch, fresh_routes):
    monkeypatch.setattr("int4q.kernels.cpu.native.load", lambda: (None, "not built"))
    assert routed(N=512, K=512).slow(problem()) is not None


def test_the_way_out_of_a_slow_kernel_is_named(monkeypatch, fresh_routes):
    monkeypatch.setattr("int4q.kernels.cpu.native.load", lambda: (None, "not built"))
    with pytest.warns(registry.SlowKernelWarning, match='not built; .*"cpu_packed" is faster'):
        routed(M=4)


H200 = dict(device="cuda", capability=(9, 0))
ROUTES = [  # M, what changes, the kernel of a plain weight's F.linear on an H200
    (1, {}, "cuda_decode"),
    (8, {}, "cuda_decode"),
    (12, {}, "cuda_decode"),
    (13, {}, "cuda_warp_specialised"),
    (9, dict(N=28672), "cuda_warp_specialised"),
    (8, dict(group_size=32, N=28672), "cuda_warp_specialised"),
    (8, dict(group_size=32), "cuda_decode"),
    (9, dict(group_size=32), "cuda_warp_specialised"),
    (16, dict(group_size=32), "cuda_warp_specialised"),
    (16, dict(group_size=32, K=14336), "cuda_warp_specialised"),
    (8, dict(N=512, K=2048), "cuda_decode"),
    (9, dict(N=512, K=2048), "cuda_warp_specialised"),
    (16, dict(group_size=32, N=512, K=2048), "cuda_warp_specialised"),
    (16, dict(group_size=32, capability=(8, 0)), "cuda_decode"),
    (64, dict(N=512, K=2048), "cuda_warp_specialised"),
    (65, dict(N=512, K=2048), "triton_dequantize_cublas"),
    (17, {}, "cuda_warp_specialised"),
    (64, {}, "cuda_warp_specialised"),
    (64, dict(dtype=torch.float16, scale_dtype=torch.float32), "cuda_warp_specialised"),
    (65, {}, "gluon_matmul"),
    (64, dict(N=28672), "cuda_warp_specialised"),
    (64, dict(K=14336), "cuda_warp_specialised"),
    (64, dict(capability=(10, 0)), "triton_matmul"),
    (4096, {}, "triton_dequantize_cublas"),
    (64, dict(dtype=torch.float32), "triton_matmul"),
    (64, dict(capability=(8, 0)), "triton_matmul"),
]


@pytest.mark.parametrize("M,change,name", ROUTES)
def test_routes_on_a_gpu_are_chosen_without_one(M, change, name):
    pytest.importorskip("triton")
    assert choose(problem(M=M, **{**H200, **change})).name == name


@pytest.mark.parametrize(
    "M,experts,change,name",
    [
        (8, 128, {}, "cuda_experts"),
        (64, 8, {}, "gluon_experts"),
        (512, 128, {}, "cuda_experts"),
        (512, 128, dict(group_size=32), "gluon_experts"),
        (4096, 128, {}, "gluon_experts"),
        (4096, 128, dict(capability=(8, 0)), "triton_experts"),
        (4096, 128, dict(dtype=torch.float32), "triton_experts"),
        (8, 128, dict(dtype=torch.float64), "one_by_one"),
        (8, 128, dict(device="cpu", capability=None), "one_by_one"),
        (8, 128, dict(group_size=16), "one_by_one"),
        (8, 128, dict(N=1534), "gluon_experts"),
    ],
)
@pytest.mark.parametrize("op", ["int4_grouped_mm", "int4_bmm"])
def test_routes_of_a_stack(op, M, experts, change, name):
    pytest.importorskip("triton")
    bf16 = torch.bfloat16
    problem = Problem(op, "cuda", bf16, bf16, M, 1536, 2048, 128, (9, 0), experts)
    assert choose(dataclasses.replace(problem, **change)).name == name


def test_w4a8_serves_few_rows_of_the_coalesced_op_only():
    pytest.importorskip("triton")
    coalesced = dict(op="int4_plain_mm", **H200)
    assert choose(problem(M=8, **coalesced)).name == "cuda_decode_w4a8"
    assert choose(problem(M=64, **coalesced)).name == "cuda_warp_specialised"
    assert choose(problem(M=128, **coalesced)).name == "gluon_matmul"
    plain = [k.name for k in registry.kernels("int4_linear")]
    assert not any("w4a8" in name for name in plain)


def test_w4a8_in_triton_stands_behind_cuda_and_before_the_reference():
    pytest.importorskip("triton")
    for M in (1, 8):
        w4a8 = problem(op="int4_plain_mm", M=M, **H200)
        assert choose(w4a8, KernelPreference.TRITON).name == "triton_w4a8"
        assert choose(dataclasses.replace(w4a8, capability=(8, 6))).name == "cuda_decode_w4a8"
    reasons = {n: why for n, _, why in registry.explain(problem(op="int4_plain_mm", M=9, **H200))}
    assert reasons["triton_w4a8"] == "int8 activations serve up to 8 rows; more run W4A16"
    w4a16 = problem(op="int4_plain_mm_w4a16", **H200)
    assert choose(w4a16).name == "cuda_decode"
    assert choose(w4a16, KernelPreference.TRITON).name == "triton_matvec"


def test_a_missing_triton_is_a_reason(monkeypatch):
    from int4q.kernels.triton import entries

    monkeypatch.setattr(entries, "_missing", lambda: "triton is not installed")
    reasons = {name: why for name, _, why in registry.explain(problem(M=128, **H200))}
    assert reasons["gluon_matmul"] == reasons["triton_matmul"] == "triton is not installed"
    assert choose(problem(M=128, **H200)).name == "reference"


def test_triton_launches_on_the_tensors_device(monkeypatch):
    """A weight on cuda:1 while cuda:0 is current, with stand-ins for both."""
    from types import SimpleNamespace

    from int4q.kernels.launch import lazy

    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    seen = lazy.on_its_device(lambda x: current[0])
    for index in (0, 1):
        device = SimpleNamespace(index=index)
        assert seen(SimpleNamespace(is_cuda=True, device=device)) == index
    assert seen(SimpleNamespace(is_cuda=False)) == current[0] == 0
