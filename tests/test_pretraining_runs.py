"""Runs of one process: exact resumption and stops; phases; adapters; where a run starts from."""

from __future__ import annotations

import math
import random
import shutil
import signal
import subprocess
import sys
import time

import h5py
import pytest
import torch
from pretraining_runs import (
    MODEL,
    ROOT,
    VOCAB_SIZE,
    assembled,
    begin_run,
    checkpoint,
    dies_after,
    losses,
    metrics,
    run,
    snapshot,
    wait_for_step,
)

from configuration import BertConfig
from modeling import BertForPreTraining
from optimization import learning_rate
from sparse_ops import SparseLinear, named_layers
from training.checkpoint import load_checkpoint, saved_steps
from training.hf_folders import save_hf_folder


# ------------------------------------------------------------------------------------------------- the very same losses
def test_the_same_command_gives_the_same_losses_and_another_seed_others(files, whole_run, tmp_path):
    run(files.flags(tmp_path / "again", eval_dir=files.heldout, eval_interval=10))
    assert losses(tmp_path / "again") == losses(whole_run)
    heldout = [[row["heldout_mlm_loss"] for row in metrics(output)] for output in (tmp_path / "again", whole_run)]
    assert heldout[0] == heldout[1]
    run(files.flags(tmp_path / "other", seed=43))
    assert not {loss for _, loss in losses(tmp_path / "other")} & {loss for _, loss in losses(whole_run)}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_loader_workers_changes_nothing(files, whole_run, tmp_path, workers):
    run(files.flags(tmp_path, num_workers=workers))
    assert losses(tmp_path) == losses(whole_run)


def test_recomputed_activations_change_nothing(files, whole_run, tmp_path):
    run([*files.flags(tmp_path), "--checkpoint_activations"])
    assert losses(tmp_path) == losses(whole_run)


def test_evaluation_and_checkpoints_do_not_disturb_training(files, whole_run, tmp_path):
    run(files.flags(tmp_path, num_steps_per_checkpoint=1, eval_dir=files.heldout, eval_interval=1))
    assert losses(tmp_path) == losses(whole_run)


def test_killed_again_and_again_and_resumed(files, whole_run, tmp_path):
    """Dropout on; kills before the adapters join (step 15), right before and after it, and past it."""
    flags = files.flags(tmp_path, num_steps_per_checkpoint=3)
    for step in (2, 5, 9, 14, 15, 16, 18, 19):
        dies_after(step, flags)
    resumed = run(flags).stderr
    assert "resumed after step 18" in resumed
    assert losses(tmp_path) == losses(whole_run)
    final, whole = checkpoint(tmp_path, 20), checkpoint(whole_run, 20)
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, final["model"][name]), name


SETTINGS = [
    {"double_prune_interval": 3, "num_steps_per_checkpoint": 5},  # resumes in the middle of an interval
    {"double_prune_interval": 0},
    {"double_prune": False},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"optimizer": "fused-lamb", "lr_decay": "linear", "warmup_proportion": 0.4},
    {"optimizer": "adamw", "lr_decay": "cosine"},
    {"optimizer": "adam"},
    {"optimizer": "sgd", "learning_rate": 0.1},
    {"pruned_matrix": "dynamic-weight"},
    {"pruned_matrix": "static-input", "reduction_dim": False},
    {"unstructured_masking": True},
    {"pruned_matrix": "none", "add_lora": "False"},
    {"num_workers": 1, "global_batch_size": 7},
    {"add_lora": "True", "mask_init": "random"},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=[" ".join(map(str, changes.values())) for changes in SETTINGS])
def test_killed_and_resumed_with_other_settings(files, tmp_path, changes):
    changes = {"max_steps": 10, "num_steps_per_checkpoint": 4} | changes
    run(files.flags(tmp_path / "whole", **changes))
    steps = random.Random(str(changes)).sample(range(5, 10), 2)
    for step in sorted(steps):
        dies_after(step, files.flags(tmp_path / "killed", **changes))
    run(files.flags(tmp_path / "killed", **changes))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert all(math.isfinite(float(loss)) for _, loss in losses(tmp_path / "whole"))


