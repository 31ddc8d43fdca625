"""scripts/quickstart.sh: what it calls, with a stub in place of Python, and once in earnest on sources of a few rows;
scripts/quickstart_report.py: scores beside what guessing gets."""

from __future__ import annotations

import bz2
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from finetuning_runs import sentences, write_sst2, write_stsb
from text_factory import WORDS

import run_glue
import run_pretraining
from data.fetch import RECORD, SOURCES
from data.stages import file_sha256
from training.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import quickstart_report  # noqa: E402  (a script, found through the line above)

STUB = """#!{python} -SE
import json, os, sys, time
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
if any(word in {hanging!r} for word in sys.argv):
    with open({calls!r} + ".new", "w") as file:
        print(os.getpid(), file=file)
    os.rename({calls!r} + ".new", {calls!r} + ".pid")  # never there without its content
    time.sleep(60)
if any(word in {failing!r} for word in sys.argv):
    while {hanging!r} and not os.path.exists({calls!r} + ".pid"):
        time.sleep(0.01)
    print("it failed", file=sys.stderr)
    sys.exit(3)
"""


def run_script(script: Path, home: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DEMO_", "PYTHON"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=home, env=environment, capture_output=True, text=True, timeout=400
    )


# ----------------------------------------------------------------------------------------------------- with a stub
class Clone:
    """The scripts in a repository of their own, whose environment is a stub that records its calls."""

    def __init__(self, home: Path):
        self.home, self.calls_file = home, home / "calls"
        shutil.copytree(ROOT / "scripts", home / "repository" / "scripts")
        (home / "repository/.venv/bin").mkdir(parents=True)
        for name in ("requirements.txt", ".venv/requirements.txt.installed"):
            shutil.copy(ROOT / "requirements.txt", home / "repository" / name)
        self.stub()

    def stub(self, failing: tuple[str, ...] = (), hanging: tuple[str, ...] = ()) -> None:
        """Calls with a word of `failing` end with 3, once those with one of `hanging` have begun not to end."""
        stub, calls = self.home / "repository/.venv/bin/python", str(self.calls_file)
        stub.write_text(STUB.format(python=sys.executable, calls=calls, failing=failing, hanging=hanging))
        stub.chmod(0o755)

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        return run_script(self.home / "repository/scripts/quickstart.sh", self.home, *arguments, **settings)

    def calls(self, script: str = "") -> list[list[str]]:
        """The arguments of each call of `script`."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == script]

    def checkpoints(self, run: str, *steps: int) -> None:
        """Leave what pretraining would."""
        for step in steps:
            path = self.home / "out" / run / "pretrain_ckpts" / f"ckpt_{step}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def parsed(door, clone: Clone) -> list:
    """The arguments of each call of a door, as it understands them."""
    return [door.parse_arguments(call) for call in clone.calls(f"{door.__name__}.py")]


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def test_each_pretrained_model_is_fine_tuned_on_both_tasks(clone):
    clone.checkpoints("slope", 2231)
    clone.checkpoints("dense", 2231)
    ended = clone.run("--dense", "--output", "out")
    assert ended.returncode == 0, ended.stderr
    output = clone.home / "out"
    # The two models train at the same time.
    pretrained = sorted(parsed(run_pretraining, clone), key=lambda args: args.output_dir)
    assert [(args.output_dir, args.max_steps, args.pruned_matrix, args.add_lora) for args in pretrained] == [
        (f"{output}/dense", 2231, "none", "False"),
        (f"{output}/slope", 2231, "static-weight", "lazy"),
    ]
    tuned = sorted(parsed(run_glue, clone), key=lambda args: args.output_dir)
    epochs = {"SST-2-shaped": 2, "STS-B": 3}
    for args, (name, task) in zip(tuned, [(n, t) for n in ("dense", "slope") for t in epochs], strict=True):
        assert args.output_dir == f"{output}/{name}/glue_2231/{task}"
        assert (args.task_name, args.num_train_epochs) == (task, epochs[task])
        assert args.init_checkpoint == f"{output}/{name}/pretrain_ckpts/ckpt_2231.pt"
        assert args.data_dir == f"{output}/glue/{args.task_name}"
        assert args.vocab_file == f"{output}/data/vocab.txt"
        assert args.do_train and args.do_eval and args.max_steps == -1
        assert args.max_seq_length == 64  # the positions that the demo model knows
    (report,) = clone.calls("scripts/quickstart_report.py")
    assert report[report.index("--finetuned") + 1 :] == [
        *(f"{output}/{name}/glue_2231" for name in ("slope", "dense")),
        *("--glue_dir", f"{output}/glue", "--tasks", "STS-B", "SST-2-shaped"),
    ]


def test_without_dense_there_is_one_model(clone):
    clone.checkpoints("slope", 2231)
    assert clone.run("--output", "out").returncode == 0
    assert not (clone.home / "out/dense").exists()
    assert len(clone.calls("run_pretraining.py")) == 1
    assert len(clone.calls("run_glue.py")) == 2


def test_other_lengths_start_from_the_newest_checkpoint_in_folders_of_their_own(clone):
    clone.checkpoints("slope", 9, 20, 100)  # as text, 9 and 20 come after 100
    ended = clone.run("--output", "./out/", DEMO_STEPS="100", DEMO_FINETUNE_STEPS="5")
    assert ended.returncode == 0, ended.stderr
    assert [args.max_steps for args in parsed(run_pretraining, clone)] == [100]
    for args in parsed(run_glue, clone):
        # However the folder is spelled: a run that finds another path than it began from refuses to go on.
        assert args.init_checkpoint == f"{clone.home}/out/slope/pretrain_ckpts/ckpt_100.pt"
        assert args.max_steps == 5
        assert args.output_dir == f"{clone.home}/out/slope/glue_100_5/{args.task_name}"


@pytest.mark.parametrize("script", ["run_pretraining.py", "run_glue.py"])
def test_a_failure_ends_the_script_without_a_report(clone, script):
    clone.checkpoints("slope", 2231)
    clone.stub(failing=(script,))
    assert clone.run("--output", "out").returncode == 3
    assert len(clone.calls(script)) == 1
    assert not clone.calls("scripts/quickstart_report.py")


def test_a_failure_of_the_dense_model_in_the_background_counts_too(clone):
    clone.checkpoints("slope", 2231)
    clone.stub(failing=(f"{clone.home}/out/dense",))
    ended = clone.run("--dense", "--output", "out")
    assert (ended.returncode, ended.stderr) == (3, "it failed\n")
    assert not clone.calls("scripts/quickstart_report.py")


def test_the_background_ends_with_the_script(clone):
    clone.stub(failing=(f"{clone.home}/out/slope",), hanging=(f"{clone.home}/out/dense",))
    assert clone.run("--dense", "--output", "out").returncode == 3
    deadline = time.monotonic() + 10
    pid = int(Path(f"{clone.calls_file}.pid").read_text())
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Ended processes that nobody has waited for do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["--output"], {}, "--output needs a folder"),
        (["--output", ""], {}, "--output needs a folder"),
        (["--output", "calls_of_nobody/.."], {"DEMO_STEPS": "0"}, "DEMO_STEPS=0: must be a whole number"),
        ([], {"DEMO_STEPS": "many=5"}, "DEMO_STEPS=many=5: must be a whole number"),
        ([], {"DEMO_FINETUNE_STEPS": "1.5"}, "DEMO_FINETUNE_STEPS=1.5: must be a whole number"),
        (["--output", "repository/requirements.txt"], {}, "--output repository/requirements.txt: must be a folder"),
        (["--sparse"], {}, "unknown argument --sparse"),
        (["dense"], {}, "unknown argument dense"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_done(clone, arguments, settings, said):
    before = sorted(clone.home.rglob("*"))
    ended = clone.run(*arguments, **settings)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"quickstart.sh: error: {said}") and ended.stderr.count("\n") == 1
    assert sorted(clone.home.rglob("*")) == before


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_prints_the_head_comment_and_starts_nothing(clone, word):
    before = sorted(clone.home.rglob("*"))
    ended = clone.run(word)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("From nothing to a small BERT") and "\n  --output DIR " in ended.stdout
    assert "#" not in ended.stdout and ended.stdout.endswith("2 of the other).\n")
    assert sorted(clone.home.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------ in earnest
def write_source(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Files that pass for a source of data.fetch."""
    (folder / name).mkdir(parents=True)
    for file, content in files.items():
        (folder / name / file).write_bytes(content)
    hashes = {file: file_sha256(folder / name / file) for file in files}
    record = {"package_sha256": SOURCES[name].package.sha256, "files": hashes}
    (folder / name / RECORD).write_text(json.dumps(record))


