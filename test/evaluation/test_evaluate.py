"""``evaluate`` against its definition, token by token."""

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from int4q import Int4WeightOnlyConfig, evaluate, quantize_

V, H = 19, 32


class Model(nn.Module):
    """A causal language model: the mean of what came before, through two layers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.up, self.head = nn.Embedding(V, H), nn.Linear(H, 64), nn.Linear(64, V)
        self.calls = []

    def forward(self, ids):
        self.calls.append(ids.shape[1])
        assert not self.training
        x = self.embed(ids)
        mean = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return 3 * self.head(torch.tanh(self.up(mean + x)))


def token_by_token(model, ids, window, stride):
    """``[(log p of token t)]`` for every t >= 1, by the window that predicts it."""
    found = {}
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        logits = model(ids[None, start:end])[0]
        for t in range(start + 1, end):
            found.setdefault(t, logits[t - 1 - start])
        if end == len(ids):
            break
    return torch.stack([found[t] for t in range(1, len(ids))]).log_softmax(-1).detach()


@pytest.mark.parametrize("length", [2, 7, 8, 9, 30])
@pytest.mark.parametrize("stride", [1, 3, 7, None])
def test_sliding_windows(length, stride):
    model, reference = Model().eval(), Model(1).eval()
    ids = torch.randint(V, (length,))
    got = evaluate(model, ids, reference=reference, window=8, stride=stride)
    p, q = (token_by_token(m, ids, 8, stride or 4) for m in (reference, model))
    assert got.tokens == length - 1
    assert math.isclose(got.perplexity, F.nll_loss(q, ids[1:]).exp(), rel_tol=1e-5)
    assert math.isclose(got.reference_perplexity, F.nll_loss(p, ids[1:]).exp(), rel_tol=1e-5)
    kl = (p.exp() * (p - q)).sum(-1)
    assert math.isclose(got.kl, kl.mean(), rel_tol=1e-4)
    assert math.isclose(got.kl_error, kl.std(correction=0) / (length - 1) ** 0.5, rel_tol=1e-2,
                        abs_tol=1e-4)  # fmt: skip
    assert math.isclose(got.top1, (p.argmax(-1) == q.argmax(-1)).float().mean(), rel_tol=1e-6)


def test_texts_count_by_their_tokens():
    model = Model().eval()
    a, b = torch.randint(V, (20,)), torch.randint(V, (5,))
    both = evaluate(model, [a, b, torch.tensor([3])])
    one = [evaluate(model, t) for t in (a, b)]
    nll = sum(e.tokens * math.log(e.perplexity) for e in one)
    assert both.tokens == 23 and math.isclose(math.log(both.perplexity), nll / 23, rel_tol=1e-6)
    rows = torch.stack([a[:5], b])
    assert evaluate(model, rows).tokens == 8

    def tokenizer(text):
        return {"input_ids": [ord(c) % V for c in text]}

    text = evaluate(model, ["abc", "de"], tokenizer=tokenizer)
    ids = [torch.tensor(tokenizer(t)["input_ids"]) for t in ("abc", "de")]
    assert text == evaluate(model, ids)


def test_one_window_at_a_time_and_modes_restored():
    model, reference = Model().train(), Model().eval()
    evaluate(model, torch.randint(V, (100,)), reference=reference, window=16)
    assert max(model.calls) == 16 and model.training and not reference.training
    assert model.calls[: len(reference.calls)] == reference.calls[: len(model.calls)]


def test_the_same_model():
    model = Model().eval()
    got = evaluate(model, torch.randint(V, (50,)), reference=Model().eval())
    assert abs(got.kl) < 1e-6 and got.top1 == 1 and got.perplexity == got.reference_perplexity
    assert got.layers == ()
    alone = evaluate(model, torch.randint(V, (50,)))
    assert alone.kl is None and alone.reference_perplexity is None


@torch.no_grad()
def test_layers():
    model, reference = Model(), Model().eval()
    quantize_(
        model,
        Int4WeightOnlyConfig(group_size=32, set_inductor_config=False),
        filter_fn=lambda module, name: isinstance(module, nn.Linear),
    )
    ids = torch.randint(V, (12,))
    got = evaluate(model, ids, reference=reference)
    assert got.kl > 0 and {layer.name for layer in got.layers} == {"up.weight", "head.weight"}
    seen = {}
    handle = reference.up.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
    reference(ids[None])
    handle.remove()
    w, v = reference.up.weight.detach(), model.up.weight.dequantize()
    up = next(layer for layer in got.layers if layer.name == "up.weight")
    exact = 10 * torch.log10(w.square().sum() / (w - v).square().sum())
    assert math.isclose(up.weight_sqnr, exact, rel_tol=1e-4)
    error = F.linear(seen["x"], v - w).square().sum()
    exact = 10 * torch.log10(seen["y"].square().sum() / error)
    assert math.isclose(up.output_sqnr, exact, rel_tol=1e-4)
    assert got.worst(1)[0].output_sqnr == min(layer.output_sqnr for layer in got.layers)
    assert not reference.up._forward_hooks
    read = json.loads(got.to_json())
    assert read["kl"] == got.kl and len(read["layers"]) == 2


def test_json_of_what_is_not_finite():
    from int4q.evaluation import Evaluation

    assert json.loads(Evaluation(1, math.inf).to_json())["perplexity"] is None


@pytest.mark.parametrize(
    "data,arguments,error,message",
    [
        ("text", {}, TypeError, "text needs a tokenizer="),
        (torch.randn(4), {}, TypeError, "texts, or token ids .* got torch.float32 tensor"),
        (7, {}, TypeError, "texts, or token ids .* got int"),
        ([torch.tensor([1])], {}, ValueError, "two tokens at least"),
        (torch.arange(4), dict(window=1), ValueError, "window must be 2 tokens at least, got 1"),
        (torch.arange(4), dict(window=4, stride=4), ValueError, r"stride must be 1 to 3"),
        (torch.arange(4), dict(stride=0), ValueError, "stride must be 1 to 511"),
    ],
)
def test_arguments_that_do_not_do(data, arguments, error, message):
    with pytest.raises(error, match=message):
        evaluate(Model().eval(), data, **arguments)


class Tokenizer:
    def __call__(self, text):
        return {"input_ids": [min(ord(c), 127) for c in text]}


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A folder with a model, and a text."""
    transformers = pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Tokenizer()
    )
    (tmp_path / "text.txt").write_text("What is measured here is this sentence. " * 5)
    return tmp_path / "model", tmp_path / "text.txt"


