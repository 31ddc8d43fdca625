"""Flags: the words they take, JSON files of defaults, and who speaks when they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest
from pretraining_runs import ROOT

import run_glue
import run_squad
from data.glue import TASKS
from run_pretraining import parse_arguments
from training.errors import UsageError
from training.flags import boolean, real, run_door, whole

GIVEN = ["--input_dir", "in", "--output_dir", "out", "--model_config_file", "model.json"]
PUBLISHED_DEFAULTS = {
    "masked_token_fraction": 0.2,
    "lora_rank": 4,
    "lora_weight_decay": 1e-4,
    "lora_lr_scale": 1.0,
    "unstructured_mask_sparsity": 60.0,
    "num_steps_per_checkpoint": 100,
    "seed": 42,
    "warmup_proportion": 0.01,
    "optimizer": "lamb",
    "pruned_matrix": "none",
    "add_lora": "False",
    "reduction_dim": True,
    "skip_first_block": False,
    "lazy_lora_fraction": 0.01,
    "double_prune_interval": 1,
    "keep_checkpoints": 3,
    "precision": "fp32",
}


# ----------------------------------------------------------------------------------------------------------- the words
def test_booleans_are_the_words_true_and_false():
    assert [boolean(word) for word in ("True", "False", True, False)] == [True, False, True, False]
    for word in ("true", "1", "", "yes", 1):
        with pytest.raises(ArgumentTypeError, match="True or False"):
            boolean(word)


def test_whole_numbers():
    assert [whole(1)(word) for word in ("7", "7038.0", 5, "1e3")] == [7, 7038, 5, 1000]
    assert isinstance(whole(1)("7038.0"), int)
    for word in ("0", "1.5", "x", "", "nan", "inf", True, "11"):
        with pytest.raises(ArgumentTypeError, match="must be a"):
            whole(1, 10)(word)


def test_numbers():
    assert [real(0, 1)(word) for word in ("0", "1", "0.01", 0.5, "1e-3")] == [0, 1, 0.01, 0.5, 0.001]
    for word in ("-0.1", "1.1", "nan", "-inf", "half", False):
        with pytest.raises(ArgumentTypeError, match="must be a number"):
            real(0, 1)(word)


@pytest.mark.parametrize(("words", "value"), [([], False), (["--fp16"], True), (["--fp16", "False"], False)])
def test_a_switch_stands_alone_or_with_a_word(words, value):
    assert parse_arguments([*GIVEN, *words]).fp16 is value


# ------------------------------------------------------------------------------------------------------------ defaults
def test_the_help_names_every_task_and_no_default_that_there_is_not(capsys):
    for door in (run_glue, run_squad):
        with pytest.raises(SystemExit):
            door.parse_arguments(["--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert "(default: )" not in words
        lower = words.partition("--do_lower_case [True|False] ")[2].partition(" --")[0]
        assert lower == "lower-case the text; when not given, as the model's configuration says"
        if door is run_glue:
            listed = words.rpartition("--task_name TASK ")[2].partition(" --")[0].replace(" ", "")  # lines break at "-"
            assert listed.endswith(":" + ",".join(TASKS).lower())


def test_defaults_are_the_published_ones_and_the_help_shows_every_one():
    args = vars(parse_arguments(GIVEN))
    assert {name: args[name] for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS
    ended = subprocess.run(
        [sys.executable, "run_pretraining.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    words = " ".join(ended.stdout.split())
    for name in args.keys() - {"given", "given_on_command_line"}:
        assert f"--{name}" in words, name
    for name, default in PUBLISHED_DEFAULTS.items():
        after = words.rpartition(f" --{name} ")[2]
        assert f"(default: {default})" in after.partition(" --")[0], name


def test_the_file_sets_defaults_and_the_command_line_wins(tmp_path):
    path = tmp_path / "phase.json"
    path.write_text(json.dumps({"max_steps": 7038.0, "learning_rate": "0.006", "seed": 1, "lora_rank": None}))
    args = parse_arguments([*GIVEN, "--config_file", str(path), "--seed", "2"])
    assert (args.max_steps, args.learning_rate, args.seed, args.lora_rank) == (7038, 0.006, 2, 4)
    assert {"max_steps", "learning_rate", "seed"} <= args.given
    assert "seed" in args.given_on_command_line and "max_steps" not in args.given_on_command_line
    assert "weight_decay" not in args.given


def test_the_path_flags_may_come_from_the_file(tmp_path):
    path = tmp_path / "phase.json"
    path.write_text(json.dumps({"input_dir": "in", "output_dir": "out", "model_config_file": "model.json"}))
    args = parse_arguments(["--config_file", str(path)])
    assert (args.input_dir, args.output_dir, args.model_config_file) == ("in", "out", "model.json")


@pytest.mark.parametrize("name", ["phase1", "phase2", "phase3", "demo"])
def test_the_published_configurations_parse(name):
    args = parse_arguments([*GIVEN[:4], "--config_file", str(ROOT / f"config/bert_pretraining_{name}_config.json")])
    assert (ROOT / args.model_config_file).is_file()


def test_both_spellings_of_the_launchers_flag():
    for word in ("--local_rank=3", "--local-rank=3"):
        assert parse_arguments([*GIVEN, word]).local_rank == 3


# In the file, on the command line -> the precision
PRECISIONS = [
    ({}, [], "fp32"),
    ({}, ["--fp16"], "fp16"),
    ({}, ["--precision", "bf16"], "bf16"),
    ({"fp16": True}, [], "fp16"),
    ({"fp16": True}, ["--precision", "bf16"], "bf16"),
    ({"precision": "bf16"}, ["--fp16"], "fp16"),
    ({"fp16": True}, ["--fp16", "False"], "fp32"),
    ({"precision": "fp16"}, ["--fp16", "False"], "fp32"),
    ({}, ["--fp16", "--precision", "fp16"], "fp16"),
    ({}, ["--fp16", "False", "--precision", "bf16"], "bf16"),
]


@pytest.mark.parametrize(("values", "words", "precision"), PRECISIONS)
def test_one_precision_from_two_flags(tmp_path, values, words, precision):
    path = tmp_path / "phase.json"
    path.write_text(json.dumps(values))
    args = parse_arguments([*GIVEN, "--config_file", str(path), *words])
    assert (args.precision, args.fp16) == (precision, precision == "fp16")  # logs and checkpoints hold both


# ------------------------------------------------------------------------------------------------------ who speaks, how
def wrong() -> None:
    raise UsageError("--flag: wrong\nin two lines")


def test_the_first_process_of_a_node_speaks_and_all_end_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/run_it.py"])
    for local_rank, said in (("0", "run_it.py: error: --flag: wrong in two lines\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as ended:
            run_door(wrong)
        assert ended.value.code == 2
        assert capsys.readouterr().err == said


def test_an_error_of_the_program_is_not_dressed_up():
    def broken():
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run_door(broken)
