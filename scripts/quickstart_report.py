#!/usr/bin/env python3
"""The table that scripts/quickstart.sh ends with: what each run learned, against guessing without reading the text.

python scripts/quickstart_report.py --runs SLoPe=demo/slope dense=demo/dense --heldout demo/data/phase1/heldout \\
    --finetuned demo/slope/glue_2231 demo/dense/glue_2231 --glue_dir demo/glue --tasks STS-B SST-2-shaped
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configuration import BertConfig
from data.glue import Task, baseline, get_task, labels_array, read_examples, score
from data.shard_files import ShardSet
from modeling import BertForPreTraining
from sparse_ops import named_layers, sparsity_report
from training.assembly import build_pretraining_model
from training.checkpoint import checkpoint_path, load_checkpoint, saved_steps
from training.errors import UsageError
from training.flags import Parser, read_json, run_door

LAST_STEPS = 50  # the last loss is a mean over these, since one batch's loss is noisy
STATE_BYTES_PER_PARAMETER = 16  # fp32: the weight, its gradient and two optimizer moments


@dataclass(frozen=True)
class Guessing:
    """How well one can do on the held-out text without reading it."""

    entropy: float
    """Entropy in nats of the held-out tokens' own frequencies: no fixed distribution has a lower loss on them."""
    majority: float
    """Share of the most frequent token."""


def guessing(heldout: Path) -> Guessing:
    """Count the tokens that can be masked: all but [CLS], [SEP] and padding."""
    shards = ShardSet(heldout, flag="--heldout")
    counts = np.zeros(int(shards.vocab_size), np.int64)
    for index in range(len(shards.files)):
        arrays = shards.load(index, len(counts))
        ids = arrays["input_ids"].copy()
        special = arrays["special_token_positions"]
        real = np.arange(ids.shape[1]) <= special[:, -1:]
        np.put_along_axis(real, special.astype(np.int64), False, axis=1)
        counts += np.bincount(ids[real], minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return Guessing(float(-(share * np.log(share)).sum()), float(share.max()))


def read_metrics(run: Path) -> list[dict[str, str]]:
    paths = sorted(run.glob("*_metrics.csv"))
    if not paths:
        raise UsageError(f"--runs {run}: holds no *_metrics.csv; is it the --output_dir of a run?")
    with paths[-1].open(newline="") as file:
        return list(csv.DictReader(file))


def describe(run: Path) -> dict[str, str]:
    """The table's column of one run, a string for each row."""
    rows = read_metrics(run)
    losses = [float(row["step_loss"]) for row in rows]
    heldout = [row for row in rows if row["heldout_mlm_loss"]][-1]
    checkpoints = run / "pretrain_ckpts"
    checkpoint = load_checkpoint(checkpoint_path(checkpoints, saved_steps(checkpoints)[-1]), "--runs")
    model = build_pretraining_model(checkpoint)
    dense = BertForPreTraining(BertConfig.from_dict(checkpoint["model_config"]))
    report = sparsity_report(model)
    parameters, dense_parameters = (sum(p.numel() for p in m.parameters()) for m in (model, dense))
    mask_bytes = sum(layer.mask_bits.numel() for _, layer in named_layers(model))
    batch = int(checkpoint["arguments"]["global_batch_size"])
    seconds = sum(batch / float(row["sequences_per_second"]) for row in rows)
    densities = (f"{report.forward_density:.4f}", f"{report.backward_density:.4f}") if report.layers else ("1", "1")
    state = (parameters * STATE_BYTES_PER_PARAMETER + mask_bytes) / 1e6
    return {
        "pretraining loss, first step": f"{losses[0]:.3f}",
        f"pretraining loss, last {LAST_STEPS} steps": f"{sum(losses[-LAST_STEPS:]) / len(losses[-LAST_STEPS:]):.3f}",
        "held-out MLM loss": f"{float(heldout['heldout_mlm_loss']):.3f}",
        "held-out MLM accuracy": f"{float(heldout['heldout_mlm_accuracy']):.4f}",
        "density of W^R": densities[0],
        "density of W^(R,C)": densities[1],
        "parameters": f"{parameters:,}",
        "parameters, if dense": f"{dense_parameters:,}",
        "weights, gradients, moments, masks, MB": f"{state:.2f}",
        "weights, gradients, moments, if dense, MB": f"{dense_parameters * STATE_BYTES_PER_PARAMETER / 1e6:.2f}",
        "steps with adapters": f"{sum(row['adapters'] == '1' for row in rows)} of {len(rows)}",
        "tokens/s (median step)": f"{median(float(row['tokens_per_second']) for row in rows):,.0f}",
        "training time, s": f"{seconds:.0f}",
    }


def score_label(task: Task, metric: str) -> str:
    return f"{task.name}, dev {metric}"


def describe_scores(finetuned: Path, tasks: list[Task]) -> dict[str, str]:
    """Rows for the metrics of each task, from the outputs of run_glue.py in `finetuned`/TASK."""
    rows = {}
    for task in tasks:
        path = finetuned / task.name / "eval_results.json"
        results = read_json(str(path), "--finetuned")
        for metric in task.metrics:
            try:
                rows[score_label(task, metric)] = f"{results['metrics'][metric]:.4f}"
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"--finetuned {path}: holds no {metric} of {task.name}") from error
    return rows


