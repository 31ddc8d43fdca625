"""Calls of scripts/reproduce.py in this process, and its settings.

Apart from reproduction_data.py, which the forked processes import, too.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from pretraining_runs import ROOT
from reproduction_data import Forked

from training.flags import run_door

sys.path.insert(0, str(ROOT / "scripts"))

import reproduce  # noqa: E402  (scripts, found through the line above)
import run_processes  # noqa: E402
from reproduction_runs import Settings  # noqa: E402


def flags(data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--output_dir", str(output), "--data_dir", str(data), "--skip_data"),
        *("--model_config_file", str(data / "model.json"), "--epochs", "20", "--global_batch_size", "6"),
        *("--local_batch_size", "3", "--learning_rate", "4e-3", "--sparse_learning_rate", "5e-3"),
        *("--precision", "fp32"),
        *("--finetune_seeds", "3,5", "--finetune_steps", "2", *more),
    ]


def call(words: list[str], start=Forked) -> int:
    """The exit code of the script in this process, whose commands are `start`'s."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reproduce.py", *words])
        patch.setattr(run_processes, "start", start)
        try:
            run_door(reproduce.main)
        except SystemExit as end:
            return end.code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def settings(**changes) -> Settings:
    model = json.loads((ROOT / "config/bert_reproduction_config.json").read_text())
    training = {
        "epochs": 10,
        "global_batch_size": 256,
        "local_batch_size": 64,
        "learning_rate": 2e-3,
        "sparse_learning_rate": 3e-3,
        "lora_lr_scale": 0.5,
    }
    training |= {"warmup_proportion": 0.1, "seed": 42, "precision": "bf16", "finetune_seeds": "0,1,2"}
    training |= {"finetune_steps": None, "model": model, "sequences": 305_129, "sequence_length": 128}
    return Settings(**(training | changes))


def report_rows(output: Path, capsys) -> dict[str, list[str]]:
    assert call(["--report", "--output_dir", str(output)]) == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1:] for row in table if row}
