"""The job scripts, with stubs of torchrun, srun, sbatch, scontrol and ssh first on PATH; once with the real torchrun.

A stub writes down how it was called and then does what the test planned for that call.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from run_pretraining import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
JOBS = {name: f"run_pretraining_jobs_{name}.sh" for name in ("local", "slurm", "ssh")}
PHASE_STEPS = {1: (0, 4), 2: (4, 3), 3: (7, 2)}  # previous_phase_end_step, max_steps: they end at 4, 7 and 9

TORCHRUN = """#!{python} -SE
# Plans: "save STEP", "fail CODE", "nothing", and with a worker that saves STEP at USR1: "wait STEP", "late STEP" (it
# listens after 3 s only), "slow STEP" (it takes 3 s to end and does not listen then); "deaf" (a worker that never ends)
import fcntl, json, os, subprocess, sys, time
from pathlib import Path

home, host = Path({home!r}), os.environ.get("STUB_HOST", "")
flags = dict(zip(sys.argv, sys.argv[1:]))
checkpoints = Path(flags["--output_dir"]) / "pretrain_ckpts"
checkpoints.mkdir(parents=True, exist_ok=True)
with open(home / "torchrun.calls", "a") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.write(json.dumps([host, *sys.argv[1:]]) + chr(10))
plan = home / ("plan" + host)
action, _, rest = plan.read_text().partition(chr(10))
plan.write_text(rest)
word, _, value = action.partition(" ")
if word == "save":
    (checkpoints / f"ckpt_{{value}}.pt").touch()
elif word == "fail":
    sys.exit(int(value))
elif word in ("wait", "late", "slow", "deaf"):
    worker = subprocess.Popen([sys.executable, "-SE", home / "worker.py", checkpoints / f"ckpt_{{value}}.pt", word])
    sys.exit(worker.wait() != 0)
"""

WORKER = """import os, signal, sys, threading, time
from pathlib import Path

checkpoint, plan, launcher = Path(sys.argv[1]), sys.argv[2], os.getppid()
ready = Path(__file__).parent / ("ready" + os.environ.get("STUB_HOST", ""))


def save(number, frame):
    if plan == "deaf":
        return
    checkpoint.touch()
    if plan == "slow":
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # as Python does when it shuts down
        time.sleep(3)
    os._exit(0)


if plan == "late":
    ready.write_text(str(launcher))
    time.sleep(3)
signal.signal(signal.SIGUSR1, save)
ready.write_text(str(launcher))
while os.getppid() == launcher:
    time.sleep(0.05)
"""

RECORD = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> {home}/{name}.calls
"""

STUBS = {
    "srun": RECORD + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "sbatch": RECORD,
    "scontrol": RECORD + "printf 'node1\\nnode2\\n'\n",
    "ssh": RECORD + 'export STUB_HOST="${{@: -2:1}}"\nexec bash -c "${{@: -1}}"\n',
}


