"""The how-tos run as they are shown: the Python of each page, from top to bottom, is a program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parent.parent / "docs" / "howto").glob("*.md"))
NEEDS = dict.fromkeys(("checkpoint", "generate", "moe", "save"), "transformers")
NEEDS |= {"tune": "triton", "lora": "peft"}
# Inductor, FSDP2, transformers, the interpreter.
SLOW = ("checkpoint", "compile", "distributed", "generate", "lora", "moe", "save", "tune")
INTERPRETED = {"TRITON_INTERPRET": "1"}  # the page says so: there may be no GPU


def program(page: Path) -> str:
    """The page's Python at its own line numbers, so that a traceback points into the page."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        inside = line == "```python" if fence else inside
        lines.append(line if inside and not fence else "")
    return "\n".join(lines)


def test_every_block_is_python_or_plain():
    assert PAGES
    for page in PAGES:
        opened = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)[::2]
        assert set(opened) <= {"python", ""} and "python" in opened, page


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in PAGES],
)
def test_howto_runs(page, tmp_path, request):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    if page.stem == "webgpu":
        request.getfixturevalue("webgpu")
    script = tmp_path / page.name
    script.write_text(program(page))
    environment = {**os.environ, "INT4Q_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", script.name],
        env=environment | (INTERPRETED if page.stem == "tune" else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
