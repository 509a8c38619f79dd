"""The same weights by other packages: torchao's HQQ, and llama.cpp's quantisers.

    python peers.py build/model build/text --ggml libggml-base.so

llama.cpp's come from its own library (``ggml_quantize_chunk``), with and without an importance
matrix; that holds, as llama.cpp's tool does, the mean square of every input, here int4q's of the
same 8,192 tokens. Q4_K takes K that is a multiple of 256 only.
"""

import ctypes

import numpy as np
import torch
from bench import Bench, arguments, each, finish, quantized
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

# Name -> bits a weight (scales included), K must be a multiple of.
TYPES = {"Q4_0": (4.5, 32), "Q4_1": (5.0, 32), "IQ4_NL": (4.5, 32), "Q4_K": (4.5, 256)}


class Ggml:
    def __init__(self, path: str):
        self._lib = ctypes.CDLL(path)
        self._quantize = self._lib.ggml_quantize_chunk
        pointer = ctypes.POINTER(ctypes.c_float)
        self._quantize.argtypes = [
            ctypes.c_int, pointer, ctypes.c_void_p, *[ctypes.c_int64] * 3, pointer,
        ]  # fmt: skip
        self._quantize.restype = ctypes.c_size_t

    def __call__(self, kind: str, w: Tensor, importance: Tensor | None) -> Tensor:
        """``w [N, K]`` as ``kind`` holds it, in float32."""
        N, K = w.shape
        source = np.ascontiguousarray(w.float().cpu().numpy())
        bits = TYPES[kind][0]
        out = np.empty((N, int(K * bits / 8)), np.uint8)
        weights = None if importance is None else importance.float().cpu().contiguous().numpy()
        pointer = ctypes.POINTER(ctypes.c_float)
        kind_id = GGMLQuantizationType[kind]
        size = self._quantize(
            int(kind_id), source.ctypes.data_as(pointer), out.ctypes.data, 0, N, K,
            None if weights is None else weights.ctypes.data_as(pointer),
        )  # fmt: skip
        if size != out.nbytes:
            raise RuntimeError(f"{kind} wrote {size} bytes, expected {out.nbytes}")
        return torch.from_numpy(dequantize(out, kind_id)).to(w.device)


def hqq(group: int):
    """torchao's, as it holds them: q * scale + zero, in groups along K."""
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    def quantize(name: str, w: Tensor) -> Tensor:
        size = next(g for g in (group, 64, 32) if w.shape[1] % g == 0)
        found = _choose_qparams_and_quantize_affine_hqq(
            w, nbits=4, group_size=size, axis=1, compute_dtype=torch.float32, device=str(w.device),
            raw_output=True,
        )  # fmt: skip
        q, scale, zero = (t.to(w.device).float() for t in found[:3])
        return ((q.reshape(-1, size) - zero.reshape(-1, 1)) * scale.reshape(-1, 1)).view_as(w)

    return quantize


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--ggml", help="libggml-base.so of llama.cpp")
    given = parser.parse_args()
    bench = Bench(given.model, given.texts, given.device, given.rows)
    names = bench.weights()
    for group in given.groups:
        bench.measure("min-max", group, quantized("tinygemm", group, None))
        bench.measure("torchao hqq", group, each(names, hqq(group)))
    ggml = Ggml(given.ggml) if given.ggml else None
    widths = {bench.model.get_submodule(n).weight.shape[1] for n in names}
    for kind, (bits, multiple) in TYPES.items() if ggml else ():
        if any(K % multiple for K in widths):
            print(f"{kind} takes K that is a multiple of {multiple} only")
            continue
        for matrix in (None, bench.text):

            def by_ggml(name: str, w: Tensor, kind=kind, matrix=matrix) -> Tensor:
                return ggml(kind, w, matrix[name].mean_square if matrix else None)

            label = f"llama.cpp {kind} ({bits} bits){', importance matrix' if matrix else ''}"
            bench.measure(label, 32, each(names, by_ggml))
    finish(bench, given.json)