def _heed_signals() -> None:
    """Also where these tests run in the background: bash cannot trap a signal that it was started to ignore."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Cluster:
    """A copy of the scripts, small phase configs, the stubs, and what they wrote down."""

    def __init__(self, home: Path):
        self.home, self.repository, self.output = home, home / "repository", home / "out put"
        self.started: list[subprocess.Popen] = []
        shutil.copytree(ROOT / "scripts", self.repository / "scripts")
        (self.repository / "run_pretraining.py").touch()
        (self.repository / "config").mkdir()
        for phase, (before, steps) in PHASE_STEPS.items():
            config = {"previous_phase_end_step": before, "max_steps": steps, "log_prefix": f"phase{phase}_log"}
            self.config(phase).write_text(json.dumps(config, indent=2))
        for folder in ("phase1", "phase2"):
            for part in ("train", "heldout"):
                (home / "data" / folder / part).mkdir(parents=True)
        self.bin = home / "bin"
        self.bin.mkdir()
        self.add_stub("torchrun", TORCHRUN.format(python=sys.executable, home=str(home)))
        (home / "worker.py").write_text(WORKER)
        for name, text in STUBS.items():
            self.add_stub(name, text.format(home=home, name=name))
        self.plan()

    def config(self, phase: int) -> Path:
        return self.repository / "config" / f"bert_pretraining_phase{phase}_config.json"

    def add_stub(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def plan(self, *actions: str, host: str = "") -> None:
        (self.home / f"plan{host}").write_text("\n".join(actions))

    def add_environment(self) -> None:
        """This Python beside torchrun, and what it needs of the real repository to read run_pretraining.py's flags."""
        self.add_stub("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (self.repository / "run_pretraining.py").write_text((ROOT / "run_pretraining.py").read_text())
        for name in ("data", "training", "kernels", "modeling.py", "optimization.py", "sparse_ops.py"):
            (self.repository / name).symlink_to(ROOT / name)

    def start(self, job: str, *arguments: str, **settings: str) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {"PATH": f"{self.bin}:{environment['PATH']}", "OUTPUT_DIR": str(self.output), "DATA_DIR": "data"}
        if job == "slurm":
            slurm = {"SUBMIT_DIR": self.repository, "JOB_ID": "77", "JOB_NUM_NODES": 2, "JOB_NODELIST": "node[1-2]"}
            environment |= {f"SLURM_{name}": str(value) for name, value in slurm.items()}
            environment["SLURM_CPUS_PER_TASK"] = "16"
        process = subprocess.Popen(
            ["bash", self.repository / "scripts" / JOBS[job], *arguments],
            cwd=self.home,
            env=environment | settings,
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_heed_signals,
        )
        self.started.append(process)
        return process

    def clean_up(self) -> None:
        """End what a failed test has left: the jobs' process groups and each torchrun's own."""
        groups = [process.pid for process in self.started]
        groups += [int(path.read_text() or 0) for path in self.home.glob("ready*")]
        for group in filter(None, groups):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        for process in self.started:
            process.wait()

    def run(self, job: str, *arguments: str, **settings: str) -> tuple[int, str]:
        process = self.start(job, *arguments, **settings)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def interrupt(
        self, job: str, number: signal.Signals, hosts: tuple[str, ...] = ("",), group: bool = False, **settings: str
    ) -> tuple[int, str]:
        """Start the job, wait until its workers are there, send the signal to the job script or to its whole group."""
        process = self.start(job, **settings)
        self.await_workers(hosts)
        (os.killpg if group else os.kill)(process.pid, number)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def await_workers(self, hosts: tuple[str, ...] = ("",)) -> None:
        deadline = time.monotonic() + 30
        ready = [self.home / f"ready{host}" for host in hosts]
        while not all(path.exists() and path.read_text() for path in ready):
            assert time.monotonic() < deadline, "the workers did not start"
            time.sleep(0.02)

    def calls(self, stub: str) -> list[str]:
        path = self.home / f"{stub}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def runs(self) -> list[tuple[str, list[str], dict[str, str]]]:
        """Each call of torchrun: the host, torchrun's own arguments, the flags of run_pretraining.py."""
        runs = []
        for host, *arguments in map(json.loads, self.calls("torchrun")):
            script = arguments.index("run_pretraining.py")
            flags = arguments[script + 1 :]
            runs.append((host, arguments[:script], dict(zip(flags[::2], flags[1::2], strict=True))))
        return runs

    def phases(self) -> list[int]:
        return [int(re.search(r"phase(\d)_config", flags["--config_file"])[1]) for _, _, flags in self.runs()]

    def saved(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("ckpt_")) for path in self.output.glob("pretrain_ckpts/ckpt_*.pt"))


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.clean_up()


# ---------------------------------------------------------------- the phases


def test_phase_2_follows_phase_1_with_the_recipes_flags_and_adapters_in_the_last_phase_alone(cluster):
    cluster.plan("save 4", "save 7")
    code, output = cluster.run("local", NPROC_PER_NODE="3", MAX_RESTARTS="2")
    assert code == 0, output
    assert cluster.phases() == [1, 2]
    (_, launcher, first), (_, _, second) = cluster.runs()
    assert launcher == ["--standalone", "--nproc_per_node", "3", "--max_restarts", "2"]
    data = f"{cluster.home}/data"
    assert first == {
        "--input_dir": f"{data}/phase1/train",
        "--output_dir": str(cluster.output),
        "--config_file": str(cluster.config(1)),
        "--optimizer": "fused-lamb",
        "--weight_decay": "0.01",
        "--num_steps_per_checkpoint": "100",
        "--pruned_matrix": "static-weight",
        "--skip_first_block": "False",
        "--skip_last_block": "False",
        "--skip_attention": "False",
        "--reduction_dim": "True",
        "--unstructured_masking": "False",
        "--unstructured_mask_sparsity": "60",
        "--sparsity_increment": "-1",
        "--add_lora": "False",
        "--lora_rank": "4",
        "--eval_dir": f"{data}/phase1/heldout",
        "--eval_interval": "100",
    }
    assert second == first | {
        "--input_dir": f"{data}/phase2/train",
        "--eval_dir": f"{data}/phase2/heldout",
        "--config_file": str(cluster.config(2)),
        "--add_lora": "lazy",
    }


