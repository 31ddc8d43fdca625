"""Checkpoints: what they hold, that they are whole or not there, and that damage is seen."""

from __future__ import annotations

import functools
import os
import signal

import numpy as np
import pytest
import torch
from pretraining_runs import begin_run, losses, run

from sparse_ops import SparseLinear, named_layers
from training.assembly import build_pretraining_model
from training.checkpoint import (
    PARTS,
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    remove_old_checkpoints,
    remove_unfinished_checkpoints,
    save_checkpoint,
    saved_steps,
)
from training.errors import UsageError


def small_state(step: int = 5) -> dict:
    return {part: {} for part in PARTS} | {
        "step": step,
        "model": {"weight": torch.arange(60.0).view(20, 3), "bias": torch.arange(7)},
        "words": ["a", "b"],
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


# ---- what a run's checkpoints hold
def test_a_checkpoint_loads_with_weights_only_and_holds_plain_values_alone(whole_run):
    state = torch.load(whole_run / "pretrain_ckpts" / "ckpt_20.pt", weights_only=True)

    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                check(part)
        else:
            assert value is None or type(value) in (str, int, float, bool, torch.Tensor), value

    check(state)


def test_what_a_checkpoint_says_of_its_run(whole_run):
    state = load_checkpoint(whole_run / "pretrain_ckpts" / "ckpt_20.pt")
    assert {"format_version", "model", "optimizer", "scaler", "data", "sparsity", "model_config", "arguments"} < set(
        state
    )
    assert (state["step"], state["phase_start"]) == (20, 0)
    assert state["data"] == {"samples": 20 * 12, "total": 63}
    assert state["sparsity"]["pruned_matrix"] == "static-weight" and state["sparsity"]["lora_rank"] == 4
    assert state["arguments"]["learning_rate"] == 4e-3 and state["arguments"]["seed"] == 42
    assert state["model_config"]["hidden_size"] == 16
    before = load_checkpoint(whole_run / "pretrain_ckpts" / "ckpt_10.pt")
    assert before["sparsity"]["lora_rank"] == 0


def test_pruned_layers_are_stored_pruned(whole_run):
    state = load_checkpoint(whole_run / "pretrain_ckpts" / "ckpt_20.pt")
    layers = named_layers(build_pretraining_model(state), SparseLinear)
    assert len(layers) == 9
    for name, layer in layers:
        assert f"{name}.weight" not in state["model"]
        dense = layer.in_features * layer.out_features
        assert state["model"][f"{name}.values"].numel() == dense // 2
        assert state["model"][f"{name}.mask_bits"].numel() == dense // 8
        assert state["optimizer"]["state"][f"{name}.values"]["exp_avg"].numel() == dense // 2


def test_adapters_join_the_optimizer_at_step_0_and_leave_the_others_alone(whole_run):
    state = load_checkpoint(whole_run / "pretrain_ckpts" / "ckpt_20.pt")["optimizer"]["state"]
    adapters = {name for name in state if name.rpartition(".")[2].startswith("lora_")}
    assert len(adapters) == 18
    assert {state[name]["step"] for name in adapters} == {6}  # steps 15 to 20
    assert {state[name]["step"] for name in state.keys() - adapters} == {20}


def test_every_interval_and_at_the_end_and_the_newest_are_kept(files, whole_run, tmp_path):
    assert saved_steps(whole_run / "pretrain_ckpts") == [10, 15, 20]  # --keep_checkpoints is 3
    run(files.flags(tmp_path, max_steps=11, num_steps_per_checkpoint=4, keep_checkpoints=2))
    assert saved_steps(tmp_path / "pretrain_ckpts") == [8, 11]


def test_without_checkpoints(files, tmp_path):
    run(files.flags(tmp_path, max_steps=6, skip_checkpoint=True))
    assert not (tmp_path / "pretrain_ckpts").exists()
    assert len(losses(tmp_path)) == 6


# ---- writing
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = checkpoint_path(tmp_path, 5)
    save_checkpoint(path, small_state())

    def half(state, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, small_state())
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(checkpoint_path(tmp_path, 6), small_state())
    assert same(load_checkpoint(path)["model"], small_state()["model"])
    assert saved_steps(tmp_path) == [5]


def kill_while_saving(step: int) -> None:
    save = torch.save

    def half(state, file):
        save(state, file)
        if state["step"] == step:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(files, whole_run, tmp_path):
    assert begin_run(files.flags(tmp_path), functools.partial(kill_while_saving, 10)).finish().code == -9
    assert saved_steps(tmp_path / "pretrain_ckpts") == [5]
    ended = run(files.flags(tmp_path))
    assert "resumed after step 5" in ended.stderr and "damaged" not in ended.stderr
    assert losses(tmp_path) == losses(whole_run)
    assert [path.name for path in (tmp_path / "pretrain_ckpts").iterdir() if path.suffix != ".pt"] == []


def test_the_file_is_flushed_to_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(type(tmp_path), "replace", lambda a, b: (calls.append(f"rename to {b.name}"), replace(a, b)))
    save_checkpoint(checkpoint_path(tmp_path / "new" / "folder", 5), small_state())
    assert calls == ["fsync", "rename to ckpt_5.pt", "fsync"]


# ---- damage
def test_no_damaged_byte_goes_unseen(tmp_path):
    """One byte in two flipped, one at a time: refused in one line, or without effect (the archive pads its members)."""
    path = checkpoint_path(tmp_path, 5)
    save_checkpoint(path, small_state())
    whole, intact = path.read_bytes(), load_checkpoint(path)
    refused = 0
    for position in range(0, len(whole), 2):
        content = bytearray(whole)
        content[position] ^= 0xFF
        path.write_bytes(content)
        try:
            state = load_checkpoint(path)
        except UsageError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
        else:
            assert same(state, intact), position
    assert refused > len(whole) / 4


def test_no_cut_goes_unseen(tmp_path):
    path = checkpoint_path(tmp_path, 5)
    save_checkpoint(path, small_state())
    whole = path.read_bytes()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="damaged"):
            load_checkpoint(path)


