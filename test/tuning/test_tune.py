"""``int4q.tune``: the search with a stand-in timer, and the table that it writes."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from helpers import run_in_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.importorskip("triton")

    @pytest.mark.slow
    def test_under_the_interpreter():
        """The tests below that run kernels, in a process where the interpreter does."""
        run_in_interpreter(__file__)


import int4q  # noqa: E402
from int4q import tuning  # noqa: E402
from int4q.cli import main  # noqa: E402
from int4q.kernels.triton import (
    tuned,  # noqa: E402
    tuned_table,  # noqa: E402
)
from int4q.kernels.triton.tiles import (  # noqa: E402
    DequantizeConfig,
    MatmulConfig,
    MatvecConfig,
    StreamConfig,
)
from int4q.kernels.triton.tuned_table import Device, Row  # noqa: E402
from int4q.tuning import families  # noqa: E402

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter's process"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache folder and no table in use."""
    monkeypatch.setenv("INT4Q_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("INT4Q_TUNED", raising=False)
    tuned.use(None)
    yield tmp_path / "cache"
    tuned.use(None)


def table(path, rows=None, device="cpu", capability=None, **more):
    """A table for this machine's CPU, which under the interpreter is a device like any other."""
    row = Row("matvec", 1, 64, 128, True, MatvecConfig(2, 128, 8), 1.5, 2.0)
    rows = [row] if rows is None else rows
    return tuned_table.write(path, Device(device, capability), rows, 512, {"date": "today", **more})


# --- the search -----------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Two candidates a kernel, one of which cannot run."""
    candidates = {
        "matmul": [MatmulConfig(32, 16, 32, 4, 2), MatmulConfig(31, 16, 32, 4, 2)],
        "matvec": [MatvecConfig(2, 64, 4), MatvecConfig(3, 64, 4)],
        "dequantize": [DequantizeConfig(2, 64, 4), DequantizeConfig(3, 64, 4)],
    }
    for name, configs in candidates.items():
        family = dataclasses.replace(
            tuning.FAMILIES[name], candidates=lambda place, configs=configs: iter(configs)
        )
        monkeypatch.setitem(tuning.FAMILIES, name, family)
    return {name: configs[0] for name, configs in candidates.items()}


class Timer:
    """Calls each call; then every second kind of call was the faster one: the candidate."""

    def __init__(self, *times):
        self.times, self.results = list(times), []

    def __call__(self, calls):
        self.results += [call() for call in calls]
        return self.times.pop(0)


@interpreted
def test_the_fastest_that_is_right_wins(few, cache):
    lines = []
    # matvec and dequantise at M = 1, then matmul and dequantise + cuBLAS at 4 and at 16 rows
    timer = Timer(9.0, 3.0, 5.0, 4.0, 8.0, 4.0, 7.0, 8.0, 4.0, 2.0)
    path = int4q.tune(
        shapes=[(40, 128)], group_sizes=[64], rows=[1, 4, 16], timer=timer, log=lines.append,
        dtype=torch.float32, device=CPU,
    )  # fmt: skip
    assert not timer.times and path == cache / "tuned-cpu.json"
    content = json.loads(path.read_text())
    assert content["device"] == "cpu" and content["int4q"] == int4q.__version__
    found = tuned.table(CPU)
    assert found.path == path and tuned.source("cpu") == str(path)
    assert found.dequantize_from_m == 16  # 2 against 4 there, 7 against 4 at 4 rows
    assert tuned.matvec_config(40, 128, CPU) == few["matvec"]
    assert tuned.matmul_config(3, 33, 65, CPU, False) == few["matmul"]
    row = found.rows["matvec", 1, 64, 128, True]
    assert (row.us, row.default_us) == (3.0, 9.0)
    # Classes of other shapes, scales and rows keep what ships.
    assert tuned.matvec_config(65, 128, CPU) == tuned.matvec_rule(65, 128)
    assert tuned.matmul_config(4, 40, 128, CPU, True) == tuned.matmul_rule(4, 40, 128, CPU)
    assert any("left out" in line for line in lines)


@interpreted
def test_what_ships_stays_unless_beaten_by_the_margin(few):
    timer = Timer(100.0, 99.0)
    path = int4q.tune(
        shapes=[(40, 128)], group_sizes=[64], rows=[1], kernels=["matvec"], timer=timer,
        log=lambda line: None, device=CPU,
    )  # fmt: skip
    assert json.loads(path.read_text())["rows"] == []


@interpreted
def test_a_class_takes_the_mean_of_its_shapes(few):
    """Twice as slow on one shape and 2.5 times as fast on the other: faster on the whole."""
    timer = Timer(10.0, 20.0, 10.0, 4.0)
    int4q.tune(
        shapes=[(40, 128), (50, 128)], group_sizes=[64], rows=[1], kernels=["matvec"], timer=timer,
        log=lambda line: None, device=CPU,
    )  # fmt: skip
    row = tuned.table(CPU).rows["matvec", 1, 64, 128, True]
    assert row.us == pytest.approx(80**0.5, abs=1e-3) and row.default_us == 10.0


@interpreted
def test_a_wrong_result_is_never_timed(few, monkeypatch):
    """A kernel that answers wrongly is refused with its error, and nothing is written."""
    family = tuning.FAMILIES["matvec"]
    wrong = dataclasses.replace(family, call=lambda *args: family.call(*args) * 1.1)
    monkeypatch.setitem(tuning.FAMILIES, "matvec", wrong)
    lines = []
    with pytest.raises(ValueError, match=r"one of \('matvec',\) must run on cpu"):
        int4q.tune(
            shapes=[(40, 128)], group_sizes=[64], rows=[1], kernels=["matvec"], timer=Timer(),
            log=lines.append, device=CPU,
        )  # fmt: skip
    assert any("wrong: relative error 0.1" in line for line in lines)


@interpreted
def test_shapes_of_a_model(few):
    from int4q import Int4WeightOnlyConfig, quantize_

    model = torch.nn.Sequential(torch.nn.Linear(128, 48), torch.nn.Linear(48, 8))
    with pytest.raises(ValueError, match="4-bit weights"):
        int4q.tune(model, device=CPU)
    with pytest.warns(int4q.Int4SkipWarning):
        quantize_(model, Int4WeightOnlyConfig(group_size=32))
    timer = Timer(9.0, 3.0)
    int4q.tune(model, rows=[1], kernels=["matvec"], timer=timer, log=lambda line: None, device=CPU)
    assert list(tuned.table(CPU).rows) == [("matvec", 1, 64, 128, True)]


@interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would tune the GPU")
def test_the_command(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tuning.tune.__kwdefaults__, "timer", Timer(5.0, 1.0))
    sets = {"core": [int4q.bench.shapes.Shape(16, 64, "small")]}
    monkeypatch.setattr("int4q.tuning.command.SETS", sets)
    out = tmp_path / "table.json"
    main(["tune", "--groups", "32", "--rows", "1", "--kernels", "matvec", "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert tuned.source("cpu") == str(out)


@interpreted
@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"kernels": ["blas"]}, "kernels must be out of"),
        ({"rows": [0]}, "rows must be positive"),
        ({"rows": []}, "rows must be positive"),
        ({"shapes": [(8, 100)]}, "multiple of a group size"),
        ({"shapes": [(8, 128)], "group_sizes": [48]}, "multiple of a group size"),
        ({"shapes": []}, "needs shapes"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        int4q.tune(**arguments, device=CPU)


@interpreted
def test_bad_dtype():
    with pytest.raises(TypeError, match="dtype must be bfloat16"):
        int4q.tune(dtype=torch.float64, device=CPU)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter may tune")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="tune needs a CUDA device"):
        int4q.tune(device="cpu")


# --- candidates -------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [2, 9, 16, 33, 128, 257, 4096])
def test_candidates_fit_and_differ(M):
    place = families.Place(M, 4096, 4096, 101376, 100)
    small = list(families.matmul_candidates(place))
    assert 8 <= len(small) == len(set(small)) <= 150
    big = list(families.stream_candidates(dataclasses.replace(place, shared=232448, sms=132)))
    assert 4 <= len(big) == len(set(big)) <= 60
    for c in big:
        assert c.num_stages * (c.block_n * c.block_k // 2 + c.block_m * c.block_k * 2) <= 232448


# --- the table ------------------------------------------------------------------------------------


def test_every_config_survives_the_file(tmp_path):
    rows = [
        Row("stream", 64, 4096, 4096, False, StreamConfig(128, 64, 256, 8, 4, 132), 1.0, 2.0),
        Row("stream", 32, 4096, 4096, True, StreamConfig(64, 32, 256, 4, 3, max_registers=128),
            1.0, 2.0),
        Row("matmul", 64, 4096, 4096, True, MatmulConfig(64, 64, 64, 4, 3, 2), 1.0, 2.0),
        Row("matvec", 1, 4096, 4096, True, MatvecConfig(4, 256, 4), 1.0, 2.0),
        Row("dequantize", 0, 4096, 4096, True, DequantizeConfig(8, 256, 4), 1.0, 2.0),
    ]  # fmt: skip
    read = tuned_table.read(table(tmp_path / "t.json", rows, "a GPU", (9, 0)))
    assert list(read.rows.values()) == rows and read.device == Device("a GPU", (9, 0))
    assert read.dequantize_from_m == 512
    assert not list(tmp_path.glob("*.part"))


def test_the_cache_folder_is_read_at_the_first_call(cache):
    table(cache / "tuned-cpu.json")
    assert tuned.matvec_config(64, 128, CPU) == MatvecConfig(2, 128, 8)
    assert tuned.source("cpu") == str(cache / "tuned-cpu.json")
    assert tuned.matvec_config(64, 128) == tuned.matvec_rule(64, 128)  # no device, no table


def test_without_a_table_the_built_in_tiles():
    assert tuned.source("cpu") == "built-in"
    assert tuned.matvec_config(64, 128, CPU) == tuned.matvec_rule(64, 128)


def test_the_variable_names_a_table(monkeypatch, tmp_path):
    monkeypatch.setenv("INT4Q_TUNED", str(table(tmp_path / "mine.json")))
    tuned.use(None)
    assert tuned.source("cpu") == str(tmp_path / "mine.json")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": 2}',
        '{"format": 1}',
        {"device": 7},
        {"capability": [9]},
        {"capability": [9, "0"]},
        {"dequantize_from_m": 0},
        {"rows": [{}]},
        {"kernel": "blas"},
        {"M": 3},
        {"light": 1},
        {"config": {"block_n": 2}},
        {"config": {"block_n": 3, "block_h": 128, "num_warps": 8}},
        {"config": {"block_n": True, "block_h": 128, "num_warps": 8}},
        {"config": {"block_n": 2, "block_h": 128, "num_warps": 8, "stages": 2}},
    ],
    ids=str,
)
def test_a_broken_file_is_never_used(content, cache, monkeypatch):
    path = table(cache / "tuned-cpu.json")
    if isinstance(content, dict):
        whole = json.loads(path.read_text())
        target = whole if set(content) <= set(whole) else whole["rows"][0]
        target.update(content)
        content = json.dumps(whole)
    path.write_text(content)
    with pytest.raises(ValueError, match="must be a table that int4q.tune"):
        tuned.use(path)
    tuned.use(None)
    with pytest.warns(UserWarning, match="built-in tiles"):
        assert tuned.source("cpu") == "built-in"
    monkeypatch.setenv("INT4Q_TUNED", str(path))
    tuned.use(None)
    with pytest.raises(ValueError, match="must be a table that int4q.tune"):
        tuned.source("cpu")


def test_a_table_of_another_device_is_never_used(cache, monkeypatch):
    path = table(cache / "tuned-cpu.json", device="another", capability=(8, 6))
    with pytest.warns(UserWarning, match="must be of"):
        assert tuned.source("cpu") == "built-in"
    with pytest.raises(ValueError, match="Run int4q tune on this machine"):
        tuned.use(path)
    monkeypatch.setenv("INT4Q_TUNED", str(path))
    tuned.use(None)
    with pytest.raises(ValueError, match="INT4Q_TUNED"):
        tuned.source("cpu")


def test_plans_and_routes_are_forgotten_with_the_table(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tuned, "_changed", [*tuned._changed, lambda: calls.append(1)])
    tuned.use(table(tmp_path / "t.json"))
    tuned.use(None)
    assert calls == [1, 1]


def test_dequantise_from_follows_the_capability(monkeypatch, tmp_path):
    """A table moves the crossover only of problems on its own kind of device."""
    found = tuned_table.read(table(tmp_path / "t.json", [], "a GPU", (8, 6)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuned, "table", lambda device: found)
    assert tuned.dequantize_from_m((8, 6)) == 512
    assert tuned.dequantize_from_m((9, 0)) == tuned.DEQUANTIZE_FROM_M
    assert tuned.dequantizes(512, 4096, 4096, (8, 6)) and not tuned.dequantizes(512, 4096, 4096)