def test_every_setting_reaches_run_pretraining(cluster):
    cluster.plan("save 4")
    settings = {
        "OPTIMIZER": "adamw",
        "WEIGHT_DECAY": "0.1",
        "NUM_STEPS_PER_CHECKPOINT": "7",
        "PRUNED_MATRIX": "dynamic-weight",
        "SKIP_FIRST_BLOCK": "True",
        "SKIP_LAST_BLOCK": "True",
        "SKIP_ATTENTION": "True",
        "REDUCTION_DIM": "False",
        "UNSTRUCTURED_MASKING": "True",
        "UNSTRUCTURED_MASK_SPARSITY": "75",
        "SPARSITY_INCREMENT": "0,12,-1",
        "ADD_LORA": "True",
        "LORA_RANK": "64",
    }
    extra = {
        "PHASES": "1",
        "EVAL_INTERVAL": "0",
        "DATA_DIR": "s3://bucket/bert",
        "EXTRA_FLAGS": "--local_batch_size 32",
    }
    code, output = cluster.run("local", **settings, **extra)
    assert code == 0, output
    ((_, _, flags),) = cluster.runs()
    assert {name: flags[f"--{name.lower()}"] for name in settings} == settings
    assert flags["--local_batch_size"] == "32"
    assert flags["--input_dir"] == "s3://bucket/bert/phase1/train"
    assert "--eval_dir" not in flags


def test_phase_3_reads_phase_2s_data_and_gets_the_adapters_when_it_is_the_last(cluster):
    cluster.plan("save 4", "save 7", "save 9")
    assert cluster.run("local", PHASES=" 1 2 3 ")[0] == 0
    flags = [flags for _, _, flags in cluster.runs()]
    assert [f["--add_lora"] for f in flags] == ["False", "False", "lazy"]
    assert flags[2]["--input_dir"].endswith("/phase2/train")


def test_a_phase_is_run_until_its_last_checkpoint_and_a_finished_one_not_at_all(cluster):
    cluster.plan("save 2", "save 4", "save 6", "save 7")
    assert cluster.run("local")[0] == 0
    assert cluster.phases() == [1, 1, 2, 2]
    code, output = cluster.run("local")
    assert (code, len(cluster.runs())) == (0, 4), output
    assert "phases 1 2 are finished" in output


@pytest.mark.parametrize("job", JOBS)
def test_a_failed_run_is_not_started_again(cluster, job):
    (cluster.repository / "nodes.txt").write_text("alpha\n")
    cluster.plan("fail 3", "save 4", "save 7")
    cluster.plan("fail 3", "save 4", "save 7", host="alpha")
    code, output = cluster.run(job)
    assert (code, len(cluster.runs()), cluster.calls("sbatch")) == (3, 1, []), output
    assert "error: phase 1 failed with exit code 3" in output


def test_a_run_that_saves_nothing_new_is_not_started_again(cluster):
    cluster.plan("save 2", "nothing", "nothing")
    code, output = cluster.run("local")
    assert (code, len(cluster.runs())) == (1, 2), output
    assert "without a checkpoint newer than step 2" in output


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(("child", "code"), [("sleep 0.3; exit 7", "7"), ("kill -USR1 $BASHPID", "138")])
def test_waiting_goes_on_after_a_signal_whose_trap_has_run_already(child, code):
    """Of two signals at once, as Ctrl-C sends, bash may run both traps and then end the next wait, too."""
    script = f"""source {ROOT}/scripts/launch_pretraining.sh
        wait() {{ if [[ -z ${{ended:-}} ]]; then ended=1; sleep 0.1; return 138; fi; builtin wait "$1"; }}
        ({child}) & code=0
        wait_for "$!" || code=$?
        echo "$code" """
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=10)
    assert found.stdout == f"{code}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_the_local_script_with_0(cluster, number):
    cluster.plan("wait 2", "save 4")
    code, output = cluster.interrupt("local", number, group=number == signal.SIGINT)  # as Ctrl-C sends it
    assert (code, cluster.saved(), len(cluster.runs())) == (0, [2], 1), output
    assert "start it again to go on" in output


