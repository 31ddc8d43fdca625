"""Fine-tuning of a tiny BERT: its files, small tasks that it can learn, and runs of run_glue.py and run_squad.py.

A run is a call of the script's `main` in this process; where it has to die or to be several, a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pretraining_runs
import pytest
import torch
import transformers
from pretraining_runs import Finished, kill_after, snapshot
from shard_factory import write_shard
from squad_factory import WORDS, question, write_squad, write_vocabulary
from torch import Tensor

from data.tokenization import load_tokenizer, vocabulary_sha256
from training.checkpoint import load_checkpoint
from training.flags import run_door

__all__ = ["kill_after", "snapshot"]
LENGTH = 32
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
}


# --------------------------------------------------------------------------------------------------------------- files
def make_folder(folder: Path, hf_class=transformers.BertForPreTraining, seed: int = 0, **changes) -> Path:
    """A Hugging Face folder of a tiny dense model with random weights and no dropout."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_vocabulary(folder / "vocab.txt")
    size = len(vocabulary.read_text().splitlines())
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    torch.manual_seed(seed)
    config = transformers.BertConfig(**(SIZES | dropout | {"vocab_size": size, "initializer_range": 0.2} | changes))
    model = hf_class(config)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias, std=0.1)  # zeros would hide a bias that is lost
    model.save_pretrained(folder)
    return folder


def pretrain(folder: Path, vocab_file: Path, **changes) -> Path:
    """The checkpoint of a run of 2 steps, by default SLoPe's with adapters of rank 4."""
    size, sha256 = len(vocab_file.read_text().splitlines()), vocabulary_sha256(load_tokenizer(vocab_file))
    shard = folder / "shards" / "shard_0.hdf5"
    write_shard(shard, count=12, length=16, vocab_size=size, vocabulary_sha256=sha256)
    model = SIZES | {"vocab_size": size} | pretraining_runs.NO_DROPOUT
    (folder / "model.json").write_text(json.dumps(model))
    flags = {"pruned_matrix": "static-weight", "add_lora": "lazy", "learning_rate": 4e-3} | changes
    flags |= {"model_config_file": folder / "model.json", "input_dir": folder / "shards", "output_dir": folder / "run"}
    flags |= {"max_steps": 2, "global_batch_size": 4, "local_batch_size": 4, "max_predictions_per_seq": 2}
    flags |= {"num_workers": 0, "disable_progress_bar": True}
    run("run_pretraining", command(flags))
    return folder / "run" / "pretrain_ckpts" / "ckpt_2.pt"


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Random words, and whether "paris" is among them; both classes are equally frequent."""
    rng, words = np.random.default_rng(seed), [word for word in WORDS if word != "paris"]
    rows = []
    for number in range(count):
        sentence = list(rng.choice(words, rng.integers(3, 9)))
        if number % 2:
            sentence.insert(rng.integers(len(sentence)), "paris")
        rows.append((" ".join(sentence), number % 2))
    return rows


def write_sst2(folder: Path, train: int = 48, dev: int = 20) -> Path:
    """Files of SST-2's shape that a tiny model can learn: the label says whether the sentence holds a word."""
    for split, count, seed in (("train", train, 0), ("dev", dev, 1)):
        rows = "".join(f"{text}\t{label}\n" for text, label in sentences(count, seed))
        write(folder / f"{split}.tsv", f"sentence\tlabel\n{rows}")
    rows = "".join(f"{number}\t{text}\n" for number, (text, _) in enumerate(sentences(6, 2)))
    write(folder / "test.tsv", f"index\tsentence\n{rows}")
    return folder


def write_stsb(folder: Path, count: int = 16) -> Path:
    for split, seed in (("train", 0), ("dev", 1), ("test", 2)):
        pairs = zip(sentences(count, seed), sentences(count, seed + 10), strict=True)
        rows = [f"{number}\t{a}\t{b}\t{number % 6 * 0.8:.1f}\n" for number, ((a, _), (b, _)) in enumerate(pairs)]
        write(folder / f"{split}.tsv", "index\tsentence1\tsentence2\tscore\n" + "".join(rows))
    return folder


def write_mnli(folder: Path, count: int = 12) -> Path:
    words = ("contradiction", "entailment", "neutral")
    for seed, split in enumerate(("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")):
        pairs = zip(sentences(count, seed), sentences(count, seed + 10), strict=True)
        rows = [f"{number}\t{a}\t{b}\t{words[number % 3]}\n" for number, ((a, _), (b, _)) in enumerate(pairs)]
        write(folder / f"{split}.tsv", "index\tsentence1\tsentence2\tgold_label\n" + "".join(rows))
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_questions(
    path: Path, count: int = 24, seed: int = 0, impossible: bool = False, words_of_a_context: tuple[int, int] = (12, 30)
) -> Path:
    """When was it built? The one year in a context of words; with `impossible`, every third context has none."""
    rng, words = np.random.default_rng(seed), [word for word in WORDS if not word.isdigit()]
    paragraphs = []
    for number in range(count):
        context = list(rng.choice(words, rng.integers(*words_of_a_context)))
        if impossible and number % 3 == 0:
            paragraphs.append((" ".join(context), [question(f"q{number}", "", is_impossible=True)]))
            continue
        year = str(rng.choice(["1887", "1889"]))
        context.insert(rng.integers(len(context)), year)
        more = {"is_impossible": False} if impossible else {}
        paragraphs.append((" ".join(context), [question(f"q{number}", " ".join(context), year, **more)]))
    return write_squad(path, *paragraphs, version="v2.0" if impossible else "1.1")


