"""`int4q doctor` says what this machine has."""

import torch

from int4q.cli import main


def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr("int4q.cli.doctor._PACKAGES", {"no-such-package": "pip install it[hf]"})
    main(["doctor"])
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "no-such-package  not installed  pip install it[hf]" in out
    assert "taken: M = 1 " in out and "reference" in out
