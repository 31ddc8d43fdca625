"""The job scripts' settings: the recipe, help, what is refused, and what reaches run_pretraining.py."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
from job_cluster import JOBS, ROOT

from run_pretraining import parse_arguments


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
