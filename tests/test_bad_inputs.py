"""What wrong flags, config files, shards and directories get from run_pretraining.py: one line, exit code 2."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from pretraining_runs import (
    LENGTH,
    MODEL,
    ROOT,
    SPOKEN,
    VOCAB_SIZE,
    Run,
    TrainingFiles,
    begin_ranks,
    begin_run,
    checkpoint,
    refused,
    run,
    write_model,
)
from shard_factory import write_arrays, write_premasked_shard, write_shard

# --------------------------------------------------------------------------------------------------------- flags alone
WRONG_FLAGS = [
    # what is wrong, what the line says beside the flag
    ({"max_steps": 0}, "at least 1"),
    ({"max_steps": "many"}, "must be a number, not many"),
    ({"max_steps": 2.5}, "whole number"),
    ({"global_batch_size": 0}, "at least 1"),
    ({"local_batch_size": 0}, "at least 1"),
    ({"local_batch_size": -8}, "at least 1"),
    ({"learning_rate": "nan"}, "must be a number"),
    ({"learning_rate": "inf"}, "must be a number"),
    ({"learning_rate": -1e-3}, "at least 0"),
    ({"weight_decay": -0.1}, "at least 0"),
    ({"lora_weight_decay": "nan"}, "must be a number"),
    ({"warmup_proportion": 1.5}, "from 0 to 1"),
    ({"masked_token_fraction": 20}, "from 0 to 1"),
    ({"max_grad_norm": 0}, "above 0"),
    ({"max_predictions_per_seq": 0}, "at least 1"),
    ({"num_steps_per_checkpoint": 0}, "at least 1"),
    ({"keep_checkpoints": 0}, "at least 1"),
    ({"eval_interval": -1}, "at least 1"),
    ({"num_workers": -1}, "at least 0"),
    ({"seed": -1}, "from 0 to"),
    ({"seed": 2**64}, "from 0 to"),
    ({"previous_phase_end_step": -1}, "at least 0"),
    ({"double_prune_interval": -1}, "at least 0"),
    ({"lora_rank": 0}, "at least 1"),
    ({"lora_rank": -4}, "at least 1"),
    ({"lazy_lora_fraction": 2}, "from 0 to 1"),
    ({"optimizer": "lion"}, "lamb"),
    ({"lr_decay": "step"}, "poly"),
    ({"precision": "fp8"}, "bf16"),
    ({"mask_init": "largest"}, "magnitude"),
    ({"add_lora": "yes"}, "lazy"),
    ({"pruned_matrix": "weights"}, "static-weight"),
    ({"pruned_matrix": ""}, "static-weight"),
    ({"reduction_dim": 1}, "True or False"),
    ({"skip_attention": "true"}, "True or False"),
    ({"fp16": "yes"}, "True or False"),
    ({"unstructured_mask_sparsity": 100, "unstructured_masking": True}, "below 100"),
    ({"unstructured_mask_sparsity": -5, "unstructured_masking": True}, "from 0"),
    ({"unstructured_masking": True, "pruned_matrix": "dynamic-weight"}, "static-weight"),
    ({"sparsity_increment": "a,b"}, "ascending block numbers"),
    ({"sparsity_increment": "1,0"}, "ascending block numbers"),
    ({"sparsity_increment": "0,0"}, "ascending block numbers"),
    ({"sparsity_increment": "0,-1,1"}, "ascending block numbers"),
    ({"sparsity_increment": "0,"}, "ascending block numbers"),
    ({"sparsity_increment": "2"}, "between 0 and 1"),
    ({"sparsity_increment": "0,12,-1"}, "2 blocks"),
    ({"log_prefix": "logs/phase1"}, "without directories"),
    ({"log_prefix": ""}, "without directories"),
    ({"input_dir": None}, "must be given"),
    ({"input_dir": ""}, "must be given"),
    ({"output_dir": ""}, "must be given"),
    ({"output_dir": None}, "must be given"),
    ({"model_config_file": None}, "must be given"),
    ({"kfac": "True"}, "unrecognized arguments"),
    ({"max_step": 5}, "unrecognized arguments"),
    ({"local_rank": "first"}, "must be a number"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG_FLAGS, ids=[" ".join(map(str, c.items())) for c, _ in WRONG_FLAGS])
def test_a_flag_with_a_wrong_value(files, tmp_path, changes, words):
    output = tmp_path / "out"
    refused(files.flags(output, **changes), output, f"--{next(iter(changes))}", words)


def test_fp16_with_another_precision(files, tmp_path):
    refused(
        [*files.flags(tmp_path / "out"), "--fp16", "--precision", "bf16"], tmp_path / "out", "--fp16", "--precision"
    )


def test_adapters_without_pruned_layers(files, tmp_path):
    for word in ("lazy", "True"):
        flags = files.flags(tmp_path / "out", add_lora=word, pruned_matrix="none")
        refused(flags, tmp_path / "out", f"--add_lora {word}", "--pruned_matrix is none")


def test_a_flag_without_its_value_or_shortened(files, tmp_path):
    flags = files.flags(tmp_path / "out")
    refused([*flags, "--seed"], tmp_path / "out", "--seed")
    refused([*flags, "--learning", "1e-3"], tmp_path / "out", "--learning")
    refused([*flags, "nonsense"], tmp_path / "out", "nonsense")


def test_a_stray_word_behind_a_switch(files, tmp_path):
    """Which takes it for its own."""
    words = [*files.flags(tmp_path / "out", disable_progress_bar=None), "--disable_progress_bar", "stray"]
    refused(words, tmp_path / "out", "--disable_progress_bar: takes True or False or no word at all, not stray")


def test_kernels_by_name_without_what_they_run(files, tmp_path):
    output = tmp_path / "out"
    for backend, matrix in (("cutlass", "none"), ("cusparselt", "dynamic-weight")):
        flags = files.flags(output, sparse_backend=backend, pruned_matrix=matrix, add_lora="False")
        refused(flags, output, f"--sparse_backend {backend}: needs --pruned_matrix static-weight, not {matrix}")


def test_held_out_shards_that_are_the_training_s(files, tmp_path):
    (tmp_path / "link").symlink_to(files.train)
    for folder in (files.train, f"{files.train}/", tmp_path / "link"):
        refused(
            files.flags(tmp_path / "out", eval_dir=folder), tmp_path / "out", f"--eval_dir {folder}: is --input_dir"
        )


def test_a_value_with_a_line_break_is_still_one_line(files, tmp_path):
    refused(files.flags(tmp_path / "out", input_dir="no\nsuch"), tmp_path / "out", "--input_dir no such")


# -------------------------------------------------------------------------------------------------------- config files
WRONG_CONFIG_VALUES = [
    ({"maximum_steps": 5}, "maximum_steps", "no flag of this script"),
    ({"help": True}, "help", "no flag of this script"),
    ({"config_file": "other.json"}, "config_file", "no flag of this script"),
    ({"kfac": True}, "kfac", "set it to false"),
    ({"kfac": "false"}, "kfac", "set it to false"),
    ({"max_steps": "many"}, "max_steps", "must be a number"),
    ({"max_steps": True}, "max_steps", "must be a number"),
    ({"max_steps": 10**400}, "max_steps", "must be a number"),
    ({"max_steps": [5]}, "max_steps", "one word, number"),
    ({"learning_rate": float("nan")}, "learning_rate", "must be a number"),
    ({"learning_rate": {"peak": 1}}, "learning_rate", "one word, number"),
    ({"output_dir": ["a", "b"]}, "output_dir", "one word, number"),
    ({"fp16": 1}, "fp16", "True or False"),
    ({"optimizer": "adagrad"}, "optimizer", "adamw"),
    ({"local_rank": "first"}, "local_rank", "must be a number"),
    ({"lora_rank": 0}, "lora_rank", "at least 1"),
    ({"fp16": True, "precision": "bf16"}, "--fp16", "--precision bf16"),
]


@pytest.mark.parametrize(
    ("values", "key", "words"), WRONG_CONFIG_VALUES, ids=[str(v)[:40] for v, *_ in WRONG_CONFIG_VALUES]
)
def test_a_wrong_entry_of_the_config_file(files, tmp_path, values, key, words):
    config, output = tmp_path / "phase.json", tmp_path / "out"
    config.write_text(json.dumps(values))
    named = () if key.startswith("--") else ("--config_file", str(config))
    changes = {"config_file": config} | {name: None for name in values if name in ("max_steps", "learning_rate")}
    refused(files.flags(output, **changes), output, key, words, *named)


def test_a_config_file_that_is_none(files, tmp_path):
    output, path = tmp_path / "out", tmp_path / "phase.json"
    flags = files.flags(output, config_file=path)
    refused(flags, output, "--config_file", str(path), "cannot be read")
    refused(files.flags(output, config_file=tmp_path), output, "--config_file", str(tmp_path), "cannot be read")
    for content in (b"{", b"", b"\xff\xfe\x00", b"max_steps: 5"):
        path.write_bytes(content)
        refused(flags, output, "--config_file", str(path), "is not JSON")
    for content in (b"[1]", b"5", b"null"):
        path.write_bytes(content)
        refused(flags, output, "--config_file", str(path), "one JSON object")


WRONG_MODELS = [
    ({"hidden_sizes": 16}, "hidden_sizes"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "16"}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ({"num_attention_heads": 3}, "num_attention_heads"),
    ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob"),
    ({"hidden_act": "swish"}, "hidden_act"),
    ({"tokenizer": "sentencepiece"}, "tokenizer"),
    ({"next_sentence": "yes"}, "next_sentence"),
    ({"vocab_file": 5}, "vocab_file"),
]


@pytest.mark.parametrize(("changes", "key"), WRONG_MODELS, ids=[str(c) for c, _ in WRONG_MODELS])
def test_a_wrong_model_configuration(files, tmp_path, changes, key):
    model = write_model(tmp_path / "model.json", **changes)
    refused(files.flags(tmp_path / "out", model_config_file=model), tmp_path / "out", str(model), key)


def test_a_model_configuration_that_lacks_a_size_or_is_none(files, tmp_path):
    output, model = tmp_path / "out", tmp_path / "model.json"
    flags = files.flags(output, model_config_file=model)
    refused(flags, output, str(model), "cannot be read")
    refused(files.flags(output, model_config_file=tmp_path), output, str(tmp_path), "cannot be read")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        model.write_text(json.dumps({name: value for name, value in MODEL.items() if name != key}))
        refused(flags, output, str(model), key)
    model.write_text("{")
    refused(flags, output, f"--model_config_file {model}: is not JSON")
    write_model(model, hidden_size=0)
    refused(flags, output, f"--model_config_file {model}: hidden_size is 0")


def test_a_dimension_that_m_does_not_divide(files, tmp_path):
    odd = write_model(tmp_path / "odd.json", intermediate_size=30)
    for matrix in ("static-weight", "dynamic-weight", "dynamic-input"):
        flags = files.flags(tmp_path / "out", model_config_file=odd, pruned_matrix=matrix)
        refused(flags, tmp_path / "out", "--pruned_matrix", "multiples of 4")
    flags = files.flags(tmp_path / "out", model_config_file=write_model(tmp_path / "m.json", intermediate_size=36))
    refused([*flags, "--sparsity_increment", "1"], tmp_path / "out", "--sparsity_increment", "multiples of 8")


def test_flags_that_leave_no_layer_to_prune(files, tmp_path):
    output, skipped = tmp_path / "out", {"skip_first_block": True, "skip_last_block": True}
    for matrix in ("static-weight", "dynamic-weight"):
        said = f"--pruned_matrix {matrix}", "2 blocks", "--skip_first_block", "--skip_last_block"
        refused(files.flags(output, pruned_matrix=matrix, add_lora="False", **skipped), output, *said)
    run(files.flags(output, pruned_matrix="none", add_lora="False", max_steps=1, **skipped))  # without effect


def test_adapters_as_large_as_the_layer(files, tmp_path):
    output = tmp_path / "out"
    for word, rank in (("lazy", 16), ("True", 64)):
        said = f"--lora_rank {rank}", "must be below 16", "bert.encoder.layer.0.", "(16 x 16)"
        refused(files.flags(output, add_lora=word, lora_rank=rank), output, *said)
    run(files.flags(output, add_lora="True", lora_rank=15, max_steps=1))
    run(files.flags(tmp_path / "without", add_lora="False", lora_rank=64, max_steps=1))


# -------------------------------------------------------------------------------------------------------------- shards
def no_folder(files: TrainingFiles, folder: Path) -> None:
    folder.rmdir()


def empty_folder(files: TrainingFiles, folder: Path) -> None:
    (folder / "readme.txt").write_text("no shard here")


def a_file(files: TrainingFiles, folder: Path) -> None:
    folder.rmdir()
    folder.write_text("a file")


def truncated(files: TrainingFiles, folder: Path) -> None:
    content = (files.train / "shard_0.hdf5").read_bytes()
    (folder / "shard.hdf5").write_bytes(content[: len(content) // 2])


def empty_file(files: TrainingFiles, folder: Path) -> None:
    (folder / "shard.hdf5").touch()


def text_file(files: TrainingFiles, folder: Path) -> None:
    (folder / "shard.hdf5").write_text("Once upon a time\n" * 100)


def foreign(files: TrainingFiles, folder: Path) -> None:
    write_arrays(folder / "shard.hdf5", {"images": np.zeros((4, 8, 8), np.int32)}, {})


def no_samples(files: TrainingFiles, folder: Path) -> None:
    arrays = {"input_ids": np.zeros((0, LENGTH), np.int32), "special_token_positions": np.zeros((0, 3), np.int32)}
    write_arrays(folder / "shard.hdf5", arrays | {"next_sentence_labels": np.zeros(0, np.int8)}, {})


def attributes_beyond_the_vocabulary(files: TrainingFiles, folder: Path) -> None:
    for name in ("a", "b"):
        write_shard(folder / f"{name}.hdf5", vocab_size=VOCAB_SIZE, length=LENGTH)
    with h5py.File(folder / "b.hdf5", "r+") as file:
        file.attrs["max_token_id"] = VOCAB_SIZE  # a later shard, but what it says of itself is read at the start


def data_beyond_the_vocabulary(files: TrainingFiles, folder: Path) -> None:
    write_shard(folder / "shard.hdf5", vocab_size=VOCAB_SIZE + 30, length=LENGTH, count=30, attributes=False)


def negative_token(files: TrainingFiles, folder: Path) -> None:
    write_shard(folder / "shard.hdf5", vocab_size=VOCAB_SIZE, length=LENGTH)
    with h5py.File(folder / "shard.hdf5", "r+") as file:
        file["input_ids"][3, 2] = -1


def longer_than_the_position_table(files: TrainingFiles, folder: Path) -> None:
    write_shard(folder / "shard.hdf5", vocab_size=VOCAB_SIZE, length=LENGTH * 2)


def lengths_that_differ(files: TrainingFiles, folder: Path) -> None:
    write_shard(folder / "a.hdf5", vocab_size=VOCAB_SIZE, length=LENGTH)
    write_shard(folder / "b.hdf5", vocab_size=VOCAB_SIZE, length=LENGTH // 2)


def layouts_that_differ(files: TrainingFiles, folder: Path) -> None:
    write_shard(folder / "a.hdf5", vocab_size=VOCAB_SIZE, length=LENGTH)
    write_premasked_shard(folder / "b.hdf5", vocab_size=VOCAB_SIZE, length=LENGTH)


def no_mask_token(files: TrainingFiles, folder: Path) -> None:
    write_shard(folder / "shard.hdf5", vocab_size=VOCAB_SIZE, length=LENGTH, attributes=False)


WRONG_SHARDS = [
    (no_folder, "no such folder"),
    (empty_folder, "no HDF5 shards"),
    (a_file, "no such folder"),
    (truncated, "shard.hdf5"),
    (empty_file, "shard.hdf5"),
    (text_file, "shard.hdf5"),
    (foreign, "shard.hdf5"),
    (no_samples, "no samples"),
    (attributes_beyond_the_vocabulary, f"vocabulary of {VOCAB_SIZE}"),
    (data_beyond_the_vocabulary, f"vocabulary of {VOCAB_SIZE}"),
    (negative_token, "token id -1"),
    (longer_than_the_position_table, "max_position_embeddings"),
    (lengths_that_differ, "sequence_length"),
    (layouts_that_differ, "layout"),
    (no_mask_token, "[MASK]"),
]


@pytest.mark.parametrize("flag", ["input_dir", "eval_dir"])
@pytest.mark.parametrize(("spoil", "words"), WRONG_SHARDS, ids=[spoil.__name__ for spoil, _ in WRONG_SHARDS])
def test_wrong_shards(files, tmp_path, flag, spoil, words):
    folder, output = tmp_path / "shards", tmp_path / "out"
    folder.mkdir()
    spoil(files, folder)
    refused(files.flags(output, **{flag: folder}), output, f"--{flag}", str(folder), words)


def test_pairs_need_a_second_token_type(files, tmp_path):
    """Of premasked shards the ids tell, also where they have no labels."""
    model, out = write_model(tmp_path / "model.json", type_vocab_size=1, next_sentence=False), tmp_path / "out"
    unlabelled = tmp_path / "unlabelled"
    for path in files.premasked.iterdir():
        unlabelled.mkdir(exist_ok=True)
        shutil.copyfile(path, unlabelled / path.name)
        with h5py.File(unlabelled / path.name, "r+") as file:
            del file["next_sentence_labels"]
            assert file["segment_ids"][()].any()
    for folder in (files.train, files.premasked, unlabelled):
        said = "holds pairs of texts, of token types 0 and 1; the model's type_vocab_size must"
        refused(files.flags(out, model_config_file=model, input_dir=folder), out, f"--input_dir: {folder}/", said)
    refused(files.flags(out, model_config_file=model, input_dir=files.single, eval_dir=unlabelled), out, "--eval_dir: ")
    run(files.flags(out, model_config_file=model, input_dir=files.single, max_steps=1))


def test_shards_of_another_vocabulary(files, tmp_path):
    """Than the held-out ones, the checkpoint that a run goes on from, or one that it starts from."""
    folders, options = {}, {"vocab_size": VOCAB_SIZE, "length": LENGTH, "count": 20}
    for name in ("one", "other"):
        folders[name] = tmp_path / name
        write_shard(folders[name] / "shard.hdf5", vocabulary_sha256=name, **options)
    one, other = folders["one"], folders["other"]
    out = tmp_path / "out"
    flags = files.flags(out, input_dir=one, eval_dir=other)
    refused(flags, out, f"--eval_dir {other}: is of another vocabulary than --input_dir {one}")
    run(files.flags(out, input_dir=one, max_steps=2))
    newest = out / "pretrain_ckpts" / "ckpt_2.pt"
    assert checkpoint(out, 2)["model_config"]["vocabulary_sha256"] == "one"
    said = f"--input_dir {other}: is of another vocabulary than the model of {newest}"
    refused(files.flags(out, input_dir=other, max_steps=4), out, said)
    fresh = tmp_path / "fresh"
    refused(files.flags(fresh, input_dir=other, init_checkpoint=newest), fresh, said)
    run(files.flags(fresh, init_checkpoint=newest, max_steps=1))  # these shards know none
    assert checkpoint(fresh, 1)["model_config"]["vocabulary_sha256"] == "one"
    model = write_model(tmp_path / "model.json", vocabulary_sha256="third")
    flags = files.flags(tmp_path / "new", input_dir=one, model_config_file=model)
    refused(flags, tmp_path / "new", "is of another vocabulary than the model configuration")


def test_premasked_shards_with_more_predictions_than_asked_for(files, tmp_path):
    flags = files.flags(tmp_path / "out", input_dir=files.premasked, max_predictions_per_seq=3)
    refused(flags, tmp_path / "out", "--max_predictions_per_seq 3", "at least 4")


def test_single_sequences_for_a_model_with_next_sentence_prediction(files, tmp_path):
    refused(files.flags(tmp_path / "out", input_dir=files.single), tmp_path / "out", "--input_dir", "next_sentence")


def test_a_vocabulary_file_that_cannot_tell_the_mask_token(files, tmp_path):
    vocabulary, output = tmp_path / "vocab.txt", tmp_path / "out"
    model = write_model(tmp_path / "model.json", vocab_file=str(vocabulary))
    flags = files.flags(output, model_config_file=model)
    refused(flags, output, "vocab_file", str(vocabulary))
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    refused(flags, output, "vocab_file", str(vocabulary), "[MASK]")
    vocabulary.write_text("[PAD]\n[MASK]\n")
    refused(flags, output, "vocab_file", str(vocabulary), "has [MASK] at 1", "say 4")


def spoil_later_shard(folder: Path) -> None:
    """A good first shard, and one of a single sample that only shows its token beyond the vocabulary when loaded."""
    write_shard(folder / "a.hdf5", count=11, vocab_size=VOCAB_SIZE, length=LENGTH)
    write_shard(folder / "b.hdf5", count=1, vocab_size=VOCAB_SIZE, length=LENGTH)
    with h5py.File(folder / "b.hdf5", "r+") as file:
        file["input_ids"][0, 1] = VOCAB_SIZE


@pytest.mark.parametrize(("ranks", "workers", "seed"), [(1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 0, 3), (2, 1, 3)])
def test_a_later_shard_found_wrong_while_training(files, tmp_path, ranks, workers, seed):
    """Of two ranks one alone meets the sample, by seed 0 the first, by seed 3 the second; both end, rank 0 speaks."""
    spoil_later_shard(tmp_path / "shards")
    changes = {"num_workers": workers, "seed": seed, "global_batch_size": 4, "local_batch_size": 2}
    flags = files.flags(tmp_path / "out", input_dir=tmp_path / "shards", **changes)
    ended = [rank.finish() for rank in begin_ranks(flags, ranks)]
    assert [end.code for end in ended] == [2] * ranks, ended
    said = [line for end in ended for line in end.stderr.splitlines() if SPOKEN in line]
    assert len(said) == 1 and said[0].startswith(SPOKEN), ended
    assert "--input_dir" in said[0] and "b.hdf5" in said[0] and f"vocabulary of {VOCAB_SIZE}" in said[0]
    assert "Traceback" not in "".join(end.stderr for end in ended)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_later_heldout_shard_found_wrong_while_evaluating(files, tmp_path, ranks):
    spoil_later_shard(tmp_path / "heldout")
    flags = files.flags(tmp_path / "out", eval_dir=tmp_path / "heldout", eval_interval=2)
    ended = [rank.finish() for rank in begin_ranks(flags, ranks)]
    assert [end.code for end in ended] == [2] * ranks, ended
    said = [line for end in ended for line in end.stderr.splitlines() if SPOKEN in line]
    assert len(said) == 1 and "--eval_dir" in said[0] and "b.hdf5" in said[0]
    assert "Traceback" not in "".join(end.stderr for end in ended)


# --------------------------------------------------------------------------------------------------- output directories
def test_an_output_directory_that_cannot_be_written(files, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        line = begin_run(files.flags(output)).finish()
        assert line.code == 2
        assert line.stderr.count("\n") == 1 and line.stderr.startswith(
            f"{SPOKEN}--output_dir {output}: cannot be written"
        )
    assert (tmp_path / "file").read_text() == "in the way"


def test_logs_that_cannot_be_written_end_every_rank(files, tmp_path):
    (tmp_path / "logfile.txt").mkdir()
    ended = [rank.finish() for rank in begin_ranks(files.flags(tmp_path), 2)]
    assert [end.code for end in ended] == [2, 2], ended
    assert ended[0].stderr.startswith(f"{SPOKEN}--output_dir {tmp_path}") and "logfile.txt" in ended[0].stderr
    assert ended[1].stderr == ""


def test_a_second_run_in_an_output_directory_in_use(files, tmp_path):
    import fcntl

    output = tmp_path / "out"
    output.mkdir()
    with (output / ".lock").open("w") as lock:
        lock.write("process 7 on some node\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(files.flags(output), output, f"--output_dir {output}", "another run", "process 7 on some node")
        ended = [rank.finish() for rank in begin_ranks(files.flags(output), 2)]
    assert [end.code for end in ended] == [2, 2]
    assert ended[0].stderr.count(SPOKEN) == 1 and ended[1].stderr == ""
    run(files.flags(output, max_steps=1))  # once it is free again


# --------------------------------------------------------------------------------------------------- real command lines
def test_a_plain_process_speaks_once_and_ends_with_2(files, tmp_path):
    command = [sys.executable, "run_pretraining.py", *files.flags(tmp_path / "out", lora_rank=0)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"{SPOKEN}--lora_rank: must be a whole number of at least 1, not 0\n"
    assert not (tmp_path / "out").exists()


def test_under_a_launcher_one_line_and_2_from_every_rank(files, tmp_path):
    """The launcher ends what is left when one rank fails: no rank may be ended before it left with its own code."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "run_pretraining.py",
    ]
    ended = subprocess.run(
        [*command, *files.flags(tmp_path / "out", input_dir=tmp_path / "nowhere")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    said = [line for line in ended.stderr.splitlines() if SPOKEN in line]
    assert len(said) == 1 and "--input_dir" in said[0], ended.stderr
    codes = [line.split(":")[1].split()[0] for line in ended.stderr.splitlines() if line.strip().startswith("exitcode")]
    assert codes == ["2", "2"], ended.stderr
    assert 'run_pretraining.py", line' not in ended.stderr  # no traceback of ours
    assert not (tmp_path / "out").exists()


@pytest.fixture
def launcher_store() -> dict[str, str]:
    """The environment of two ranks under a launcher, whose store this process plays."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"},
    }
    del store


def test_a_rank_that_is_done_waits_for_the_slower_one(files, tmp_path, launcher_store):
    flags = files.flags(tmp_path / "out", lora_rank=0)
    quick = Run(flags, launcher_store | {"RANK": "0", "LOCAL_RANK": "0"}, [])
    quick.process.join(1.0)
    assert quick.process.is_alive()
    quick.signal(signal.SIGTERM)  # as a launcher does once a rank has failed
    slow = Run(flags, launcher_store | {"RANK": "1", "LOCAL_RANK": "1"}, [])
    assert [slow.finish().code, quick.finish().code] == [2, 2]


def impatient() -> None:
    import training.distributed

    training.distributed.LEAVE_SECONDS = 0.5


def test_a_rank_whose_mistake_is_its_own_does_not_wait_for_ever(files, tmp_path, launcher_store):
    flags = files.flags(tmp_path / "out", lora_rank=0)
    ended = Run(flags, launcher_store | {"RANK": "0", "LOCAL_RANK": "0"}, [impatient]).finish(20)
    assert ended.code == 2 and ended.stderr.startswith(SPOKEN) and ended.stderr.count("\n") == 1, ended
    launcher_store["MASTER_PORT"] = "9"  # nobody there any more
    ended = Run(flags, launcher_store | {"RANK": "0", "LOCAL_RANK": "0"}, [impatient]).finish(20)
    assert ended.code == 2 and ended.stderr.startswith(SPOKEN), ended
