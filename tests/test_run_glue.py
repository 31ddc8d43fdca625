"""run_glue.py end to end on a tiny BERT: the same numbers as plain transformers, ranks, resume, sparsity, files."""

from __future__ import annotations

import finetuning_runs as runs
import numpy as np
import pytest
import torch
from finetuning_runs import LENGTH, glue, results
from transformers import BertForSequenceClassification

from data.glue import TASKS, read_examples
from data.tokenization import load_tokenizer

GLUE = "run_glue"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hugging Face folder of a dense model without a task head."""
    return runs.make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sst2(tmp_path_factory):
    return runs.write_sst2(tmp_path_factory.mktemp("SST-2"))


@pytest.fixture(scope="module")
def whole_run(folder, sst2, tmp_path_factory):
    """Output directory of an uninterrupted run, with predictions; read-only for tests."""
    output = tmp_path_factory.mktemp("whole")
    runs.run(GLUE, glue(folder, sst2, output, do_predict=True, num_steps_per_checkpoint=2))
    return output


# ------------------------------------------------------------------------------------------------ the numbers are right
@pytest.mark.parametrize(("name", "writer", "outputs"), [("MNLI", runs.write_mnli, 3), ("STS-B", runs.write_stsb, 1)])
def test_predictions_are_those_of_plain_transformers(tmp_path, name, writer, outputs):
    """Untrained but whole: the classifier is the folder's own. Predictions are compared through the test files."""
    model_dir = runs.make_folder(tmp_path / "model", BertForSequenceClassification, num_labels=outputs)
    data, task = writer(tmp_path / "data"), TASKS[name]
    flags = {"task_name": name, "do_train": None, "do_predict": True, "eval_batch_size": 5, "max_seq_length": 14}
    runs.run(GLUE, glue(model_dir, data, tmp_path / "out", **flags))

    model = BertForSequenceClassification.from_pretrained(model_dir).eval()
    tokenizer = load_tokenizer(model_dir / "vocab.txt", lowercase=True)
    tokenizer.enable_truncation(14)
    for split, file_name in task.submissions.items():
        expected = []
        for example in read_examples(task, data, split):
            encoding = tokenizer.encode(example.sentence1, example.sentence2)
            with torch.no_grad():
                inputs = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
                logits = model(**{key: torch.tensor([ids]) for key, ids in inputs.items()}).logits[0]
            value = logits.item() if task.regression else task.labels[logits.argmax()]
            expected.append(f"{min(max(value, 0.0), 5.0):.3f}" if task.regression else value)
        rows = [line.split("\t") for line in (tmp_path / "out" / file_name).read_text().splitlines()]
        assert rows[0] == ["index", "prediction"]
        assert [row[0] for row in rows[1:]] == [str(number) for number in range(len(expected))]
        assert [row[1] for row in rows[1:]] == expected
        assert len(set(expected)) > 1


def test_dev_logits_are_those_of_plain_transformers(tmp_path, monkeypatch, sst2):
    model_dir = runs.make_folder(tmp_path / "model", BertForSequenceClassification, num_labels=2)
    seen = []
    monkeypatch.setattr("run_glue.decide", lambda task, logits: (seen.append(logits), logits.argmax(1))[1])
    runs.run(GLUE, glue(model_dir, sst2, tmp_path / "out", do_train=None))

    model = BertForSequenceClassification.from_pretrained(model_dir).eval()
    tokenizer = load_tokenizer(model_dir / "vocab.txt", lowercase=True)
    tokenizer.enable_truncation(LENGTH)
    examples = read_examples(TASKS["SST-2"], sst2, "dev")
    with torch.no_grad():
        expected = [model(torch.tensor([tokenizer.encode(e.sentence1).ids])).logits[0] for e in examples]
    torch.testing.assert_close(torch.from_numpy(seen[0]), torch.stack(expected), rtol=1e-4, atol=1e-5)
    right = np.mean([logits.argmax() == example.label for logits, example in zip(expected, examples, strict=True)])
    assert results(tmp_path / "out")["metrics"] == {"accuracy": pytest.approx(right)}


