"""What a run gets whose checkpoints contradict its flags, are not its own, or are damaged."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretraining_runs import (
    MODEL,
    Run,
    begin_ranks,
    begin_run,
    kill_after,
    refused,
    run,
    write_model,
)

from training.checkpoint import load_checkpoint, save_checkpoint, saved_steps
from training.hf_folders import save_hf_folder


@pytest.fixture(scope="module")
def half_way(files, tmp_path_factory) -> Path:
    """Output directory of a run that was killed after its checkpoint of step 5, before adapters joined."""
    output = tmp_path_factory.mktemp("half_way")
    assert begin_run(files.flags(output), kill_after(7)).finish().code == -9
    return output


CONTRADICTIONS = [
    # given, both values
    ({"pruned_matrix": "none", "add_lora": "False"}, ("--pruned_matrix none", "static-weight")),
    ({"pruned_matrix": "dynamic-weight"}, ("--pruned_matrix dynamic-weight", "static-weight")),
    ({"skip_first_block": True}, ("--skip_first_block True", "False")),
    ({"skip_last_block": True}, ("--skip_last_block True", "False")),
    ({"skip_attention": True}, ("--skip_attention True", "False")),
    ({"reduction_dim": False}, ("--reduction_dim False", "True")),
    ({"unstructured_masking": True}, ("--unstructured_masking True", "False")),
    ({"sparsity_increment": "1"}, ("--sparsity_increment 1", "-1")),
    ({"optimizer": "adamw"}, ("--optimizer", "adamw", "lamb")),
]


@pytest.mark.parametrize(("changes", "words"), CONTRADICTIONS, ids=[words[0] for _, words in CONTRADICTIONS])
def test_a_flag_that_contradicts_the_checkpoint(files, half_way, changes, words):
    refused(files.flags(half_way, **changes), half_way, *words)


@pytest.mark.parametrize(("changes", "words"), CONTRADICTIONS[:-1], ids=[words[0] for _, words in CONTRADICTIONS[:-1]])
def test_a_flag_that_contradicts_the_initial_checkpoint(files, half_way, tmp_path, changes, words):
    init = half_way / "pretrain_ckpts" / "ckpt_5.pt"
    refused(files.flags(tmp_path / "out", init_checkpoint=init, **changes), tmp_path / "out", *words)


def test_another_percentage_than_the_checkpoint_of_unstructured_masks(files, tmp_path):
    output = tmp_path / "out"
    flags = {"unstructured_masking": True, "add_lora": "False", "max_steps": 2, "num_steps_per_checkpoint": 1}
    run(files.flags(output, unstructured_mask_sparsity=75, **flags))
    flags["max_steps"] = 3
    refused(
        files.flags(output, unstructured_mask_sparsity=60, **flags), output, "--unstructured_mask_sparsity 60", "75"
    )


def test_sparsity_asked_of_a_dense_checkpoint_in_the_middle_of_a_phase(files, tmp_path):
    dense = {"pruned_matrix": "none", "add_lora": "False"}
    assert begin_run(files.flags(tmp_path, **dense), kill_after(7)).finish().code == -9
    refused(files.flags(tmp_path, add_lora="False"), tmp_path, "--pruned_matrix static-weight", "none")


ADAPTER_CONTRADICTIONS = [
    ({"lora_rank": 8}, ("--lora_rank 8", "4")),
    ({"add_lora": "False"}, ("--add_lora False", "adapters of rank 4")),
]


@pytest.mark.parametrize(("changes", "words"), ADAPTER_CONTRADICTIONS)
def test_adapters_of_the_checkpoint_cannot_go_or_change(files, whole_run, tmp_path, changes, words):
    flags = {"max_steps": 40, "lora_rank": 4} | changes  # goes on in the middle of the phase, after they joined
    refused(files.flags(whole_run, **flags), whole_run, *words)
    flags = {"previous_phase_end_step": 20, "lora_rank": 4} | changes  # a new phase
    refused(files.flags(whole_run, **flags), whole_run, *words)
    init = whole_run / "pretrain_ckpts" / "ckpt_20.pt"
    refused(files.flags(tmp_path / "out", init_checkpoint=init, **changes), tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 7}, ("--seed 7", "42")),
        ({"masked_token_fraction": 0.5}, ("--masked_token_fraction 0.5", "0.2")),
        ({"max_predictions_per_seq": 3}, ("--max_predictions_per_seq 3", "4")),
    ],
)
def test_the_data_may_not_change_in_the_middle_of_a_phase(files, half_way, changes, words):
    refused(files.flags(half_way, **changes), half_way, *words)


def test_a_run_that_diverges_ends_and_keeps_its_last_good_checkpoint(files, tmp_path):
    flags = files.flags(tmp_path, optimizer="sgd", learning_rate=1e30, lr_decay="constant", num_steps_per_checkpoint=1)
    ended = begin_run(flags).finish()
    assert ended.code == 2
    (line,) = [line for line in ended.stderr.splitlines() if "error:" in line]
    assert "--learning_rate 1e+30" in line and "not finite" in line
    for step in saved_steps(tmp_path / "pretrain_ckpts"):
        model = load_checkpoint(tmp_path / "pretrain_ckpts" / f"ckpt_{step}.pt")["model"]
        assert all(torch.isfinite(tensor.float()).all() for tensor in model.values())


def test_ranks_that_see_different_checkpoints_are_refused(files, half_way, tmp_path):
    shutil.copytree(half_way, tmp_path / "here")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        Run(files.flags(tmp_path / folder), shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, [])
        for rank, folder in enumerate(("here", "elsewhere"))
    ]
    ended = [rank.finish() for rank in ranks]
    assert [end.code for end in ended] == [2, 2]
    assert "folders that all nodes share" in ended[0].stderr and "error:" not in ended[1].stderr


WRONG_NETWORKS = [
    ({"hidden_size": 32}, "hidden_size 16"),
    ({"num_hidden_layers": 1}, "num_hidden_layers 2"),
    ({"num_hidden_layers": 3}, "num_hidden_layers 2"),
    ({"num_attention_heads": 4}, "num_attention_heads 2"),
    ({"intermediate_size": 64}, "intermediate_size 32"),
    ({"hidden_act": "relu"}, "hidden_act gelu"),
    ({"max_position_embeddings": 32}, "max_position_embeddings 16"),
    ({"vocab_size": 99}, "vocab_size 61"),
    ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-12"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_NETWORKS, ids=[str(changes) for changes, _ in WRONG_NETWORKS])
def test_a_checkpoint_of_another_network(files, half_way, tmp_path, changes, words):
    model = write_model(tmp_path / "model.json", **changes)
    path = half_way / "pretrain_ckpts" / "ckpt_5.pt"
    refused(files.flags(half_way, model_config_file=model), half_way, str(path), words)
    flags = files.flags(tmp_path / "out", model_config_file=model, init_checkpoint=path)
    refused(flags, tmp_path / "out", str(path), words)


def edit(source: Path, target: Path, change: Callable[[dict], None]) -> Path:
    state = load_checkpoint(source)
    change(state)
    save_checkpoint(target, state)
    return target


def test_a_checkpoint_without_the_models_weights(files, half_way, tmp_path):
    """Never train on weights that were silently drawn anew."""
    source, wrong = half_way / "pretrain_ckpts" / "ckpt_5.pt", tmp_path / "wrong.pt"
    flags, output = files.flags(tmp_path / "out", init_checkpoint=wrong), tmp_path / "out"

    edit(source, wrong, lambda state: state.update(model={}))
    refused(flags, output, str(wrong), "none of this model's weights")
    edit(source, wrong, lambda state: state.update(model={f"gpt.{n}": t for n, t in state["model"].items()}))
    refused(flags, output, str(wrong), "none of this model's weights")
    name = "bert.encoder.layer.1.output.dense.values"
    edit(source, wrong, lambda state: state["model"].pop(name))
    refused(flags, output, str(wrong), name)
    edit(source, wrong, lambda state: state["model"].update({name: state["model"][name][:, :4]}))
    refused(flags, output, str(wrong), name, "shape")
    edit(source, wrong, lambda state: state.pop("sparsity"))
    refused(flags, output, str(wrong), "not a checkpoint of this suite", "sparsity")
    edit(source, wrong, lambda state: state.update(format_version=2))
    refused(flags, output, str(wrong), "format version 2")
    torch.save({"weight": torch.zeros(2)}, wrong)
    refused(flags, output, "--init_checkpoint", str(wrong), "not a checkpoint of this suite")
    torch.save(torch.nn.Linear(2, 2), wrong)
    refused(flags, output, "--init_checkpoint", str(wrong), "not a checkpoint of this suite")
    wrong.write_bytes(source.read_bytes()[:-1000])
    refused(flags, output, "--init_checkpoint", str(wrong), "damaged")
    wrong.write_text("Once upon a time\n")
    line = refused(flags, output, f"--init_checkpoint {wrong}: not a checkpoint of this suite")
    assert "damaged" not in line
    wrong.unlink()
    refused(flags, output, "--init_checkpoint", str(wrong), "no such file")


def test_a_hugging_face_folder_that_is_none(files, tmp_path):
    folder, output = tmp_path / "hf", tmp_path / "out"
    folder.mkdir()
    flags = files.flags(output, init_checkpoint=folder)
    refused(flags, output, f"--init_checkpoint {folder}: no config.json")
    from configuration import BertConfig
    from modeling import BertForPreTraining

    config = BertConfig.from_dict(MODEL)
    save_hf_folder(folder, config, BertForPreTraining(config).state_dict())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(flags, output, str(weights))
    weights.unlink()
    refused(flags, output, f"--init_checkpoint {folder}: no weights")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(files, half_way, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(half_way, output)
    good, newest = (output / "pretrain_ckpts" / f"ckpt_{step}.pt" for step in (5, 10))
    content = bytearray(good.read_bytes())
    weights = load_checkpoint(good)["model"]["bert.embeddings.position_embeddings.weight"]
    content[content.index(weights.numpy().tobytes()) + 500] ^= 1
    newest.write_bytes(content)
    ended = [rank.finish() for rank in begin_ranks(files.flags(output, max_steps=10), 2)]
    assert [end.code for end in ended] == [0, 0], ended
    said = [line for line in ended[0].stderr.splitlines() if "damaged" in line]
    assert len(said) == 1 and str(newest) in said[0] and "using the one before it" in said[0]
    assert "resumed after step 5" in ended[0].stderr
    assert load_checkpoint(newest)["step"] == 10  # and a good one is in its place now


def test_only_damaged_checkpoints(files, half_way, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(half_way, output)
    path = output / "pretrain_ckpts" / "ckpt_5.pt"
    path.write_bytes(b"")
    refused(files.flags(output), output, "--output_dir", str(path), "damaged", "remove them")


def test_a_phase_that_does_not_follow_the_checkpoint(files, whole_run, half_way, tmp_path):
    refused(files.flags(tmp_path / "out", previous_phase_end_step=20), tmp_path / "out", "--previous_phase_end_step 20")
    flags = files.flags(half_way, previous_phase_end_step=20)
    refused(flags, half_way, "--previous_phase_end_step 20", "ckpt_5.pt", "step 5")
    flags = files.flags(whole_run, previous_phase_end_step=10, max_steps=20)
    refused(flags, whole_run, "--previous_phase_end_step 10", "ckpt_20.pt", "step 0")
    refused(files.flags(whole_run, previous_phase_end_step=25), whole_run, "--previous_phase_end_step 25", "step 20")
