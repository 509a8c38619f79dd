"""vLLM's own classes load int4q's checkpoints; without a GPU, so nothing is served here."""

from contextlib import contextmanager

import pytest
import torch

vllm = pytest.importorskip("vllm")
transformers = pytest.importorskip("transformers")

from checkpoints import llama, qwen_moe  # noqa: E402
from ranks import group  # noqa: E402
from torch import distributed as dist  # noqa: E402

from int4q import Int4Tensor  # noqa: E402
from int4q.cli import main  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
two = group(2)


@contextmanager
def on_the_cpu(folder, ranks, rank, port=29611):
    """vLLM's config of a checkpoint, in a process that is one of ``ranks``."""
    import vllm.platforms
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )
    from vllm.platforms.cpu import CpuPlatform

    from int4q.integrations.vllm import register

    register()
    register()  # (as vLLM's processes may)
    vllm.platforms._current_platform = CpuPlatform()
    torch.accelerator.empty_cache = lambda: None
    model = ModelConfig(model=str(folder), quantization="int4q", skip_tokenizer_init=True,
                        dtype="bfloat16", max_model_len=64)  # fmt: skip
    parallel = ParallelConfig(tensor_parallel_size=ranks, distributed_executor_backend="mp")
    config = VllmConfig(model_config=model, parallel_config=parallel)
    with set_current_vllm_config(config):
        where = f"tcp://127.0.0.1:{port}"
        init_distributed_environment(ranks, rank, where, rank, backend="gloo")
        if not model_parallel_is_initialized():
            initialize_model_parallel(ranks)
        yield config


def layers(folder, ranks=1, rank=0):
    """vLLM's first decoder layer."""
    with on_the_cpu(folder, ranks, rank) as config:
        from vllm.model_executor.model_loader import get_model

        return get_model(vllm_config=config).model.layers[0]


def check(folder, dtype):
    """A rank's weights: its rows of q, k, v, gate and up, its columns of o and down."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    ours = layers(folder, ranks, rank)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).model.layers[0]

    def shares(owner, names, dim):
        weights = [getattr(owner, f"{n}_proj").weight.dequantize(torch.float32) for n in names]
        return torch.cat([w.chunk(ranks, dim)[rank] for w in weights])

    x = torch.randn(3, 64, dtype=torch.bfloat16)
    for layer, expected in [
        (ours.self_attn.qkv_proj, shares(theirs.self_attn, "qkv", 0)),
        (ours.mlp.gate_up_proj, shares(theirs.mlp, ("gate", "up"), 0)),
        (ours.self_attn.o_proj, shares(theirs.self_attn, "o", 1)),
        (ours.mlp.down_proj, shares(theirs.mlp, ("down",), 1)),
    ]:
        weight = layer.weight
        assert isinstance(weight, Int4Tensor) and weight.dtype == dtype
        assert torch.equal(weight.dequantize(torch.float32), expected)
        x = torch.randn(3, expected.shape[1], dtype=torch.bfloat16)
        y, exact = layer.quant_method.apply(layer, x), x.float() @ expected.mT
        assert (y - exact).norm() < 0.01 * exact.norm()


def quantised(folder, *flags):
    main(["quantize", str(llama(folder / "model")), str(folder / "int4"), *flags])
    return folder / "int4"


def test_loaded_on_two_ranks(two, tmp_path):
    two.run(check, quantised(tmp_path, "--group-size", "32"), torch.bfloat16)


def test_float32_scales_stay(two, tmp_path):
    """Of a GGUF file: they are no bfloat16."""
    gguf_files = pytest.importorskip("gguf_files")
    main(["convert", str(gguf_files.write(tmp_path / "x.gguf")), str(tmp_path / "int4")])
    two.run(check, tmp_path / "int4", torch.float32)


def refused(folder, message):
    with pytest.raises(ValueError, match=message):
        layers(folder, dist.get_world_size(), dist.get_rank())


def test_other_groups_than_config_json_says(two, tmp_path):
    folder = quantised(tmp_path, "--group-size", "32")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"group_size": 32', '"group_size": 64'))
    two.run(refused, folder, "must be whole groups of 64|must have 1 entries along dim 0")


def check_kept(folder):
    ours = layers(folder, dist.get_world_size(), dist.get_rank())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).model.layers[0]
    rows = [p.weight.chunk(2)[dist.get_rank()] for p in (theirs.mlp.gate_proj, theirs.mlp.up_proj)]
    assert torch.equal(ours.mlp.gate_up_proj.weight, torch.cat(rows))
    assert isinstance(ours.self_attn.qkv_proj.weight, Int4Tensor)


def test_modules_that_were_kept(two, tmp_path):
    two.run(check_kept, quantised(tmp_path, "--group-size", "32", "--exclude", r"layers\.0\.mlp"))


def test_what_is_refused(tmp_path):
    from int4q.integrations.vllm import Int4QuantizationConfig

    source = qwen_moe(tmp_path / "model")
    main(["quantize", str(source), str(tmp_path / "int4"), "--group-size", "32"])
    told = transformers.AutoConfig.from_pretrained(tmp_path / "int4").quantization_config
    with pytest.raises(ValueError, match="compressed_tensors writes mixtures"):
        Int4QuantizationConfig.from_config(told)
