#!/usr/bin/env python3
"""Pretrain dense, by SLoPe, with lazy adapters, and dense pruned half-way; fine-tune each; draw picture and table.

bash scripts/reproduce.sh --parallel 4              the whole comparison, on all GPUs of this machine
bash scripts/reproduce.sh --report                  table and picture of what is there, also while it runs

What was stopped or killed goes on by the same command, what is finished is not run again. OUTPUT_DIR/report.md and
OUTPUT_DIR/curves.png are written from logs or summaries, results and checkpoints; --docs writes them into
docs/results.md, too.
"""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from datetime import date
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare_finetuning import TASKS
from reproduction_report import measure_density, write_report
from reproduction_runs import RECIPES, ROOT, STANDARD, Plan, Settings
from run_processes import Command, Job, Planned, Processes, StopRequestedError, gpu_places, shown

from configuration import BertConfig
from data.shard_files import ShardSet
from data.stages import write_atomic
from training.errors import UsageError
from training.flags import Parser, add_switch, parse_flags, parse_seeds, read_json, real, run_door, whole

DOCS = ROOT / "docs/results.md"
ESTIMATED_SEQUENCES = 305_000  # of the large corpus, vocabulary 16,384; for --dry_run without data
# Flags that the numbers depend on: they are told again where the command of a report is shown.
TELLING = (
    *("epochs", "global_batch_size", "local_batch_size", "learning_rate", "sparse_learning_rate", "lora_lr_scale"),
    *("warmup_proportion", "seed", "precision", "finetune_seeds", "finetune_steps"),
)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument("--output_dir", default="results/reproduction", metavar="DIR", help="for all that is made")
    files.add_argument("--data_dir", metavar="DIR", help="for the data; by default OUTPUT_DIR/data")
    files.add_argument(
        "--model_config_file",
        default=str(ROOT / "config/bert_reproduction_config.json"),
        metavar="JSON",
        help="the model's sizes, and the size of the vocabulary that is built",
    )
    files.add_argument("--nproc", default=os.cpu_count(), type=whole(1), help="processes that make the data")
    add_switch(files, "--skip_data", "make no data: they are all in --data_dir")
    runs = parser.add_argument_group("what to run")
    extra = ",".join(name for name in RECIPES if name not in STANDARD)
    runs.add_argument(
        "--only",
        metavar="NAMES",
        help=f"some runs, with commas: {','.join(STANDARD)}; or what is else not run: {extra}",
    )
    add_switch(runs, "--skip_finetuning", "pretrain alone")
    runs.add_argument("--tasks", metavar="NAMES", default=",".join(TASKS), help="to fine-tune on, with commas")
    runs.add_argument("--parallel", default=1, type=whole(1), metavar="N", help="fine-tunings at a time on each GPU")
    add_switch(runs, "--dry_run", "print the commands, and run none")
    add_switch(runs, "--report", "run nothing: table and picture from what is there")
    runs.add_argument("--docs", nargs="?", const=str(DOCS), metavar="FILE", help="also into this document, by default "
                      "docs/results.md, between its two marker lines")  # fmt: skip
    training = parser.add_argument_group("training, the same for all runs but for the learning rate")
    training.add_argument("--epochs", default=30, type=whole(1, 30), help="passes over the text")
    training.add_argument("--global_batch_size", default=64, type=whole(1), help="sequences of an optimizer step")
    training.add_argument("--local_batch_size", default=64, type=whole(1), help="sequences of a micro-step")
    training.add_argument("--learning_rate", default=1.7e-3, type=real(0), help="peak learning rate of dense runs")
    training.add_argument("--sparse_learning_rate", default=1.7e-3, type=real(0), help="of runs sparse from the start")
    training.add_argument("--lora_lr_scale", default=0.1, type=real(0), help="the adapters' rate over all else's")
    training.add_argument("--warmup_proportion", default=0.1, type=real(0, 0.5), help="share of the steps it rises in")
    training.add_argument("--seed", default=42, type=whole(0, 2**32 - 2), help="of weights, order, masks, dropout")
    training.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"), help="of matrix products")
    training.add_argument(
        "--finetune_seeds", default="0,1,2", metavar="LIST", help="of all tasks but SQuAD: it has one"
    )
    training.add_argument("--finetune_steps", type=whole(1), help="cut every fine-tuning short, to try the command")
    args = parse_flags(parser, argv)
    args.names = _chosen(args.only or ",".join(STANDARD), RECIPES, "--only")
    args.task_names = [] if args.skip_finetuning else _chosen(args.tasks, TASKS, "--tasks")
    args.output_dir = Path(args.output_dir).resolve()  # one spelling: runs remember the paths that they began from
    args.data_dir = Path(args.data_dir).resolve() if args.data_dir else args.output_dir / "data"
    parse_seeds(args.finetune_seeds, "--finetune_seeds")
    args.defaults = vars(parser.parse_args([]))
    return args


