"""GLUE (Wang et al., 2019, arXiv:1804.07461): its tasks as one table, a reader of its files, its submission format.

The files are GLUE's own TSV files as its zip archives hold them: a tab parts cells, a line feed ends rows, a quote is a
character like any other. Sets of this shape made from other data (data.prepare_glue) are tasks of their own, with names
of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.stages import write_atomic
from training.errors import UsageError
from training.metrics import evaluate


class Example(NamedTuple):
    """One row of a task's file."""

    index: str
    """As the file gives it, else the row's number from 0."""
    sentence1: str
    sentence2: str | None
    """None where the task has single sentences; a pair's second sentence may be empty."""
    label: int | float | None
    """Class id, the place in `Task.labels`; a score where the task is a regression; None in a test split."""


@dataclass(frozen=True)
class Layout:
    """One way in which a task's files are published."""

    columns: Mapping[str, str]
    """What the columns `sentence1`, `sentence2`, `label` and `index` of an Example are called."""
    files: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
    )
    """File name by split."""
    headerless: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The columns, by split, of files whose first line is a row."""
    dev_ids: str | None = None
    """A file of id pairs (`#1 ID`, `#2 ID`): the rows of the train file that make up the dev split."""


@dataclass(frozen=True)
class Task:
    """One task: what its files, labels, metrics and submission look like."""

    name: str
    """GLUE's own spelling, which is the folder's name too."""
    layouts: tuple[Layout, ...]
    metrics: tuple[str, ...]
    """Its official metrics: keys of `training.metrics.METRICS`."""
    labels: tuple[str, ...] = ("0", "1")
    """The label words by class id; none where the task is a regression."""
    score_range: tuple[float, float] | None = None
    """Least and greatest score of a regression."""
    dev_splits: tuple[str, ...] = ("dev",)
    submissions: Mapping[str, str] = field(default_factory=dict)
    """File name of the predictions, by test split."""
    mean_metrics: tuple[str, ...] = ()
    """The metrics whose mean is the task's part in the 8-task mean; none where it has no part."""
    has_broken_rows: bool = False
    """Whether the published train and dev files hold rows that lack columns, which every reader passes over."""

    @property
    def pairs(self) -> bool:
        """Whether its examples have two sentences."""
        return any("sentence2" in layout.columns for layout in self.layouts)

    @property
    def regression(self) -> bool:
        return self.score_range is not None

    @property
    def num_labels(self) -> int:
        """Outputs of the model's classifier."""
        return 1 if self.regression else len(self.labels)


