"""What both fine-tuning scripts share: sparse checkpoints keep their masks, the published flags, launchers."""

from __future__ import annotations

import csv
import gc
import json
import subprocess
import sys
import weakref

import finetuning_runs as runs
import pytest
import torch
from finetuning_runs import glue, results, run, squad, write_sst2
from pretraining_runs import ROOT
from safetensors.torch import load_file

from sparse_ops import named_layers
from training import engine
from training.assembly import read_source
from training.checkpoint import load_checkpoint
from training.engine import Engine
from training.sparsity import SparsityConfig

DOORS = ("run_glue", "run_squad")
QUERY = "bert.encoder.layer.1.attention.self.query"  # of the second block: the first one's stays dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def slope(folder, tmp_path_factory):
    """A pretraining checkpoint with 2:4 masks and adapters of rank 4."""
    return runs.pretrain(tmp_path_factory.mktemp("slope"), folder / "vocab.txt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """SST-2's files in SST-2/, SQuAD's train.json and dev.json."""
    home = tmp_path_factory.mktemp("data")
    runs.write_sst2(home / "SST-2")
    for name, count, seed in (("train", 16, 0), ("dev", 8, 1)):
        runs.write_questions(home / f"{name}.json", count, seed)
    return home


def flags(door: str, source, data, output, **changes) -> list[str]:
    """The command line of a short run of either script."""
    if door == "run_glue":
        return glue(source, data / "SST-2", output, **{"max_steps": 2} | changes)
    return squad(source, data, output, **{"max_steps": 2} | changes)


def trained(output) -> dict:
    return load_checkpoint(output / "finetune_ckpts" / "ckpt_2.pt")


# -------------------------------------------------------------------------------------------------------------- padding
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "slope"])
@pytest.mark.parametrize("door", DOORS)
def test_without_padding_it_learns_what_it_learns_with(door, sparse, slope, folder, data, tmp_path, monkeypatch):
    """The last batch of an epoch has fewer rows, and each step two micro-steps."""
    dimensions, losses, micro_step, sizes = {"True": set(), "False": set()}, {}, Engine.micro_step, []
    monkeypatch.setattr(Engine, "prepare", lambda self, largest, count: sizes.append(largest()["input_ids"].numel()))
    start = {"init_checkpoint": slope, "vocab_file": folder / "vocab.txt"} if sparse else {}
    for unpad, found in dimensions.items():

        def record(self, batch, *place, found=found):
            found.add(batch["input_ids"].dim())
            assert batch["input_ids"].numel() <= sizes[-1]
            return micro_step(self, batch, *place)

        monkeypatch.setattr(Engine, "micro_step", record)
        more = {"unpad": unpad, "train_batch_size": 24, "gradient_accumulation_steps": 2, "max_steps": 5}
        said = run(door, flags(door, folder, data, tmp_path / unpad, **more, **start))
        assert ("no padding computed but up to a multiple of 128 tokens" in said) == (unpad == "True")
        with (tmp_path / unpad / "finetune_metrics.csv").open() as file:
            losses[unpad] = [float(row["step_loss"]) for row in csv.DictReader(file)]
    assert dimensions == {"True": {1}, "False": {2}}
    assert max(sizes) == 12 * runs.LENGTH, "the largest batch is not captured first"
    assert losses["True"] == pytest.approx(losses["False"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compile": True}, "--compile: only what a GPU runs is compiled; leave it out"),
        ({"cuda_graphs": "True"}, "--cuda_graphs True: cannot run with a CPU; leave it out"),
        ({"attention": "short"}, "--attention short: cannot run with a CPU; leave it out"),
        ({"dense_kernels": "True"}, "--dense_kernels True: cannot run without a GPU's compiled blocks; leave it out"),
    ],
)
def test_what_a_cpu_cannot_run_is_an_error(changes, said, folder, data, tmp_path):
    for door in DOORS:
        assert said in runs.refused(door, flags(door, folder, data, tmp_path, no_cuda=True, **changes))
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- sparsity
@pytest.mark.parametrize("door", DOORS)
def test_masks_and_adapters_of_a_checkpoint_stay(door, slope, folder, data, tmp_path):
    """No sparsity flag is given: pattern, positions and rank are the checkpoint's; values and adapters are trained."""
    runs.run(door, flags(door, slope, data, tmp_path, vocab_file=folder / "vocab.txt"))
    before, after = load_checkpoint(slope), trained(tmp_path)
    assert after["sparsity"] == before["sparsity"]
    assert SparsityConfig.from_dict(after["sparsity"]).lora_rank == 4
    pruned = [name.removesuffix(".values") for name in before["model"] if name.endswith(".values")]
    assert len(pruned) == 9 and QUERY in pruned  # 6 layers a block, less query, key and value of the first
    for layer in pruned:
        for name in (name for name in before["model"] if name.startswith(f"{layer}.")):
            old, new = before["model"][name], after["model"][name]
            assert old.shape == new.shape
            assert torch.equal(old, new) != old.is_floating_point(), name  # only the packed positions are as they were


def test_operands_are_made_for_the_engine_alone(slope, folder, data, tmp_path, monkeypatch):
    """Those that a model could be built with take longer than all the rest of it."""
    found, select = [], engine.select_backends

    def record(model, *rest):
        found.extend(layer.operands for _, layer in named_layers(model))
        select(model, *rest)

    monkeypatch.setattr(engine, "select_backends", record)
    runs.pretrain(tmp_path / "pretraining", folder / "vocab.txt")
    runs.run("run_glue", flags("run_glue", slope, data, tmp_path / "glue", vocab_file=folder / "vocab.txt"))
    assert found == [None] * 18


@pytest.mark.parametrize("door", DOORS)
def test_a_finetuned_sparse_checkpoint_is_evaluated_alone(door, slope, folder, data, tmp_path, monkeypatch):
    """Frozen, so that operands are made that no product has to round."""
    trains, select = [], engine.select_backends

    def record(model, *rest):
        trains.append({parameter.requires_grad for parameter in model.parameters()})
        select(model, *rest)

    monkeypatch.setattr(engine, "select_backends", record)
    runs.run(door, flags(door, slope, data, tmp_path / "train", vocab_file=folder / "vocab.txt"))
    checkpoint = tmp_path / "train" / "finetune_ckpts" / "ckpt_2.pt"
    alone = flags(door, checkpoint, data, tmp_path / "alone", vocab_file=folder / "vocab.txt", do_train=None)
    runs.run(door, alone)
    assert results(tmp_path / "alone")["metrics"] == results(tmp_path / "train")["metrics"]
    assert trains == [{True}, {False}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pruned_matrix": "none"}, "--pruned_matrix none contradicts the checkpoint, which has static-weight"),
        ({"pruned_matrix": "dynamic-weight"}, "--pruned_matrix dynamic-weight contradicts"),
        ({"skip_attention": True}, "--skip_attention"),
        ({"skip_attention": "True"}, "--skip_attention True contradicts the checkpoint, which has False"),
        ({"reduction_dim": "False"}, "--reduction_dim False contradicts the checkpoint, which has True"),
        ({"sparsity_increment": "0"}, "--sparsity_increment 0 contradicts the checkpoint, which has -1"),
        ({"add_lora": "False"}, "--add_lora False contradicts the checkpoint, which has adapters of rank 4"),
        ({"lora_rank": 8}, "--lora_rank 8 contradicts the checkpoint, which has 4"),
        ({"add_lora": "lazy"}, "--add_lora"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint(changes, said, slope, folder, data, tmp_path):
    for door in DOORS:
        line = runs.refused(door, flags(door, slope, data, tmp_path, vocab_file=folder / "vocab.txt", **changes))
        assert said in line
    assert not any(tmp_path.iterdir())


def test_pairs_need_a_second_token_type(data, tmp_path):
    model, output = runs.make_folder(tmp_path / "model", type_vocab_size=1), tmp_path / "out"
    pairs = glue(model, runs.write_stsb(tmp_path / "STS-B"), output, task_name="sts-b")
    for door, command in (("run_squad", squad(model, data, output)), ("run_glue", pairs)):
        assert "must be at least 2, and is 1" in runs.refused(door, command)
    assert not output.exists()
    run("run_glue", glue(model, data / "SST-2", output, max_steps=1))  # single sentences


@pytest.mark.parametrize("door", DOORS)
def test_another_vocabulary_of_the_same_size_is_refused(door, folder, slope, data, tmp_path):
    entries = (folder / "vocab.txt").read_text().splitlines()
    entries[-1], entries[-2] = entries[-2], entries[-1]
    another = runs.write(tmp_path / "another.txt", "\n".join(entries))
    sizes = json.dumps(runs.SIZES | {"vocab_size": len(entries)})
    for changes in ({}, {"config_file": runs.write(tmp_path / "model.json", sizes)}):
        line = runs.refused(door, flags(door, slope, data, tmp_path / "out", vocab_file=another, **changes))
        assert f"--vocab_file {another}: has other entries" in line and not (tmp_path / "out").exists()
    runs.run("run_glue", flags("run_glue", slope, data, tmp_path / "a", vocab_file=folder / "vocab.txt"))
    assert trained(tmp_path / "a")["model_config"]["vocabulary_sha256"] == read_source(slope).config.vocabulary_sha256


@pytest.mark.parametrize("door", DOORS)
def test_a_dense_model_is_pruned_by_magnitude(door, folder, data, tmp_path):
    """Without a step that matters: the values are the two largest of every four weights, where they were."""
    one_step = {"pruned_matrix": "static-weight", "learning_rate": 0, "warmup_proportion": 0}
    runs.run(door, flags(door, folder, data, tmp_path, **one_step))
    saved, dense = trained(tmp_path)["model"], load_file(folder / "model.safetensors")
    for name in (QUERY, "bert.encoder.layer.0.intermediate.dense"):
        groups = dense[f"{name}.weight"].unflatten(1, (-1, 4))
        kept = groups.abs().topk(2, dim=2).indices.sort(dim=2).values
        torch.testing.assert_close(saved[f"{name}.values"], groups.gather(2, kept).flatten(1), rtol=0, atol=0)
    assert "bert.encoder.layer.0.attention.self.query.weight" in saved  # the first layers after the input stay dense
    assert not any("lora" in name for name in saved)


def test_adapters_join_a_dense_model_that_is_pruned(folder, data, tmp_path):
    changes = {"pruned_matrix": "static-weight", "add_lora": "True", "lora_rank": 2}
    runs.run("run_glue", flags("run_glue", folder, data, tmp_path, **changes))
    saved = trained(tmp_path)
    assert saved["sparsity"]["lora_rank"] == 2
    assert saved["model"][f"{QUERY}.lora_left"].shape == (32, 2)
    assert saved["model"][f"{QUERY}.lora_right"].abs().max() > 0  # it begins at 0, and is trained


def test_pruning_nothing_and_adapters_as_large_as_a_layer(folder, slope, data, tmp_path):
    for door in DOORS:
        sparse = {"pruned_matrix": "static-weight"}
        changes = sparse | {"skip_first_block": "True", "skip_last_block": "True"}
        line = runs.refused(door, flags(door, folder, data, tmp_path / "out", **changes))
        assert "--pruned_matrix static-weight: no layer" in line
        for rank in (32, 64):
            changes = sparse | {"add_lora": "True", "lora_rank": rank}
            line = runs.refused(door, flags(door, folder, data, tmp_path / "out", **changes))
            assert f"--lora_rank {rank}: must be below 32" in line
    assert not (tmp_path / "out").exists()
    runs.run("run_glue", flags("run_glue", folder, data, tmp_path / "off", **sparse, add_lora="False", lora_rank=64))


def test_adapters_join_a_sparse_checkpoint_without(folder, data, tmp_path):
    source = runs.pretrain(tmp_path, folder / "vocab.txt", add_lora="False")
    assert read_source(str(source)).sparsity.lora_rank == 0
    changes = {"add_lora": "True", "lora_rank": 2, "vocab_file": folder / "vocab.txt"}
    runs.run("run_glue", flags("run_glue", source, data, tmp_path / "out", **changes))
    assert trained(tmp_path / "out")["model"][f"{QUERY}.lora_left"].shape == (32, 2)


@pytest.mark.parametrize("kind", ["dynamic-weight", "static-input", "dynamic-input", "dynamic-output-grad"])
def test_ablations_can_be_finetuned(kind, folder, data, tmp_path):
    runs.run("run_glue", flags("run_glue", folder, data, tmp_path, pruned_matrix=kind))
    assert trained(tmp_path)["sparsity"]["pruned_matrix"] == kind


# ------------------------------------------------------------------------------------------ the published command lines
def published(door: str, source, data, output, vocab) -> list[str]:
    """The whole argument lists of the published job scripts, with a tiny model's files and sizes in them."""
    sparsity = f"""--pruned_matrix static-weight --skip_first_block False --skip_last_block False
        --skip_attention False --reduction_dim True --add_lora True --lora_rank 4 --unstructured_masking False
        --unstructured_mask_sparsity 60 --sparsity_increment -1 --init_checkpoint {source} --vocab_file {vocab}
        --output_dir {output} --bert_model bert-large-uncased --do_lower_case --do_train --do_eval --fp16 --seed 2
        --max_seq_length 32 --max_steps -1.0 --warmup_proportion 0.1 --gradient_accumulation_steps 1"""
    task = {
        "run_glue": f"""--task_name sst-2 --data_dir {data}/SST-2 --train_batch_size 16 --eval_batch_size 16
            --learning_rate 2.4e-6 --num_train_epochs 1.0 --do_predict""",
        "run_squad": f"""--train_file {data}/train.json --predict_file {data}/dev.json --do_predict
            --train_batch_size 4 --predict_batch_size 4 --learning_rate 3e-5 --num_train_epochs 1.0
            --doc_stride 16 --max_query_length 8 --n_best_size 20 --max_answer_length 30
            --eval_script {data}/evaluate-v1.1.py""",
    }
    lesser = f"""--tokenizer wordpiece --cache_dir {output}_cache --json-summary {output}/dllogger.json
        --disable-progress-bar --log_freq 1 --loss_scale 0 --no_cuda --skip_checkpoint"""
    return [*task[door].split(), *sparsity.split(), *lesser.split()]


@pytest.mark.parametrize("door", DOORS)
def test_the_published_argument_lists_are_taken(door, slope, folder, data, tmp_path):
    """With the effect of each: cache, log, summary, no checkpoint; --amp in place of --fp16 is the same run."""
    words = published(door, slope, data, tmp_path / "out", folder / "vocab.txt")
    said = runs.run(door, words)
    metrics = results(tmp_path / "out")["metrics"]
    assert "step/s" not in said  # of a progress bar
    steps = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(steps) == len(runs.losses(tmp_path / "out")) > 1  # --log_freq 1, --max_steps -1.0
    summary = (tmp_path / "out" / "dllogger.json").read_text()
    assert json.loads(summary.removeprefix("DLLL "))["data"] == metrics
    assert any((tmp_path / "out_cache").iterdir()) and not (tmp_path / "out" / "cache").exists()
    assert not (tmp_path / "out" / "finetune_ckpts").exists()

    amp = published(door, slope, data, tmp_path / "amp", folder / "vocab.txt")
    amp = ["--amp" if word == "--fp16" else word for word in amp]
    runs.run(door, [*amp, "--skip_cache"])
    assert results(tmp_path / "amp") == results(tmp_path / "out")
    assert not (tmp_path / "amp_cache").exists()


@pytest.mark.parametrize("door", DOORS)
def test_a_summary_that_could_not_be_written_is_found_before_the_first_step(door, folder, data, tmp_path):
    file = runs.write(tmp_path / "file", "kept")
    output = tmp_path / "out"
    for path, words in (
        (tmp_path, f"{tmp_path} is a folder: give the name of a file"),
        (file / "a" / "b.json", f"{file} is no folder"),
    ):
        line = runs.refused(door, flags(door, folder, data, output, **{"json-summary": path}))
        assert f"--json-summary: {words}" in line
    line = runs.refused(door, flags(door, folder, data, file))
    assert f"--output_dir: {file} is no folder: give a folder" in line
    line = runs.refused(door, flags(door, folder, data, output, cache_dir=file / "cache"))
    assert f"--cache_dir: {file} is no folder" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "kept"


@pytest.mark.parametrize("door", DOORS)
def test_a_summary_without_scores_is_the_trainings(door, folder, data, tmp_path):
    summary = tmp_path / "below" / "dllogger.json"
    changes = {"do_eval": None, "do_predict": True, "json-summary": summary}
    runs.run(door, flags(door, folder, data, tmp_path / "out", **changes))
    written = json.loads(summary.read_text().removeprefix("DLLL "))["data"]
    losses = runs.losses(tmp_path / "out")
    assert written == {"steps": 2, "average_loss": pytest.approx(sum(losses) / 2)}
    assert not (tmp_path / "out" / "eval_results.json").exists()
    before = runs.snapshot(tmp_path)
    line = runs.refused(door, flags(door, folder, data, tmp_path / "out", **changes, do_train=None))
    assert "--json-summary" in line and "--do_eval" in line and runs.snapshot(tmp_path) == before


def test_a_model_can_be_named_by_its_folder(folder, data, tmp_path):
    """--bert_model is a label, or a Hugging Face folder when nothing else says where weights are."""
    runs.run("run_glue", glue(None, data / "SST-2", tmp_path, bert_model=folder, max_steps=2))
    assert trained(tmp_path)["step"] == 2


def test_a_config_file_says_the_models_sizes(folder, data, tmp_path):
    size = len((folder / "vocab.txt").read_text().splitlines())
    sizes = runs.write(tmp_path / "model.json", json.dumps(runs.SIZES | {"vocab_size": size}))
    runs.run("run_glue", flags("run_glue", folder, data, tmp_path / "a", config_file=sizes))
    assert trained(tmp_path / "a")["model_config"]["hidden_dropout_prob"] == 0.1  # the folder has 0
    runs.write(sizes, json.dumps(runs.SIZES | {"vocab_size": size, "num_layers": 2}))
    line = runs.refused("run_glue", flags("run_glue", folder, data, tmp_path / "b", config_file=sizes))
    assert "num_layers" in line and "model.json" in line


# ------------------------------------------------------------------------------------------------------------ launchers
def test_torchrun_starts_it_and_a_mistake_is_one_line(folder, data, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run_glue.py"]
    words = glue(folder, data / "SST-2", tmp_path / "out", max_steps=2)
    alone = glue(folder, data / "SST-2", tmp_path / "alone", max_steps=2)
    wrong = glue(folder, tmp_path / "none", tmp_path / "wrong")
    running = [
        subprocess.Popen([*launcher, *line], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for line in (words, wrong)
    ]
    runs.run("run_glue", alone)
    said = [process.communicate(timeout=120)[1] for process in running]
    assert running[0].returncode == 0, said[0]
    assert results(tmp_path / "out") == results(tmp_path / "alone")
    assert running[1].returncode != 0
    assert len([line for line in said[1].splitlines() if line.startswith("run_glue.py: error: --data_dir")]) == 1
    assert not (tmp_path / "wrong").exists()


def test_a_seed_s_model_is_gone_when_the_next_but_one_begins(folder, tmp_path, monkeypatch):
    """By counting references alone: several models of several seeds would not fit onto a device together."""
    alive, before = [], []
    whole = Engine.__init__

    def counting(self, model, *args, **kwargs):
        before.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(model))
        whole(self, model, *args, **kwargs)

    monkeypatch.setattr(Engine, "__init__", counting)
    gc.disable()
    try:
        run("run_glue", glue(folder, write_sst2(tmp_path / "data"), tmp_path / "out", seeds="0,1,2,3", max_steps=1))
    finally:
        gc.enable()
    assert before == [0, 1, 1, 1]
