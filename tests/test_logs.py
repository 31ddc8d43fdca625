"""The logs of a run: the table of metrics, JSON lines, TensorBoard, the text log, the progress bar; by rank 0 alone."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
from pretraining_runs import begin_ranks, begin_run, kill_after, losses, metrics, run

from optimization import learning_rate
from training.logs import Logger

COLUMNS = ["step", "step_loss", "learning_rate", "sequences_per_second"]
ROW = {"step_loss": 1 / 3, "learning_rate": 1e-3, "sequences_per_second": 8.0}


def json_lines(path: Path) -> list[dict]:
    lines = path.read_text().splitlines()
    assert all(line.startswith("DLLL ") for line in lines)
    return [json.loads(line.removeprefix("DLLL ")) for line in lines]


# ------------------------------------------------------------------------------------------------------------- the CSV
def test_the_columns_begin_as_documented(whole_run):
    header = (whole_run / "logfile_metrics.csv").read_text().splitlines()[0]
    assert header.startswith("step,epoch,step_loss,average_loss,learning_rate,")
    assert [int(row["step"]) for row in metrics(whole_run)] == list(range(1, 21))


def test_what_the_columns_say(whole_run):
    rows = metrics(whole_run)
    total = 0.0
    for step, row in enumerate(rows, start=1):
        total += float(row["step_loss"])
        assert float(row["step_loss"]) == float(row["mlm_loss"]) + float(row["nsp_loss"])
        assert float(row["average_loss"]) == total / step
        assert int(row["epoch"]) == (step * 12 - 1) // 63  # 63 samples, 12 a step
        rate = learning_rate(step, base=4e-3, total_steps=20, warmup_proportion=0.01, decay="poly")
        assert float(row["learning_rate"]) == rate
        assert row["adapters"] == str(int(step >= 15))
        assert float(row["sequences_per_second"]) > 0 and float(row["tokens_per_second"]) > 0


def test_an_epoch_ends_with_its_last_sample(files, tmp_path):
    run(files.flags(tmp_path, global_batch_size=63, local_batch_size=21, max_steps=2))
    assert [row["epoch"] for row in metrics(tmp_path)] == ["0", "1"]


def test_numbers_are_at_full_precision(whole_run):
    for row in metrics(whole_run):
        for name in ("step_loss", "average_loss", "learning_rate"):
            assert row[name] == repr(float(row[name]))
    assert max(len(row["step_loss"]) for row in metrics(whole_run)) > 15


def test_heldout_columns_are_filled_where_it_was_evaluated(whole_run):
    filled = [int(row["step"]) for row in metrics(whole_run) if row["heldout_mlm_loss"]]
    assert filled == [10, 20]
    assert all(0 <= float(metrics(whole_run)[step - 1]["heldout_mlm_accuracy"]) <= 1 for step in filled)


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(files, whole_run, tmp_path):
    assert begin_run(files.flags(tmp_path), kill_after(8)).finish().code == -9
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 9))
    run(files.flags(tmp_path))
    assert losses(tmp_path) == losses(whole_run)
    assert [row["average_loss"] for row in metrics(tmp_path)] == [row["average_loss"] for row in metrics(whole_run)]
    steps = [line["step"][0] for line in json_lines(tmp_path / "logfile.json") if line["step"] != "PARAMETER"]
    assert steps == list(range(1, 21))  # each step once


def test_rows_that_a_crash_cut_or_garbled_are_dropped(tmp_path):
    path = tmp_path / "log_metrics.csv"
    path.write_text("step,step_loss,learning_rate,sequences_per_second\n1,0.5,0.1,8\n2,0.4,0.1,8\n,\n3x,\n")
    Logger(tmp_path, "log", COLUMNS, resume_step=5).close()
    assert [row["step"] for row in metrics(tmp_path, "log")] == ["1", "2"]
    path.write_text("another,table\n1,2\n")
    Logger(tmp_path, "log", COLUMNS, resume_step=5).close()
    assert path.read_text().splitlines() == [",".join(COLUMNS)]


def test_a_column_that_does_not_exist_is_an_error(tmp_path):
    logger = Logger(tmp_path, "log", COLUMNS, resume_step=0)
    with pytest.raises(ValueError, match="loss"):
        logger.step(1, ROW | {"loss": 1.0})
    logger.close()


# ---------------------------------------------------------------------------------------------------------- JSON lines
def test_json_lines_that_dllogger_tools_read(whole_run):
    first, *steps = json_lines(whole_run / "logfile.json")
    assert first["step"] == "PARAMETER" and first["data"]["learning_rate"] == 4e-3
    assert [line["step"] for line in steps] == [[step] for step in range(1, 21)]
    for line, row in zip(steps, metrics(whole_run), strict=True):
        assert {"timestamp", "datetime", "elapsedtime", "type", "step", "data"} == set(line)
        assert line["type"] == "LOG"
        assert {name: repr(value) for name, value in line["data"].items()} == {
            name: row[name] for name in row if name != "step" and row[name]
        }


DLLOGGER = """
class Verbosity:
    VERBOSE = 1

