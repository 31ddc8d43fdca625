"""Every command of the README is run, in a copy of the repository whose model, phases and corpus are small."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from text_factory import make_corpus

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    command.replace("\\\n", " ").strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for command in re.split(r"(?<!\\)\n", block)
    if command.strip()
]
# What the copy does smaller. The corpus is the folder of text that another command of the README reads.
SMALLER = {
    "--corpus large": "--corpus my_text --vocab_size 300",
    "--corpus my_text --nproc": "--corpus my_text --vocab_size 300 --nproc",
    "ckpt_8601.pt": "ckpt_4.pt",
    "bash scripts/test.sh": "bash scripts/test.sh tests/test_metrics.py",
}
# Layers larger than the adapters of the README, of rank 64.
SIZES = {"hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 160}
STEPS = {"max_steps": 2, "global_batch_size": 4, "local_batch_size": 1, "fp16": False}


def shrink(path: Path, changes: dict) -> None:
    content = json.loads(path.read_text())
    assert set(changes) - {"fp16"} <= set(content)  # a key that the file lacks would shrink nothing
    path.write_text(json.dumps(content | changes))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "repository"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "demo", "results", "datasets")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    shrink(folder / "config/bert_large_uncased_config.json", SIZES | {"vocab_size": 300})
    shrink(folder / "config/bert_pretraining_phase1_config.json", STEPS)
    shrink(folder / "config/bert_pretraining_phase2_config.json", STEPS | {"previous_phase_end_step": 2})
    make_corpus(folder / "my_text")
    return folder


def test_the_readme_has_its_commands():
    assert COMMANDS[:2] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    assert sum(command.startswith("torchrun") for command in COMMANDS) == 2
    for part in ("ckpt_8601.pt", "--corpus large", "--corpus my_text --nproc"):
        assert any(part in command for command in COMMANDS)


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[" ".join(c.split()[:2]) for c in COMMANDS])
def test_command(copy, number):
    """In the README's order, since later commands read what earlier ones wrote."""
    command = COMMANDS[number]
    for written, smaller in SMALLER.items():
        command = command.replace(written, smaller)
    environment = os.environ | {
        "PATH": f"{copy}/.venv/bin:{os.environ['PATH']}",
        "DEMO_STEPS": "20",
        "DEMO_FINETUNE_STEPS": "5",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=copy, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
    if "quickstart" in command:
        for row in ("best fixed guess (unigram entropy)", "STS-B, dev spearman", "SST-2-shaped, dev accuracy"):
            assert row in done.stdout
        assert (copy / "demo/loss_curve.png").stat().st_size > 10_000
