"""``cuda_graph_generate``: the tokens of transformers' own loop, from one of our own."""

import functools
import gc
import threading
import warnings
import weakref

import pytest
import torch

import int4q
from int4q import GraphFallbackWarning, Int4WeightOnlyConfig, cuda_graph_generate, quantize_
from int4q.integrations import decode_attention, decode_step, generation
from int4q.integrations.decode_step import CapturedGraph, Eager, Step, static_cache

transformers = pytest.importorskip("transformers")

TINY = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    vocab_size=96, intermediate_size=128, initializer_range=0.3,
)  # fmt: skip
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=96, num_experts=6)
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=512, bos_token_id=1,
            eos_token_id=2, initializer_range=0.3,
        )
    ),
    # a window of 8 tokens in every layer, and in some
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**TINY, sliding_window=8)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **TINY, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**TINY, **MOE)
    ),
}  # fmt: skip


def model(kind="llama", device="cpu"):
    torch.manual_seed(0)
    return MODELS[kind]().eval().to(device)


def prompts(device="cpu", batch=3):
    ids = torch.randint(3, 96, (batch, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(batch - 1):  # padding on the left
        mask[row, : 3 - row] = 0
    return ids.to(device), mask.to(device)


def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """The loop on any device, each forward as it is."""
    length = generation.cache_length(generation_config.max_length - 1)
    step = Step(static_cache(model, length), length, Eager())
    request = logits_processor, stopping_criteria, generation_config
    return generation.decode(model, step, input_ids, *request, None, kwargs)


def generate(m, ids, **kwargs):
    kwargs = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **kwargs}
    torch.manual_seed(2)
    return m.generate(ids, **kwargs)


def own(m, ids, **kwargs):
    """transformers' loop."""
    return generate(m, ids, cache_implementation="static", disable_compile=True, **kwargs)


REQUESTS = {
    "greedy": {},
    "sampling": dict(do_sample=True, top_k=20, temperature=0.8),
    "processors": dict(repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=5),
    "ends": dict(eos_token_id=list(range(5, 96, 9))),
    "several": dict(do_sample=True, num_return_sequences=2),
    "one token": dict(max_new_tokens=1),
}


# --- the tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("is_padded", [False, True], ids=["", "padded"])
def test_the_tokens_of_transformers_loop(request_, is_padded):
    m, (ids, mask) = model(), prompts()
    kwargs = {**REQUESTS[request_], **({"attention_mask": mask} if is_padded else {})}
    expected = own(m, ids, **kwargs)
    assert torch.equal(generate(m, ids, custom_generate=loop, **kwargs), expected)
    assert expected.unique().numel() > 10


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind):
    m, (ids, mask) = model(kind), prompts()
    for kwargs in ({}, {"attention_mask": mask}):
        expected = own(m, ids, **kwargs)
        assert torch.equal(generate(m, ids, custom_generate=loop, **kwargs), expected)


def test_what_is_returned():
    m, (ids, _) = model(), prompts()
    asked = dict(return_dict_in_generate=True, output_scores=True, output_logits=True,
                 repetition_penalty=1.5, max_new_tokens=5)  # fmt: skip
    expected = own(m, ids, **asked)
    result = generate(m, ids, custom_generate=loop, **asked)
    assert type(result) is type(expected)
    assert torch.equal(result.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(result[name], expected[name], strict=True):
            torch.testing.assert_close(a, b)
        assert len(result[name]) == 5
    lengths = [int(r.past_key_values.get_seq_length()) for r in (result, expected)]
    assert lengths[0] == lengths[1] == 11


def test_a_step_serves_again():
    m, (ids, mask) = model(), prompts()
    step = Step(static_cache(m, 256), 256, Eager())

    def kept(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        request = logits_processor, stopping_criteria, generation_config
        return generation.decode(model, step, input_ids, *request, None, kwargs)

    for prompt, padding in ((ids, mask), (ids.flip(0)[:, :5], mask[:, :5]), (ids, mask.flip(0))):
        expected = own(m, prompt, attention_mask=padding)
        got = generate(m, prompt, attention_mask=padding, custom_generate=kept)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 2047, 2049, 4097, 100_000])
def test_few_lengths_to_keep(tokens):
    length = generation.cache_length(tokens)
    assert tokens <= length <= max(tokens + 255, tokens * 9 / 8)
    assert len({generation.cache_length(n) for n in range(1, 10_000)}) < 30


# --- what does not fit ----------------------------------------------------------------------------