class JSONStreamBackend:
    def __init__(self, verbosity, filename, append=False):
        self.file = open(filename, "a" if append else "w")

class Logger:
    def __init__(self, backends):
        self.backends = backends

    def log(self, step, data, verbosity=1):
        print("dllogger", repr(step), data.get("step_loss"), file=self.backends[0].file)

    def flush(self):
        self.backends[0].file.flush()
"""


def prepend_to_path(folder: Path) -> None:
    sys.path.insert(0, str(folder))


def test_dllogger_itself_is_used_where_the_machine_has_it(files, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "dllogger.py").write_text(DLLOGGER)
    prepare = functools.partial(prepend_to_path, tmp_path / "packages")
    run(files.flags(tmp_path, max_steps=2), prepare)
    (_, loss_1), (_, loss_2) = losses(tmp_path)
    lines = (tmp_path / "logfile.json").read_text().splitlines()
    assert lines == ["dllogger 'PARAMETER' None", f"dllogger (1,) {loss_1}", f"dllogger (2,) {loss_2}"]


def test_a_placeholder_of_that_name_is_not(files, tmp_path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "dllogger.py").write_text('"""Nothing here."""\n')
    run(files.flags(tmp_path, max_steps=2), functools.partial(prepend_to_path, tmp_path / "packages"))
    assert len(json_lines(tmp_path / "logfile.json")) == 3


# -------------------------------------------------------------------------------------------------------------- others
def test_tensorboard_has_every_step(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole_run / "tensorboard")).Reload()
    scalars = events.Scalars("step_loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 21))
    assert [scalar.value for scalar in scalars] == pytest.approx([float(loss) for _, loss in losses(whole_run)])
    assert [scalar.step for scalar in events.Scalars("heldout_mlm_loss")] == [10, 20]


def test_the_text_log_tells_the_run(whole_run):
    text = (whole_run / "logfile.txt").read_text()
    for words in (
        '"learning_rate": 0.004',
        "63 sequences of 16 tokens",
        "static-weight: 9 linear layers pruned",
        "density of W^R 0.5000",
        "adapters of rank 4 join before step 15",
        "adapters of rank 4 joined before step 15",
        "finished: step 20",
    ):
        assert text.count(words) == 1, words


def test_a_log_prefix_names_all_files(files, tmp_path):
    run(files.flags(tmp_path, max_steps=2, log_prefix="phase1_log"))
    named = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert named == {".lock", "phase1_log.txt", "phase1_log.json", "phase1_log_metrics.csv"}


def test_the_progress_bar_shows_loss_rate_and_speed_and_can_be_turned_off(files, tmp_path):
    flags = files.flags(tmp_path / "with", max_steps=3, disable_progress_bar=None)
    shown = run(flags).stderr
    assert "3/3" in shown and "loss=" in shown and "lr=" in shown and "seq/s=" in shown
    shown = run([*files.flags(tmp_path / "without", max_steps=3, disable_progress_bar=None), "--disable_progress_bar"])
    assert "loss=" not in shown.stderr and "finished: step 3" in shown.stderr


def test_rank_0_alone_writes(files, tmp_path):
    first, second = (rank.finish() for rank in begin_ranks(files.flags(tmp_path, max_steps=3), 2))
    assert (first.code, second.code) == (0, 0)
    assert "finished: step 3" in first.stderr
    assert second.stderr == "" and second.stdout == ""
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3]
    assert len(json_lines(tmp_path / "logfile.json")) == 4
    assert (tmp_path / "logfile.txt").read_text().count("finished") == 1
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
