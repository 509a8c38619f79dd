"""Tiny random models of transformers, one of each kind that is held in another way."""

import torch
import transformers

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
TINY = SIZES | dict(num_key_value_heads=2, head_dim=16, vocab_size=96, max_position_embeddings=64)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, **TOKENS, intermediate_size=128)
    )


def qwen3():
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TINY, **TOKENS, intermediate_size=128, tie_word_embeddings=True)
    )


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **TINY, **TOKENS, intermediate_size=128, moe_intermediate_size=96, num_experts=6,
        num_experts_per_tok=2, mlp_only_layers=[1],
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(
        **TINY, **TOKENS, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def gemma3():
    config = transformers.Gemma3TextConfig(
        **TINY, **TOKENS, intermediate_size=128, sliding_window=8, query_pre_attn_scalar=16
    )
    return transformers.Gemma3ForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        **TINY, **TOKENS, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def llama4():
    config = transformers.Llama4TextConfig(
        **TINY, **TOKENS, intermediate_size=64, intermediate_size_mlp=128, num_local_experts=4,
        num_experts_per_tok=1, interleave_moe_layer_step=1,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


def deepseek_v3():
    config = transformers.DeepseekV3Config(
        **SIZES, **TOKENS, vocab_size=96, max_position_embeddings=64, num_key_value_heads=4,
        intermediate_size=128, moe_intermediate_size=64, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=32,
        kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def bert():
    config = transformers.BertConfig(**SIZES, intermediate_size=128, vocab_size=96)
    return transformers.BertForMaskedLM(config)


def whisper():
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=96,
        num_mel_bins=8, max_source_positions=16, max_target_positions=32, decoder_start_token_id=1,
        **TOKENS,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def clip():
    text = dict(**SIZES, intermediate_size=128, vocab_size=96, **TOKENS)
    vision = dict(**SIZES, intermediate_size=128, image_size=16, patch_size=8)
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    )


DENSE = (llama, qwen3, gemma3)
MIXTURES = (qwen3_moe, mixtral, gpt_oss, llama4, deepseek_v3)
ENCODERS = (bert, whisper, clip)
FAMILIES = DENSE + MIXTURES + ENCODERS


def build(make, dtype=torch.bfloat16):
    """Random weights, biases too, of the size that lets every part of the output matter."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # (and what a model computes in float32 stays so)
    try:
        model = make().eval()
    finally:
        torch.set_default_dtype(before)
    for p in model.parameters():
        p.requires_grad_(False).normal_(std=0.3 if p.ndim < 2 else p.shape[-1] ** -0.5)
    return model


def inputs(make, dtype=torch.bfloat16):
    torch.manual_seed(1)
    ids = torch.arange(18).view(2, 9) * 7 % 90 + 3
    if make is whisper:
        return {
            "input_features": torch.randn(2, 8, 32).to(dtype), "decoder_input_ids": ids
        }  # fmt: skip
    if make is clip:
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16).to(dtype)}
    return {"input_ids": ids}


def output(model, make):
    with torch.no_grad():
        out = model(**inputs(make, model.dtype))
    return torch.cat([out.image_embeds, out.text_embeds]) if make is clip else out.logits