def test_other_ways_of_decoding_are_refused():
    m, (ids, _) = model(), prompts(batch=1)
    for kwargs in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": model()}):
        with pytest.raises(ValueError, match="decodes greedily or samples.*Leave custom_generate"):
            generate(m, ids, custom_generate=cuda_graph_generate, **kwargs)


class Stream:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_the_loop_on_a_cpu():
    m, (ids, mask) = model(), prompts()
    expected, stream = own(m, ids[:1]), Stream()
    got = generate(m, ids[:1], custom_generate=cuda_graph_generate, streamer=stream)
    assert torch.equal(got, expected)
    assert stream.tokens == expected.flatten().tolist() and stream.ended
    kept = dict(decode_step._STEPS[m])
    for _ in range(2):  # with a kept step too
        got = generate(m, ids, attention_mask=mask, custom_generate=cuda_graph_generate)
        assert torch.equal(got, own(m, ids, attention_mask=mask))
    assert len(decode_step._STEPS[m]) == len(kept) + 1


@pytest.mark.parametrize("heads", [2, 6])
def test_attention_of_one_token(heads):
    query, key, value = torch.randn(2, 6, 1, 8), *torch.randn(2, 2, heads, 5, 8)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]]).bool().view(2, 1, 1, 5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.5, enable_gqa=True
    )
    got, _ = decode_attention.attention(None, query, key, value, mask, 0.5)
    torch.testing.assert_close(got, expected.transpose(1, 2))


def test_attention_is_put_back():
    m, seen = model(), []
    assert m.config._attn_implementation == "sdpa"
    with decode_attention.attention_of_one_token(m):
        seen.append(m.config._attn_implementation)
    with pytest.raises(KeyError), decode_attention.attention_of_one_token(m):
        raise KeyError
    assert seen == [decode_attention.NAME] and m.config._attn_implementation == "sdpa"
    m.set_attn_implementation("eager")  # a choice of the user's own
    with decode_attention.attention_of_one_token(m):
        assert m.config._attn_implementation == "eager"


@pytest.mark.slow
def test_compiled_on_a_cpu():
    m, (ids, mask) = model(), prompts()
    asked = dict(custom_generate=cuda_graph_generate, compile_forward=True)
    for kwargs in ({}, {"attention_mask": mask}):
        expected = own(m, ids, **kwargs)
        for _ in range(2):
            assert torch.equal(generate(m, ids, **kwargs, **asked), expected)
    left = weakref.ref(m)
    del m
    gc.collect()
    assert left() is None