def _chosen(text: str, known: dict, flag: str) -> list[str]:
    """The names in `text`, in the order of `known`, which is one that they can be run in."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"{flag} {text}: {name or 'an empty name'} is none of {', '.join(known)}")
    return [name for name in known if name in names]


# ----------------------------------------------------------------------------------------------------------- the stages
def make_plan(args, sequences: int, sequence_length: int = 128) -> Plan:
    """The commands for a corpus of so many sequences, in all passes over it together."""
    flag = "--model_config_file"
    model = read_json(args.model_config_file, flag)
    BertConfig.from_json_file(args.model_config_file, flag)  # a mistake in it is found before anything is made
    training = {name: getattr(args, name) for name in TELLING}
    settings = Settings(**training, model=model, sequences=sequences, sequence_length=sequence_length)
    return Plan(settings, args.output_dir, args.data_dir, Path(args.model_config_file).resolve(), args.nproc)


def plan_for_data(args) -> Plan:
    """The commands for the shards that are there."""
    shards = ShardSet(args.data_dir / "phase1/train", flag="--data_dir")
    return make_plan(args, shards.total, shards.sequence_length)


def must_end_well(command: Command, code: int, what: str) -> None:
    if code == 2 and command.log is None:  # it has said what is wrong, in one line
        sys.exit(2)
    if code != 0:
        where = "" if command.log is None else f" (see {command.log})"
        raise UsageError(
            f"{what}: ended with exit code {code}{where}; when its reason is gone, the same command goes on"
        )


def make_data(args) -> Job:
    for words in make_plan(args, 0).data_commands(args.task_names):
        command = Command(words, with_children=True)
        must_end_well(command, (yield command), "the data")


def training_command(words: list[str], log: Path | None) -> Command:
    """Without a bar where nobody watches it."""
    return Command(words if log is None else [*words, "--disable_progress_bar"], log)


def pretrain(plan: Plan, name: str, log: Path | None) -> Job:
    """One run to its end, from where it is or from the run that it branches off."""
    recipe, last = RECIPES[name], plan.last_checkpoint(name)
    if not last.exists():
        if recipe.source and not plan.has_begun(name) and not plan.branch_off(name):
            step = plan.settings.step_of(recipe.branch)
            if recipe.new_phase:
                raise UsageError(
                    f"--only {name}: begins with step {step} of {recipe.source}, which is not there: run that, too"
                )
            print(f"{name}: runs from its first step, since {recipe.source} has no checkpoint of step {step}")
        record_machine(plan.directory(name))
        command = training_command(plan.pretraining_command(name), log)
        try:
            code = yield command
        finally:
            plan.keep_branches(name)
        must_end_well(command, code, name)
        if not last.exists():
            raise UsageError(f"{name}: stopped before its end; the same command goes on")
    measure_density(plan.output_dir, name, last)


def finetune(plan: Plan, name: str, task: str, log: Path | None) -> Job:
    """One task, all its seeds. Its checkpoints, 12 bytes a parameter for each seed, go once there are scores."""
    directory = plan.finetuning_directory(name, task)
    if not (directory / "eval_results.json").exists():
        record_machine(plan.directory(name))
        command = training_command(plan.finetuning_command(name, task), log)
        must_end_well(command, (yield command), f"{name}, {task}")
        if not (directory / "eval_results.json").exists():
            raise UsageError(f"{name}, {task}: stopped before its end; the same command goes on")
    for checkpoints in directory.rglob("finetune_ckpts"):
        shutil.rmtree(checkpoints)


@functools.cache
def machine() -> tuple[str, str]:
    """The chip that runs use, and torch's version."""
    words = "import torch; c = torch.cuda; print(c.get_device_name() if c.is_available() else '', torch.__version__)"
    # In a process of its own, since asking takes memory of the GPU that stays taken.
    answer = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout
    chip, _, version = answer.strip("\n").rpartition(" ")
    return f"one {chip}" if chip else f"{os.cpu_count()} cores of an {os.uname().machine} CPU", version.partition("+")[
        0
    ]


