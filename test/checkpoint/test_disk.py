"""`int4q quantize` on a disk that is full, and where it may not write."""

import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from checkpoints import contents, llama  # noqa: E402

from int4q.checkpoint.plan import Plan  # noqa: E402
from int4q.checkpoint.quantizing import Options, plan_quantize  # noqa: E402
from int4q.checkpoint.source import Source  # noqa: E402
from int4q.checkpoint.stream import run  # noqa: E402

SIZE = 1 << 20
NOBODY = 65534


@pytest.fixture
def plan(tmp_path) -> Plan:
    made, _ = plan_quantize(Source(llama(tmp_path / "model")), Options(group_size=32))
    assert made.nbytes < SIZE // 2
    return made


@pytest.fixture
def disk(tmp_path) -> Path:
    """A file system of ``SIZE`` bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take all the room that is left."""
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_full_disk(plan, disk, tmp_path, when):
    target, ballast = disk / "int4", disk / "ballast"
    filled = []

    def progress(read, total):
        """Fill the disk after the first weight: what follows finds no room to be written."""
        if not filled:
            filled.append(read < total)
            fill(ballast)

    if when == "before":
        fill(ballast)
    with pytest.raises(OSError, match="GB are free|No space left") as failed:
        run(plan, target, progress=progress, max_shard_size="40KB", sync_bytes=0)
    assert failed.value.errno == errno.ENOSPC and not target.exists()
    assert filled == ([] if when == "before" else [True])
    ballast.unlink()
    run(plan, target, max_shard_size="40KB")
    run(plan, tmp_path / "undisturbed", max_shard_size="40KB")
    assert contents(target) == contents(tmp_path / "undisturbed")
    assert os.listdir(disk) == ["int4"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_folder_that_may_not_be_written(plan):
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to other users
        folder = Path(name)
        folder.chmod(0o555)
        if (child := os.fork()) == 0:
            code = 0
            try:
                if os.getuid() == 0:  # whom no mode stops
                    os.setuid(NOBODY)
                torch.set_num_threads(1)
                run(plan, folder / "int4")
            except OSError as error:
                code = error.errno if str(error.filename).startswith(name) else 1
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == errno.EACCES
        assert os.listdir(folder) == []