def unsuited(m, ids=None, **kwargs):
    """The reason against the loop."""
    seen = []
    ids = prompts(batch=1)[0] if ids is None else ids

    def custom(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.append(generation._unsuited(model, ids, generation_config, False, kwargs))
        return input_ids

    generate(m, prompts(batch=1)[0], custom_generate=custom, **kwargs)
    return seen[0]


def test_a_reason_is_named_and_transformers_loop_runs():
    m, (ids, _) = model(), prompts(batch=1)
    expected, stream = generate(m, ids), Stream()
    m.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.warns(GraphFallbackWarning, match=r"model\.layers\.0 has a forward hook"):
        got = generate(m, ids, custom_generate=cuda_graph_generate, streamer=stream)
    assert torch.equal(got, expected)
    assert stream.tokens == expected.flatten().tolist() and stream.ended


def test_reasons(monkeypatch):
    assert unsuited(model()) is None
    assert "token ids are on meta" in unsuited(model(), torch.empty(0, device="meta"))
    assert "hidden states" in unsuited(
        model(), output_hidden_states=True, return_dict_in_generate=True
    )
    assert "use_cache=False" in unsuited(model(), use_cache=False)
    assert "given token_type_ids" in unsuited(
        model("gpt2"), token_type_ids=torch.zeros(1, 7, dtype=torch.long)
    )
    cache = transformers.StaticCache(config=model().config, max_cache_len=40)
    assert "a cache was passed" in unsuited(model(), past_key_values=cache)
    m = model()
    m.model.layers[0].register_forward_hook(lambda *_: None)
    assert "model.layers.0 has a forward hook" in unsuited(m)
    m = model()
    m(prompts()[0], output_hidden_states=True)  # transformers hooks its own modules for this
    assert unsuited(m) is None
    monkeypatch.setattr(generation, "_devices", lambda model: {torch.device("meta")})
    assert "on meta, not on one CUDA device or a CPU" in unsuited(model())


def test_caches_that_count_on_the_host(monkeypatch):
    class Odd(transformers.cache_utils.StaticLayer):
        pass

    m = model()
    mapping = {"full_attention": Odd}
    monkeypatch.setattr(transformers.cache_utils, "STATIC_LAYER_TYPE_MAPPING", mapping)
    with pytest.raises(TypeError, match="its cache has layers of Odd"):
        static_cache(m, 256)


# --- a model quantised on load --------------------------------------------------------------------


@pytest.mark.slow
def test_transformers_compiles_a_prepared_model_as_any_other(tmp_path):
    model().save_pretrained(tmp_path)
    config = transformers.TorchAoConfig(
        Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    )
    m = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    ids, _ = prompts()
    expected = own(m, ids)
    int4q.prepare_for_inference_(m, fuse=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append([type(t) for t in inputs if isinstance(t, torch.Tensor)])
        return graph

    compiled = transformers.CompileConfig(backend=backend, mode=None, fullgraph=True)
    compiled._compile_all_devices = True  # a CPU too
    torch._dynamo.reset()
    got = generate(m, ids, cache_implementation="static", compile_config=compiled)
    assert torch.equal(got, expected)
    assert len(graphs) == 1 and set(graphs[0]) <= {torch.Tensor, torch.nn.Parameter}


# --- what a graph depends on ----------------------------------------------------------------------


def test_changes_that_ask_for_a_new_graph():
    config = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    changes = {
        "prepared": lambda m: int4q.prepare_for_inference_(m),
        "attention": lambda m: m.set_attn_implementation("eager"),
        "training": lambda m: m.train(),
        "a new weight": lambda m: m.lm_head.register_parameter(
            "weight", torch.nn.Parameter(m.lm_head.weight.clone())
        ),
        "cast": lambda m: m.bfloat16(),
    }
    m = model()
    quantize_(m, config, lambda module, name: "_proj" in name)
    for name, change in changes.items():
        before = decode_step.state_of(m)
        assert before == decode_step.state_of(m)
        change(m)
        assert decode_step.state_of(m) != before, name
    before = decode_step.state_of(m)
    m.load_state_dict(m.state_dict())
    m(prompts()[0])
    assert decode_step.state_of(m) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_active_adapter_asks_for_a_new_graph():
    peft = pytest.importorskip("peft")
    m = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["q_proj"]))
    m.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    before = decode_step.state_of(m)
    m.set_adapter("other")
    assert decode_step.state_of(m) != before


def test_steps_are_kept_and_freed():
    m = model()
    kept = weakref.ref(step := Step(None, 1, Eager()))
    decode_step.keep(m, "key", step)
    del step
    assert decode_step.take(m, "key") is kept()
    assert decode_step.take(m, "key") is None and kept() is None
    for i in range(decode_step.KEPT + 2):
        decode_step.keep(m, i, Step(None, 1, Eager()))
    assert [decode_step.take(m, i) is None for i in range(decode_step.KEPT + 2)].count(True) == 2
    step = Step(None, 1, Eager())
    kept = weakref.ref(step)
    decode_step.keep(m, "key", step)
    del m, step
    gc.collect()
    assert kept() is None
    decode_step.keep(m := model(), "key", Step(None, 1, Eager()))
    int4q.drop_cuda_graphs(m)
    assert decode_step.take(m, "key") is None


# --- graphs ---------------------------------------------------------------------------------------


def captured(m):
    """The runners of the steps that are kept of a model."""
    return [step.runner for step in decode_step._STEPS.get(m, {}).values()]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MODELS)
def test_graphs_give_the_tokens_of_transformers_loop(kind):
    m, (ids, mask) = model(kind, "cuda"), prompts("cuda")
    for name, kwargs in REQUESTS.items():
        for padding in ({}, {"attention_mask": mask}):
            expected = own(m, ids, **kwargs, **padding)
            for _ in range(2):
                with warnings.catch_warnings():
                    warnings.simplefilter("error", GraphFallbackWarning)
                    got = generate(m, ids, custom_generate=cuda_graph_generate, **kwargs, **padding)
                assert torch.equal(got, expected), name
    assert all(r._graph is not None and r.reason is None for r in captured(m)) and captured(m)


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [False, True])
def test_graphs_of_4_bit_weights(fuse):
    m, (ids, mask) = model(device="cuda").bfloat16(), prompts("cuda")
    config = Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    quantize_(m, config, lambda module, name: "_proj" in name)
    int4q.prepare_for_inference_(m, fuse=fuse)
    for kwargs in ({}, {"attention_mask": mask}):
        expected = own(m, ids, **kwargs)
        for _ in range(2):
            got = generate(m, ids, custom_generate=cuda_graph_generate, **kwargs)
            assert torch.equal(got, expected)
    assert all(r._graph is not None for r in captured(m))