@pytest.mark.parametrize("worker", ["late", "slow"])
def test_a_worker_that_starts_or_ends_is_not_killed_by_the_signal(cluster, worker):
    cluster.plan(f"{worker} 2")
    code, output = cluster.interrupt("local", signal.SIGTERM)
    assert (code, cluster.saved()) == (0, [2]), output


def test_a_signal_in_the_last_phases_last_step_ends_with_everything_finished(cluster):
    cluster.plan("wait 4")
    code, output = cluster.interrupt("local", signal.SIGTERM, PHASES="1")
    assert (code, cluster.saved()) == (0, [4]), output
    assert "phases 1 are finished" in output


def test_processes_that_do_not_save_in_time_are_killed_and_that_is_a_failure(cluster):
    cluster.plan("deaf")
    started = time.monotonic()
    code, output = cluster.interrupt("local", signal.SIGTERM, STOP_GRACE="1")
    assert code == 128 + signal.SIGKILL, output
    assert time.monotonic() - started < 30


REAL_RUN = """import os, sys
checkpoints = os.path.join(sys.argv[sys.argv.index("--output_dir") + 1], "pretrain_ckpts")
os.makedirs(checkpoints, exist_ok=True)
rank, worker = os.environ["RANK"], {worker!r}
os.environ["STUB_HOST"] = rank
checkpoint = os.path.join(checkpoints, f"ckpt_{{int(rank) + 1}}.pt")
os.execv(sys.executable, [sys.executable, "-SE", worker, checkpoint, "wait"])
"""


@pytest.mark.parametrize("to_everybody", [False, True], ids=["to the script", "to its group and to torchrun"])
def test_the_real_torchrun_ends_with_0_after_a_signal(cluster, to_everybody):
    """Its workers hear of it, although torchrun itself would answer TERM with exit code 1 and die of USR1."""
    (cluster.bin / "torchrun").unlink()
    (cluster.bin / "torchrun").symlink_to(Path(sys.executable).parent / "torchrun")
    (cluster.repository / "run_pretraining.py").write_text(REAL_RUN.format(worker=str(cluster.home / "worker.py")))
    process = cluster.start("local", NPROC_PER_NODE="2")
    cluster.await_workers(("0", "1"))
    if to_everybody:
        os.kill(int((cluster.home / "ready0").read_text()), signal.SIGUSR1)
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, cluster.saved()) == (0, [1, 2]), output


CRASHES = """import os, signal, sys
checkpoints = os.path.join(sys.argv[sys.argv.index("--output_dir") + 1], "pretrain_ckpts")
os.makedirs(checkpoints, exist_ok=True)
open(os.path.join(checkpoints, "attempts"), "a").write("x")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
open(os.path.join(checkpoints, "ckpt_4.pt"), "w").close()
"""


@pytest.mark.parametrize("settings,code,attempts", [({}, 0, 2), ({"MAX_RESTARTS": "0"}, 1, 1)], ids=["default", "0"])
def test_the_real_torchrun_restarts_processes_that_crashed(cluster, settings, code, attempts):
    (cluster.bin / "torchrun").unlink()
    (cluster.bin / "torchrun").symlink_to(Path(sys.executable).parent / "torchrun")
    (cluster.repository / "run_pretraining.py").write_text(CRASHES)
    ended, output = cluster.run("local", PHASES="1", NPROC_PER_NODE="1", **settings)
    assert ended == code, output
    assert (cluster.output / "pretrain_ckpts" / "attempts").read_text() == "x" * attempts
    assert cluster.saved() == ([4] if code == 0 else [])


# ---------------------------------------------------------------- SLURM


