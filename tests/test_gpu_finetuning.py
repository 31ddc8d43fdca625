"""Fine-tuning on a GPU: micro-steps as CUDA graphs, one for each padded length, against the plain loop."""

import csv
import json
from pathlib import Path

import pytest
from finetuning_runs import check_both_backends, glue, make_folder, pretrain, run, squad, write_questions, write_sst2

from training.graphs import MicroStepGraphs

pytestmark = pytest.mark.gpu
LONG = {"max_position_embeddings": 256}  # more than one length that batches are padded to
PLAIN = {"cuda_graphs": "False", "unpad": "False"}


def losses(output: Path) -> list[float]:
    with (output / "finetune_metrics.csv").open() as file:
        return [float(row["step_loss"]) for row in csv.DictReader(file)]


def scores(output: Path) -> dict[str, float]:
    return json.loads((output / "eval_results.json").read_text())["metrics"]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "slope with adapters"])
def test_glue_with_graphs_learns_what_it_learns_without(tmp_path, sparse):
    folder, data = make_folder(tmp_path / "model"), write_sst2(tmp_path / "data")
    start = {}
    if sparse:
        start = {"init_checkpoint": pretrain(tmp_path / "sparse", folder / "vocab.txt")}
        start |= {"vocab_file": folder / "vocab.txt"}
    for name, flags in (("graphs", {}), ("compiled", {"compile": True}), ("plain", PLAIN)):
        output = tmp_path / name
        run("run_glue", glue(folder, data, output, precision="bf16", max_steps=12, **start, **flags))
    for name in ("graphs", "compiled"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=0.02), name
        assert scores(tmp_path / name) == pytest.approx(scores(tmp_path / "plain"), abs=0.11)  # 2 of 20 examples


@pytest.mark.parametrize("longest", [128, 256], ids=["attention of ours", "flash"])
@pytest.mark.parametrize("unpad", ["auto", "False"])
def test_squad_with_graphs_of_several_shapes_and_accumulation(tmp_path, monkeypatch, unpad, longest):
    """The last batch of an epoch is smaller: a shape of its own."""
    folder, data = make_folder(tmp_path / "model", **LONG), tmp_path / "data"
    data.mkdir()
    for split, seed in (("train", 0), ("dev", 1)):
        write_questions(data / f"{split}.json", count=27, seed=seed, words_of_a_context=(20, longest - 18))
    captured, capture = set(), MicroStepGraphs.capture

    def record(self, batch, *how):
        captured.add(batch["input_ids"].shape)
        capture(self, batch, *how)

    monkeypatch.setattr(MicroStepGraphs, "capture", record)
    for name, flags in (("graphs", {"unpad": unpad}), ("plain", PLAIN)):
        lengths = {"max_seq_length": longest, "doc_stride": 32, "gradient_accumulation_steps": 2, "max_steps": 9}
        run("run_squad", squad(folder, data, tmp_path / name, precision="bf16", **lengths, **flags))
    assert len(captured) > 1 and {len(shape) for shape in captured} == {2 if unpad == "False" else 1}
    assert losses(tmp_path / "graphs") == pytest.approx(losses(tmp_path / "plain"), rel=0.03)


@pytest.mark.parametrize("adapters", [False, True], ids=["r = 0", "adapters"])
@pytest.mark.parametrize("attention", ["flash", "auto"])
@pytest.mark.parametrize("door", ["run_glue", "run_squad"])
def test_both_backends_learn_the_same(tmp_path, door, attention, adapters):
    check_both_backends(tmp_path, door, adapters, attention=attention)
