"""scripts/compare_finetuning.py: which runs there are, and where each of them runs."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from finetuning_runs import write
from pretraining_runs import ROOT

from training.flags import run_door

sys.path.insert(0, str(ROOT / "scripts"))

import compare_finetuning  # noqa: E402  (scripts, found through the line above)
import run_processes  # noqa: E402


@pytest.fixture(autouse=True)
def inputs(tmp_path_factory, monkeypatch) -> Path:
    """What the runs would read, empty, in the folder that flags and their defaults are looked up in."""
    home = tmp_path_factory.mktemp("inputs")
    for name in ("train.tsv", "dev.tsv"):
        write(home / "data" / "glue" / "SST-2-shaped" / name, "")
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        write(home / "data" / "squad" / name, "")
    (home / "model").mkdir()
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 0, [{}]), (None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("", 0, [{}]), ("5,-1,3", 1, ["5"])],
)
def test_places_are_the_gpus_that_are_visible(visible, count, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert run_processes.gpu_places() == [x if x == {} else {"CUDA_VISIBLE_DEVICES": x} for x in expected]


def test_runs_are_dealt_out_to_the_gpus_and_their_scores_make_the_table(tmp_path, monkeypatch, capsys):
    started, running, most = [], set(), []

    class Started:
        def __init__(self, command, place, log):
            self.output = Path(command[command.index("--output_dir") + 1])
            self.seed, self.squad = int(command[command.index("--seed") + 1]), "squad" in command[1]
            started.append((place["CUDA_VISIBLE_DEVICES"], self.seed, "--add_lora" in command))
            self.polls = 3
            running.add(self.output)

        def poll(self):
            most.append(len(running))
            self.polls -= 1
            if self.polls > 0:
                return None
            score = {"exact_match": 70 + self.seed, "f1": 80 + self.seed}
            score = score if self.squad else {"accuracy": 0.5 + self.seed / 10}
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "eval_results.json").write_text(json.dumps({"metrics": score}))
            running.discard(self.output)
            return 0

    monkeypatch.setattr(run_processes, "start", Started)
    monkeypatch.setattr(compare_finetuning, "gpu_places", lambda: [{"CUDA_VISIBLE_DEVICES": name} for name in "25"])
    words = ["--init_checkpoint", "model", "--output_dir", str(tmp_path), "--seeds", "0,2", "--parallel", "4"]
    monkeypatch.setattr(sys, "argv", ["compare_finetuning.py", *words, "--tasks", "SST-2-shaped", "SQuAD"])
    compare_finetuning.main()
    assert sorted(place for place, *_ in started) == ["2"] * 6 + ["5"] * 6 and max(most) == 4
    assert sum(adapters for *_, adapters in started) == 4
    text = (tmp_path / "table.md").read_text()
    assert "| dense | 60.00 ± 14.14 | 71.00 ± 1.41 | 81.00 ± 1.41 |" in text
    assert text.strip() in capsys.readouterr().out
    compare_finetuning.main()
    assert len(started) == 12, "finished runs are not run again"


def run_one(monkeypatch, tmp_path, started) -> int:
    """The exit code of a comparison of one task and seed, whose processes are `started`."""
    monkeypatch.setattr(run_processes, "start", started)
    monkeypatch.setattr(compare_finetuning, "gpu_places", lambda: [{}])
    words = ["--init_checkpoint", "model", "--output_dir", str(tmp_path), "--seeds", "0", "--tasks", "SST-2-shaped"]
    monkeypatch.setattr(sys, "argv", ["compare_finetuning.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_door(compare_finetuning.main)
    return ended.value.code


def test_a_run_that_fails_is_named_with_its_last_line(monkeypatch, tmp_path, capsys):
    class Failed:
        def __init__(self, command, place, log):
            log.parent.mkdir(parents=True)
            log.write_text("begun\nout of memory\n")

        def poll(self) -> int:
            return 1

    assert run_one(monkeypatch, tmp_path, Failed) == 2
    said = capsys.readouterr().err
    assert "error: SST-2-shaped, dense, seed 0: did not finish (out of memory); see " in said and said.count("\n") == 1


def test_a_stop_is_said_and_leaves_no_table(monkeypatch, tmp_path):
    class Stopped:
        def __init__(self, command, place, log):
            os.kill(os.getpid(), signal.SIGTERM)

        def send_signal(self, number: int) -> None:
            pass

        def poll(self) -> int:
            return 0

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        assert run_one(monkeypatch, tmp_path, Stopped) == "stopped; the same command goes on"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("model", "--init_checkpoint {home}/model: no such file or folder"),
        (
            "data/glue/SST-2-shaped/dev.tsv",
            "--glue_dir {home}/data/glue/SST-2-shaped: must be the folder of SST-2-shaped",
        ),
        ("data/glue", "--glue_dir {home}/data/glue/SST-2-shaped: must be the folder of SST-2-shaped"),
        ("data/squad/dev-v1.1.json", "--squad_dir {home}/data/squad: holds no dev-v1.1.json"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(missing, said, inputs, monkeypatch, capsys):
    (inputs / missing).rename(inputs / "elsewhere")
    words = ["--init_checkpoint", "model", "--output_dir", "out", "--tasks", "SST-2-shaped", "SQuAD"]
    monkeypatch.setattr(sys, "argv", ["compare_finetuning.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_door(compare_finetuning.main)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert said.format(home=inputs.resolve()) in line
    assert not (inputs / "out").exists()


@pytest.mark.parametrize("seeds", ["0,0", "a,b", ""])
def test_wrong_seeds_are_one_line(monkeypatch, tmp_path, seeds, capsys):
    words = ["--init_checkpoint", "model", "--output_dir", str(tmp_path), "--seeds", seeds]
    monkeypatch.setattr(sys, "argv", ["compare_finetuning.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_door(compare_finetuning.main)
    assert ended.value.code == 2 and f"--seeds {seeds}: must be different whole numbers" in capsys.readouterr().err
