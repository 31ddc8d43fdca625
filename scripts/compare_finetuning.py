#!/usr/bin/env python3
"""Fine-tune one checkpoint dense, pruned 2:4, and pruned 2:4 with adapters, on several tasks and seeds; then the table.

python scripts/compare_finetuning.py --init_checkpoint DIR --glue_dir DATA/glue --squad_dir DATA/squad \\
    --output_dir results/comparison --seeds 0,1,2 --parallel 4

Runs are processes of run_glue.py and run_squad.py, `--parallel` of them at a time, dealt out to the machine's GPUs. One
that is finished is not run again, one that was stopped goes on; where one fails, the others are told to stop. The table
(Markdown) is OUTPUT_DIR/table.md, too.
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run_processes import ROOT, Command, Job, Planned, Processes, StopRequestedError, gpu_places

from data.glue import find_file, get_task
from training.errors import UsageError
from training.flags import Parser, parse_seeds, run_door, whole

VARIANTS = {
    "dense": ["--pruned_matrix", "none"],
    "2:4": ["--pruned_matrix", "static-weight"],
    "2:4, rank-16 adapters": ["--pruned_matrix", "static-weight", "--add_lora", "True", "--lora_rank", "16"],
}
# Of each task: what run_glue.py or run_squad.py is told, and the metrics to show, with their factor to percent.
GLUE_SETTINGS = ["--train_batch_size", "32", "--learning_rate", "5e-5", "--max_seq_length", "128"]
SQUAD_SETTINGS = [
    "--train_batch_size",
    "32",
    "--learning_rate",
    "1e-4",
    "--max_seq_length",
    "384",
    "--doc_stride",
    "128",
]
SQUAD_FILES = ("train-v1.1.json", "dev-v1.1.json")
TASKS = {
    "STS-B": ([*GLUE_SETTINGS, "--num_train_epochs", "4"], ("pearson", "spearman"), 100),
    "SST-2-shaped": ([*GLUE_SETTINGS, "--num_train_epochs", "3"], ("accuracy",), 100),
    "QNLI-shaped": ([*GLUE_SETTINGS, "--num_train_epochs", "1"], ("accuracy",), 100),
    "SQuAD": ([*SQUAD_SETTINGS, "--num_train_epochs", "2"], ("exact_match", "f1"), 1),
}


@dataclass(frozen=True)
class Run:
    """One fine-tuning run."""

    task: str
    variant: str
    seed: int
    directory: Path

    @property
    def results(self) -> Path:
        return self.directory / "eval_results.json"

    def metrics(self) -> dict[str, float]:
        return json.loads(self.results.read_text())["metrics"]

    def command(self, args) -> list[str]:
        settings = [
            *TASKS[self.task][0],
            *VARIANTS[self.variant],
            "--seed",
            str(self.seed),
            "--precision",
            args.precision,
        ]
        settings += ["--init_checkpoint", str(args.init_checkpoint), "--output_dir", str(self.directory)]
        settings += ["--cache_dir", str(args.output_dir / "cache"), "--disable_progress_bar", "--do_train", "--do_eval"]
        if args.max_steps is not None:
            settings += ["--max_steps", str(args.max_steps)]
        if self.task == "SQuAD":
            files = [
                "--train_file",
                f"{args.squad_dir}/{SQUAD_FILES[0]}",
                "--predict_file",
                f"{args.squad_dir}/{SQUAD_FILES[1]}",
            ]
            return [sys.executable, str(ROOT / "run_squad.py"), *files, "--do_predict", *settings]
        return [
            *(sys.executable, str(ROOT / "run_glue.py"), "--task_name", self.task),
            *("--data_dir", f"{args.glue_dir}/{self.task}", *settings),
        ]

    def finish(self, args) -> Job:
        """Run to the end, unless that was done; its output goes into `run.log`."""
        if self.results.exists():
            return
        started, log = time.time(), self.directory / "run.log"
        code = yield Command(self.command(args), log)
        if code != 0 or not self.results.exists():
            last = (log.read_text().strip().splitlines() or ["nothing printed"])[-1]
            raise UsageError(f"{self.task}, {self.variant}, seed {self.seed}: did not finish ({last}); see {log}")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics().items())
        print(f"{self.task}, {self.variant}, seed {self.seed}: {shown} ({time.time() - started:.0f} s)", flush=True)


def table(runs: list[Run], tasks: list[str]) -> str:
    """Mean and sample standard deviation over the seeds, one row a variant."""
    columns = [(task, metric) for task in tasks for metric in TASKS[task][1]]
    lines = [
        "| | " + " | ".join(f"{task} {metric}" for task, metric in columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for variant in VARIANTS:
        cells = []
        for task, metric in columns:
            group = [run for run in runs if (run.task, run.variant) == (task, variant)]
            values = [run.metrics()[metric] * TASKS[task][2] for run in group]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def check_files(args) -> None:
    """What the runs will read is there.

    Raises:
        UsageError: naming the flag, before a folder or a log is made.
    """
    if not args.init_checkpoint.exists():
        raise UsageError(f"--init_checkpoint {args.init_checkpoint}: no such file or folder")
    for task in args.tasks:
        if task == "SQuAD":
            for name in SQUAD_FILES:
                if not (args.squad_dir / name).is_file():
                    raise UsageError(f"--squad_dir {args.squad_dir}: holds no {name}, which --tasks {task} reads")
            continue
        for split in ("train", *get_task(task).dev_splits):
            find_file(get_task(task), args.glue_dir / task, split, "--glue_dir")


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--init_checkpoint", required=True, metavar="PATH", help="the dense model: a checkpoint or a folder"
    )
    parser.add_argument(
        "--glue_dir", default="data/glue", metavar="DIR", help="holds a folder of TSV files for each task"
    )
    parser.add_argument(
        "--squad_dir", default="data/squad", metavar="DIR", help="holds train-v1.1.json and dev-v1.1.json"
    )
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="runs and table go here")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="which tasks")
    parser.add_argument("--seeds", default="0,1,2", metavar="LIST", help="whole numbers with commas")
    parser.add_argument("--parallel", default=1, type=whole(1), metavar="N", help="runs at a time")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"), help="of the matrix products")
    parser.add_argument("--max_steps", type=whole(1), metavar="N", help="cut every run short, to try the command")
    args = parser.parse_args()
    for name in ("init_checkpoint", "glue_dir", "squad_dir", "output_dir"):  # runs start in the repository's folder
        setattr(args, name, Path(getattr(args, name)).resolve())
    seeds = parse_seeds(args.seeds, "--seeds")
    check_files(args)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {args.output_dir}: cannot be written ({error.strerror})") from error
    runs = [
        Run(task, variant, seed, args.output_dir / task / variant.replace(", ", "_").replace(":", "") / f"seed_{seed}")
        for task, seed, variant in itertools.product(args.tasks, seeds, VARIANTS)
    ]
    gpus = gpu_places()
    places = [gpus[number % len(gpus)] for number in range(args.parallel)]
    try:
        Processes().run({f"{run.directory}": Planned(run.finish(args)) for run in runs}, places)
    except StopRequestedError:
        sys.exit("stopped; the same command goes on")
    text = table(runs, args.tasks)
    (args.output_dir / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_door(main)
