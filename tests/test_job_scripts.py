"""What the job scripts start, and what they do at signals and failures; once with the real torchrun."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_cluster import JOBS, ROOT, Cluster

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