def test_slurm_submits_itself_again_when_time_runs_out(cluster):
    cluster.plan("wait 2")
    code, output = cluster.interrupt("slurm", signal.SIGUSR1, SBATCH_FLAGS="--nodes 2 --partition long")
    assert (code, cluster.saved()) == (0, [2]), output
    script = "scripts/run_pretraining_jobs_slurm.sh"
    assert cluster.calls("sbatch") == [f"--dependency=afterany:77 --nodes 2 --partition long {script}"]


def test_slurm_does_not_submit_itself_again_when_it_is_cancelled_or_finished(cluster):
    cluster.plan("wait 2")
    code, output = cluster.interrupt("slurm", signal.SIGTERM)
    assert (code, cluster.saved()) == (0, [2]), output
    cluster.plan("save 4", "save 7")
    assert cluster.run("slurm")[0] == 0
    assert cluster.calls("sbatch") == []


def test_slurm_starts_one_torchrun_a_node_that_meet_on_the_first(cluster):
    cluster.plan("save 4")
    assert cluster.run("slurm", PHASES="1")[0] == 0
    (srun,) = cluster.calls("srun")
    assert srun.startswith("--ntasks-per-node=1 --cpus-per-task=16 --kill-on-bad-exit=1 bash ")
    ((_, launcher, _),) = cluster.runs()
    meeting = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:20077", "--rdzv_id", "77"]
    assert launcher == [*meeting, "--nproc_per_node", "gpu", "--max_restarts", "3"]


def test_the_slurm_script_asks_for_a_warning_before_the_time_limit():
    text = (ROOT / "scripts" / JOBS["slurm"]).read_text()
    warning = int(re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)[1])
    grace = int(re.search(r"STOP_GRACE:-(\d+)", text)[1])
    assert grace < warning


# ---------------------------------------------------------------- ssh


def test_ssh_starts_one_torchrun_a_machine_with_the_same_settings(cluster):
    nodes = cluster.home / "my nodes"
    nodes.write_text("# rack 1\nme@alpha\n\n  beta  # second\n")
    for host in ("me@alpha", "beta"):
        cluster.plan("save 4", host=host)
    awkward = {"PHASES": "1", "OUTPUT_DIR": f"{cluster.home}/it's $HOME", "SPARSITY_INCREMENT": "0,12,-1"}
    machine = {"NODES_FILE": str(nodes), "RDZV_PORT": "29511", "SSH_FLAGS": "-i key", "REMOTE_ENV": "A=1 B=2"}
    code, output = cluster.run("ssh", **machine, **awkward)
    assert code == 0, output
    assert [call.split(" cd ")[0] for call in sorted(cluster.calls("ssh"))] == [
        f"-o BatchMode=yes -o ServerAliveInterval=30 -i key {host}" for host in ("beta", "me@alpha")
    ]
    assert all(" env STOP_ON_EOF=1 A=1 B=2 PHASES=1 " in call for call in cluster.calls("ssh"))
    (beta, beta_launcher, beta_flags), (alpha, alpha_launcher, alpha_flags) = sorted(cluster.runs(), key=lambda r: r[0])
    assert (beta, alpha) == ("beta", "me@alpha")
    assert (beta_launcher, beta_flags) == (alpha_launcher, alpha_flags)
    assert beta_launcher[:6] == ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "alpha:29511"]
    assert beta_flags["--output_dir"] == awkward["OUTPUT_DIR"]
    assert beta_flags["--sparsity_increment"] == "0,12,-1"


def two_machines(cluster: Cluster, alpha: str, beta: str) -> None:
    (cluster.repository / "nodes.txt").write_text("alpha\nbeta\n")
    cluster.plan(alpha, host="alpha")
    cluster.plan(beta, host="beta")


@pytest.mark.parametrize(
    "number,group",
    [(signal.SIGTERM, False), (signal.SIGUSR1, False), (signal.SIGTERM, True), (signal.SIGINT, True)],
    ids=["TERM", "USR1", "TERM to the group", "Ctrl-C"],
)
def test_ssh_stops_every_machine_at_a_signal(cluster, number, group):
    two_machines(cluster, "wait 2", "wait 3")
    code, output = cluster.interrupt("ssh", number, hosts=("alpha", "beta"), group=group)
    assert (code, cluster.saved(), len(cluster.runs())) == (0, [2, 3], 2), output
    assert "Killed" not in output