def test_the_command(tmp_path, llama, capsys, monkeypatch):
    from int4q import cli

    paths = [*map(str, llama), str(tmp_path / "out.json")]
    for algorithm in ("gptq", "auto", "hqq"):
        command = ["eval", *paths[:2], "--algorithm", algorithm, "--json", paths[2]]
        if algorithm == "gptq":
            command += ["--calibrate", paths[1]]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cli.main([*command, "--window", "32", "--tokens", "100", "--device", "cpu"])
        assert any("in smaller groups, as group_size 128" in str(w.message) for w in caught)
        read = json.loads((tmp_path / "out.json").read_text())
        assert read["tokens"] == 99 and read["kl"] > 0 and len(read["layers"]) == 14
        shown = capsys.readouterr().out
        assert "same top token" in shown and "14 weights in 4 bits" in shown
    monkeypatch.setattr(cli.evaluation, "evaluate", lambda model, ids, **kwargs: ids)
    shown = []
    monkeypatch.setattr(cli.evaluation, "show", shown.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.main(["eval", paths[0], "--algorithm", "tinygemm", "--device", "cpu"])
    assert shown[0].shape == (8192,)  # Python's manual


COMMAND = ["--window", "32", "--tokens", "100", "--device", "cpu"]


def test_the_command_on_a_model_in_4_bits(tmp_path, llama, capsys):
    transformers = pytest.importorskip("transformers")
    from int4q import cli

    folder, text = llama
    config = transformers.TorchAoConfig(Int4WeightOnlyConfig(32, set_inductor_config=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "small")
    command = ["eval", str(tmp_path / "small"), str(text), "--json", str(tmp_path / "out.json")]
    cli.main([*command, *COMMAND, "--reference", str(folder)])
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["kl"] > 0 and len(read["layers"]) == 14
    original = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(Tokenizer()(text.read_text())["input_ids"][:100])
    exact = evaluate(original, ids, window=32).perplexity
    assert math.isclose(read["reference_perplexity"], exact, rel_tol=1e-5)
    cli.main([*command, *COMMAND])
    assert json.loads((tmp_path / "out.json").read_text())["kl"] is None
    assert "14 weights in 4 bits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--reference is for a model that is in 4 bits already"):
        cli.main(["eval", str(folder), str(text), *COMMAND, "--reference", str(folder)])


def test_the_card(tmp_path, llama):
    from int4q import cli

    folder, text = llama
    made = tmp_path / "small"
    cli.main(["quantize", str(folder), str(made), "--group-size", "32"])
    card, command = made / "README.md", ["eval", str(made), str(text), *COMMAND, "--card"]
    before = card.read_text()
    card.write_text(f"{before}\n## Licence\n\nFree.\n")
    figures = tmp_path / "out.json"
    cli.main([*command, "--reference", str(folder), "--json", str(figures)])
    first, read = card.read_text(), json.loads(figures.read_text())
    assert first.startswith(before) and "99 tokens of text.txt, in windows of 32:" in first
    assert f"| perplexity | {read['perplexity']:.3f} |" in first
    assert f"| KL(original, this), nats a token | {read['kl']:.4f} ±" in first
    card.write_text(first.replace("\n## Licence\n\nFree.\n", "") + "\n## Licence\n\nFree.\n")
    cli.main(command)  # the figures that were there make way, and nothing else
    again = card.read_text()
    assert again.startswith(before) and "\n## Licence\n\nFree.\n" in again
    assert again.count("int4q eval") == 1 and "KL(" not in again
    with pytest.raises(ValueError, match="--card is for a folder with a README"):
        cli.main(["eval", str(folder), str(text), *COMMAND, "--card"])
    (folder / "README.md").touch()
    with pytest.raises(ValueError, match="--card is for a model that is in 4 bits already"):
        cli.main(["eval", str(folder), str(text), *COMMAND, "--card"])
    assert not (folder / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::int4q.Int4SkipWarning")
def test_the_picture(tmp_path, llama, monkeypatch):
    pytest.importorskip("matplotlib")
    from int4q import cli
    from int4q.evaluation import picture

    command = ["eval", *map(str, llama), *COMMAND, "--algorithm", "tinygemm"]
    cli.main([*command, "--picture", str(tmp_path / "layers.png")])
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"must end in one of .* got .*layers\.bmp"):
        cli.main([*command, "--picture", str(tmp_path / "layers.bmp")])
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        cli.main([*command, "--picture", str(tmp_path / "layers.png")])


def test_lines_of_the_picture():
    from int4q.evaluation import Layer
    from int4q.evaluation.picture import _lines

    layers = [
        Layer("m.0.up.weight", 20.0, 25.0),
        Layer("m.1.up.weight", 21.0),
        Layer("head.w", 9.0),
    ]
    assert _lines(layers) == {"up": [(0, 25.0), (1, 21.0)], "head.w": [(0, 9.0)]}
