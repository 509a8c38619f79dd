"""The decode example: its cache, its kernels and its checks, on the smallest preset."""

import json

import pytest
import torch
from helpers import ROOT

from int4q import Int4WeightOnlyConfig

CONTEXT, STEPS = 12, 8
CONFIGS = {
    "high precision": None,
    "plain": Int4WeightOnlyConfig(group_size=32, set_inductor_config=False),
    "coalesced W4A16": Int4WeightOnlyConfig(
        group_size=32,
        int4_packing_format="cuda_coalesced",
        activation_dtype=torch.bfloat16,
        set_inductor_config=False,
    ),
}


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    # Its fills would be kernels between those of the example.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    # Matrices this small gain nothing from threads, and much time is lost where cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(config, device: str):
    from decode_model import PRESETS, Decoder

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = PRESETS["tiny"]
    model = Decoder(shape, config, CONTEXT + STEPS + 1, torch.device(device), dtype)
    model.prefill(torch.randint(shape.vocab, (CONTEXT,)).to(device))
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cached_steps_equal_full_recomputation(config):
    model = make(config, "cpu")
    logits = []
    for _ in range(STEPS):
        list(model.step())
        logits.append(model.logits.clone())
    assert int(model.position) == CONTEXT - 1 + STEPS
    for i, cached in enumerate(logits):
        tokens = model.history[: CONTEXT + i].clone()
        model.k_cache.fill_(torch.nan)  # nothing of the first pass may be read
        model.v_cache.fill_(torch.nan)
        model.position.zero_()
        list(model.sections(tokens))
        # float32, logits of standard deviation 1: sums in another order, through two layers
        torch.testing.assert_close(model.logits, cached, atol=1e-4, rtol=0)
        assert int(model.logits.argmax()) == int(model.history[CONTEXT + i])


def test_a_tied_head_reads_the_embedding():
    model = make(None, "cpu")
    assert model.head.weight.data_ptr() == model.embedding.data_ptr()
    assert model.weight_bytes() == 4 * (
        sum(m.weight.numel() for layer in model.layers for m in layer.children())
        + model.embedding.numel()
    )


def test_4_bit_bytes_are_counted_with_their_scales():
    from decode_model import PRESETS

    shape, bits = PRESETS["tiny"], 4 + 2 * 32 / 32  # float32 scale and zero point for 32 weights
    width = shape.heads * shape.head_dim
    kv = 2 * shape.kv_heads * shape.head_dim
    weights = shape.hidden * (2 * width + kv + 3 * shape.ffn) * shape.layers
    head = 4 * shape.vocab * shape.hidden
    assert make(CONFIGS["plain"], "cpu").weight_bytes() == weights * bits / 8 + head


def test_the_command_on_a_cpu(tmp_path):
    import decode

    command = "--preset tiny --device cpu --context 8 --tokens 4 --group-sizes 32 --out".split()
    result = decode.main([*command, str(tmp_path)])
    rows = [(row["variant"], row["lm_head"]) for row in result["rows"]]
    assert rows == [("float32", "16 bits")] + [
        (name, head)
        for name in ("plain W4A16", "coalesced W4A16", "coalesced W4A8")
        for head in ("16 bits", "int4")
    ]
    assert all(row["tokens_s"] > 0 for row in result["rows"])
    assert json.loads((tmp_path / "decode_e2e.json").read_text()) == result
    assert (tmp_path / "decode_e2e.md").read_text().count("\n| ") == 8
    assert not list(tmp_path.glob("*.part"))


def test_a_graph_that_chooses_other_tokens_is_refused(monkeypatch):
    import decode

    model = make(None, "cpu")

    def wrong(model):
        def step():
            list(model.step())
            model.history[model.position] += 1

        return step

    monkeypatch.setattr(decode, "captured", wrong)
    with pytest.raises(RuntimeError, match="captured tokens"):
        decode.measure(model, CONTEXT, 4, None)


def test_logits_that_differ_between_layouts_are_refused():
    import decode

    coalesced = decode.Variant("coalesced W4A16", "cuda_coalesced", torch.bfloat16, 32)
    plain, exact = torch.ones(1, 8), {}
    assert decode._compared(decode.Variant("plain", "plain", None, 32), plain, exact) == {}
    assert decode._compared(coalesced, plain.clone(), exact) == {"logits_error": 0.0}
    with pytest.raises(RuntimeError, match="logits differ"):
        decode._compared(coalesced, plain * 1.1, exact)


def test_the_published_tables_are_those_of_the_published_figures(tmp_path):
    import decode_report

    folder = ROOT / "docs" / "benchmarks" / "h200"
    result = json.loads((folder / "decode_e2e.json").read_text())
    assert decode_report.markdown(result) == (folder / "decode_e2e.md").read_text()
    for row in result["rows"]:
        if profile := row.get("profile"):
            assert sum(profile["sections_ms"].values()) == pytest.approx(profile["ms"])
            assert profile["ms"] == pytest.approx(row["ms"], rel=0.03)  # tracing slows nothing
    pytest.importorskip("matplotlib")
    decode_report.plot([r for r in result["rows"] if "profile" in r], tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 0


@pytest.mark.gpu
@pytest.mark.parametrize("context", [1, 2, 63, 64, 65, 700])
@pytest.mark.parametrize("heads", [(4, 2, 32), (32, 8, 128), (32, 16, 256)])
def test_fused_kernels_equal_the_definition(heads, context):
    import decode_kernels
    import decode_model

    (heads, kv_heads, D), hidden = heads, 5376
    device = torch.device("cuda")
    run = decode_kernels.Attention(heads, kv_heads, D, device)
    qkv = torch.randn(1, (heads + 2 * kv_heads) * D, device=device).bfloat16()
    x = (3 * torch.randn(1, hidden, device=device)).bfloat16()
    caches = torch.randn(2, kv_heads, 800, D, device=device).bfloat16()
    caches[:, :, context:] = torch.nan  # must not be read
    wanted_caches = caches.clone()
    angle = 6 * torch.rand(800, D // 2, device=device)
    position = torch.tensor([context], device=device)
    tables = angle.cos(), angle.sin(), position
    out = run(qkv, x, *tables, *caches, decode_model.EPS)
    wanted = decode_model.attend(qkv, x, *tables, *wanted_caches, heads)
    # bfloat16 results, and probabilities rounded to it before they meet the values
    assert (out.float() - wanted.float()).norm() < 8e-3 * wanted.float().norm()
    new = caches[:, :, context], wanted_caches[:, :, context]
    torch.testing.assert_close(*new, atol=0, rtol=2**-7)  # one rounding step of bfloat16
    assert torch.equal(run(qkv, x, *tables, *caches, decode_model.EPS), out)

    gate_up = torch.randn(1, 2 * 1000, device=device).bfloat16()
    got = decode_kernels.gate(gate_up, x, decode_model.EPS)
    torch.testing.assert_close(got, decode_model.gate(gate_up, x), atol=1e-6, rtol=2**-7)


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path):
    import decode

    command = "--preset tiny --context 40 --tokens 20 --group-sizes 32 128 --out".split()
    result = decode.main([*command, str(tmp_path)])
    for row in result["rows"]:
        assert len(row["checked_tokens"]) == decode.CHECKED
        if profile := row.get("profile"):
            assert sum(profile["sections_ms"].values()) == pytest.approx(profile["ms"])
    assert (tmp_path / "decode_e2e.png").stat().st_size > 0