def test_ssh_ends_the_other_machines_at_once_when_one_fails(cluster):
    two_machines(cluster, "deaf", "fail 5")
    started = time.monotonic()
    code, output = cluster.run("ssh")
    assert code == 5, output
    assert time.monotonic() - started < 30  # STOP_GRACE is 240
    assert "error: beta ended with exit code 5" in output


def test_ssh_machines_save_and_stop_when_the_script_is_killed(cluster):
    two_machines(cluster, "wait 2", "wait 3")
    process = cluster.start("ssh")
    cluster.await_workers(("alpha", "beta"))
    process.kill()
    process.wait()
    process.communicate(timeout=60)  # its output ends with the last process that it left
    assert cluster.saved() == [2, 3]


# ---------------------------------------------------------------- settings


def recipe(job: str) -> str:
    text = (ROOT / "scripts" / JOBS[job]).read_text()
    return re.search(r"# ---- the recipe\n(.*?)# ---- the ", text, re.DOTALL)[1]


def test_the_three_scripts_have_the_same_recipe_and_ssh_forwards_all_of_it():
    assert recipe("local") == recipe("slurm") == recipe("ssh")
    forwarded = re.search(r"FORWARDED=\((.*?)\)", (ROOT / "scripts" / JOBS["ssh"]).read_text(), re.DOTALL)[1].split()
    names = re.findall(r"^(\w+)=", recipe("ssh"), re.MULTILINE)
    assert set(names) < set(forwarded)
    assert len(names) == len(set(names)) == 20


@pytest.mark.parametrize(
    "job,settings,message",
    [
        ("local", {"PHASES": "1 4"}, "error: PHASES=1 4: must be phases out of"),
        ("local", {"PHASES": " "}, "error: PHASES: must name at least one phase"),
        ("local", {"PHASES": ""}, "error: PHASES: must name at least one phase"),
        ("local", {"PHASES": "7"}, "error: PHASES=7: must be phases out of 1 2 3, in this order"),
        ("local", {"PHASES": "2 1"}, "error: PHASES=2 1: must be phases out of 1 2 3, in this order"),
        ("local", {"PHASES": "1 1"}, "error: PHASES=1 1: must be phases out of 1 2 3, in this order"),
        ("local", {"PHASES": "*"}, "error: PHASES=*: must be phases out of"),
        ("local", {"NPROC_PER_NODE": "zero"}, "error: NPROC_PER_NODE=zero: must be a whole number of at least 1, or"),
        ("slurm", {"NPROC_PER_NODE": "0"}, "error: NPROC_PER_NODE=0: must be a whole number of at least 1, or"),
        ("local", {"MAX_RESTARTS": "x"}, "error: MAX_RESTARTS=x: must be a whole number of at least 0"),
        ("local", {"EVAL_INTERVAL": "often"}, "error: EVAL_INTERVAL=often: must be a whole number of at least 0"),
        ("local", {"EVAL_INTERVAL": "08"}, "error: EVAL_INTERVAL=08: must be a whole number of at least 0"),
        ("ssh", {"STOP_GRACE": "long"}, "error: STOP_GRACE=long: must be a whole number of at least 0"),
        ("ssh", {"RDZV_PORT": "65536"}, "error: RDZV_PORT=65536: must be a whole number from 1 to 65535"),
        ("local", {"DATA_DIR": "nowhere"}, "/nowhere: must hold the folder phase1/train"),
        ("slurm", {"DATA_DIR": "nowhere"}, "/nowhere: must hold the folder phase1/train"),
        ("local", {"OUTPUT_DIR": "empty"}, "/empty: must be a folder that can be written to, or a path"),
        ("ssh", {"OUTPUT_DIR": "empty/out"}, "/empty/out: must be a folder that can be written to, or a path"),
        ("local", {"OUTPUT_DIR": "s3://bucket/out"}, "OUTPUT_DIR=s3://bucket/out: must be a folder"),
        ("local", {"CONFIG_DIR": "nowhere"}, "must hold bert_pretraining_phase1_config.json"),
        ("local", {"EXTRA_FLAGS": "--max_steps 5"}, "error: EXTRA_FLAGS=--max_steps 5: "),
        ("ssh", {"NODES_FILE": "nowhere"}, "error: NODES_FILE=nowhere: must be a file"),
        ("ssh", {"NODES_FILE": "bin"}, "error: NODES_FILE=bin: must be a file"),
        ("ssh", {"NODES_FILE": "empty"}, "error: NODES_FILE=empty: names no machine"),
        ("slurm", {"SLURM_SUBMIT_DIR": ""}, "error: SLURM_SUBMIT_DIR is not set: submit this script with sbatch"),
        ("slurm", {"SLURM_SUBMIT_DIR": "/"}, "error: / is not the folder of the repository"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(cluster, job, settings, message):
    (cluster.repository / "nodes.txt").write_text("alpha\n")
    (cluster.home / "empty").write_text("# nobody\n")
    code, output = cluster.run(job, **settings)
    assert (code, output.count("\n"), cluster.runs()) == (2, 1, []), output
    assert message in output


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"LORA_RANK": "x"}, "--lora_rank: must be a number, not x"),
        ({"OPTIMIZER": "foo"}, "--optimizer: invalid choice: 'foo'"),
        ({"PRUNED_MATRIX": "foo"}, "--pruned_matrix foo: must be one of"),
        ({"PRUNED_MATRIX": "none"}, "--add_lora lazy: adapters join pruned layers"),
        ({"EXTRA_FLAGS": "--nonsense 3"}, "unrecognized arguments: --nonsense 3"),
    ],
)
def test_what_run_pretraining_says_of_its_flags_is_said_before_torchrun_starts(cluster, settings, message):
    cluster.add_environment()
    code, output = cluster.run("local", CONFIG_DIR=str(ROOT / "config"), **settings)
    assert (code, output.count("\n"), cluster.runs()) == (2, 1, []), output
    assert output.startswith("run_pretraining.py: error: ") and message in output
    assert not cluster.output.exists()


