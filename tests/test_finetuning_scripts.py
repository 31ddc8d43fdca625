"""scripts/run_glue.sh, run_squad.sh and their SLURM forms, with a stub in place of Python that records its calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_glue
import run_squad

ROOT = Path(__file__).resolve().parents[1]
STUB = """#!{python} -SE
import json, sys
if "-c" in sys.argv[1:3]:
    sys.exit()  # asked whether flags are right
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
sys.exit(any(word in {failing!r} for word in sys.argv))
"""


class Machine:
    """A home with data, a checkpoint and the stub."""

    def __init__(self, home: Path):
        self.home, self.calls_file = home, home / "calls"
        for task in ("CoLA", "RTE", "STS-B"):
            (home / "data" / task).mkdir(parents=True)
        for version in ("v1.1", "v2.0"):
            for split in ("train", "dev"):
                (home / "data" / f"{split}-{version}.json").touch()
        (home / "ckpt_9.pt").touch()
        (home / "vocab.txt").touch()
        self.fail()

    def fail(self, *words: str) -> None:
        """Calls with one of these words end with 1."""
        stub = self.home / "python"
        stub.write_text(STUB.format(python=sys.executable, calls=str(self.calls_file), failing=words))
        stub.chmod(0o755)

    def run(self, script: str, *arguments: str, **settings: str | None) -> tuple[int, str]:
        """Exit code and stderr; a setting of None is not set."""
        ended = self.process(script, *arguments, **settings)
        return ended.returncode, ended.stderr

    def process(self, script: str, *arguments: str, **settings: str | None) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {"PYTHON": str(self.home / "python"), "INIT_CHECKPOINT": str(self.home / "ckpt_9.pt")}
        environment |= {"VOCAB_FILE": str(self.home / "vocab.txt"), "DATA_DIR": str(self.home / "data")}
        environment |= {"OUTPUT_DIR": str(self.home / "out put"), "TASKS": "CoLA RTE"} | settings
        environment = {name: value for name, value in environment.items() if value is not None}
        command = ["bash", str(ROOT / "scripts" / script), *arguments]
        return subprocess.run(command, cwd=self.home, env=environment, capture_output=True, text=True)

    def calls(self) -> list[list[str]]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_glue_runs_each_task_by_the_recipe(machine):
    assert machine.run("run_glue.sh")[0] == 0
    *tasks, summary = machine.calls()
    assert [Path(call[0]).name for call in tasks] == ["run_glue.py"] * 2
    found = [run_glue.parse_arguments(call[1:]) for call in tasks]
    for args, task, epochs in zip(found, ("CoLA", "RTE"), (5, 3), strict=True):
        assert (args.task_name, args.num_train_epochs) == (task, epochs)
        assert (args.learning_rate, args.train_batch_size, args.max_seq_length) == (2.4e-6, 4, 128)
        assert args.warmup_proportion == 0.1 and args.seed_list == [42]
        assert args.data_dir == str(machine.home / "data" / task)
        assert args.output_dir == str(machine.home / "out put" / task)
        assert args.do_train and args.do_eval and args.do_predict
        assert "pruned_matrix" not in args.given and "add_lora" not in args.given  # the checkpoint says it
    assert Path(summary[0]).name == "summarize_glue.py" and summary[1] == str(machine.home / "out put")


def test_squad_runs_by_the_recipe(machine):
    for version in ("v1.1", "v2.0"):
        assert machine.run("run_squad.sh", SQUAD_VERSION=version) == (0, "")
        args = run_squad.parse_arguments(machine.calls()[-1][1:])
        assert (args.learning_rate, args.num_train_epochs, args.max_seq_length, args.doc_stride) == (3e-5, 2, 384, 128)
        assert args.version_2_with_negative == (version == "v2.0")
        assert args.train_file.endswith(f"train-{version}.json") and args.predict_file.endswith(f"dev-{version}.json")
        assert args.do_train and args.do_predict and args.do_eval


def test_settings_reach_the_flags(machine):
    settings = {"PRUNED_MATRIX": "static-weight", "LORA_RANK": "16", "SEEDS": "0,1", "PRECISION": "bf16"}
    settings |= {"EXTRA_FLAGS": "--log_freq 7 --skip_cache", "LEARNING_RATE": "1e-5", "NPROC_PER_NODE": "2"}
    assert machine.run("run_glue.sh", **settings, TASKS="STS-B", VOCAB_FILE=None)[0] == 0
    call = machine.calls()[0]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert call[:5] == launcher and call[5] == str(ROOT / "run_glue.py")
    args = run_glue.parse_arguments(call[6:])
    assert (args.pruned_matrix, args.add_lora, args.lora_rank) == ("static-weight", "True", 16)
    assert (args.seed_list, args.precision, args.log_freq, args.skip_cache) == ([0, 1], "bf16", 7, True)
    assert args.learning_rate == 1e-5 and args.vocab_file is None


def test_a_task_that_fails_does_not_stop_the_others(machine):
    machine.fail("CoLA")
    code, said = machine.run("run_glue.sh")
    assert code == 1 and "these tasks failed: CoLA" in said
    assert [Path(call[0]).name for call in machine.calls()] == ["run_glue.py"] * 2 + ["summarize_glue.py"]
    machine.fail("CoLA", "RTE")
    before = len(machine.calls())
    assert machine.run("run_glue.sh")[0] == 1
    assert len(machine.calls()) == before + 2  # nothing to sum up


@pytest.mark.parametrize(
    ("script", "settings", "said"),
    [
        ("run_glue.sh", {"INIT_CHECKPOINT": None}, "INIT_CHECKPOINT"),
        ("run_squad.sh", {"INIT_CHECKPOINT": "none.pt"}, "INIT_CHECKPOINT=none.pt"),
        ("run_glue.sh", {"DATA_DIR": "none"}, "DATA_DIR=none"),
        ("run_glue.sh", {"TASKS": "CoLA QQP"}, "QQP"),
        ("run_glue.sh", {"TASKS": ""}, "TASKS: must name at least one task"),
        ("run_glue.sh", {"NPROC_PER_NODE": "zero"}, "NPROC_PER_NODE=zero: must be a whole number of at least 1"),
        ("run_squad.sh", {"OUTPUT_DIR": "vocab.txt"}, "OUTPUT_DIR=vocab.txt: must be a folder"),
        ("run_glue.sh", {"VOCAB_FILE": "none.txt"}, "VOCAB_FILE=none.txt: no such file"),
        ("run_squad.sh", {"SQUAD_VERSION": "v3"}, "SQUAD_VERSION=v3"),
        ("run_glue_mist.sh", {}, "sbatch"),
        ("run_squad_mist.sh", {"SLURM_SUBMIT_DIR": "/"}, "is not the folder of the repository"),
    ],
)
def test_wrong_settings_start_nothing(machine, script, settings, said):
    code, lines = machine.run(script, **settings)
    assert code == 2 and said in lines and len(lines.splitlines()) == 1
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("script", "settings", "said"),
    [
        ("run_glue.sh", {"SEEDS": "x"}, "--seeds x: must be different whole numbers"),
        ("run_glue.sh", {"EPOCHS": "x"}, "--num_train_epochs: must be a number, not x"),
        ("run_glue.sh", {"COLA_EPOCHS": "0", "TASKS": "RTE CoLA"}, "--num_train_epochs 0: must be above 0"),
        ("run_glue.sh", {"LORA_RANK": "x", "NPROC_PER_NODE": "2"}, "--lora_rank: must be a number, not x"),
        ("run_squad.sh", {"EPOCHS": "x"}, "--num_train_epochs: must be a number, not x"),
        ("run_squad.sh", {"PRUNED_MATRIX": "foo"}, "--pruned_matrix foo: must be one of"),
    ],
)
def test_what_the_python_script_says_of_its_flags_is_said_once_before_the_first_task(machine, script, settings, said):
    """With the real Python, which starts nothing."""
    code, lines = machine.run(script, PYTHON=sys.executable, **settings)
    assert code == 2 and said in lines and len(lines.splitlines()) == 1, lines
    assert not (machine.home / "out put").exists()


@pytest.mark.parametrize("script", ["run_glue.sh", "run_squad.sh", "run_glue_mist.sh", "run_squad_mist.sh"])
def test_help_lists_the_settings_and_no_other_argument_is_taken(machine, script):
    for word in ("--help", "-h"):
        ended = machine.process(script, word)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.startswith("Fine-tune on ")
        names = [line.split("=")[0].strip() for line in ended.stdout.split("Settings")[1].splitlines()[1:]]
        assert {"DATA_DIR", "OUTPUT_DIR", "EPOCHS", "INIT_CHECKPOINT", "SEEDS", "NPROC_PER_NODE"} < set(names)
        assert len(names) == len(set(names))
        assert ("NPROC_PER_NODE=gpu" in ended.stdout) == ("mist" in script)
    code, said = machine.run(script, "CoLA", SLURM_SUBMIT_DIR=str(ROOT))
    assert code == 2 and said.startswith(f"{script}: error: unknown argument CoLA: settings are variables")
    assert said.count("\n") == 1 and machine.calls() == []


@pytest.mark.parametrize("task", ["glue", "squad"])
def test_the_clusters_scripts_add_its_settings(machine, task):
    assert machine.run(f"run_{task}_mist.sh", SLURM_SUBMIT_DIR=str(ROOT), EXTRA_FLAGS="--log_freq 9")[0] == 0
    call = machine.calls()[0]
    assert call[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "gpu"]
    args = {"glue": run_glue, "squad": run_squad}[task].parse_arguments(call[6:])
    assert (args.precision, args.disable_progress_bar, args.log_freq) == ("fp16", True, 9)


def test_shellcheck_has_nothing_to_say():
    scripts = [f"scripts/{name}.sh" for name in ("run_glue", "run_squad", "run_glue_mist", "run_squad_mist")]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed beside this Python")
    command = [str(shellcheck), "--external-sources", "--source-path=SCRIPTDIR/..", *scripts]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