def record_machine(directory: Path) -> None:
    """Add this machine and day to those that the run was made on."""
    chip, version = machine()
    entry = {"chip": chip, "torch": version, "date": date.today().isoformat()}
    path = directory / "machines.json"
    known = json.loads(path.read_text()) if path.exists() else []
    if entry not in known:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps([*known, entry], indent=2) + "\n")


def dry_run(args) -> None:
    there = (args.data_dir / "phase1/train").is_dir()
    plan = plan_for_data(args) if there else make_plan(args, ESTIMATED_SEQUENCES)
    for command in [] if args.skip_data else plan.data_commands(args.task_names):
        print(shown(command))
    if not there:
        print(f"# {plan.settings.steps} steps are an estimate: without the data, their number is not known")
    for name in args.names:
        recipe = RECIPES[name]
        if recipe.source:
            print(f"# {name} goes on from step {plan.settings.step_of(recipe.branch)} of {recipe.source}")
        print(shown(plan.pretraining_command(name)))
    for name, task in product(args.names, args.task_names):
        print(shown(plan.finetuning_command(name, task)))


def reproduce(args) -> None:
    processes, gpus = Processes(), gpu_places()
    if not args.skip_data:
        processes.run({"the data": Planned(make_data(args))})
    plan = plan_for_data(args)
    plan.settings.save(args.output_dir)
    processes.run(planned_jobs(args, plan, gpus), gpus, args.parallel)


def planned_jobs(args, plan: Plan, gpus: Sequence[dict]) -> dict[str, Planned]:
    """All runs, each on a GPU of its own, and their fine-tunings, which share them."""

    def pretrain_and_report(name: str) -> Job:
        yield from pretrain(plan, name, log_beside(plan.directory(name), len(gpus)))
        report(args)  # after each run, for who looks in

    def can_begin(name: str, unfinished: Collection[str]) -> bool:
        return RECIPES[name].source not in unfinished or plan.can_branch_off(name)

    # The longest first, so that no GPU waits at the end: runs that branch off late are short; so are the first tasks.
    longest_first = sorted(args.names, key=lambda name: RECIPES[name].branch)
    pretrainings = {
        name: Planned(pretrain_and_report(name), functools.partial(can_begin, name), alone=True)
        for name in longest_first
    }
    finetunings = {
        f"{name}, {task}": Planned(
            finetune(plan, name, task, log_beside(plan.finetuning_directory(name, task), len(gpus) * args.parallel)),
            lambda unfinished, name=name: name not in unfinished,
        )
        for name, task in product(longest_first, reversed(args.task_names))
    }
    return pretrainings | finetunings


def log_beside(directory: Path, at_a_time: int) -> Path | None:
    """For the output of a run that others run beside."""
    return directory / "run.log" if at_a_time > 1 else None


def report(args, docs: Path | None = None) -> str:
    """Write table and picture; returns the text."""
    settings = Settings.load(args.output_dir)
    told = {name: getattr(settings, name) for name in TELLING if getattr(settings, name) != args.defaults[name]}
    if settings.model != read_json(args.defaults["model_config_file"], "--model_config_file"):
        told["model_config_file"] = "FILE"
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    return write_report(args.output_dir, shlex.join(["bash", "scripts/reproduce.sh", *words]), docs)


def main() -> None:
    args = parse_arguments()
    if args.dry_run:
        dry_run(args)
        return
    if not args.report:
        try:
            reproduce(args)
        except StopRequestedError:
            sys.exit("stopped; the same command goes on")
    print(report(args, Path(args.docs) if args.docs else None))


if __name__ == "__main__":
    run_door(main)
