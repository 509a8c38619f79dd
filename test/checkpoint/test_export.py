"""int4q.export: other engines' formats hold the same values."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.slow

from checkpoints import llama, packed, qwen_moe  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import int4q  # noqa: E402
from int4q import export  # noqa: E402
from int4q.checkpoint.converting import plan_folder  # noqa: E402
from int4q.checkpoint.source import Source  # noqa: E402
from int4q.checkpoint.stream import run  # noqa: E402
from int4q.cli import main  # noqa: E402


def decompressed(folder):
    """Every weight by the library: module -> values."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (scheme,) = library.QuantizationConfig.model_validate(config).config_groups.values()
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    modules = {n.removesuffix(".weight_packed") for n in state if n.endswith(".weight_packed")}
    parts = {
        m: {n[len(m) + 1 :]: t for n, t in state.items() if n.startswith(f"{m}.")} for m in modules
    }
    decompress = PackedQuantizationCompressor.decompress
    return {m: decompress(part, scheme)["weight"] for m, part in parts.items()}


def test_symmetric_weights(tmp_path):
    source = llama(tmp_path / "model")
    main(["quantize", str(source), str(tmp_path / "int4"), "--group-size", "32",
          "--algorithm", "symmetric"])  # fmt: skip
    main(["convert", str(tmp_path / "int4"), str(tmp_path / "ct"), "--to", "compressed-tensors"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int4")
    theirs = decompressed(tmp_path / "ct")
    assert len(theirs) == 14
    for module, w in theirs.items():
        assert torch.equal(model.get_submodule(module).weight.dequantize(), w)
    ids = torch.arange(8)[None]
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16)
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for module, w in theirs.items():
        dense.get_submodule(module).weight.data.copy_(w)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, dense(ids).logits)


def test_experts_and_back(tmp_path):
    theirs = packed(tmp_path / "theirs", qwen_moe(tmp_path / "model"), "gptq", False)
    run(plan_folder(Source(theirs), lambda name, how: None), tmp_path / "int4")
    export.compressed_tensors(tmp_path / "int4", tmp_path / "ct")
    run(plan_folder(Source(tmp_path / "ct"), lambda name, how: None), tmp_path / "again")
    read = transformers.AutoModelForCausalLM.from_pretrained
    ours, again = read(tmp_path / "int4"), read(tmp_path / "again")
    for (name, p), q in zip(ours.named_parameters(), again.parameters(), strict=True):
        exact = [t.dequantize() if isinstance(t, int4q.Int4Tensor) else t for t in (p, q)]
        assert torch.equal(*exact), name
    assert len(decompressed(tmp_path / "ct")) == 4 + 9


def test_free_zero_points_are_refused(tmp_path):
    main(["quantize", str(llama(tmp_path / "model")), str(tmp_path / "int4"), "--group-size", "32"])
    with pytest.raises(ValueError, match="_proj: .*whole multiples"):
        export.compressed_tensors(tmp_path / "int4", tmp_path / "ct")
    assert not (tmp_path / "ct").exists()
    with pytest.raises(ValueError, match="must hold a 4-bit checkpoint"):
        export.compressed_tensors(tmp_path / "model", tmp_path / "ct")
