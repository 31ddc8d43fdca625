"""scripts/summarize_glue.py: the 8-task mean as the SLoPe paper takes it, and what is missing from it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "summarize_glue.py"

METRICS = {
    "CoLA": {"matthews_correlation": 0.50},
    "SST-2": {"accuracy": 0.90},
    "MRPC": {"f1": 0.88, "accuracy": 0.11},
    "STS-B": {"pearson": 0.86, "spearman": 0.84},
    "QQP": {"f1": 0.87, "accuracy": 0.11},
    "MNLI": {"accuracy": 0.83, "mismatched_accuracy": 0.11},
    "QNLI": {"accuracy": 0.91},
    "RTE": {"accuracy": 0.66},
}
MEAN = "80.00"  # of 50, 90, 88, 85, 87, 83, 91 and 66


def write_results(folder: Path, task: str, metrics: dict, **more) -> None:
    folder.mkdir(parents=True)
    (folder / "eval_results.json").write_text(json.dumps({"task": task, "metrics": metrics} | more))


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs the script in this process: exit code and what it printed to stdout and stderr."""

    def run(*folders: Path) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, folders)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    return run


@pytest.fixture
def lines_of(run_script):
    def lines(*folders: Path) -> list[str]:
        done = run_script(*folders)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return lines


def test_the_script_runs_from_any_folder(tmp_path):
    write_results(tmp_path / "rte", "RTE", METRICS["RTE"])
    done = subprocess.run([sys.executable, str(SCRIPT), "rte"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RTE")


def test_all_eight_tasks_give_the_mean(tmp_path, lines_of):
    for task, metrics in METRICS.items():
        write_results(tmp_path / task, task, metrics)
    lines = lines_of(tmp_path)
    assert [line.split()[:2] for line in lines[:8]] == [
        ["CoLA", "50.00"],
        ["SST-2", "90.00"],
        ["MRPC", "88.00"],
        ["STS-B", "85.00"],
        ["QQP", "87.00"],
        ["MNLI", "83.00"],
        ["QNLI", "91.00"],
        ["RTE", "66.00"],
    ]
    assert lines[8:] == [f"mean of all 8 tasks: {MEAN}"]


def test_missing_tasks_are_named_and_the_mean_says_what_it_is_of(tmp_path, lines_of):
    for task in ("RTE", "CoLA"):
        write_results(tmp_path / task, task.lower(), METRICS[task])
    lines = lines_of(tmp_path / "RTE", tmp_path / "CoLA")
    assert lines[2:] == [
        "no mean of 8 tasks yet, missing: SST-2, MRPC, STS-B, QQP, MNLI, QNLI",
        "mean of these 2 tasks: 58.00",
    ]


def test_other_tasks_keep_their_own_names_and_never_count(tmp_path, lines_of):
    for task, metrics in METRICS.items():
        write_results(tmp_path / task, task, metrics)
    for task in ("WNLI", "MNLI-mm", "SST-2-shaped", "QNLI-shaped"):
        write_results(tmp_path / task, task, {"accuracy": 0.01})
    lines = lines_of(tmp_path)
    assert lines[8:10] == [f"mean of all 8 tasks: {MEAN}", "outside the mean:"]
    assert [line.split()[0] for line in lines[10:]] == ["MNLI-mm", "WNLI", "SST-2-shaped", "QNLI-shaped"]


def test_only_other_tasks_give_no_mean(tmp_path, lines_of):
    write_results(tmp_path / "a", "sst-2-shaped", {"accuracy": 0.75})
    lines = lines_of(tmp_path)
    assert lines[0].startswith("no mean of 8 tasks yet")
    assert not [line for line in lines if line.startswith("mean")]


def test_seeds_give_the_spread_and_their_own_folders_are_not_read(tmp_path, lines_of):
    seeds = {"0": {"pearson": 0.8, "spearman": 0.8}, "1": {"pearson": 0.9, "spearman": 0.9}}
    write_results(tmp_path / "sts", "sts-b", {"pearson": 0.85, "spearman": 0.85}, seeds=seeds)
    write_results(tmp_path / "sts" / "seed_0", "sts-b", seeds["0"])
    line = lines_of(tmp_path)[0]
    assert line.split()[:6] == ["STS-B", "85.00", "±", "7.07", "(2", "seeds)"]


def test_a_folder_that_is_named_twice_counts_once(tmp_path, lines_of):
    write_results(tmp_path / "rte", "RTE", METRICS["RTE"])
    assert "mean of these 1 tasks: 66.00" in lines_of(tmp_path, tmp_path / "rte", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such folder"),
        ("", "holds no eval_results.json"),
        ("{", "is not JSON"),
        ("{}", "lacks 'task'"),
        ('{"task": "RTE", "metrics": {"f1": 1.0}}', "lacks 'accuracy'"),
        ('{"task": "RTE", "metrics": {"accuracy": "high"}}', "is no result"),
        ('{"task": "SQuAD", "metrics": {"f1": 1.0}}', "SQuAD: no such task"),
        ('{"task": 3, "metrics": {"f1": 1.0}}', "is no result"),
    ],
)
def test_what_is_no_result_is_one_line_and_exit_code_2(tmp_path, run_script, content, said):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
    if content:
        (folder / "eval_results.json").write_text(content)
    done = run_script(folder)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert str(folder) in done.stderr
    assert not done.stdout


def test_two_results_of_one_task_are_refused(tmp_path, run_script):
    for run in ("first", "second"):
        write_results(tmp_path / run, "RTE", METRICS["RTE"])
    done = run_script(tmp_path)
    assert done.returncode == 2
    assert str(tmp_path / "first") in done.stderr
    assert str(tmp_path / "second") in done.stderr