def test_the_newest_that_verifies(tmp_path):
    for step in (5, 10, 100):  # 100 is after 10, though not in the order of names
        save_checkpoint(checkpoint_path(tmp_path, step), small_state(step))
    (tmp_path / "ckpt_200.tmp").write_bytes(b"unfinished")
    (tmp_path / "ckpt_best.pt").write_bytes(b"somebody's")
    said = []
    step, path, state = newest_checkpoint(tmp_path, said.append)
    assert (step, path, state["step"]) == (100, checkpoint_path(tmp_path, 100), 100)
    assert said == []
    content = bytearray(checkpoint_path(tmp_path, 100).read_bytes())
    content[content.index(np.float32(33).tobytes())] ^= 1  # in the middle of a weight matrix
    checkpoint_path(tmp_path, 100).write_bytes(content)
    checkpoint_path(tmp_path, 10).write_bytes(b"")
    step, path, state = newest_checkpoint(tmp_path, said.append)
    assert (step, path, state["step"]) == (5, checkpoint_path(tmp_path, 5), 5)
    assert [("ckpt_100" in line, "ckpt_10." in line) for line in said] == [(True, False), (False, True)]
    checkpoint_path(tmp_path, 5).unlink()
    with pytest.raises(UsageError, match="--output_dir"):
        newest_checkpoint(tmp_path, said.append)
    assert newest_checkpoint(tmp_path / "none", said.append) is None


def test_old_checkpoints_go_but_never_the_last_of_a_phase(tmp_path):
    for step in (1, 2, 3, 4, 5, 6, 7, 8):
        save_checkpoint(checkpoint_path(tmp_path, step), small_state(step))
    remove_old_checkpoints(tmp_path, keep=2, phase_start=4, newest=8)
    assert saved_steps(tmp_path) == [1, 2, 3, 4, 7, 8]
    remove_old_checkpoints(tmp_path, keep=3, phase_start=0, newest=4)
    assert saved_steps(tmp_path) == [2, 3, 4, 7, 8]
    remove_old_checkpoints(tmp_path, keep=5, phase_start=4, newest=8)
    assert saved_steps(tmp_path) == [2, 3, 4, 7, 8]


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_saved(tmp_path):
    for step in (1, 2, 5):  # 5 was found damaged when the run went on after 1
        save_checkpoint(checkpoint_path(tmp_path, step), small_state(step))
    remove_old_checkpoints(tmp_path, keep=1, phase_start=0, newest=2)
    assert saved_steps(tmp_path) == [2, 5]


def test_what_a_killed_save_left_goes(tmp_path):
    save_checkpoint(checkpoint_path(tmp_path, 1), small_state(1))
    (tmp_path / "ckpt_2.tmp").write_bytes(b"half")
    remove_unfinished_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_1.pt"]
