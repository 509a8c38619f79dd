"""The benchmark's own arithmetic and files, on shapes small enough for any machine."""

import json

import pytest
import torch

from int4q import Int4Tensor
from int4q.bench import (
    cpu,
    decode,
    experts,
    experts_peers,
    generate,
    host,
    lora,
    models,
    peers,
    report,
    shapes,
)
from int4q.cli import main

ROWS = [
    {"N": 64, "K": 64, "group_size": 32, "M": M, "flops": 2 * M * 64 * 64, "bytes": 4096,
     "us": {"int4q plain": 2.0 * M, "cuBLAS bf16": 4.0 * M, "slow": 16.0 * M},
     "relative_error": {}, "not_timed": {"broken": "wrong: relative error 0.5"}}
    for M in (1, 2)
]  # fmt: skip
RESULT = {
    "gpu": "a GPU", "torch": "2", "cuda": "13", "int4q": "0", "date": "2026-01-01",
    "ceilings": {"read_tb_s": 4.0, "copy_tb_s": 4.0, "bf16_tflop_s": 500.0}, "rows": ROWS,
}  # fmt: skip


def test_gpu_table_holds_times_ratios_and_means():
    text = report.markdown(RESULT)
    assert "| 64 x 64 | 32 | 1 | 2.0 | 4.0 (2.00) | 16.0 (8.00) |" in text
    assert "| 2 | 32 | 2.00 | 8.00 |" in text
    assert report.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert "wrong: relative error 0.5" in report.line(ROWS[0], RESULT["ceilings"])


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    (path,) = report.plots(RESULT, tmp_path)
    assert path.stat().st_size > 1000


