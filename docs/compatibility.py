"""Writes docs/compatibility.md: which scenario works with which versions, from test results.

    pytest test/integrations ... --junitxml=new.xml  # once for each set of versions
    python docs/compatibility.py old.xml new.xml

A scenario works where every one of its tests passed. The versions are the properties that
test/conftest.py writes. A scenario without a test in any of the files is an error.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

PAGE = Path(__file__).with_name("compatibility.md")
SCENARIOS = Path(__file__).with_name("compatibility.json")
"""Area -> test file -> test, or one case of it -> what it shows."""
MARKS = {"passed": "yes", "xfailed": "**no**", "failed": "**fails**", "skipped": "not run"}


@dataclass
class Run:
    """One file of results.

    Attributes:
        versions: package -> version.
        outcomes: test's name, as ``checkpoint/test_files::test_x[case]`` -> outcome.
    """

    versions: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    def outcome(self, test: str) -> str | None:
        """The worst outcome of a test's cases; ``None`` if it was not run."""
        pattern = re.compile(re.escape(test) + ("" if test.endswith("]") else r"(\[.*\])?"))
        found = {o for name, o in self.outcomes.items() if pattern.fullmatch(name)}
        found -= {"skipped"} if len(found) > 1 else set()  # cases for other devices
        return next((o for o in ("failed", "xfailed", "passed", "skipped") if o in found), None)


def read(path: Path) -> Run:
    """The results in a file that pytest's ``--junitxml`` wrote."""
    run = Run()
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        for item in suite.iter("property"):
            if not item.attrib["name"].startswith("hypothesis"):  # (which writes its own)
                run.versions[item.attrib["name"]] = item.attrib["value"]
        for case in suite.iter("testcase"):
            file = case.attrib["classname"].replace(".", "/").removeprefix("test/")
            run.outcomes[f"{file}::{case.attrib['name']}"] = _outcome(case)
    return run


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    return "xfailed" if skipped.attrib.get("type") == "pytest.xfail" else "skipped"


def columns(paths: list[Path]) -> list[Run]:
    """The results by versions: files of the same versions are one run."""
    runs: list[Run] = []
    for run in map(read, paths):
        same = next((r for r in runs if r.versions == run.versions), None)
        if same is None:
            runs.append(run)
        else:
            same.outcomes |= run.outcomes
    return runs


def page(runs: list[Run]) -> str:
    """The page's Markdown.

    Raises:
        ValueError: no run has a test of some scenario.
    """
    lines = [
        "# What works with what",
        "",
        "Each column is a set of versions under which the tests were run, on the CPU; `yes` stands",
        "where every case of the test passed. Written by `docs/compatibility.py` from pytest's",
        "results.",
    ]
    for area, files in json.loads(SCENARIOS.read_text()).items():
        heads = [", ".join(f"{n} {r.versions[n]}" for n in _named(area, r)) for r in runs]
        lines += ["", f"## {area}", "", f"| Scenario | {' | '.join(heads)} | Test |"]
        lines.append("|---" * (len(runs) + 2) + "|")
        for file, tests in files.items():
            for test, scenario in tests.items():
                outcomes = [run.outcome(f"{file}::{test}") for run in runs]
                if not any(outcomes):
                    raise ValueError(f"no file of results has {file}::{test}")
                marks = " | ".join(MARKS[o or "skipped"] for o in outcomes)
                lines.append(f"| {scenario} | {marks} | `{file}::{test}` |")
    return "\n".join(lines) + "\n"


def _named(area: str, run: Run) -> list[str]:
    """Packages that a table's head names, of those that a run has."""
    names = {
        "transformers": ["transformers"],
        "many GPUs": ["transformers"],
        "other formats": ["transformers"],
        "peft": ["transformers", "peft"],
    }.get(area, [area])
    return [n for n in dict.fromkeys(("torch", "torchao", *names)) if n in run.versions]


if __name__ == "__main__":
    PAGE.write_text(page(columns([Path(path) for path in sys.argv[1:]])))