def test_a_plain_process_killed_from_outside_at_any_moment(files, tmp_path):
    """The command itself, SIGKILLed some milliseconds after a checkpoint appeared, twice."""
    changes = {"max_steps": 150, "num_steps_per_checkpoint": 10, "lazy_lora_fraction": 0.7}
    run(files.flags(tmp_path / "whole", **changes))
    output = tmp_path / "killed"
    command = [sys.executable, "run_pretraining.py", *files.flags(output, **changes)]
    killed = []
    for step in (11, 61):
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            wait_for_step(output, step)
            time.sleep(random.random() * 0.05)
            process.kill()
        killed.append(losses(output)[-1][0])
    assert killed[-1] < 150
    run(files.flags(output, **changes))
    assert losses(output) == losses(tmp_path / "whole"), killed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_it_saves_and_goes_on_later(files, tmp_path, number):
    flags = files.flags(tmp_path, max_steps=100_000, num_steps_per_checkpoint=100_000)
    stopped = []
    for _ in range(2):
        process = begin_run(flags)
        wait_for_step(tmp_path, (stopped[-1] if stopped else 0) + 3)
        process.signal(number)
        ended = process.finish()
        assert ended.code == 0, ended
        assert f"stopped after step {losses(tmp_path)[-1][0]} by {number.name}" in ended.stderr
        stopped.append(losses(tmp_path)[-1][0])
        assert saved_steps(tmp_path / "pretrain_ckpts") == stopped
    assert [step for step, _ in losses(tmp_path)] == list(range(1, stopped[-1] + 1))


def test_a_finished_run_started_again_takes_no_step(files, whole_run):
    before = snapshot(whole_run)
    ended = run(files.flags(whole_run))
    assert ended.stderr.startswith("finished") and ended.stderr.count("\n") == 1
    assert snapshot(whole_run) == before


# -------------------------------------------------------------------------------------------------------------- phases
@pytest.fixture(scope="module")
def two_phases(files, tmp_path_factory):
    """Six steps of phase 1 and five of phase 2 in one output directory, no adapters."""
    output = tmp_path_factory.mktemp("phases")
    flags = {"add_lora": "False", "num_steps_per_checkpoint": 2, "keep_checkpoints": 1}
    run(files.flags(output, max_steps=6, log_prefix="phase1_log", **flags))
    phase2 = {"max_steps": 5, "previous_phase_end_step": 6, "learning_rate": 2e-3, "warmup_proportion": 0.5}
    run(files.flags(output, log_prefix="phase2_log", **(flags | phase2)))
    return output


def test_steps_are_cumulative_and_the_schedule_is_the_phases_own(two_phases):
    assert [step for step, _ in losses(two_phases, "phase1_log")] == [1, 2, 3, 4, 5, 6]
    rows = metrics(two_phases, "phase2_log")
    assert [int(row["step"]) for row in rows] == [7, 8, 9, 10, 11]
    rates = [learning_rate(s, base=2e-3, total_steps=5, warmup_proportion=0.5, decay="poly") for s in range(1, 6)]
    assert [float(row["learning_rate"]) for row in rows] == rates
    assert float(rows[1]["average_loss"]) == (float(rows[0]["step_loss"]) + float(rows[1]["step_loss"])) / 2
    assert saved_steps(two_phases / "pretrain_ckpts") == [6, 11]  # the last of phase 1 stays, whatever is kept


def test_a_phase_takes_over_weights_and_moments_and_starts_counting_anew(files, two_phases, tmp_path):
    """As NVIDIA's suite does it: step counts, schedule and data begin again, moments stay."""
    (tmp_path / "pretrain_ckpts").mkdir()
    shutil.copy(two_phases / "pretrain_ckpts" / "ckpt_6.pt", tmp_path / "pretrain_ckpts")
    phase1 = checkpoint(tmp_path, 6)
    begun = assembled(files.flags(tmp_path, previous_phase_end_step=6, add_lora="False"))
    assert (begun.step, begun.samples, begun.loss_total) == (6, 0, 0.0)
    for name, tensor in begun.engine.model.state_dict().items():
        assert torch.equal(tensor, phase1["model"][name]), name
    state = begun.engine.state_dict()["optimizer"]["state"]
    assert state.keys() == phase1["optimizer"]["state"].keys()
    for name, before in phase1["optimizer"]["state"].items():
        assert (before["step"], state[name]["step"]) == (6, 0)
        assert torch.equal(before["exp_avg"], state[name]["exp_avg"])
        assert torch.equal(before["exp_avg_sq"], state[name]["exp_avg_sq"])
    assert any(before["exp_avg"].abs().sum() > 0 for before in phase1["optimizer"]["state"].values())
    phase2 = checkpoint(two_phases, 11)
    assert {entry["step"] for entry in phase2["optimizer"]["state"].values()} == {5}
    assert phase2["data"] == {"samples": 5 * 12, "total": 63} and phase2["phase_start"] == 6


