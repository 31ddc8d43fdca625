#!/usr/bin/env python3
"""Gather finished GLUE tasks into the 8-task mean, and say which tasks are missing.

    python scripts/summarize_glue.py results/glue

Read is each eval_results.json that run_glue.py left in the named folders or below them. A task's score is, times 100,
Matthews correlation for CoLA, F1 for MRPC and QQP, the mean of Pearson's and Spearman's correlation for STS-B, accuracy
for SST-2, MNLI (the matched dev set), QNLI and RTE; the mean of the eight is the SLoPe paper's. Other tasks are listed
under their own names and count for nothing.
"""

import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.glue import TASKS, Task, get_task
from training.errors import UsageError
from training.flags import Parser, read_json, run_door

RESULTS = "eval_results.json"
COUNTED = [task for task in TASKS.values() if task.mean_metrics]


class Result(NamedTuple):
    """A finished task."""

    task: Task
    score: float
    """Times 100."""
    spread: float | None
    """Sample standard deviation of the score over the seeds; None for one seed."""
    seeds: int
    path: Path


def find_results(folder: Path) -> list[Path]:
    """The topmost results in `folder` and below; what lies below a result are the seeds that it is the mean of.

    Raises:
        UsageError: no such folder, or no results there.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the --output_dir of run_glue.py, or a folder that holds some")
    found = []
    for parent, folders, files in os.walk(folder):
        folders.sort()
        if RESULTS in files:
            found.append(Path(parent) / RESULTS)
            folders.clear()
    if not found:
        raise UsageError(f"{folder}: holds no {RESULTS}; run_glue.py writes one with --do_eval")
    return found


def read_result(path: Path) -> Result:
    """Read the results `{"task": name, "metrics": {...}, "seeds": {seed: metrics}}`, seeds being optional.

    Raises:
        UsageError: naming the file, for anything else.
    """
    content = read_json(str(path), "results")
    try:
        task = get_task(content["task"], f"{path}: task")
        score = task_score(task, content["metrics"])
        seeds = [task_score(task, metrics) for metrics in content.get("seeds", {}).values()]
    except KeyError as error:
        raise UsageError(f"{path}: lacks {error}, which run_glue.py writes with --do_eval") from error
    except (TypeError, AttributeError) as error:
        raise UsageError(f"{path}: is no result of run_glue.py ({error})") from error
    spread = statistics.stdev(seeds) if len(seeds) > 1 else None
    return Result(task, score, spread, max(1, len(seeds)), path)


def task_score(task: Task, metrics: dict[str, float]) -> float:
    """A task's one number, times 100."""
    return 100 * statistics.fmean(metrics[name] for name in task.mean_metrics or task.metrics)


def summarize(results: list[Result]) -> str:
    """The table, the mean and what is missing.

    Raises:
        UsageError: two results of one task.
    """
    by_task: dict[str, Result] = {}
    for result in results:
        first = by_task.setdefault(result.task.name, result)
        if first is not result:
            raise UsageError(f"{result.task.name} is in {first.path} and in {result.path}: give one of the two folders")
    counted = [by_task[task.name] for task in COUNTED if task.name in by_task]
    others = [by_task[name] for name, task in TASKS.items() if name in by_task and not task.mean_metrics]
    missing = [task.name for task in COUNTED if task.name not in by_task]

    lines = [_line(result) for result in counted]
    if missing:
        lines.append(f"no mean of {len(COUNTED)} tasks yet, missing: {', '.join(missing)}")
    if counted:
        mean = statistics.fmean(result.score for result in counted)
        lines.append(f"mean of {'all' if not missing else 'these'} {len(counted)} tasks: {mean:.2f}")
    if others:
        lines += ["outside the mean:", *map(_line, others)]
    return "\n".join(lines)


def _line(result: Result) -> str:
    spread = "" if result.spread is None else f" ± {result.spread:.2f} ({result.seeds} seeds)"
    metrics = " and ".join(result.task.mean_metrics or result.task.metrics)
    return f"{result.task.name:<14}{result.score:6.2f}{spread}  {metrics}  {result.path.parent}"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="output folders of run_glue.py")
    args = parser.parse_args()
    paths = dict.fromkeys(path.resolve() for folder in args.folders for path in find_results(folder))
    print(summarize([read_result(path) for path in paths]))


if __name__ == "__main__":
    run_door(main)
