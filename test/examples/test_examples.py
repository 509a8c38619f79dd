"""The examples run as they are shown."""

import runpy
import sys

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
