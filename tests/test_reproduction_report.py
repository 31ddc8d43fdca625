"""scripts/reproduction_report.py: the table from logs, what it says about them, and documents that cannot take it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from finetuning_runs import write
from pretraining_runs import ROOT
from reproduction_calls import call, report_rows, settings
from reproduction_report import (  # scripts, found through reproduction_calls
    MARKERS,
    Summary,
    expected_density,
    read_runs,
)
from reproduction_runs import PREFIX, RECIPES, Settings


# ----------------------------------------------------------------------------------------------------------- the report
def write_log(output: Path, name: str, losses: list[float], last: int | None = None, **columns) -> None:
    """A log of steps of 2 sequences and 100 tokens in half a second each, evaluated at every second step."""
    lines = ["step,mlm_loss,sequences_per_second,tokens_per_second,adapters,heldout_mlm_loss,peak_memory_gb"]
    for step, loss in enumerate(losses[:last], 1):
        values = {"sequences": 4, "tokens": 200, "adapters": 0, "memory": 8} | columns
        heldout = "" if step % 2 else loss
        lines.append(
            f"{step},{loss},{values['sequences']},{values['tokens']},{values['adapters']},{heldout},{values['memory']}"
        )
    write(output / name / f"{PREFIX}_metrics.csv", "\n".join(lines) + "\n")


@pytest.fixture
def logged(tmp_path) -> Path:
    """60 steps of dense, of SLoPe twice as fast in half the memory, and 40 of a third run."""
    falling = [8 - step / 10 for step in range(1, 61)]
    content = asdict(settings(global_batch_size=2, sequences=30, epochs=20))
    write(tmp_path / "settings.json", json.dumps(content))
    write_log(tmp_path, "dense", falling)
    slope = [loss + 0.2 for loss in falling]
    slope[55] += 3
    write_log(tmp_path, "slope", slope, sequences=8, tokens=400, memory=4)
    write_log(tmp_path, "lazy_1", falling, last=40)
    return tmp_path


def test_the_table_is_made_from_logs(logged, capsys):
    rows = report_rows(logged, capsys)
    assert rows["steps"] == ["60", "60", "40 of 60"]
    assert rows["tokens seen, millions"] == ["0.0", "0.0", "0.0"]
    assert rows["held-out MLM loss, last"] == ["2.000", "2.200", "4.000"]
    assert rows["held-out MLM loss, last, above dense"] == ["", "+0.200", ""]
    assert rows["held-out MLM loss, best"] == ["2.000 (step 60)", "2.200 (step 60)", "4.000 (step 40)"]
    # SLoPe's step 56, 5.6, against the middle of steps 36 to 55, 3.65; an even fall of 0.1 a step lies 1.05 below.
    assert rows["largest rise of a step's MLM loss over the median of 20 before"] == ["-1.050", "1.950", "-1.050"]
    assert rows["tokens/s, median step without adapters, against dense"] == ["x1.00", "x2.00", "x1.00"]
    assert rows["peak memory, against dense"] == ["x1.00", "x0.50", "x1.00"]
    assert rows["time of all steps, s"] == ["30", "15", "20"]
    assert not any("with adapters" in label and "tokens" in label for label in rows)  # no run has a step with any


def test_the_report_says_what_is_to_be_explained_and_what_is_unfinished(logged):
    assert call(["--report", "--output_dir", str(logged)]) == 0
    text = (logged / "report.md").read_text()
    assert "**More than 0.15 nats above dense at the end, to be explained:**\n- SLoPe, r = 0: 0.20, where dense" in text
    assert text.endswith("Not finished yet: SLoPe, rank 48 in the last 1%.\n")
    write_log(logged, "slope", [8.14 - step / 10 for step in range(1, 61)])
    assert call(["--report", "--output_dir", str(logged)]) == 0
    assert "to be explained" not in (logged / "report.md").read_text()


def test_a_row_that_is_being_written_does_not_count(logged, capsys):
    with (logged / "dense" / f"{PREFIX}_metrics.csv").open("a") as file:
        file.write("61,1.9,4")
    assert report_rows(logged, capsys)["steps"] == ["60", "60", "40 of 60"]


def test_speed_of_the_pruned_run_is_that_after_pruning(logged, capsys):
    write_log(logged, "pruned_half", [5.0] * 60)
    path = logged / "pruned_half" / f"{PREFIX}_metrics.csv"
    header, *lines = path.read_text().splitlines()
    after = [line.replace(",4,200,0,", ",12,600,0,").replace(",8", ",3") for line in lines[30:]]
    write(path, "\n".join([header, *lines[:30], *after]) + "\n")
    rows = report_rows(logged, capsys)
    assert rows["tokens/s, median step without adapters, against dense"][-1] == "x3.00"
    assert rows["peak memory, GB"][-1] == "3.00"
    assert rows["time of all steps, s"][-1] == "20"


def test_steps_with_adapters_are_compared_with_dense_too(logged, capsys):
    path = logged / "lazy_1" / f"{PREFIX}_metrics.csv"
    header, *lines = path.read_text().splitlines()
    after = [line.replace(",4,200,0,", ",4,150,1,") for line in lines[30:]]
    assert after != lines[30:]
    write(path, "\n".join([header, *lines[:30], *after]) + "\n")
    rows = report_rows(logged, capsys)
    assert rows["tokens/s, median step without adapters, against dense"] == ["x1.00", "x2.00", "x1.00"]
    assert rows["tokens/s, median step with adapters, against dense"] == ["", "", "x0.75"]


def test_tokens_of_the_curves(logged):
    summary = read_runs(logged, Settings.load(logged))["slope"].summary
    assert [evaluation.tokens for evaluation in summary.evaluations[:2]] == [200, 400]
    first = summary.evaluations[0]
    assert (first.step, first.mlm_loss, first.mlm_accuracy) == (2, pytest.approx(8.0), None)
    assert summary.tokens == 6000 and summary.tokens_before_adapters is None
    write_log(logged, "lazy_10", [5.0] * 60, adapters=1)
    assert read_runs(logged, Settings.load(logged))["lazy_10"].summary.tokens_before_adapters == 100  # the first step's


def test_a_report_needs_no_logs_of_finished_runs(logged, capsys):
    write_log(logged, "lazy_10", [8 - step / 10 for step in range(1, 61)], adapters=1)
    assert call(["--report", "--output_dir", str(logged)]) == 0
    text, picture = (logged / "report.md").read_text(), (logged / "curves.png").read_bytes()
    for name in ("dense", "slope", "lazy_10"):
        (logged / name / f"{PREFIX}_metrics.csv").unlink()
    assert call(["--report", "--output_dir", str(logged)]) == 0
    assert (logged / "report.md").read_text() == text and (logged / "curves.png").read_bytes() == picture
    (logged / "lazy_1" / f"{PREFIX}_metrics.csv").unlink()  # not finished: only its log tells of it
    assert report_rows(logged, capsys)["steps"] == ["60", "60", "60"]


def test_a_log_counts_more_than_a_summary(logged, capsys):
    report_rows(logged, capsys)
    write_log(logged, "slope", [5.0] * 60)
    assert report_rows(logged, capsys)["held-out MLM loss, last"] == ["2.000", "5.000", "4.000"]


NO_NUMBER = json.dumps({field.name: "x" for field in fields(Summary)} | {"evaluations": []})


@pytest.mark.parametrize("content", ["{}", "[]", NO_NUMBER, '{"evaluations": [{"step": 1}]}', "no JSON"])
def test_a_summary_of_something_else_is_refused(logged, capsys, content):
    (logged / "slope" / f"{PREFIX}_metrics.csv").unlink()
    write(logged / "slope" / "summary.json", content)
    assert call(["--report", "--output_dir", str(logged)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--output_dir {logged}/slope/summary.json: " in said


def test_density_by_the_papers_formula():
    assert expected_density() == 0.5 - 0.09375
    assert expected_density(1, 2) == 0.5 - 0.125
    assert expected_density(2, 8) == pytest.approx(0.25 - 0.0584, abs=5e-5)


def test_documents_without_markers_and_logs_of_something_else(logged, capsys):
    docs = write(logged / "docs.md", "nothing\n")
    assert call(["--report", "--output_dir", str(logged), "--docs", str(docs)]) == 2
    assert "must hold the lines <!-- reproduce.sh writes from here -->" in capsys.readouterr().err
    assert docs.read_text() == "nothing\n"
    write(logged / "slope" / f"{PREFIX}_metrics.csv", "step,loss\n1,2\n")
    assert call(["--report", "--output_dir", str(logged)]) == 2
    assert "is no log of run_pretraining.py" in capsys.readouterr().err
    for name in RECIPES:
        write(logged / name / f"{PREFIX}_metrics.csv", "step\n")
    assert call(["--report", "--output_dir", str(logged)]) == 0  # by the summaries of a report before
    for path in logged.glob("*/summary.json"):
        path.unlink()
    assert call(["--report", "--output_dir", str(logged)]) == 2
    assert "no run has taken a step yet" in capsys.readouterr().err


def test_the_results_have_the_markers():
    content = (ROOT / "docs/results.md").read_text()
    assert 0 < content.find(MARKERS[0]) < content.find(MARKERS[1])