def test_a_phase_killed_in_its_middle_resumes_there(files, two_phases, tmp_path):
    flags = {"add_lora": "False", "num_steps_per_checkpoint": 2}
    run(files.flags(tmp_path, max_steps=6, **flags))
    phase2 = {"max_steps": 5, "previous_phase_end_step": 6, "learning_rate": 2e-3, "warmup_proportion": 0.5}
    phase2 = files.flags(tmp_path, log_prefix="phase2_log", **(flags | phase2))
    dies_after(9, phase2)
    assert "resumed after step 8" in run(phase2).stderr
    assert losses(tmp_path, "phase2_log") == losses(two_phases, "phase2_log")
    assert run(files.flags(tmp_path, max_steps=6, **flags)).stderr.startswith("finished")  # phase 1, started again


def test_lazy_adapters_count_the_steps_of_all_phases(files, tmp_path):
    flags = {"num_steps_per_checkpoint": 2, "lazy_lora_fraction": 0.25}
    run(files.flags(tmp_path, max_steps=8, log_prefix="phase1_log", **(flags | {"add_lora": "False"})))
    run(files.flags(tmp_path, max_steps=8, previous_phase_end_step=8, log_prefix="phase2_log", **flags))
    assert [row["adapters"] for row in metrics(tmp_path, "phase1_log")] == ["0"] * 8
    assert [row["adapters"] for row in metrics(tmp_path, "phase2_log")] == ["0"] * 4 + ["1"] * 4  # 0.25 of 16
    run(files.flags(tmp_path, max_steps=2, previous_phase_end_step=16, log_prefix="phase3_log", add_lora=None))
    assert [row["adapters"] for row in metrics(tmp_path, "phase3_log")] == ["1", "1"]  # they never go


def test_a_dense_phase_is_pruned_where_the_next_begins(files, tmp_path):
    dense = {"add_lora": "False", "max_steps": 4}
    run(files.flags(tmp_path, pruned_matrix="none", **dense))
    begun = assembled(files.flags(tmp_path, previous_phase_end_step=4, **dense))
    check_pruned_by_magnitude(begun.engine.model, checkpoint(tmp_path, 4)["model"])
    run(files.flags(tmp_path, previous_phase_end_step=4, **dense))
    assert checkpoint(tmp_path, 8)["sparsity"]["pruned_matrix"] == "static-weight"


# ------------------------------------------------------------------------------------------------------------ adapters
def test_adapters_change_no_output_at_the_step_they_join(files, whole_run, tmp_path):
    run(files.flags(tmp_path, add_lora="False"))
    without, joined = losses(tmp_path), losses(whole_run)
    assert without[:15] == joined[:15]  # step 15 computes with them, but R is still 0
    assert all(a != b for a, b in zip(without[15:], joined[15:], strict=True))


def test_adapters_by_hand_from_the_first_step_of_a_run(files, whole_run, tmp_path):
    """--add_lora True, given when a run is stopped and started again: they are there from its first step on."""
    flags = {"num_steps_per_checkpoint": 7, "max_steps": 20}
    dies_after(8, files.flags(tmp_path, add_lora="False", **flags))
    assert "resumed after step 7" in run(files.flags(tmp_path, add_lora="True", **flags)).stderr
    assert [row["adapters"] for row in metrics(tmp_path)] == ["0"] * 7 + ["1"] * 13
    assert losses(tmp_path)[:8] == losses(whole_run)[:8]
    assert losses(tmp_path)[8] != losses(whole_run)[8]
    run(files.flags(tmp_path / "new", add_lora="True", max_steps=2, lora_rank=3))
    assert [row["adapters"] for row in metrics(tmp_path / "new")] == ["1", "1"]
    assert checkpoint(tmp_path / "new", 2)["model"]["bert.encoder.layer.1.output.dense.lora_left"].shape == (32, 3)


# ---------------------------------------------------------------------------------------------------- where it starts
def check_pruned_by_magnitude(model, dense: dict[str, torch.Tensor]) -> None:
    layers = named_layers(model, SparseLinear)
    assert len(layers) == 9
    for name, layer in layers:
        weight = dense[f"{name}.weight"]
        groups = weight.abs().unflatten(1, (-1, 4))
        largest = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.topk(2).indices, True).flatten(1)
        assert torch.equal(layer.mask(), largest), name
        assert torch.equal(layer.dense_weight(), torch.where(largest, weight, 0.0)), name
    first_query = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(model.state_dict()[first_query], dense[first_query])


