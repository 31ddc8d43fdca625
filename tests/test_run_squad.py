"""run_squad.py end to end on a tiny BERT: the same answers as plain transformers, ranks, resume, v2.0, files."""

from __future__ import annotations

import json

import finetuning_runs as runs
import numpy as np
import pytest
import torch
from finetuning_runs import LENGTH, results, squad
from transformers import BertForQuestionAnswering

from data.squad import read_squad
from data.squad_windows import encode
from data.tokenization import load_tokenizer

SQUAD = "run_squad"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train.json and dev.json of v1.1, and those of v2.0 in v2/."""
    home = tmp_path_factory.mktemp("squad")
    (home / "v2").mkdir()
    for version, impossible in ((home, False), (home / "v2", True)):
        runs.write_questions(version / "train.json", 24, seed=0, impossible=impossible)
        runs.write_questions(version / "dev.json", 12, seed=1, impossible=impossible)
    return home


@pytest.fixture(scope="module")
def whole_run(folder, data, tmp_path_factory):
    """Output directory of an uninterrupted run; read-only for tests."""
    output = tmp_path_factory.mktemp("whole")
    runs.run(SQUAD, squad(folder, data, output, num_steps_per_checkpoint=2))
    return output


def answers(output) -> dict[str, str]:
    return json.loads((output / "predictions.json").read_text())


def best_span(start, end, first: int, last: int, most: int) -> tuple[float, int, int]:
    """Score, first and last position of the best span in [first, last], by trying all."""
    pairs = [(i, j) for i in range(first, last + 1) for j in range(i, min(i + most, last + 1))]
    return max((float(start[i] + end[j]), i, j) for i, j in pairs)


# ------------------------------------------------------------------------------------------------ the numbers are right
def test_answers_are_those_of_plain_transformers(tmp_path, data):
    """Contexts of one window each; the best span found by trying all of them."""
    model_dir = runs.make_folder(tmp_path / "model", BertForQuestionAnswering, max_position_embeddings=64)
    flags = {"do_train": None, "train_file": None, "max_seq_length": 64, "predict_batch_size": 5}
    runs.run(SQUAD, squad(model_dir, data, tmp_path / "out", **flags, max_answer_length=4, n_best_size=3))

    model = BertForQuestionAnswering.from_pretrained(model_dir).eval()
    tokenizer = load_tokenizer(model_dir / "vocab.txt", lowercase=True)
    expected, nbest = {}, json.loads((tmp_path / "out" / "nbest_predictions.json").read_text())
    for example in read_squad(data / "dev.json"):
        encoding = tokenizer.encode(example.question, example.context)
        with torch.no_grad():
            outputs = model(torch.tensor([encoding.ids]), token_type_ids=torch.tensor([encoding.type_ids]))
        start, end = outputs.start_logits[0], outputs.end_logits[0]
        score, first, last = best_span(start, end, encoding.type_ids.index(1), len(encoding.ids) - 2, most=4)
        expected[example.qid] = example.context[encoding.offsets[first][0] : encoding.offsets[last][1]]
        best = nbest[example.qid][0]
        assert best["start_logit"] + best["end_logit"] == pytest.approx(score, abs=1e-4)
        assert len(nbest[example.qid]) == 3
    assert answers(tmp_path / "out") == expected
    right = np.mean([expected[e.qid] == e.answers[0].text for e in read_squad(data / "dev.json")])
    assert results(tmp_path / "out")["metrics"]["exact_match"] == pytest.approx(100 * right)


def test_first_steps_are_those_of_plain_transformers(folder, data, tmp_path):
    """Two steps of plain AdamW on all windows, without decay and clipping: the losses before and after agree.

    The plain loss is that of windows without padding: over padding, too, it would depend on the batch's length.
    """
    model_dir = runs.make_folder(tmp_path / "model", BertForQuestionAnswering)
    windows = encode(
        read_squad(data / "train.json"), load_tokenizer(model_dir / "vocab.txt", lowercase=True), LENGTH, 8, 8
    )
    flags = {"train_batch_size": len(windows), "max_steps": 2, "learning_rate": 1e-3, "weight_decay": 0}
    flags |= {"max_grad_norm": 1e9, "warmup_proportion": 0, "lr_decay": "constant", "do_eval": None}
    runs.run(SQUAD, squad(model_dir, data, tmp_path / "out", **flags))

    model = BertForQuestionAnswering.from_pretrained(model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-6, weight_decay=0)
    rows = [windows.batch([row]) for row in range(len(windows))]
    batches = [{name: torch.from_numpy(array) for name, array in row.items()} for row in rows]
    expected = []
    for _ in range(2):
        loss = torch.stack([model(**batch).loss for batch in batches]).mean()
        expected.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert runs.losses(tmp_path / "out") == pytest.approx(expected, rel=1e-3)


def test_training_learns_to_answer(folder, data, tmp_path):
    runs.run(SQUAD, squad(folder, data, tmp_path, max_steps=60, train_batch_size=16, learning_rate=3e-3))
    losses = runs.losses(tmp_path)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    metrics = results(tmp_path)["metrics"]
    assert metrics["exact_match"] >= 50 and metrics["f1"] >= metrics["exact_match"]


# ---------------------------------------------------------------------------------------------- the same run, otherwise
@pytest.mark.parametrize(("accumulation", "unpad"), [(1, "False"), (3, "True")])
def test_two_processes_train_as_one_does(folder, data, tmp_path, accumulation, unpad):
    runs.run(SQUAD, squad(folder, data, tmp_path / "one"))
    flags = squad(folder, data, tmp_path / "two", gradient_accumulation_steps=accumulation, unpad=unpad)
    ended = runs.run_apart(SQUAD, flags, ranks=2)
    assert [end.code for end in ended] == [0, 0], ended
    assert runs.losses(tmp_path / "two") == pytest.approx(runs.losses(tmp_path / "one"), rel=1e-3)
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert answers(tmp_path / "two") == answers(tmp_path / "one")


def test_a_killed_run_goes_on_to_the_same_end(folder, data, tmp_path, whole_run):
    flags = squad(folder, data, tmp_path, num_steps_per_checkpoint=2)
    (ended,) = runs.run_apart(SQUAD, flags, runs.kill_after(3))
    assert ended.code == -9
    assert "goes on after step 2 of 6" in runs.run(SQUAD, flags)
    assert runs.losses(tmp_path) == runs.losses(whole_run)
    for name in ("eval_results.json", "predictions.json", "nbest_predictions.json"):
        assert (tmp_path / name).read_text() == (whole_run / name).read_text()


def test_a_finetuned_checkpoint_is_evaluated_alone(data, tmp_path, whole_run):
    checkpoint = whole_run / "finetune_ckpts" / "ckpt_6.pt"
    runs.run(SQUAD, squad(checkpoint, data, tmp_path, do_train=None, train_file=None, do_predict=None))
    assert results(tmp_path) | {"seeds": None} == results(whole_run) | {"seeds": None}
    assert answers(tmp_path) == answers(whole_run)


def test_several_seeds_give_mean_and_spread(folder, data, tmp_path):
    runs.run(SQUAD, squad(folder, data, tmp_path, seeds="3,4", max_steps=4))
    found = results(tmp_path)
    f1 = [found["seeds"][seed]["f1"] for seed in ("3", "4")]
    assert found["metrics"]["f1"] == pytest.approx(np.mean(f1))
    assert found["spread"]["f1"] == pytest.approx(np.std(f1, ddof=1))
    assert answers(tmp_path / "seed_3").keys() == answers(tmp_path / "seed_4").keys()


# ---------------------------------------------------------------------------------------------------------------- v2.0
def test_version_2(folder, data, tmp_path):
    """The threshold moves questions between "no answer" and their best span; the scores say how each kind fares."""
    flags = {"version_2_with_negative": True, "max_steps": 4}
    runs.run(SQUAD, squad(folder, data / "v2", tmp_path / "train", **flags))
    metrics = results(tmp_path / "train")["metrics"]
    assert {"exact", "f1", "HasAns_f1", "NoAns_f1", "best_f1", "best_f1_thresh"} <= set(metrics)
    checkpoint = tmp_path / "train" / "finetune_ckpts" / "ckpt_4.pt"
    for threshold, empty in ((-1000.0, 12), (1000.0, 0)):
        output = tmp_path / f"{threshold}"
        flags = {"version_2_with_negative": True, "null_score_diff_threshold": threshold, "do_train": None}
        runs.run(SQUAD, squad(checkpoint, data / "v2", output, **flags))
        assert sum(answer == "" for answer in answers(output).values()) == empty
        metrics = results(output)["metrics"]
        assert metrics["NoAns_exact"] == (100 if empty else 0)
    assert (tmp_path / "train" / "null_odds.json").exists()


def test_questions_without_answers_can_be_predicted_but_not_scored(data, tmp_path, whole_run):
    content = json.loads((data / "dev.json").read_text())
    for paragraph in content["data"][0]["paragraphs"]:
        for entry in paragraph["qas"]:
            del entry["answers"]
    (tmp_path / "open.json").write_text(json.dumps(content))
    checkpoint = whole_run / "finetune_ckpts" / "ckpt_6.pt"
    flags = {"predict_file": tmp_path / "open.json", "do_train": None, "train_file": None}
    runs.run(SQUAD, squad(checkpoint, data, tmp_path / "out", **flags, do_eval=None))
    assert answers(tmp_path / "out") == answers(whole_run)
    assert not (tmp_path / "out" / "eval_results.json").exists()
    assert "answers" in runs.refused(SQUAD, squad(checkpoint, data, tmp_path / "scored", **flags))


# ----------------------------------------------------------------------------------------- what is refused, in one line
def test_wrong_inputs_are_one_line_and_write_nothing(folder, data, tmp_path, whole_run):
    output = tmp_path / "out"
    shifted = json.loads((data / "train.json").read_text())
    shifted["data"][0]["paragraphs"][3]["qas"][0]["answers"][0]["answer_start"] += 1
    (tmp_path / "shifted.json").write_text(json.dumps(shifted))
    (tmp_path / "broken.json").write_text("{")
    cases = [
        ({"train_file": None}, ["--train_file"]),
        ({"predict_file": None}, ["--predict_file"]),
        ({"train_file": tmp_path / "none.json"}, ["none.json"]),
        ({"predict_file": tmp_path / "none.json"}, ["none.json"]),
        ({"train_file": tmp_path / "broken.json"}, ["broken.json", "not JSON"]),
        ({"train_file": tmp_path / "shifted.json"}, ["shifted.json", "q3", "answer_start"]),
        ({"train_file": data / "v2" / "train.json"}, ["--version_2_with_negative"]),
        ({"init_checkpoint": None}, ["--init_checkpoint"]),
        ({"vocab_file": tmp_path / "none.txt"}, ["--vocab_file"]),
        ({"do_train": None}, ["--do_train", "qa_outputs"]),
        ({"do_train": None, "do_predict": None, "do_eval": None}, ["--do_train"]),
        ({"max_seq_length": LENGTH + 1}, ["--max_seq_length 33"]),
        ({"doc_stride": LENGTH - 3}, ["--doc_stride 29", "--max_seq_length 32 holds 28 tokens"]),
        ({"null_score_diff_threshold": 5}, ["--null_score_diff_threshold 5", "--version_2_with_negative"]),
        ({"sparse_backend": "cutlass"}, ["--sparse_backend cutlass: needs --pruned_matrix static-weight, not none"]),
        ({"pruned_matrix": "static-wait"}, ["--pruned_matrix static-wait", "static-weight"]),
    ]
    for changes, said in cases:
        line = runs.refused(SQUAD, squad(folder, data, output, **changes))
        assert all(word in line for word in said), (changes, line)
        assert not output.exists(), changes
    checkpoint = whole_run / "finetune_ckpts" / "ckpt_6.pt"
    sizes = runs.write(tmp_path / "sizes.json", json.dumps(runs.SIZES | {"vocab_size": 500, "hidden_size": 16}))
    vocabulary = {"vocab_file": folder / "vocab.txt"}
    assert "hidden_size 32" in runs.refused(SQUAD, squad(checkpoint, data, output, config_file=sizes, **vocabulary))
    assert not output.exists()


def test_the_largest_stride_and_a_threshold_of_zero_are_taken(folder, data, tmp_path):
    flags = {"doc_stride": LENGTH - 4, "null_score_diff_threshold": 0.0, "max_steps": 1}
    runs.run(SQUAD, squad(folder, data, tmp_path, **flags))


def test_a_question_must_leave_room_for_its_context(folder, data, tmp_path):
    assert "--max_seq_length 8" in runs.refused(SQUAD, squad(folder, data, tmp_path / "out", max_seq_length=8))


def test_the_folder_of_a_glue_run_is_not_taken_for_ones_own(folder, data, tmp_path):
    runs.run("run_glue", runs.glue(folder, runs.write_sst2(tmp_path / "SST-2"), tmp_path / "out", max_steps=6))
    line = runs.refused(SQUAD, squad(folder, data, tmp_path / "out"))
    assert "--output_dir" in line and "task_name SST-2" in line and "give another folder" in line
