"""Plans in a file: the same launches, in a process without Python too."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from fake_cuda import as_seen
from planned_op import OP, TWO, named, parts
from torch.utils import cpp_extension

import int4q
from int4q.kernels.core import library, saved
from int4q.kernels.launch import record

_core, _reason = library.load()
pytestmark = pytest.mark.skipif(_core is None, reason=str(_reason))
SOURCE = Path(__file__).with_name("run_saved.cpp")


@pytest.fixture(autouse=True)
def fresh(fake, monkeypatch):
    TWO.use(fake)
    monkeypatch.setattr(library, "unavailable", lambda: None)


@pytest.fixture
def path(tmp_path):
    OP(*parts())
    OP(*parts(3))
    int4q.save_plans(tmp_path / "op.plans")
    assert [p.name for p in tmp_path.iterdir()] == ["op.plans"]
    return tmp_path / "op.plans"


def load(path):
    _core.int4q_core_load.restype = ctypes.c_char_p
    error = _core.int4q_core_load(str(path).encode())
    return error and error.decode()


def run(fake, M=2):
    fake.take()
    x, w = parts(M)
    y = OP(x, w)
    return named(fake.take(), x=x, w=w, w1=w[1:], out=y)


def test_a_process_takes_them_up(fake, path):
    wanted = [run(fake, M) for M in (2, 3)]
    record.clear()
    TWO.runs = 0
    assert load(path) is None
    assert [run(fake, M) for M in (2, 3)] == wanted
    assert TWO.runs == 0
    assert load(path) is None and _core.int4q_core_plans() == 2  # once more changes nothing
    run(fake, 4)
    assert TWO.runs == 1


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("g++") or pytest.skip("no g++")
    path = tmp_path_factory.mktemp("program") / "run_saved"
    command = [compiler, "-std=c++20", "-O0", str(SOURCE), "-o", str(path)]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    for folder in cpp_extension.library_paths():
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, "-ltorch_cpu", "-lc10", "-ldl"], check=True)
    return path


def without_addresses(seen):
    """Launches of any process: which parameters are addresses, the other ones as they are."""

    def of(parameter):
        if len(parameter) == 128:
            return parameter[8:]
        return any(parameter) if len(parameter) == 8 else parameter

    return [s._replace(parameters=tuple(map(of, s.parameters))) for s in seen]


def test_a_process_without_python(fake, path, program):
    def done(M):
        command = [str(program), _core._name, fake.path, str(path), str(M)]
        return subprocess.run(command, capture_output=True, text=True)

    for M in (2, 3):
        fake.take()
        OP(*parts(M))
        assert without_addresses(as_seen(done(M).stdout)) == without_addresses(fake.take())
    failed = done(4)
    assert failed.returncode == 2 and not failed.stdout
    text = "no plan is saved of this call of int4q::test_two_launches, .* shape \\[4, 16\\]"
    assert re.search(text, failed.stderr)


def change(path, word, value):
    data = bytearray(path.read_bytes())
    struct.pack_into("=q", data, 8 * word, value)
    path.write_bytes(data)


def test_a_file_that_is_not_right(path):
    good = path.read_bytes()
    record.clear()
    assert "cannot read" in load(path.with_name("none"))
    change(path, 0, 1)
    assert "not a file of plans" in load(path)
    path.write_bytes(good)
    change(path, 2, int.from_bytes(b"0.0.0", "little"))
    assert "save them again" in load(path)
    for end in range(8, len(good), 8):
        path.write_bytes(good[:end])
        assert load(path), end
    assert _core.int4q_core_plans() == 0
    path.write_bytes(good)
    assert load(path) is None and _core.int4q_core_plans() == 2


def test_nothing_to_save(tmp_path):
    with pytest.raises(RuntimeError, match="make the calls first"):
        int4q.save_plans(tmp_path / "none.plans")
    assert not list(tmp_path.iterdir())


def test_calls_without_a_plan_are_named(tmp_path, monkeypatch):
    OP(*parts())
    monkeypatch.setattr(TWO, "body", lambda x, w: x[:, :4] + 1)
    OP(*parts(5))
    with pytest.warns(saved.PlansWarning, match="test_two_launches"):
        int4q.save_plans(tmp_path / "op.plans")


def test_without_the_core(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda: "switched off")
    with pytest.raises(RuntimeError, match="switched off"):
        int4q.save_plans(tmp_path / "op.plans")