def test_first_gradient_step_is_that_of_plain_transformers(tmp_path, sst2):
    """One step of plain AdamW on the whole set, without decay and clipping: the loss before and after agree."""
    model_dir = runs.make_folder(tmp_path / "model", BertForSequenceClassification, num_labels=2)
    flags = {"train_batch_size": 48, "max_steps": 2, "learning_rate": 1e-3, "weight_decay": 0, "max_grad_norm": 1e9}
    runs.run(GLUE, glue(model_dir, sst2, tmp_path / "out", **flags, warmup_proportion=0, lr_decay="constant"))

    model = BertForSequenceClassification.from_pretrained(model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=_epsilon(), weight_decay=0)
    tokenizer = load_tokenizer(model_dir / "vocab.txt", lowercase=True)
    tokenizer.enable_padding()
    examples = read_examples(TASKS["SST-2"], sst2, "train")
    encoded = tokenizer.encode_batch([example.sentence1 for example in examples])
    inputs = {"input_ids": torch.tensor([e.ids for e in encoded])}
    inputs |= {"attention_mask": torch.tensor([e.attention_mask for e in encoded])}
    expected = []
    for _ in range(2):
        loss = model(**inputs, labels=torch.tensor([example.label for example in examples])).loss
        expected.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert runs.losses(tmp_path / "out") == pytest.approx(expected, rel=1e-4)


def _epsilon() -> float:
    from optimization import build_optimizer

    return build_optimizer("adamw", [{"params": [torch.zeros(1)]}], 1.0, 1.0).defaults["eps"]


def test_training_learns_the_task(folder, sst2, tmp_path):
    runs.run(GLUE, glue(folder, sst2, tmp_path, max_steps=None, num_train_epochs=10, train_batch_size=16))
    losses = runs.losses(tmp_path)
    assert len(losses) == 30
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    assert results(tmp_path)["metrics"]["accuracy"] >= 0.9


def test_a_score_is_learned_too(folder, tmp_path):
    data = runs.write_stsb(tmp_path / "STS-B")
    flags = {"task_name": "sts-b", "max_steps": 60, "train_batch_size": 16, "learning_rate": 1e-3}
    runs.run(GLUE, glue(folder, data, tmp_path / "out", **flags))
    losses = runs.losses(tmp_path / "out")
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    assert set(results(tmp_path / "out")["metrics"]) == {"pearson", "spearman"}


def test_mnli_has_two_dev_sets(folder, tmp_path):
    data = runs.write_mnli(tmp_path / "MNLI")
    said = runs.run(GLUE, glue(folder, data, tmp_path / "out", task_name="mnli", do_predict=True))
    metrics = results(tmp_path / "out")["metrics"]
    assert set(metrics) == {"accuracy", "mismatched_accuracy"}
    assert f"accuracy {metrics['accuracy']:.4f}" in said and "MNLI, seed 1" in said
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv"):
        words = {line.split("\t")[1] for line in (tmp_path / "out" / name).read_text().splitlines()[1:]}
        assert words <= {"contradiction", "entailment", "neutral"}