# ---------------------------------------------------------------------------------------------------------------- runs
def command(flags: dict) -> list[str]:
    """Flags as words; True is a flag that stands alone, None leaves it out."""
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def glue(folder: Path, data: Path, output: Path, **changes) -> list[str]:
    """The command line of a short run on the SST-2 of `write_sst2`, from the Hugging Face folder `folder`."""
    flags = {"task_name": "sst-2", "data_dir": data, "init_checkpoint": folder, "output_dir": output}
    flags |= {"do_train": True, "do_eval": True, "max_seq_length": LENGTH, "train_batch_size": 8, "max_steps": 6}
    flags |= {"learning_rate": 2e-3, "seed": 1, "disable_progress_bar": True}
    return command(flags | changes)


def squad(folder: Path, data: Path, output: Path, **changes) -> list[str]:
    """The command line of a short run on `data`/train.json and dev.json of `write_questions`."""
    flags = {"train_file": data / "train.json", "predict_file": data / "dev.json", "init_checkpoint": folder}
    flags |= {"output_dir": output, "do_train": True, "do_predict": True, "do_eval": True, "max_seq_length": LENGTH}
    flags |= {"doc_stride": 8, "max_query_length": 8, "train_batch_size": 8, "max_steps": 6, "learning_rate": 2e-3}
    flags |= {"seed": 1, "disable_progress_bar": True}
    return command(flags | changes)


def run(door: str, flags: Sequence[str]) -> str:
    """Run `door`'s main in this process, to a good end; what it said on stderr."""
    code, said = attempt(door, flags)
    assert code == 0, said
    return said


def attempt(door: str, flags: Sequence[str]) -> tuple[int, str]:
    """Exit code and stderr of `door` in this process."""
    said = io.StringIO()
    main = importlib.import_module(door).main
    with mock.patch.object(sys, "argv", [f"{door}.py", *flags]), contextlib.redirect_stderr(said), _same_signals():
        try:
            run_door(main)
        except SystemExit as end:
            return end.code, said.getvalue()
    return 0, said.getvalue()


@contextlib.contextmanager
def _same_signals() -> Iterator[None]:
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refused(door: str, flags: Sequence[str]) -> str:
    """The one line with which `door` refuses, with exit code 2."""
    code, said = attempt(door, flags)
    lines = said.splitlines()
    assert (code, len(lines)) == (2, 1), said
    assert lines[0].startswith(f"{door}.py: error: ")
    return lines[0]


def run_apart(door: str, flags: Sequence[str], *prepare, ranks: int = 1) -> list[Finished]:
    """Run `door` in `ranks` processes of their own. `prepare` are importable functions that they call first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    streams = Path(tempfile.mkdtemp(prefix="finetuning-"))
    processes = []
    for rank in range(ranks):
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        world |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (door, list(flags), world if ranks > 1 else {}, streams / str(rank), list(prepare))
        processes.append(pretraining_runs._context().Process(target=_run_apart, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(pretraining_runs.TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
    return [Finished(process.exitcode, "", (streams / str(rank)).read_text()) for rank, process in enumerate(processes)]


def _run_apart(door: str, flags: list[str], environment: dict[str, str], stream: Path, prepare: list) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(stream, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(environment)
    sys.argv = [f"{door}.py", *flags]
    for function in prepare:
        function()
    run_door(importlib.import_module(door).main)


# -------------------------------------------------------------------------------------------------------------- results
def results(output: Path) -> dict:
    return json.loads((output / "eval_results.json").read_text())


def losses(output: Path) -> list[float]:
    """Of each step."""
    return [float(row["step_loss"]) for row in pretraining_runs.metrics(output, "finetune")]


def weights(output: Path, step: int) -> dict[str, Tensor]:
    return load_checkpoint(output / "finetune_ckpts" / f"ckpt_{step}.pt")["model"]


# ------------------------------------------------------------------------------------------------------------- backends
def check_both_backends(folder: Path, door: str, adapters: bool, steps: int = 36, **changes) -> None:
    """Losses of all steps, and how far the matrices went, are those of dense operands: to bf16's roundings.

    Args:
        changes: flags of all runs.
    """
    model, data = make_folder(folder / "model"), folder / "data"
    if door == "run_glue":
        write_sst2(data)
    else:
        data.mkdir()
        for split, seed in (("train", 0), ("dev", 1)):
            write_questions(data / f"{split}.json", seed=seed)
    flags = {"pruned_matrix": "static-weight", "precision": "bf16", "max_steps": steps} | changes
    flags |= {"add_lora": "True", "lora_rank": 4} if adapters else {}

    def learned(backend: str, **changes) -> tuple[list[float], dict[str, Tensor]]:
        output, command_of = folder / f"{backend}_{len(changes)}", glue if door == "run_glue" else squad
        said = run(door, command_of(model, data, output, **flags | changes, sparse_backend=backend))
        assert ("cutlass (" in said) == (backend == "cutlass"), said
        return losses(output), weights(output, changes.get("max_steps", steps))

    _, start = learned("dense", learning_rate=1e-12, max_steps=1)
    (right, dense), (found, sparse) = learned("dense"), learned("cutlass")
    assert right[-1] < 0.7 * right[0], "it learns nothing, and so the test shows nothing"
    assert len(found) == steps and found == pytest.approx(right, rel=0.05)
    for name, matrix in dense.items():
        if matrix.is_floating_point() and not name.endswith("bias"):  # those of keys have no gradient but roundings
            difference = (sparse[name] - matrix).norm() / (matrix - start[name]).norm()
            assert difference < 0.2, f"{name}: {difference:.3f} of its way"