def test_cpu_run_writes_checked_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "SHAPES", [(64, 128)])
    monkeypatch.setattr(cpu, "ROWS", [1, 40])
    monkeypatch.setattr(cpu, "GROUPS", [32])
    monkeypatch.setattr(cpu, "SECONDS", 0.01)
    monkeypatch.setattr(cpu, "COLD_BYTES", 1 << 14)
    monkeypatch.setattr(cpu, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(cpu, "ISAS", {"best": {}})
    monkeypatch.setattr(cpu, "quantize_row", lambda threads: {"seconds": 1, "peak_over_weight": 2})
    monkeypatch.setattr(cpu, "_in_process", lambda threads, isa: cpu.measure(threads))
    main(["bench", "cpu", "--threads", "1", "--out", str(tmp_path)])
    (measured,) = json.loads((tmp_path / "cpu.json").read_text())["runs"]
    assert [r["M"] for r in measured["linear"]] == [1, 40] and measured["read_gb_s"] > 0
    assert all(t > 0 for r in measured["linear"] for t in r["ms"].values())
    assert "| 64 x 128 | 32 |" in capsys.readouterr().out


@pytest.mark.slow
def test_host_run_writes_every_mode(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "SIZES", {"cpu": (64,)})
    for name in ("LAYERS", "ROUNDS", "CALLS"):
        monkeypatch.setattr(host, name, 2)
    main(["bench", "host", "--device", "cpu", "--rows", "1", "3", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "host_cpu.json").read_text())
    modes = [(row["M"], row["mode"]) for row in result["rows"]]
    assert modes == [(1, "eager"), (1, "compiled"), (3, "eager"), (3, "compiled")]
    for row in result["rows"]:
        assert list(row["us"]) == ["bf16", "int4", "prepared"] and all(row["us"].values())
        assert row["over_bf16"]["int4"] == row["us"]["int4"] / row["us"]["bf16"]
    assert "| 64 x 64 | 3 | compiled |" in capsys.readouterr().out


@pytest.mark.slow
def test_generate_run_writes_every_way(tmp_path, capsys):
    pytest.importorskip("transformers")
    main(["bench", "generate", "--device", "cpu", "--model", "tiny", "--layers", "1", "--tokens",
          "4", "--groups", "32", "--contexts", "32", "--out", str(tmp_path), "--ways", "eager",
          "static", "graph"])  # fmt: skip
    result = json.loads((tmp_path / "generate_tiny.json").read_text())
    names = ["bf16", "int4 g32", "int4 g32 prepared", "int4 g32 fused"]
    assert [row["name"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert list(row["ways"]) == ["eager", "static", "graph"] and not row["not_run"]
        assert row["first_token_ms"]["32"] > 0
        for way in row["ways"].values():
            assert way["tokens_s"] > 0 and way["first_call_s"] > 0 and 1 <= way["alike"] <= 4
    assert "| bf16 | " in capsys.readouterr().out


def test_generate_begins_nothing_when_the_time_is_up():
    pytest.importorskip("transformers")
    found, not_run = generate.rows(generate.Request(model="tiny", time_limit=-1, groups=(32,)))
    assert not found and set(not_run.values()) == {"no time left"} and "bf16" in not_run


def test_generate_shows_no_speed_of_wrong_tokens():
    pytest.importorskip("transformers")
    request = generate.Request(model="tiny", layers=1, tokens=2)
    with pytest.raises(RuntimeError, match="the first token of eager is"):
        generate.decoding(models.load("tiny", 1, "cpu"), "eager", request, [-1, -1])


def test_host_times_no_wrong_result():
    contenders, x = host.models(64, "cpu"), torch.randn(2, 64).bfloat16()
    host.check(contenders, x)
    contenders["prepared"][3].weight.qdata.zero_()
    with pytest.raises(RuntimeError, match="prepared at M=2, K=64 differs from int4"):
        host.check(contenders, x)
    contenders["int4"][0].weight.scale.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="int4 at M=2, K=64: relative error nan"):
        host.check(contenders, x)


def test_a_wrong_result_is_never_timed(monkeypatch):
    monkeypatch.setattr(cpu, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="M=1, N=64, K=128: relative error"):
        cpu.layers(64, 128, 32, bandwidth=1e9)


@pytest.mark.slow
def test_quantising_stays_within_four_times_the_weight():
    assert cpu.quantize_row(2)["peak_over_weight"] < 4


def test_peers_say_what_is_missing_and_shapes_have_names():
    absent = [p.missing() for p in peers.PEERS if p.module == "bitsandbytes"]
    assert absent in (["bitsandbytes is not installed"], [None])
    assert shapes.CORE[0].name == "4096x4096" and set(shapes.CORE) <= set(shapes.MODELS)


def test_the_command_knows_its_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("int4q 0.")


def test_experts_table_holds_times_and_ratios():
    rows = [
        {"stack": "a stack", "group_size": 128, "tokens": 8, "rows": 16, "active_experts": 4,
         "us": {"int4q plain": 10.0, "bf16 _grouped_mm": 35.0, "other": 14.0, "slow": 20.0},
         "not_timed": {"gone": "wrong"}, "flops": 4 * 10**9, "bytes": 2 * 10**7}
    ]  # fmt: skip
    text = experts.markdown({**RESULT, "rows": rows})
    assert "| a stack | 128 | 8 | 16 | 4 | 10.0 | 35.0 | 14.0 | 20.0 | 3.50 | 1.40 | 8.0 |" in text
    assert "slow 20.0; gone: wrong" in experts.line(rows[0])
    reasons = {p.name: p.missing() for p in experts_peers.PEERS}
    assert reasons["bf16 _grouped_mm"] is None


def test_routing_takes_distinct_experts_for_every_token():
    for stack in experts.STACKS:
        ends = experts.routing(stack, 64)
        counts = ends.diff(prepend=ends.new_zeros(1))
        assert len(ends) == stack.experts and counts.max() <= 64
        assert ends[-1] == 64 * (stack.top_k or stack.experts)


DECODE = {
    "gpu": "a GPU", "torch": "2", "cuda": "13", "int4q": "0", "date": "2026-01-01",
    "rows": [
        {"N": 64, "K": 64, "group_size": 32, "M": M, "bytes": 4096, "floor_us": 1.0,
         "us": {"C++ W4A16 plain": 4.0 * M, "C++ W4A16 coalesced": 2.0, "Humming": 5.0},
         "relative_error": {}, "wrong": {"Triton W4A8 plain": "relative error 0.5"}}
        for M in (1, 2)
    ],
}  # fmt: skip


def test_decode_table_holds_times_ratios_and_errors():
    t = Int4Tensor.from_hp(torch.randn(48, 256), [1, 32])
    found = decode.numerics(t)
    by = {r["activations"]: r["relative_error"] for r in found}
    for label, e in by.items():
        # 8 bits a block of 32 against 16 (24 on a CPU) a block of 128 (8).
        assert e["W4A16"] < 1e-4 < e["W4A8"] < 5e-2, (label, e)
    text = decode.markdown({**DECODE, "numerics": found})
    assert "| 64 x 64 | 32 | 1 | 1.0 | 4.0 (25%) | 2.0 (50%) | 5.0 (20%) |" in text
    assert "| 32 | 2 | 4.00 | - | - | - | 2.50 | - |" in text
    assert "| 48 x 256 | 32 | one channel x100 |" in text
    assert "Triton W4A8 plain WRONG: relative error 0.5" in decode.line(DECODE["rows"][0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # transformers' names
@pytest.mark.filterwarnings("ignore::int4q.Int4SkipWarning")
def test_lora_is_checked_and_timed(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(lora, "ROUNDS", 1)
    monkeypatch.delitem(lora.CONTENDERS, "bitsandbytes nf4")
    result = lora.run(tmp_path, "cpu", group_size=32)
    assert json.loads((tmp_path / "lora_cpu.json").read_text()) == result
    assert [row["checkpointing"] for row in result["rows"]] == [False, True]
    for row in result["rows"]:
        assert row["ms"].keys() == {"int4", "bf16"} and min(row["ms"].values()) > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore::int4q.Int4SkipWarning")
def test_lora_finds_another_model():
    pytest.importorskip("peft")
    models = [lora.with_adapters("int4", lora.base_model("cpu", 32)) for _ in range(2)]
    x = torch.randn(1, 8, 128).bfloat16()
    lora.check("int4", *models, x)
    for p in models[1].parameters():
        if p.requires_grad:
            p.data.mul_(1.5)
    with pytest.raises(RuntimeError, match="int4: loss .* gradients off by"):
        lora.check("int4", *models, x)