# ---------------------------------------------------------------------------------------------- the same run, otherwise
@pytest.mark.parametrize(("batch", "accumulation", "unpad"), [(8, 1, "False"), (7, 2, "True"), (3, 4, "True")])
def test_two_processes_train_as_one_does(folder, sst2, tmp_path, batch, accumulation, unpad):
    """7 in 2 micro-steps of 2 ranks are parts of 2, 2, 2 and 1; 3 in 4 leave most parts empty. One pads, as ever."""
    flags = {"train_batch_size": batch, "do_predict": True, "max_steps": 8}
    runs.run(GLUE, glue(folder, sst2, tmp_path / "one", **flags))
    two = glue(folder, sst2, tmp_path / "two", **flags, gradient_accumulation_steps=accumulation, unpad=unpad)
    ended = runs.run_apart(GLUE, two, ranks=2)
    assert [end.code for end in ended] == [0, 0], ended
    assert runs.losses(tmp_path / "two") == pytest.approx(runs.losses(tmp_path / "one"), rel=1e-3)
    assert results(tmp_path / "two") == results(tmp_path / "one")
    one, two = (runs.weights(tmp_path / name, 8) for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    assert (tmp_path / "two" / "SST-2.tsv").read_text() == (tmp_path / "one" / "SST-2.tsv").read_text()


def test_a_killed_run_goes_on_to_the_same_end(folder, sst2, tmp_path, whole_run):
    flags = glue(folder, sst2, tmp_path, do_predict=True, num_steps_per_checkpoint=2)
    (ended,) = runs.run_apart(GLUE, flags, runs.kill_after(5))
    assert ended.code == -9
    assert not (tmp_path / "eval_results.json").exists()
    assert "goes on after step 4 of 6" in runs.run(GLUE, flags)
    assert runs.losses(tmp_path) == runs.losses(whole_run)
    for name in ("eval_results.json", "SST-2.tsv"):
        assert (tmp_path / name).read_text() == (whole_run / name).read_text()
    for name, tensor in runs.weights(whole_run, 6).items():
        assert torch.equal(runs.weights(tmp_path, 6)[name], tensor), name


def test_a_finished_run_takes_no_more_steps(folder, sst2, tmp_path):
    flags = glue(folder, sst2, tmp_path)
    runs.run(GLUE, flags)
    before = runs.snapshot(tmp_path)
    runs.run(GLUE, [*flags, "--task_name", "SST-2"])  # another spelling of its name
    assert {name: data for name, data in runs.snapshot(tmp_path).items() if name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }


@pytest.mark.parametrize(("unpad", "half", "others"), [("False", 2, []), ("True", 1, [2, 1.5, 0.5])])
def test_products_are_chosen_by_the_tokens_of_a_usual_batch(folder, sst2, tmp_path, monkeypatch, unpad, half, others):
    """Half of a batch's places, where no padding is computed."""
    told = []
    monkeypatch.setattr("training.engine.select_backends", lambda *given: told.append((given[3], given[5])))
    runs.run(GLUE, glue(folder, sst2, tmp_path, unpad=unpad, max_steps=1))
    places = 8 * LENGTH
    assert told == [(half * places / 2, [share * places / 2 for share in others])]


def test_checkpoints_are_saved_at_their_interval_and_at_the_end(folder, sst2, tmp_path, monkeypatch):
    import training.finetuning

    saved, plain = [], training.finetuning.save_checkpoint
    monkeypatch.setattr(
        training.finetuning, "save_checkpoint", lambda path, state: saved.append(state["step"]) or plain(path, state)
    )
    runs.run(GLUE, glue(folder, sst2, tmp_path, num_steps_per_checkpoint=4))
    assert saved == [4, 6]


def test_a_finetuned_checkpoint_is_evaluated_alone(sst2, tmp_path, whole_run):
    checkpoint = whole_run / "finetune_ckpts" / "ckpt_6.pt"
    flags = glue(checkpoint, sst2, tmp_path, do_train=None, do_predict=True)
    assert "start anew" not in runs.run(GLUE, flags)
    assert results(tmp_path)["metrics"] == results(whole_run)["metrics"]
    assert (tmp_path / "SST-2.tsv").read_text() == (whole_run / "SST-2.tsv").read_text()
    assert not (tmp_path / "finetune_ckpts").exists()


def test_several_seeds_give_mean_and_spread(folder, sst2, tmp_path):
    runs.run(GLUE, glue(folder, sst2, tmp_path / "both", seeds="0,1", do_predict=True))
    both = results(tmp_path / "both")
    alone = {}
    for seed in ("0", "1"):
        runs.run(GLUE, glue(folder, sst2, tmp_path / seed, seed=seed))
        alone[seed] = results(tmp_path / seed)["metrics"]
        assert (tmp_path / "both" / f"seed_{seed}" / "SST-2.tsv").exists()
        assert runs.losses(tmp_path / "both" / f"seed_{seed}") == runs.losses(tmp_path / seed)
    assert both["seeds"] == alone
    values = [metrics["accuracy"] for metrics in alone.values()]
    assert both["metrics"]["accuracy"] == pytest.approx(np.mean(values))
    assert both["spread"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
    assert runs.losses(tmp_path / "0") != runs.losses(tmp_path / "1")


def test_a_length_that_is_no_multiple_of_eight(tmp_path, sst2):
    """Neither batches nor positions exceed it."""
    model_dir = runs.make_folder(tmp_path / "model", max_position_embeddings=11)
    runs.run(GLUE, glue(model_dir, sst2, tmp_path / "out", max_seq_length=11, max_steps=2))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision(folder, sst2, tmp_path, precision):
    said = runs.run(GLUE, glue(folder, sst2, tmp_path, precision=precision, max_steps=2))
    assert ("slowly on a CPU" in said) == (precision == "fp16")
    assert all(np.isfinite(runs.losses(tmp_path)))


# ------------------------------------------------------------------------------------------------------ files and flags
def test_cache_is_used_again_and_can_be_left_out(folder, sst2, tmp_path):
    cache = tmp_path / "cache"
    runs.run(GLUE, glue(folder, sst2, tmp_path / "a", cache_dir=cache, max_steps=1))
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 2  # train and dev
    runs.run(GLUE, glue(folder, sst2, tmp_path / "b", cache_dir=cache, max_steps=1))
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    runs.run(GLUE, glue(folder, sst2, tmp_path / "c", skip_cache=True, skip_checkpoint=True, max_steps=1))
    assert not (tmp_path / "c" / "cache").exists() and not (tmp_path / "c" / "finetune_ckpts").exists()
    assert results(tmp_path / "a") == results(tmp_path / "b") == results(tmp_path / "c")


def test_lower_case_is_the_models_unless_a_flag_says_otherwise(tmp_path):
    """Upper-case sentences: a model that lower-cases knows their words, and one that does not sees only [UNK]."""
    model_dir = runs.make_folder(tmp_path / "model", BertForSequenceClassification, num_labels=2)
    upper = runs.write_sst2(tmp_path / "upper")
    for path in upper.iterdir():
        header, _, rows = path.read_text().partition("\n")
        path.write_text(f"{header}\n{rows.upper()}")
    written = {}
    for words in (None, True, "False"):
        output = tmp_path / f"{words}"
        flags = {"do_train": None, "do_eval": None, "do_predict": True, "do_lower_case": words}
        runs.run(GLUE, glue(model_dir, upper, output, **flags))
        written[words] = sorted((output / "cache").iterdir())[0].read_bytes()
    assert written[None] == written[True] != written["False"]


# ----------------------------------------------------------------------------------------- what is refused, in one line
def test_wrong_inputs_are_one_line_and_write_nothing(folder, sst2, tmp_path):
    output, wrong = tmp_path / "out", tmp_path / "wrong"
    label = runs.write(wrong / "label" / "train.tsv", "sentence\tlabel\nthe tower\t7\n").parent
    runs.write(label / "dev.tsv", "sentence\tlabel\nthe tower\t0\n")
    damaged = runs.write(wrong / "damaged.pt", "no archive")
    vocabulary = (folder / "vocab.txt").read_text()
    longer = runs.write(wrong / "longer.txt", f"{vocabulary}one\nmore\n")
    other = runs.make_folder(wrong / "other", BertForSequenceClassification, num_labels=3)
    cases = [
        ({"task_name": "sst-3"}, ["--task_name sst-3", "SST-2"]),
        ({"task_name": None}, ["--task_name"]),
        ({"data_dir": wrong / "none"}, ["--data_dir", "train.tsv"]),
        ({"data_dir": label}, ["train.tsv, line 2", "'7'", "0, 1"]),
        ({"init_checkpoint": None}, ["--init_checkpoint"]),
        ({"init_checkpoint": None, "bert_model": "bert-large-uncased"}, ["--init_checkpoint"]),
        ({"init_checkpoint": wrong / "none.pt"}, ["none.pt"]),
        ({"init_checkpoint": damaged}, ["damaged.pt"]),
        ({"init_checkpoint": other}, ["classifier.", "has shape [3", "need [2"]),
        ({"do_train": None}, ["--do_train", "classifier"]),
        ({"vocab_file": wrong / "none.txt"}, ["--vocab_file", "none.txt"]),
        ({"vocab_file": longer}, ["--vocab_file", "longer.txt", "must be the vocabulary"]),
        ({"output_dir": None}, ["--output_dir"]),
        ({"max_seq_length": LENGTH + 1}, ["--max_seq_length 33", "32"]),
        ({"max_steps": 0}, ["--max_steps 0"]),
        ({"max_steps": None, "num_train_epochs": 0}, ["--num_train_epochs 0"]),
        ({"seeds": "0,one"}, ["--seeds 0,one"]),
        ({"seeds": "1,1"}, ["--seeds 1,1"]),
        ({"do_train": None, "do_eval": None}, ["--do_train"]),
        ({"loss_scale": 128}, ["--loss_scale 128", "dynamic"]),
        ({"tokenizer": "bpe"}, ["--tokenizer bpe"]),
        ({"fp16": True, "precision": "bf16"}, ["--fp16", "--precision bf16"]),
        ({"add_lora": "True"}, ["--add_lora True", "--pruned_matrix"]),
        ({"no_such_flag": 1}, ["--no_such_flag"]),
    ]
    for changes, said in cases:
        line = runs.refused(GLUE, glue(folder, sst2, output, **changes))
        assert all(word in line for word in said), (changes, line)
        assert not output.exists(), changes


def test_a_checkpoint_without_a_vocabulary_needs_one(sst2, tmp_path, folder):
    checkpoint = runs.pretrain(tmp_path, folder / "vocab.txt")
    line = runs.refused(GLUE, glue(checkpoint, sst2, tmp_path / "out"))
    assert "--vocab_file: must be given" in line and not (tmp_path / "out").exists()


def test_an_output_directory_of_another_run(folder, sst2, tmp_path, whole_run):
    for changes, said in (
        ({"learning_rate": 1e-3}, "learning_rate 0.002, not 0.001"),
        ({"max_steps": 7}, "total_steps 6, not 7"),
        ({"pruned_matrix": "static-weight"}, "(dense) than this one (pruned_matrix static-weight)"),
    ):
        before = runs.snapshot(whole_run)
        line = runs.refused(GLUE, glue(folder, sst2, whole_run, **changes))
        assert said in line and "give another folder" in line
        assert runs.snapshot(whole_run) == before
    stsb = runs.write_stsb(tmp_path / "STS-B")
    line = runs.refused(GLUE, glue(folder, stsb, whole_run, task_name="sts-b"))
    assert "task_name SST-2, not STS-B" in line


def test_a_damaged_checkpoint_of_the_same_run(folder, sst2, tmp_path):
    flags = glue(folder, sst2, tmp_path, max_steps=2)
    runs.run(GLUE, flags)
    path = tmp_path / "finetune_ckpts" / "ckpt_2.pt"
    path.write_bytes(path.read_bytes()[:-100])
    line = runs.refused(GLUE, flags)
    assert str(path) in line and "damaged" in line and "remove them to start anew" in line
