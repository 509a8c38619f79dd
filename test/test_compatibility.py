"""The matrix of compatibility: every test that it names exists; results become a table."""

import ast
import importlib.util
import json
import sys

import pytest
from helpers import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def compatibility():
    spec = importlib.util.spec_from_file_location("compatibility", DOCS / "compatibility.py")
    module = sys.modules["compatibility"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compatibility"]


def scenarios():
    """(file without suffix, name of the test) of every scenario."""
    areas = json.loads((DOCS / "compatibility.json").read_text())
    return [(file, test) for files in areas.values() for file, of in files.items() for test in of]


def test_every_scenario_is_tested_and_on_the_page():
    page = (DOCS / "compatibility.md").read_text()
    for file, test in scenarios():
        tree = ast.parse((ROOT / "test" / f"{file}.py").read_text())
        assert test.partition("[")[0] in {n.name for n in tree.body if hasattr(n, "name")}
        assert f"`{file}::{test}`" in page


def results(path, versions, cases):
    lines = [f'<property name="{n}" value="{v}"/>' for n, v in versions.items()]
    lines = ["<testsuite><properties>", *lines, "</properties>"]
    for name, inside in cases:
        lines.append(f'<testcase classname="test.a.test_b" name="{name}">{inside}</testcase>')
    path.write_text("\n".join([*lines, "</testsuite>"]))
    return path


def test_results_become_a_table(compatibility, tmp_path, monkeypatch):
    given = {"torch": {"a/test_b": {"test_x": "X", "test_y": "Y", "test_z[1]": "Z"}}}
    (tmp_path / "s.json").write_text(json.dumps(given))
    monkeypatch.setattr(compatibility, "SCENARIOS", tmp_path / "s.json")
    old = [("test_x[a]", ""), ("test_x[b]", "<failure/>"), ("test_z[1]", '<skipped type="x"/>')]
    new = [("test_x[a]", ""), ("test_x[gpu]", '<skipped type="pytest.skip"/>')]
    more = [("test_y", '<skipped type="pytest.xfail"/>')]
    paths = [
        results(tmp_path / "old.xml", {"torch": "1"}, old),
        results(tmp_path / "new.xml", {"torch": "2"}, new),
        results(tmp_path / "more.xml", {"torch": "2", "hypothesis-statistics": "x"}, more),
    ]
    text = compatibility.page(compatibility.columns(paths))
    assert "| Scenario | torch 1 | torch 2 | Test |" in text
    assert "| X | **fails** | yes | `a/test_b::test_x` |" in text
    assert "| Y | not run | **no** | `a/test_b::test_y` |" in text
    assert "| Z | not run | not run | `a/test_b::test_z[1]` |" in text
    with pytest.raises(ValueError, match=r"no file of results has a/test_b::test_y"):
        compatibility.page(compatibility.columns(paths[:1]))