@pytest.mark.gpu
def test_graphs_of_4_bit_experts():
    import int4q.integrations.transformers  # noqa: F401

    m, (ids, _) = model("qwen3_moe", "cuda").bfloat16(), prompts("cuda")
    m.set_experts_implementation("int4q")
    quantize_(m, int4q.moe_config(Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)))
    int4q.prepare_for_inference_(m, fuse=True)
    expected = own(m, ids)
    assert torch.equal(generate(m, ids, custom_generate=cuda_graph_generate), expected)
    assert all(r._graph is not None for r in captured(m))


@pytest.mark.gpu
def test_a_stream_and_the_end_of_sequences():
    m, (ids, _) = model(device="cuda"), prompts("cuda", batch=1)
    for eos in (None, list(range(5, 96, 9))):
        for _ in range(2):
            expected, stream = own(m, ids, eos_token_id=eos), Stream()
            got = generate(
                m, ids, eos_token_id=eos, custom_generate=cuda_graph_generate, streamer=stream
            )
            assert torch.equal(got, expected)
            assert stream.tokens == expected.flatten().tolist() and stream.ended


@pytest.mark.gpu
def test_a_changed_model_is_captured_anew():
    m, (ids, _) = model(device="cuda"), prompts("cuda")
    graph = functools.partial(generate, m, ids, custom_generate=cuda_graph_generate)
    graph()
    m.lm_head.weight.data.mul_(-1)  # in place: the same graph
    assert torch.equal(graph(), own(m, ids)) and len(captured(m)) == 1
    m.lm_head.weight = torch.nn.Parameter(torch.randn_like(m.lm_head.weight))
    assert torch.equal(graph(), own(m, ids)) and len(captured(m)) == 2


@pytest.mark.gpu
def test_a_failed_capture_is_named_and_the_tokens_are_right():
    m, (ids, _) = model(device="cuda"), prompts("cuda")
    expected = own(m, ids)
    forward = m.model.norm.forward
    m.model.norm.forward = lambda x: (x.sum().item(), forward(x))[1]  # waits for the device
    with pytest.warns(GraphFallbackWarning, match="no CUDA graph: .*captur"):
        got = generate(m, ids, custom_generate=cuda_graph_generate)
    assert torch.equal(got, expected)
    assert torch.randn(8, device="cuda").isfinite().all()  # random numbers go on
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraphFallbackWarning)
        assert torch.equal(generate(m, ids, custom_generate=cuda_graph_generate), expected)


@pytest.mark.gpu
def test_threads_have_graphs_of_their_own():
    m, (ids, _) = model(device="cuda"), prompts("cuda")
    expected, results = own(m, ids), {}

    def run(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            results[i] = [
                generate(m, ids, custom_generate=cuda_graph_generate).cpu() for _ in range(3)
            ]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(r, expected.cpu()) for rs in results.values() for r in rs)
    assert len(results) == 2


@pytest.mark.gpu
def test_a_returned_cache_is_not_written_again():
    m, (ids, _) = model(device="cuda"), prompts("cuda")
    asked = dict(return_dict_in_generate=True, custom_generate=cuda_graph_generate)
    first = generate(m, ids, **asked)
    keys = first.past_key_values.layers[0].keys.clone()
    generate(m, ids.flip(0), **asked)
    assert torch.equal(first.past_key_values.layers[0].keys, keys) and not captured(m)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication")
def test_compiled_and_captured():
    m, (ids, mask) = model(device="cuda"), prompts("cuda")
    asked = dict(custom_generate=cuda_graph_generate, compile_forward=True)
    for kwargs in ({}, {"attention_mask": mask}):
        expected = own(m, ids, **kwargs)
        for _ in range(2):
            assert torch.equal(generate(m, ids, **kwargs, **asked), expected)
    assert all(r._graph is not None for r in captured(m))


def test_runners():
    made = []

    def forward():
        made.append(len(made))
        return made[-1]

    assert [Eager()(forward) for _ in range(2)] == [0, 1]
    runner = CapturedGraph()
    runner.reason = "some"
    assert [runner(forward) for _ in range(3)] == [2, 3, 4]