def test_from_a_dense_checkpoint_of_ours(files, tmp_path):
    run(files.flags(tmp_path / "dense", pruned_matrix="none", add_lora="False", max_steps=3))
    dense = checkpoint(tmp_path / "dense", 3)["model"]
    flags = files.flags(
        tmp_path / "out", init_checkpoint=tmp_path / "dense" / "pretrain_ckpts" / "ckpt_3.pt", max_steps=2
    )
    check_pruned_by_magnitude(assembled(flags).engine.model, dense)
    run(flags)
    assert [step for step, _ in losses(tmp_path / "out")] == [1, 2]
    entries = checkpoint(tmp_path / "out", 2)["optimizer"]["state"]
    assert entries["bert.pooler.dense.weight"]["step"] == 2  # a fresh optimizer


def test_from_a_hugging_face_folder(files, tmp_path):
    torch.manual_seed(1)
    config = BertConfig.from_dict(MODEL)
    model = BertForPreTraining(config)
    save_hf_folder(tmp_path / "hf", config, model.state_dict())
    flags = files.flags(tmp_path / "out", init_checkpoint=tmp_path / "hf", max_steps=2)
    check_pruned_by_magnitude(assembled(flags).engine.model, model.state_dict())
    assert "start anew" not in run(flags).stderr
    flags = files.flags(tmp_path / "dense", init_checkpoint=tmp_path / "hf", pruned_matrix="none", add_lora="False")
    begun = assembled(flags).engine.model.state_dict()
    assert all(torch.equal(begun[name], tensor) for name, tensor in model.state_dict().items())


def test_from_a_sparse_checkpoint_with_its_masks_and_adapters(files, whole_run, tmp_path):
    init = whole_run / "pretrain_ckpts" / "ckpt_20.pt"
    flags = files.flags(tmp_path, init_checkpoint=init, pruned_matrix=None, add_lora=None, max_steps=2, seed=7)
    begun = assembled(flags)
    for name, tensor in begun.engine.model.state_dict().items():
        assert torch.equal(tensor, load_checkpoint(init)["model"][name]), name
    assert begun.adapter_step is None and begun.step == 0
    run(flags)
    assert checkpoint(tmp_path, 2)["sparsity"] == load_checkpoint(init)["sparsity"]


def test_weights_without_a_head_start_that_head_anew_and_say_so(files, tmp_path):
    config = BertConfig.from_dict(MODEL | {"next_sentence": False})
    save_hf_folder(tmp_path / "hf", config, BertForPreTraining(config).state_dict())
    said = run(files.flags(tmp_path / "out", init_checkpoint=tmp_path / "hf", max_steps=1)).stderr
    assert "start anew" in said and "cls.seq_relationship.weight" in said and "bert.encoder" not in said


def run_one_step_ahead() -> None:
    """Called before a run: a step's losses are read when the next one has been given, as on a GPU."""
    from training.pretraining import PretrainingRun

    PretrainingRun.STEPS_AHEAD = {"cpu": 1}


def test_a_step_ahead_changes_nothing(files, tmp_path, whole_run):
    """Losses, evaluations, checkpoints and the adapters' switch, where something follows a step and where not."""
    run(files.flags(tmp_path, eval_dir=files.heldout, eval_interval=10), run_one_step_ahead)
    timed = {"sequences_per_second", "tokens_per_second", "data_wait_seconds", "tflops"}
    found, expected = (
        [{name: value for name, value in row.items() if name not in timed} for row in metrics(output)]
        for output in (tmp_path, whole_run)
    )
    assert found == expected
    names = [sorted(path.name for path in (output / "pretrain_ckpts").iterdir()) for output in (tmp_path, whole_run)]
    assert names[0] == names[1]


def test_a_wrong_shard_ends_a_run_that_is_a_step_ahead_after_the_good_steps(files, tmp_path):
    """What was taken is logged before the error is told."""
    shards = tmp_path / "shards"
    shutil.copytree(files.train, shards)
    with h5py.File(shards / "shard_1.hdf5", "r+") as file:
        file["input_ids"][5, 3] = VOCAB_SIZE + 7
        del file.attrs["max_token_id"], file.attrs["vocab_size"]
    flags = files.flags(tmp_path / "out", input_dir=shards, max_steps=30)
    ended = begin_run(flags, run_one_step_ahead).finish()
    assert ended.code == 2
    assert len(ended.stderr.splitlines()[-1:]) == 1 and "shard_1.hdf5" in ended.stderr
    steps = [int(row["step"]) for row in metrics(tmp_path / "out")]
    assert steps == list(range(1, len(steps) + 1)) and steps