def test_a_finished_phases_flags_are_not_asked_about(cluster):
    cluster.add_environment()
    for phase, key in ((1, "no_flag"), (2, "model_config_file")):
        config = json.loads(cluster.config(phase).read_text()) | {key: "model.json"}
        cluster.config(phase).write_text(json.dumps(config))
    code, output = cluster.run("local")
    assert (code, cluster.runs()) == (2, []) and "key no_flag is no flag" in output
    (cluster.output / "pretrain_ckpts").mkdir(parents=True)
    (cluster.output / "pretrain_ckpts" / "ckpt_4.pt").touch()
    cluster.plan("save 7")
    code, output = cluster.run("local")
    assert (code, cluster.phases()) == (0, [2]), output


def test_a_signal_while_the_flags_are_asked_about_ends_the_script_with_0(cluster):
    cluster.add_stub("python", f"#!/bin/sh\necho 0 > {cluster.home}/ready\nsleep 1\n")
    code, output = cluster.interrupt("local", signal.SIGTERM)
    assert (code, cluster.runs()) == (0, []), output
    assert "start it again to go on" in output


def test_held_out_data_must_be_there_only_where_it_is_evaluated_on(cluster):
    (cluster.home / "data" / "phase1" / "heldout").rmdir()
    code, output = cluster.run("local", PHASES="1")
    assert (code, output.count("\n"), cluster.runs()) == (2, 1, []), output
    assert "must hold the folder phase1/heldout" in output
    cluster.plan("save 4")
    assert cluster.run("local", PHASES="1", EVAL_INTERVAL="0")[0] == 0


def test_ssh_asks_the_machines_for_the_data_and_not_the_one_that_it_starts_from(cluster):
    (cluster.repository / "nodes.txt").write_text("alpha\n")
    code, output = cluster.run("ssh", DATA_DIR="nowhere")
    assert (code, len(cluster.calls("ssh")), cluster.runs()) == (2, 1, []), output
    assert "launch_pretraining.sh: error: DATA_DIR=" in output