def write_sources(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(rng.choice(WORDS, length))

    extracts = {f"t{n}": {"extract": " ".join(f"{text(8)} {n}." for _ in range(6))} for n in range(300)}
    write_source(folder, "wiki_summaries", {"summaries_en-us.json": json.dumps(extracts).encode()})
    pairs = [f"g\tf\ty\t{n}\t{n % 6 * 0.8:.1f}\t{text(5)}\t{text(6)}\n" for n in range(40)]
    write_source(folder, "stsb", {f"sts-{split}.csv": "".join(pairs).encode() for split in ("train", "dev", "test")})
    rows = [f"{('fresh', 'rotten')[n % 3 > 1]},{text(6)} {n},{n % 60},True" for n in range(240)]
    table = "\r\n".join(["category,text,movie_name,has_plot_and_reviews", *rows])
    write_source(folder, "rotten_tomatoes", {"rotten_tomatoes_corpus_full.csv.bz2": bz2.compress(table.encode())})


def products(folder: Path) -> dict[str, bytes]:
    """Every file that a training step or a checkpoint would change."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in ("*.pt", "*_metrics.csv", "eval_results.json", "*.hdf5", "*.tsv")
        for path in sorted(folder.rglob(pattern))
    }


def test_from_nothing_to_the_table_and_again(tmp_path):
    """The second run takes no step and fetches nothing, and says the same."""
    write_sources(tmp_path / "demo/data/download")
    script, settings = ROOT / "scripts/quickstart.sh", {"DEMO_STEPS": "3", "DEMO_FINETUNE_STEPS": "2"}
    first = run_script(script, tmp_path, **settings)
    assert first.returncode == 0, (first.stdout, first.stderr)
    assert first.stdout.count("is there and verified") == 3
    files = products(tmp_path / "demo")
    assert {"slope/glue_3_2/STS-B/eval_results.json", "slope/glue_3_2/SST-2-shaped/eval_results.json"} <= set(files)
    table = first.stdout.partition("Pretraining on the demo corpus")[2].partition("wall time")[0]
    for row in ("STS-B, dev pearson", "STS-B, dev spearman", "SST-2-shaped, dev accuracy", "always the majority class"):
        assert row in table
    second = run_script(script, tmp_path, **settings)
    assert second.returncode == 0, (second.stdout, second.stderr)
    assert products(tmp_path / "demo") == files
    assert table in second.stdout


# ---------------------------------------------------------------------------------------------------------- report
def write_results(folder: Path, name: str, **metrics: float) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "eval_results.json").write_text(json.dumps({"task": name, "metrics": metrics}))


@pytest.fixture
def glue_dir(tmp_path) -> Path:
    """In the dev split of the SST-2-shaped set the train split's majority class is the minority: 8 of 20 are 1."""
    write_stsb(tmp_path / "glue/STS-B")
    folder = write_sst2(tmp_path / "glue/SST-2-shaped")
    rows = [(text, int(number % 4 > 0)) for number, (text, _) in enumerate(sentences(40, 0))]
    write_rows(folder / "train.tsv", rows)
    write_rows(folder / "dev.tsv", [(text, int(number < 8)) for number, (text, _) in enumerate(sentences(20, 1))])
    return tmp_path / "glue"


def write_rows(path: Path, rows: list[tuple[str, int]]) -> None:
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))


