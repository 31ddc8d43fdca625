"""The job scripts with stubs of torchrun, srun, sbatch, scontrol and ssh first on PATH.

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
        modules = {path.name for path in ROOT.glob("*.py")} - {"run_pretraining.py"}
        for name in ("data", "training", "kernels", *modules):
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