@pytest.mark.parametrize("job", JOBS)
def test_help_prints_the_head_comment_and_every_setting_and_starts_nothing(cluster, job):
    for word in ("--help", "-h"):
        code, output = cluster.run(job, word, SLURM_SUBMIT_DIR="" if job == "slurm" else "/")
        assert (code, cluster.runs()) == (0, []), output
        assert output.startswith("Pretrain BERT-Large by the SLoPe recipe on ")
        assert "#" not in output.replace("#SBATCH", "").replace("# starts a comment", "")
        for name in re.findall(r"^(\w+)=", recipe(job), re.MULTILINE):
            assert re.search(rf"^  {name}=", output, re.MULTILINE), name
        assert "  SPARSITY_INCREMENT=-1             -1: 2:4 in every block\n" in output
        assert "  CONFIG_DIR=config  " in output


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("argument", ["--dry_run", "OUTPUT_DIR=out"])
def test_any_other_argument_is_refused(cluster, job, argument):
    (cluster.repository / "nodes.txt").write_text("alpha\n")
    code, output = cluster.run(job, argument)
    assert (code, output.count("\n"), cluster.runs()) == (2, 1, []), output
    assert f"error: unknown argument {argument}: settings are variables" in output


def test_a_config_without_its_number_of_steps_is_refused(cluster):
    cluster.config(2).write_text('{"max_steps": 3}')
    code, output = cluster.run("local")
    assert (code, cluster.runs()) == (2, []), output
    assert "bert_pretraining_phase2_config.json: must hold previous_phase_end_step" in output


def test_run_pretraining_takes_the_scripts_flags_with_the_published_configs(cluster):
    """What the scripts pass parses, and every phase begins where the one before it ends."""
    cluster.plan("save 7038", "save 8601", "save 8701")
    code, output = cluster.run("local", PHASES="1 2 3", CONFIG_DIR=str(ROOT / "config"))
    assert code == 0, output
    end, batches = 0, []
    for _, _, flags in cluster.runs():
        args = parse_arguments([word for pair in flags.items() for word in pair])
        assert args.previous_phase_end_step == end
        assert args.precision == "fp16"
        end += args.max_steps
        batches.append((args.global_batch_size, args.local_batch_size, args.max_predictions_per_seq))
    assert end == 8701
    assert batches == [(65536, 64, 20), (32768, 8, 80), (32768, 8, 80)]


def test_setup_mds_trial_without_a_gpu_runs_the_demos_model_through_both_phases(cluster):
    """Its commands as they stand, but for the one that makes the data."""
    section = (ROOT / "SETUP.md").read_text().split("## 3. A trial run")[1].split("\n## ")[0]
    shorten, without_gpu = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    data, commands = without_gpu.split("\n", 1)
    assert data.startswith("bash scripts/create_datasets.sh --output results/trial_data ")
    cluster.add_environment()
    shutil.rmtree(cluster.repository / "config")
    shutil.copytree(ROOT / "config", cluster.repository / "config")
    shutil.copytree(cluster.home / "data", cluster.repository / "results" / "trial_data")
    cluster.plan("save 20", "save 40")
    environment = os.environ | {"PATH": f"{cluster.bin}:{os.environ['PATH']}"}
    trial = shorten.rpartition("CONFIG_DIR=")[0] + commands
    found = subprocess.run(
        ["bash", "-ec", trial], cwd=cluster.repository, env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0 and "phases 1 2 are finished" in found.stderr, found.stderr
    assert [flags["--precision"] for _, _, flags in cluster.runs()] == ["fp32", "fp32"]
    for phase in (1, 2):
        config = json.loads(
            (cluster.repository / f"trial_config/bert_pretraining_phase{phase}_config.json").read_text()
        )
        assert config["model_config_file"] == "config/bert_demo_config.json"
    assert "/trial_config/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("pruned,add_lora", [("static-weight", "lazy"), ("none", None)])
def test_the_demos_config_serves_the_sparse_and_the_dense_run(pruned, add_lora):
    """A dense model takes no adapters, so the config leaves them to the command line."""
    config = str(ROOT / "config" / "bert_pretraining_demo_config.json")
    flags = ["--config_file", config, "--input_dir", "i", "--output_dir", "o", "--pruned_matrix", pruned]
    args = parse_arguments([*flags, *([] if add_lora is None else ["--add_lora", add_lora])])
    assert args.add_lora == (add_lora or "False")
    assert args.lazy_lora_fraction == 0.1
    assert args.precision == "fp32"