def report(monkeypatch, capsys, *arguments) -> list[str]:
    """The table's lines, white space shortened."""
    monkeypatch.setattr(sys, "argv", ["quickstart_report.py", *map(str, arguments)])
    quickstart_report.main()
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_each_score_stands_above_what_guessing_gets(monkeypatch, capsys, whole_run, files, glue_dir, tmp_path):
    for number, name in enumerate("ab"):
        write_results(tmp_path / name, "STS-B", pearson=0.5 + number, spearman=-0.25)
        write_results(tmp_path / name, "SST-2-shaped", accuracy=0.75 + number / 8)
    flags = ["--finetuned", tmp_path / "a", tmp_path / "b", "--glue_dir", glue_dir, "--tasks", "sts-b", "SST-2-shaped"]
    runs = ["--runs", f"A={whole_run}", f"B={whole_run}", "--heldout", files.heldout]
    lines = report(monkeypatch, capsys, *runs, *flags)
    assert lines[1] == "A B"
    mean = "always the mean score (undefined, taken as 0) 0.0000 0.0000"
    assert lines[-6:] == [
        *("STS-B, dev pearson 0.5000 1.5000", mean),
        *("STS-B, dev spearman -0.2500 -0.2500", mean),
        # Class 1 has 30 of the 40 train rows, and 8 of the 20 dev rows.
        *("SST-2-shaped, dev accuracy 0.7500 0.8750", "always the majority class 0.4000 0.4000"),
    ]
    place = next(place for place, line in enumerate(lines) if line.startswith("held-out MLM loss"))
    assert lines[place + 1].startswith("best fixed guess (unigram entropy)")
    assert lines[place + 3].startswith("always the most frequent token")


def test_without_fine_tuning_the_table_is_of_pretraining_alone(monkeypatch, capsys, whole_run, files):
    lines = report(monkeypatch, capsys, "--runs", f"A={whole_run}", "--heldout", files.heldout)
    assert "steps with adapters 6 of 20" in lines
    assert not any("dev" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--finetuned", "a"], "--finetuned: needs --glue_dir and --tasks"),
        (["--finetuned", "a", "a", "--glue_dir", "glue", "--tasks", "STS-B"], "--finetuned: must be 1 folders, one"),
        (["--finetuned", "a", "--glue_dir", "glue", "--tasks", "STS-C"], "--tasks STS-C: no such task"),
        (["--finetuned", "a", "--glue_dir", "glue", "--tasks", "RTE"], "--finetuned a/RTE/eval_results.json: cannot"),
        (["--finetuned", "a", "--glue_dir", "glue", "--tasks", "STS-B"], "holds no spearman of STS-B"),
    ],
)
def test_what_does_not_fit_is_one_line(monkeypatch, capsys, whole_run, files, glue_dir, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    write_results(Path("a"), "STS-B", pearson=0.5)
    with pytest.raises(UsageError, match=said):
        report(monkeypatch, capsys, "--runs", f"A={whole_run}", "--heldout", files.heldout, *flags)