# --------------------------------------------------------------------------------------------------------------- table
_SINGLE = {"index": "index", "sentence1": "sentence", "label": "label"}
_PAIR = {"index": "index", "sentence1": "sentence1", "sentence2": "sentence2", "label": "label"}
_COLA_COLUMNS = ("source", "label", "star", "sentence")
_MRPC_COLUMNS = _PAIR | {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}
_STSB_COLUMNS = _PAIR | {"label": "score"}
_STSB_CSV_COLUMNS = ("genre", "filename", "year", "old_index", "score", "sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI_DEV = ("dev_matched", "dev_mismatched")
_MNLI_TEST = ("test_matched", "test_mismatched")

_SST2 = Task("SST-2", (Layout(_SINGLE),), ("accuracy",), mean_metrics=("accuracy",))
_QNLI = Task(
    "QNLI",
    (Layout(_PAIR | {"sentence1": "question", "sentence2": "sentence"}),),
    ("accuracy",),
    _ENTAILMENT,
    mean_metrics=("accuracy",),
)
_MNLI = Task(
    "MNLI",
    (
        Layout(
            _PAIR | {"label": "gold_label"},
            {split: f"{split}.tsv" for split in ("train", *_MNLI_DEV, *_MNLI_TEST)},
        ),
    ),
    ("accuracy",),
    ("contradiction", "entailment", "neutral"),
    dev_splits=_MNLI_DEV,
    submissions=dict(zip(_MNLI_TEST, ("MNLI-m.tsv", "MNLI-mm.tsv"), strict=True)),
    mean_metrics=("accuracy",),
)

_TASKS = (
    Task(
        "CoLA",
        (Layout(_SINGLE, headerless={"train": _COLA_COLUMNS, "dev": _COLA_COLUMNS}),),
        ("matthews_correlation",),
        mean_metrics=("matthews_correlation",),
    ),
    _SST2,
    Task(
        "MRPC",
        (
            Layout(_MRPC_COLUMNS),
            Layout(
                _MRPC_COLUMNS,
                {
                    "train": "msr_paraphrase_train.txt",
                    "dev": "msr_paraphrase_train.txt",
                    "test": "msr_paraphrase_test.txt",
                },
                dev_ids="dev_ids.tsv",
            ),
        ),
        ("f1", "accuracy"),
        mean_metrics=("f1",),
    ),
    Task(
        "STS-B",
        (
            Layout(_STSB_COLUMNS),
            Layout(
                _STSB_COLUMNS,
                {split: f"sts-{split}.csv" for split in ("train", "dev", "test")},
                headerless=dict.fromkeys(("train", "dev", "test"), _STSB_CSV_COLUMNS),
            ),
        ),
        ("pearson", "spearman"),
        labels=(),
        score_range=(0.0, 5.0),
        mean_metrics=("pearson", "spearman"),
    ),
    Task(
        "QQP",
        (Layout({"index": "id", "sentence1": "question1", "sentence2": "question2", "label": "is_duplicate"}),),
        ("f1", "accuracy"),
        mean_metrics=("f1",),
        has_broken_rows=True,
    ),
    _MNLI,
    replace(
        _MNLI,
        name="MNLI-mm",
        dev_splits=("dev_mismatched",),
        submissions={"test_mismatched": "MNLI-mm.tsv"},
        mean_metrics=(),
    ),
    _QNLI,
    Task("RTE", (Layout(_PAIR),), ("accuracy",), _ENTAILMENT, mean_metrics=("accuracy",)),
    Task("WNLI", (Layout(_PAIR),), ("accuracy",)),
    replace(_SST2, name="SST-2-shaped", mean_metrics=()),
    replace(_QNLI, name="QNLI-shaped", mean_metrics=()),
)

TASKS: dict[str, Task] = {
    task.name: task if task.submissions else replace(task, submissions={"test": f"{task.name}.tsv"}) for task in _TASKS
}
"""Every task by its name."""


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def get_task(name: str, source: str = "--task_name") -> Task:
    """The task called `name`, whatever its case and punctuation: `sts-b`, `stsb` and `STS-B` are one.

    Raises:
        UsageError: no such task; `source` says where the name comes from.
    """
    for task in TASKS.values():
        if _plain(task.name) == _plain(name):
            return task
    raise UsageError(f"{source} {name}: no such task; it must be one of {', '.join(TASKS)}")


# ------------------------------------------------------------------------------------------------------------- reading
def find_file(task: Task, data_dir: str | Path, split: str, flag: str = "--data_dir") -> tuple[Path, Layout]:
    """The file that holds `split` ("train", one of `dev_splits`, or a key of `submissions`), and its layout.

    Args:
        flag: what the folder was named by.

    Raises:
        UsageError: `data_dir` holds it in none of the task's layouts.
    """
    found = _find_file(task, Path(data_dir), split)
    if found is not None:
        return found
    ways = [
        layout.files[split] + (f" with {layout.dev_ids}" if _needs_dev_ids(layout, split) else "")
        for layout in task.layouts
    ]
    inside = Path(data_dir) / task.name
    hint = f"; {inside} holds it" if _find_file(task, inside, split) else ""
    raise UsageError(
        f"{flag} {data_dir}: must be the folder of {task.name} and hold {', or '.join(ways)} "
        f"for its {split} split{hint}"
    )


def _needs_dev_ids(layout: Layout, split: str) -> bool:
    return layout.dev_ids is not None and split in ("train", "dev")


def _find_file(task: Task, folder: Path, split: str) -> tuple[Path, Layout] | None:
    for layout in task.layouts:
        names = [layout.files[split], *([layout.dev_ids] if _needs_dev_ids(layout, split) else [])]
        if all((folder / name).is_file() for name in names):
            return folder / names[0], layout
    return None


def read_examples(task: Task, data_dir: str | Path, split: str, report: Callable[[str], None] = print) -> list[Example]:
    """The rows of a split, in the file's order.

    Args:
        split: "train", one of `task.dev_splits`, or a key of `task.submissions`. Test splits are read without labels.
        report: gets one line where broken rows were passed over.

    Raises:
        UsageError: naming the file, and the line where there is one: no file of the split, not UTF-8, no rows, a column
            missing, or a label that the task does not have.
    """
    path, layout = find_file(task, data_dir, split)
    is_test = split in task.submissions
    rows = _read_rows(path)
    header = layout.headerless.get(split) or [cell.strip() for cell in next(rows, (1, []))[1]]
    places = _places(layout, header, path, with_label=not is_test)
    if _needs_dev_ids(layout, split):
        rows = _rows_of_split(rows, header, path.with_name(layout.dev_ids), is_dev=split == "dev")

    examples, broken, width = [], 0, 1 + max(places.values())
    for line, cells in rows:
        if len(cells) >= width:
            examples.append(_example(task, cells, places, len(examples), f"{path}, line {line}"))
        elif task.has_broken_rows and not is_test:
            broken += 1
        else:
            raise UsageError(f"{path}, line {line}: has {len(cells)} columns; {task.name} needs {width}")
    if not examples:
        raise UsageError(f"{path}: holds no rows; it must be the {split} file of {task.name}")
    if broken:
        report(f"{path}: {broken} of {broken + len(examples)} rows left out, their columns are not all there")
    return examples


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each line that is not blank."""
    # Iterating over bytes ends lines at line feeds alone: sentences may hold a carriage return or a U+2028.
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(f"{path}, line {line}: is not UTF-8 text") from error
            if text.strip():
                yield line, text.removesuffix("\n").removesuffix("\r").split("\t")


def _places(layout: Layout, header: Sequence[str], path: Path, with_label: bool) -> dict[str, int]:
    """Where the columns of an Example are; the index is the one that a file may lack."""
    columns = {role: column for role, column in layout.columns.items() if with_label or role != "label"}
    if columns["index"] not in header:
        del columns["index"]
    return {role: _place(column, header, path) for role, column in columns.items()}


def _place(column: str, header: Sequence[str], path: Path) -> int:
    if column not in header:
        raise UsageError(f"{path}, line 1: the header has no column {column}; it must be GLUE's own file")
    return header.index(column)


def _example(task: Task, cells: list[str], places: dict[str, int], number: int, where: str) -> Example:
    cell = {role: cells[place] for role, place in places.items()}
    label = _label(task, cell["label"], where) if "label" in cell else None
    return Example(cell.get("index", str(number)), cell["sentence1"], cell.get("sentence2"), label)


def _rows_of_split(rows, header: Sequence[str], dev_ids: Path, is_dev: bool) -> Iterator[tuple[int, list[str]]]:
    ids = {tuple(cell.strip() for cell in cells[:2]) for _, cells in _read_rows(dev_ids)}
    first, second = (_place(column, header, dev_ids) for column in ("#1 ID", "#2 ID"))
    for line, cells in rows:
        if (tuple(cells[place] for place in (first, second)) in ids) == is_dev:
            yield line, cells


def _label(task: Task, word: str, where: str) -> int | float:
    word = word.strip()
    if not task.regression:
        if word in task.labels:
            return task.labels.index(word)
        raise UsageError(f"{where}: {word!r} is no label of {task.name}; its labels are {', '.join(task.labels)}")
    least, greatest = task.score_range
    try:
        score = float(word)
    except ValueError:
        score = float("nan")
    if not least <= score <= greatest:
        raise UsageError(f"{where}: {word!r} is no score of {task.name}; it must be from {least:g} to {greatest:g}")
    return score


# ---------------------------------------------------------------------------------------------- predictions and scores
def labels_array(task: Task, examples: Sequence[Example]) -> np.ndarray:
    """The labels [N]: int64 class ids, or float32 scores."""
    return np.array([example.label for example in examples], np.float32 if task.regression else np.int64)


def decide(task: Task, logits: np.ndarray) -> np.ndarray:
    """The predictions [N] that the classifier's outputs [N, num_labels] stand for: class ids, or scores.

    Raises:
        UsageError: outputs that are not finite, which have no order.
    """
    if not np.isfinite(logits).all():
        raise UsageError(
            f"{task.name}: the model's outputs are not finite, its training diverged; give a lower --learning_rate"
        )
    return logits[:, 0] if task.regression else logits.argmax(axis=1)


def score(task: Task, split: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's official metrics on one of its dev splits.

    The first dev split's metrics have plain names; those of MNLI's second one are called `mismatched_accuracy`.
    """
    prefix = "" if split == task.dev_splits[0] else f"{split.removeprefix('dev_')}_"
    return {prefix + name: value for name, value in evaluate(task.metrics, predictions, labels).items()}


def baseline(task: Task, train_labels: np.ndarray, count: int) -> np.ndarray:
    """What needs no model: `count` times the most frequent class of the train split, or its mean score."""
    constant = train_labels.mean() if task.regression else np.bincount(train_labels).argmax()
    return np.full(count, constant)


def write_predictions(task: Task, path: Path, examples: Sequence[Example], predictions: np.ndarray) -> None:
    """Write predictions [N] as GLUE's submissions hold them: `index` and `prediction`, label words or clipped scores.

    The file name that GLUE expects for a test split is `task.submissions[split]`.
    """
    if task.regression:
        words = [f"{value:.3f}" for value in np.clip(predictions, *task.score_range)]
    else:
        words = [task.labels[value] for value in predictions]
    rows = [f"{example.index}\t{word}\n" for example, word in zip(examples, words, strict=True)]
    write_atomic(path, "index\tprediction\n" + "".join(rows))
