"""WebGPULinear: every variant of the shaders, chunking, limits, bad arguments."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import numpy as np
import pytest
import torch

from int4q import CudaCoalescedInt4Tensor, Int4Tensor, q4gsw
from int4q.kernels import reference
from int4q.kernels.webgpu import DECODE_MAX_ROWS, WebGPULinear, pack
from int4q.kernels.webgpu import device as webgpu_device
from int4q.kernels.weight import Weight

# Largest error over the root mean square of the outputs. float32: sums of K <= 2304 terms.
# float16: scales, and above DECODE_MAX_ROWS activations and weights, each rounded by up to 2^-11
# of itself; the largest of thousands of sums of such errors.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3}


def parts(N, K, group_size, scale_dtype=torch.float32, bias=True):
    weights = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    scales = (torch.rand(K // group_size, N) + 0.1).to(scale_dtype)
    return weights, scales, group_size, torch.randn(N) if bias else None


def check(layer, x, weight, precision="float32"):
    y = layer(x)
    weights, scales, group_size, bias = weight
    parts = Weight(weights.view(torch.int8), scales, None, group_size, signed=False)
    exact = x.double() @ reference.dequantize(parts, torch.float64).T
    exact = exact if bias is None else exact + bias.double()
    assert y.dtype == torch.float32 and y.shape == exact.shape
    error = (y.double() - exact).abs().max() / exact.square().mean().sqrt()
    assert error <= TOLERANCE[precision], error
    return y


SHAPES = [  # M, N, K
    (1, 8, 256), (3, 77, 512), (DECODE_MAX_ROWS, 130, 2304), (DECODE_MAX_ROWS + 1, 64, 256),
    (70, 131, 768),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("M,N,K", SHAPES)
def test_values(webgpu, M, N, K, group_size, precision):
    if precision == "float16" and not webgpu.has_f16:
        pytest.skip(f"{webgpu.name} has no shader-f16")
    weight = parts(N, K, group_size)
    check(WebGPULinear(*weight, precision=precision), torch.randn(M, K), weight, precision)


@pytest.mark.parametrize("K,group_size", [(8, 8), (72, 8), (48, 16), (2080, 32)])
@pytest.mark.parametrize("M", [1, 20])
def test_k_is_padded(webgpu, M, K, group_size):
    weight = parts(5, K, group_size, bias=False)
    check(WebGPULinear(*weight), torch.randn(M, K), weight)


@pytest.mark.parametrize("M", [2, 20])
def test_float16_scales_lose_nothing(webgpu, M):
    """They stay in float16 where the adapter has it, and give what they do in 32 bits."""
    weights, scales, group_size, bias = weight = parts(40, 512, 64, torch.float16)
    x = torch.randn(M, 512)
    layer = WebGPULinear(*weight)
    assert layer.scale == ("f16" if webgpu.has_f16 else "f32")
    wide = WebGPULinear(weights, scales.float(), group_size, bias)
    assert wide.scale == "f32"
    assert torch.equal(check(layer, x, weight), wide(x))


@pytest.mark.parametrize("M", [1, 4, 33])
def test_chunks(webgpu, M):
    """Columns and rows that pass the limit are cut, and give the same bits as in one piece."""
    weight = parts(130, 256, 32)
    x = torch.randn(M, 256)
    whole = WebGPULinear(*weight)
    cut = WebGPULinear(*weight, max_bytes=256 * 20)
    assert len(whole._chunks) == 1 and len(cut._chunks) == 4
    assert [c.start for c in cut._chunks] == [0, 40, 80, 120] and cut._rows_at_a_time() == 5
    assert torch.equal(cut(x[:5]), WebGPULinear(*weight)(x[:5]))
    check(cut, x, weight)
    assert cut.nbytes == whole.nbytes == 136 * (128 + 8 * 4 + 4)


def test_a_limit_that_cannot_be_met_is_named(webgpu):
    weight = parts(16, 4096, 32)
    with pytest.raises(
        ValueError, match="max-storage-buffer-binding-size.* of 8192 bytes, got 16384"
    ):
        WebGPULinear(*weight, max_bytes=8192)


def test_shapes_and_strides(webgpu):
    weight = parts(24, 64, 32)
    layer = WebGPULinear(*weight)
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    y = layer(x)
    assert y.shape == (2, 3, 24)
    assert torch.equal(y, layer(x.contiguous()))
    assert torch.equal(layer(x[0, 0]), y[0, 0])
    assert layer(x[:, :0]).shape == (2, 0, 24)
    array = layer(np.asfortranarray(x[0].numpy()))
    assert isinstance(array, np.ndarray) and (array == y[0].numpy()).all()
    # The weight's parts may be views as well.
    weights, scales, group_size, bias = weight
    turned = scales.mT.contiguous().mT, group_size, bias
    assert torch.equal(WebGPULinear(weights.mT.contiguous().mT, *turned)(x), y)


def test_row_counts_take_turns(webgpu):
    """More row counts than are kept; each gives the same again."""
    weight = parts(16, 64, 32)
    layer = WebGPULinear(*weight)
    x = torch.randn(12, 64)
    first = [layer(x[:m]) for m in range(1, 13)]
    for m in range(12, 0, -1):
        assert torch.equal(layer(x[:m]), first[m - 1])


def test_pipelines_are_compiled_once(webgpu):
    weight = parts(16, 64, 32)
    WebGPULinear(*weight)(torch.randn(1, 64))
    before = dict(webgpu._pipelines)
    other = parts(32, 128, 32)
    WebGPULinear(*other)(torch.randn(2, 128))
    assert webgpu._pipelines == before


def test_not_a_number(webgpu):
    weight = parts(16, 64, 32)
    x = torch.randn(12, 64)
    x[1, 3], x[5, 40] = float("nan"), float("inf")
    for rows in (x[:6], x):
        y = WebGPULinear(*weight)(rows)
        assert (~y[1].isfinite()).all() and (~y[5].isfinite()).all()
        assert y[[0, 2, 3, 4]].isfinite().all()


def test_from_int4(webgpu):
    w = torch.randn(24, 128)
    t = Int4Tensor.from_hp(w, [1, 32], algorithm="symmetric")
    bias = torch.randn(24).bfloat16()
    x = torch.randn(3, 128)
    expected = torch.nn.functional.linear(x, t.dequantize(), bias.float())
    for weight in (t, CudaCoalescedInt4Tensor.from_int4_tensor(t)):
        y = WebGPULinear.from_int4(weight, bias)(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    packed = q4gsw.from_weight(w, 8)
    y = WebGPULinear(*packed)(x)
    torch.testing.assert_close(y, q4gsw.to_linear(packed)(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="zero points of 0"):
        WebGPULinear.from_int4(Int4Tensor.from_hp(w, [1, 32]))


def test_bad_activations(webgpu):
    layer = WebGPULinear(*parts(8, 64, 32))
    x = torch.randn(2, 64)
    with pytest.raises(TypeError, match="x must be float32, got torch.bfloat16"):
        layer(x.bfloat16())
    with pytest.raises(TypeError, match="x must be float32, got float64"):
        layer(x.double().numpy())
    with pytest.raises(TypeError, match="NumPy array or a CPU tensor, got list"):
        layer([1.0])
    with pytest.raises(ValueError, match="last dim of x must be 64"):
        layer(x[:, :32])
    with pytest.raises(ValueError, match="x must be on cpu, got meta"):
        layer(x.to("meta"))
    needs_grad = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="must not require a gradient"):
        layer(needs_grad)
    with torch.no_grad():
        assert torch.equal(layer(needs_grad), layer(x))


def test_threads_share_a_layer(webgpu):
    weight = parts(64, 256, 32)
    layer = WebGPULinear(*weight)
    rows = [torch.randn(3, 256) for _ in range(8)]
    expected = [layer(x) for x in rows]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(layer, rows * 4))
    assert all(torch.equal(y, expected[i % 8]) for i, y in enumerate(got))


def test_large_buffers_are_not_kept(webgpu, monkeypatch):
    layer = WebGPULinear(*parts(16, 64, 32))
    monkeypatch.setattr("int4q.kernels.webgpu.linear._PLAN_BYTES", 4 * 3 * (64 + 16))
    for rows in (3, 4):
        layer(torch.randn(rows, 64))
    assert list(layer._plans) == [3]


# --- without an adapter -------------------------------------------------------------------------

W, S, G, B = parts(8, 128, 32)
BAD = {
    "dtype": ((W.view(torch.int8), S, 32), TypeError, r"weights must be uint8"),
    "group": ((W, S, 48), ValueError, "group_size on WebGPU must be 8, 16 or a multiple of 32"),
    "group 0": ((W, S, 0), ValueError, "group_size on WebGPU"),
    "group 24": ((W[:, :36], S, 24), ValueError, "group_size on WebGPU"),
    "K": ((W[:, :20], S, 32), ValueError, "divide K, got 32 for K 40"),
    "scale layout": ((W, S.mT, 32), ValueError, r"\[K/group_size, N\] = \[4, 8\].*\.mT"),
    "scale N": ((W, S[:, :7], 32), ValueError, r"= \[4, 8\], got \[4, 7\]"),
    "bias": ((W, S, 32, B[:7]), ValueError, r"bias must have shape \[8\]"),
    "bias dtype": ((W, S, 32, B.half()), TypeError, "bias must be float32"),
    "N": ((W[:0], S[:, :0], 32), ValueError, "N and K of 1 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        pack(*arguments)


def test_padding_is_silent():
    packed = pack(W[:, :36], torch.rand(9, 8), 8, B)
    assert packed.weights.shape == (8, 48) and (packed.weights[:, 36:] == 0x88).all()
    assert packed.scales.shape == (12, 8) and not packed.scales[9:].any()
    assert (packed.columns, packed.inner) == (8, 72)


def test_bad_precision(webgpu):
    with pytest.raises(ValueError, match="precision must be one of"):
        WebGPULinear(W, S, G, precision="bfloat16")
    webgpu_without = object.__new__(webgpu_device.Gpu)
    webgpu_without.has_f16, webgpu_without.name = False, "an old one"
    with pytest.raises(ValueError, match="needs an adapter with shader-f16, got an old one"):
        WebGPULinear(W, S, G, gpu=webgpu_without, precision="float16")


def test_the_package_holds_the_shaders():
    names = {p.name for p in resources.files("int4q.kernels.webgpu").iterdir()}
    assert {"q4gsw_decode.wgsl", "q4gsw_prefill.wgsl"} <= names
    text = webgpu_device.source("q4gsw_decode", scale="f16")
    assert text.startswith("enable f16;\nalias Scale = f16;\nalias Tile = f32;\n//")


def test_wgpu_is_optional():
    """Nothing imports it before it is used, and its absence is said."""
    code = (
        "import sys; sys.modules['wgpu'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'wgpu' else find(n, *a)\n"
        "import int4q; from int4q.kernels.webgpu import device\n"
        "print(device.unavailable())\n"
        "try: device.default_gpu()\n"
        "except ValueError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wgpu is not installed (pip install int4q[webgpu])") == 2
