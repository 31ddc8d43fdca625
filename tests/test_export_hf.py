"""scripts/export_hf.py on a checkpoint of run_pretraining.py: sparse, with adapters, vocabulary padded."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from shard_factory import write_shard

from data.tokenization import load_tokenizer, vocabulary_sha256
from sparse_ops import named_layers
from training.assembly import build_pretraining_model
from training.checkpoint import load_checkpoint, save_checkpoint

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{index}" for index in range(46))]
MODEL = {
    "vocab_size": 51,  # padded to 56
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}


def run_script(root, name, *arguments, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, root / name, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, pytestconfig):
    """The last checkpoint of a run whose adapters joined before its last steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "model.json").write_text(json.dumps(MODEL))
    sha256 = vocabulary_sha256(load_tokenizer(folder / "vocab.txt"))
    write_shard(folder / "phase1" / "train" / "shard_00000.hdf5", vocab_size=51, vocabulary_sha256=sha256)
    flags = {
        "input_dir": folder / "phase1" / "train",
        "output_dir": folder / "out",
        "model_config_file": folder / "model.json",
        "max_steps": 6,
        "global_batch_size": 4,
        "local_batch_size": 4,
        "max_predictions_per_seq": 4,
        "learning_rate": 0.01,
        "pruned_matrix": "static-weight",
        "add_lora": "lazy",
        "lazy_lora_fraction": 0.5,
        "num_workers": 0,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    run = run_script(pytestconfig.rootpath, "run_pretraining.py", *words, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder / "out" / "pretrain_ckpts" / "ckpt_6.pt"


def test_the_exported_folder_gives_the_checkpoints_logits(pretrained, tmp_path, pytestconfig):
    out = tmp_path / "exported"
    run = run_script(
        pytestconfig.rootpath, "scripts/export_hf.py", "--checkpoint", pretrained, "--output_dir", out, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert str(out) in run.stdout

    model = build_pretraining_model(load_checkpoint(pretrained))
    layers = dict(named_layers(model))
    assert layers
    assert all(layer.adapter_weight().any() for layer in layers.values())  # merging them is no empty act
    theirs, info = transformers.AutoModelForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    weights = dict(theirs.named_parameters())
    name, layer = next(iter(layers.items()))
    torch.testing.assert_close(weights[f"{name}.weight"], layer.dense_weight() + layer.adapter_weight())

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    inputs = dict(
        tokenizer(["word1 word2", "word3"], ["word4", "word5 word6 word7"], padding=True, return_tensors="pt")
    )
    with torch.no_grad():
        scores, sentence_scores = model(**inputs)
        expected = theirs.eval()(**inputs)
    torch.testing.assert_close(scores[..., :51], expected.prediction_logits, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(sentence_scores, expected.seq_relationship_logits, rtol=1e-4, atol=2e-5)


def change_checkpoint(source, target, change):
    state = load_checkpoint(source)
    change(state)
    save_checkpoint(target, state)


def as_fine_tuned(state):
    state["model"] = {name: tensor for name, tensor in state["model"].items() if not name.startswith("cls.")}


def moved_away(state):
    state["arguments"]["input_dir"] = "/nowhere/phase1/train"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([*VOCABULARY, "more"], f"holds {len(VOCABULARY) + 1} entries; the model's vocab_size is 51"),
        ([*VOCABULARY[:-1], "another"], "has other entries than the vocabulary that the model was trained with"),
    ],
)
def test_another_vocabulary_is_refused(entries, said, pretrained, tmp_path, pytestconfig):
    another = tmp_path / "another.txt"
    another.write_text("\n".join(entries) + "\n")
    words = ["--checkpoint", pretrained, "--output_dir", tmp_path / "exported", "--vocab_file", another]
    run = run_script(pytestconfig.rootpath, "scripts/export_hf.py", *words, cwd=tmp_path)
    said = f"--vocab_file {another}: {said}"
    assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (None, ["--checkpoint", "missing.pt"], "--checkpoint missing.pt: no such file"),
        (as_fine_tuned, [], "holds no masked-token head"),
        (moved_away, [], "--vocab_file: must be given, as no vocab.txt lies in /nowhere/phase1/train"),
        (None, ["--vocab_file", "missing.txt"], "--vocab_file missing.txt: no such file"),
        (None, ["--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(change, flags, message, pretrained, tmp_path, pytestconfig):
    checkpoint = pretrained
    if change is not None:
        checkpoint = tmp_path / "ckpt_6.pt"
        change_checkpoint(pretrained, checkpoint, change)
    words = ["--checkpoint", checkpoint, "--output_dir", tmp_path / "exported", *flags]
    run = run_script(pytestconfig.rootpath, "scripts/export_hf.py", *words, cwd=tmp_path)
    assert run.returncode == 2, run.stderr
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "exported").exists()
