"""What the data stages share: files are whole or not there, and worker processes end well or in one line."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from data import stages
from data.stages import atomic_path, check_folders, run_tasks
from training.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
SLEEPERS = "import time; from data.stages import run_tasks; run_tasks(time.sleep, [60] * 4, [1] * 4, 2, 'asleep')"


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_only_folders_that_are_there_or_can_be_made_may_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    check_folders("--output", tmp_path, tmp_path / "new" / "folder", Path("relative"))
    for name in ("file", "dangling"):
        for folder in (tmp_path / name, tmp_path / name / "below" / "it"):
            with pytest.raises(UsageError, match=f"--output: {tmp_path / name} is no folder: give a folder"):
                check_folders("--output", tmp_path, folder)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}

    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    check_folders("--output", tmp_path)  # nothing may be left to write in it
    with pytest.raises(UsageError, match=f"--output: {tmp_path} may not be written: give a folder"):
        check_folders("--output", tmp_path / "new" / "folder")


@pytest.mark.parametrize("nproc", [1, 2])
def test_results_come_in_the_order_of_the_tasks(nproc):
    assert run_tasks(math.factorial, [5, 3, 4, 0], [1] * 4, nproc, "factorials") == [120, 6, 24, 1]


def _refuse_zero(number: int) -> int:
    if number == 0:
        raise UsageError("zero")
    return number


@pytest.mark.parametrize(("last", "left"), [(1, "testing: 100%"), (0, "")])
def test_a_bar_stays_where_work_is_done_and_is_wiped_away_where_it_fails(monkeypatch, capsys, last, left):
    # every update is drawn, and at once
    monkeypatch.setattr(stages, "tqdm", lambda **kw: tqdm(**kw | {"delay": 0, "mininterval": 0, "miniters": 1}))
    try:
        run_tasks(_refuse_zero, [1, last], [1, 1], 1, "testing")
    except UsageError:
        assert last == 0
    drawn = capsys.readouterr().err
    assert "testing: " in drawn
    *_, line = drawn.rstrip("\r").split("\r")
    assert line.strip().startswith(left) and bool(line.strip()) == bool(left)
    assert drawn.endswith("\n" if left else "\r")


def test_a_process_that_dies_is_one_line_and_not_a_hang():
    with pytest.raises(UsageError, match="one of 2 processes died.*smaller --nproc") as error:
        run_tasks(os._exit, [1, 1, 1], [1] * 3, 2, "dying")
    assert "\n" not in str(error.value)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_end_when_their_parent_is_killed():
    with subprocess.Popen([sys.executable, "-c", SLEEPERS], cwd=ROOT, stderr=subprocess.DEVNULL) as parent:
        deadline = time.monotonic() + 30
        while len(workers := _children(parent.pid)) < 3 and time.monotonic() < deadline:  # two, and a resource tracker
            time.sleep(0.1)
        time.sleep(1)  # a worker that has begun watches its parent
        parent.send_signal(signal.SIGKILL)
    while any(_is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) >= 2
    assert not [worker for worker in workers if _is_running(worker)]