def guesses_of_tasks(tasks: list[Task], glue_dir: Path) -> dict[str, tuple[str, str]]:
    """For each row of `describe_scores`, what the train split's majority class or mean score gets on the dev split."""
    guesses = {}
    for task in tasks:
        train, dev = (
            labels_array(task, read_examples(task, glue_dir / task.name, split)) for split in ("train", "dev")
        )
        # A constant has no correlation with anything; the metrics take that as 0.
        label = "always the mean score (undefined, taken as 0)" if task.regression else "always the majority class"
        for metric, value in score(task, "dev", baseline(task, train, len(dev)), dev).items():
            guesses[score_label(task, metric)] = (label, f"{value:.4f}")
    return guesses


def print_table(
    title: str, names: list[str], columns: list[dict[str, str]], guesses: dict[str, tuple[str, str]]
) -> None:
    """Print a row for each label of `columns`, and below it, indented, the guess that it has in `guesses`."""
    label_width = max(len(label) for label in (*columns[0], *(f"  {label}" for label, _ in guesses.values())))
    widths = [
        max(len(name), *(len(value) for value in column.values())) for name, column in zip(names, columns, strict=True)
    ]

    def line(label: str, cells: list[str]) -> None:
        print(
            f"  {label:<{label_width}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)).rstrip()
        )

    print(title)
    line("", names)
    for label in columns[0]:
        line(label, [column[label] for column in columns])
        if label in guesses:
            guess, value = guesses[label]
            line(f"  {guess}", [value] * len(names))


def finetuned_tasks(args, runs: int) -> list[Task]:
    if args.glue_dir is None or args.tasks is None:
        raise UsageError("--finetuned: needs --glue_dir and --tasks")
    if len(args.finetuned) != runs:
        raise UsageError(f"--finetuned: must be {runs} folders, one for each of --runs, not {len(args.finetuned)}")
    return [get_task(name, "--tasks") for name in args.tasks]


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=DIR", help="finished runs, one column each")
    parser.add_argument("--heldout", required=True, type=Path, help="the held-out shards")
    finetuning = parser.add_argument_group("fine-tuning")
    finetuning.add_argument(
        "--finetuned", nargs="+", type=Path, metavar="DIR", help="for each run, the folder of its run_glue.py outputs"
    )
    finetuning.add_argument("--glue_dir", type=Path, metavar="DIR", help="holds a folder of TSV files for each task")
    finetuning.add_argument("--tasks", nargs="+", metavar="TASK", help="GLUE tasks, a folder of each in --finetuned")
    args = parser.parse_args()
    runs = dict(run.partition("=")[::2] for run in args.runs)
    if not all(runs.values()):
        raise UsageError("--runs: must be NAME=DIR, such as SLoPe=demo/slope")
    columns = [describe(Path(directory)) for directory in runs.values()]
    guess = guessing(args.heldout)
    guesses = {
        "held-out MLM loss": ("best fixed guess (unigram entropy)", f"{guess.entropy:.3f}"),
        "held-out MLM accuracy": ("always the most frequent token", f"{guess.majority:.4f}"),
    }
    if args.finetuned is not None:
        tasks = finetuned_tasks(args, len(runs))
        columns = [
            column | describe_scores(folder, tasks) for column, folder in zip(columns, args.finetuned, strict=True)
        ]
        guesses |= guesses_of_tasks(tasks, args.glue_dir)
    print_table("Pretraining on the demo corpus (losses in nats)", list(runs), columns, guesses)


if __name__ == "__main__":
    run_door(main)
