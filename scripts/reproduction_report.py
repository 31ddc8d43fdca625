"""The table and the picture of scripts/reproduce.py: of logs or summaries, fine-tuning results and densities."""

import csv
import json
import shutil
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import comb
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # a picture in a file, on machines without a screen
import matplotlib.pyplot as plt
from compare_finetuning import TASKS
from reproduction_runs import RECIPES, SQUAD_SEED, Settings, finetuning_directory, metrics_name, whole_rows

from data.stages import write_atomic
from sparse_ops import named_layers, sparsity_report
from training.assembly import build_pretraining_model
from training.checkpoint import load_checkpoint
from training.errors import UsageError
from training.flags import read_json

MARKERS = ("<!-- reproduce.sh writes from here -->", "<!-- to here -->")
DOCS_PICTURE = "reproduction.png"
SUMMARY = "summary.json"
WINDOW = 20  # steps before one, whose median its loss is compared with
TO_EXPLAIN = 0.15  # nats above dense
ZOOM = 0.8  # share of the tokens after which the right half of the picture begins


# -------------------------------------------------------------------------------------------------------- what is there
@dataclass(frozen=True)
class Evaluation:
    """On held-out text."""

    step: int
    tokens: float
    """Seen up to and with this step."""
    mlm_loss: float
    mlm_accuracy: float | None


@dataclass(frozen=True)
class Summary:
    """What the report tells of one run so far; in its folder as summary.json, so that a report needs no logs."""

    steps: int
    steps_with_adapters: int
    tokens: float
    """Real ones, seen in all."""
    tokens_before_adapters: float | None
    """Seen up to and with the first step that has any; None: no step has."""
    seconds: float
    """Of all steps."""
    largest_rise: float | None
    """Nats of a step's MLM loss above the median of the `WINDOW` steps before it, at most."""
    tokens_per_second: float | None
    """Median of the steps without adapters. Speeds and memory are those of the model as it is at the end: of a run
    that was pruned half-way, after that."""
    tokens_per_second_with_adapters: float | None
    peak_memory_gb: float | None
    evaluations: list[Evaluation]

    @classmethod
    def of_rows(cls, rows: list[dict[str, float]], settings: Settings, pruned_at: int = 0) -> "Summary":
        """Of a log in numbers, whose empty cells are left out."""
        seconds = [settings.global_batch_size / row["sequences_per_second"] for row in rows]
        steps = zip(rows, seconds, strict=True)
        tokens = list(accumulate(row["tokens_per_second"] * duration for row, duration in steps))
        counted = list(zip(rows, tokens, strict=True))
        own = [row for row in rows if row["step"] > pruned_at]
        return cls(
            steps=int(rows[-1]["step"]),
            steps_with_adapters=sum(row["adapters"] == 1 for row in rows),
            tokens=tokens[-1],
            tokens_before_adapters=next((seen for row, seen in counted if row["adapters"]), None),
            seconds=sum(seconds),
            largest_rise=_largest_rise([row["mlm_loss"] for row in rows]),
            tokens_per_second=_median_speed(own, adapters=False),
            tokens_per_second_with_adapters=_median_speed(own, adapters=True),
            peak_memory_gb=max((row["peak_memory_gb"] for row in own if "peak_memory_gb" in row), default=None),
            evaluations=[
                Evaluation(int(row["step"]), seen, row["heldout_mlm_loss"], row.get("heldout_mlm_accuracy"))
                for row, seen in counted
                if "heldout_mlm_loss" in row
            ],
        )

    @classmethod
    def load(cls, path: Path) -> "Summary":
        found = read_json(str(path), "--output_dir")
        try:
            evaluations = [Evaluation(**evaluation) for evaluation in found.pop("evaluations")]
            for value in (*found.values(), *(value for each in evaluations for value in asdict(each).values())):
                if value is not None and not isinstance(value, int | float):
                    raise TypeError(f"{value!r} is no number")
            return cls(**found, evaluations=evaluations)
        except (TypeError, KeyError) as error:
            raise UsageError(f"--output_dir {path}: is no summary of this script ({error}); give the logs") from error

    def save(self, path: Path) -> None:
        write_atomic(path, json.dumps(asdict(self), indent=2) + "\n")


def _largest_rise(losses: list[float]) -> float | None:
    above = (losses[i] - median(losses[i - WINDOW : i]) for i in range(WINDOW, len(losses)))
    return max(above, default=None)


def _median_speed(rows: list[dict[str, float]], adapters: bool) -> float | None:
    found = [row["tokens_per_second"] for row in rows if bool(row["adapters"]) == adapters]
    return median(found) if found else None


@dataclass(frozen=True)
class Run:
    """One run that has taken a step."""

    name: str
    settings: Settings
    summary: Summary
    density: dict | None

    @property
    def title(self) -> str:
        return self.settings.title(self.name)

    @property
    def finished(self) -> bool:
        return self.summary.steps == self.settings.steps

    @property
    def last(self) -> Evaluation | None:
        return self.summary.evaluations[-1] if self.summary.evaluations else None


def read_runs(output_dir: Path, settings: Settings) -> dict[str, Run]:
    """The runs that have taken a step, by their logs, or where these are gone by their summaries.

    Raises:
        UsageError: there is none, or a file is not this suite's.
    """
    runs = {}
    for name in RECIPES:
        directory = output_dir / name
        summary = _read_summary(directory, settings, name)
        if summary is not None:
            runs[name] = Run(name, settings, summary, _read_density(directory))
    if not runs:
        raise UsageError(f"--output_dir {output_dir}: no run has taken a step yet")
    return runs


def _read_summary(directory: Path, settings: Settings, name: str) -> Summary | None:
    log, path, recipe = directory / metrics_name(), directory / SUMMARY, RECIPES[name]
    rows = _read_rows(log) if log.exists() else []
    if rows:
        return Summary.of_rows(rows, settings, settings.step_of(recipe.branch) if recipe.new_phase else 0)
    return Summary.load(path) if path.exists() else None


def _read_rows(path: Path) -> list[dict[str, float]]:
    try:
        header, *cells = whole_rows(path) or [[]]
        rows = [{name: float(cell) for name, cell in zip(header, row, strict=True) if cell} for row in cells]
        for row in rows:
            row["step"], row["sequences_per_second"], row["tokens_per_second"], row["mlm_loss"], row["adapters"]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UsageError(f"--output_dir {path}: is no log of run_pretraining.py ({error!r})") from error
    return rows


def measure_density(output_dir: Path, name: str, checkpoint: Path) -> None:
    """Count what the run's last checkpoint keeps, into a small file that outlives it."""
    path = output_dir / name / "density.json"
    if path.exists():
        return
    model = build_pretraining_model(load_checkpoint(checkpoint, "--output_dir"))
    found = sparsity_report(model)
    layers = [layer for _, layer in named_layers(model)]
    content = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pruned_layers": found.layers,
        "forward": found.forward_density if layers else 1.0,
        "backward": found.backward_density if layers else 1.0,
    }
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def _read_density(directory: Path) -> dict | None:
    path = directory / "density.json"
    return read_json(str(path), "--output_dir") if path.exists() else None


def expected_density(n: int = 2, m: int = 4) -> float:
    """Of W^{R,C} with random masks: N/M less the extra zeros of the second pruning, the paper's formula (section 2.1).

    Σ_{j>N} C(M,j) s^j (1-s)^(M-j) (j-N)/M with s = N/M.
    """
    s = n / m
    return s - sum(comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1))


# ------------------------------------------------------------------------------------------------------------ the table
def table(output_dir: Path, runs: dict[str, Run]) -> str:
    """Markdown; a row of which no run has anything is left out."""
    columns = [_column(run, runs.get("dense")) | _scores(output_dir, run.name) for run in runs.values()]
    lines = ["| | " + " | ".join(run.title for run in runs.values()) + " |", "| --- " * (len(runs) + 1) + "|"]
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [column.get(label) or "" for column in columns]
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _column(run: Run, dense: Run | None) -> dict[str, str | None]:
    found, last, density = run.summary, run.last, run.density or {}
    best = min(found.evaluations, key=lambda evaluation: evaluation.mlm_loss, default=None)
    dense_memory = dense and dense.summary.peak_memory_gb
    comparable = run is not dense and run.finished and dense is not None and dense.finished and last and dense.last
    return {
        "steps": f"{found.steps:,}" + ("" if run.finished else f" of {run.settings.steps:,}"),
        "of them with adapters": f"{found.steps_with_adapters:,}",
        "tokens seen, millions": f"{found.tokens / 1e6:.1f}",
        "held-out MLM loss, last": last and f"{last.mlm_loss:.3f}",
        "held-out MLM loss, last, above dense": f"{last.mlm_loss - dense.last.mlm_loss:+.3f}" if comparable else None,
        "held-out MLM loss, best": best and f"{best.mlm_loss:.3f} (step {best.step:,})",
        "held-out MLM accuracy, last": last and _number(last.mlm_accuracy, ".4f"),
        f"largest rise of a step's MLM loss over the median of {WINDOW} before": _number(found.largest_rise, ".3f"),
        **_speeds(found, dense and dense.summary),
        "peak memory, GB": _number(found.peak_memory_gb, ".2f"),
        "peak memory, against dense": _ratio(found.peak_memory_gb, dense_memory),
        "time of all steps, s": f"{found.seconds:,.0f}",
        "parameters, millions": _number(density.get("parameters", 0) / 1e6 or None, ".2f"),
        "density of W^R (2:4: 0.5)": _number(density.get("forward"), ".4f"),
        f"density of W^{{R,C}} (the formula, 2:4: {expected_density():.5f})": _number(density.get("backward"), ".4f"),
    }


def _speeds(found: Summary, dense: Summary | None) -> dict[str, str | None]:
    """Of steps without and with adapters, each also against dense, which has none."""
    rows, speeds = {}, {"without": found.tokens_per_second, "with": found.tokens_per_second_with_adapters}
    for name, speed in speeds.items():
        label = f"tokens/s, median step {name} adapters"
        rows[label] = _number(speed, ",.0f")
        rows[f"{label}, against dense"] = _ratio(speed, dense and dense.tokens_per_second)
    return rows


def _ratio(value: float | None, dense: float | None) -> str | None:
    return f"x{value / dense:.2f}" if value and dense else None


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _scores(output_dir: Path, name: str) -> dict[str, str]:
    """A row for each metric of the tasks that are done, mean ± sample standard deviation, in percent."""
    rows = {}
    for task, (_, metrics, factor) in TASKS.items():
        path = finetuning_directory(output_dir, name, task) / "eval_results.json"
        if not path.exists():
            continue
        results = read_json(str(path), "--output_dir")
        try:
            for metric in metrics:
                spread = f" ± {results['spread'][metric] * factor:.2f}" if len(results["seeds"]) > 1 else ""
                rows[f"{task} dev {metric}"] = f"{results['metrics'][metric] * factor:.2f}{spread}"
        except (KeyError, TypeError) as error:
            raise UsageError(f"--output_dir {path}: holds no {metric} with its spread") from error
    return rows


# ---------------------------------------------------------------------------------------------------------- the picture
def draw(runs: dict[str, Run], picture: Path) -> None:
    """Held-out MLM loss over tokens: all of it, and its end."""
    figure, (whole, end) = plt.subplots(1, 2, figsize=(12, 5), dpi=150, layout="constrained")
    drawn = {name: run for name, run in runs.items() if run.last}
    last = max((run.last.tokens for run in drawn.values()), default=0.0) / 1e6
    for axes in (whole, end):
        lowest, highest = [], []
        for name, run in drawn.items():
            color, line = f"C{list(RECIPES).index(name)}", "--" if RECIPES[name].source else "-"
            points = [(evaluation.tokens / 1e6, evaluation.mlm_loss) for evaluation in run.summary.evaluations]
            tokens, losses = zip(*points, strict=True)
            axes.plot(tokens, losses, line, color=color, marker=".", linewidth=1.2, label=run.title)
            if run.summary.tokens_before_adapters is not None:
                axes.axvline(run.summary.tokens_before_adapters / 1e6, color=color, linestyle=":", linewidth=1)
            near = [loss for seen, loss in zip(tokens, losses, strict=True) if seen >= ZOOM * last]
            lowest, highest = [*lowest, *near], [*highest, *near]
        axes.set_xlabel("tokens seen, millions")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if lowest:
        room = 0.05 * max(max(highest) - min(lowest), 1e-3)
        end.set_xlim(ZOOM * last, last * 1.005)
        end.set_ylim(min(lowest) - room, max(highest) + room)
        whole.legend(frameon=False)
    whole.set_ylabel("held-out MLM loss (nats)")
    whole.set_title("Held-out masked-token loss", loc="left")
    end.set_title("its end; dotted: adapters join", loc="left")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------- the report
def write_report(output_dir: Path, command: str, docs: Path | None) -> str:
    """Write OUTPUT_DIR/report.md and curves.png and, with `docs`, the same between that document's markers.

    Of finished runs also summary.json, so that their logs may go.

    Raises:
        UsageError: there is nothing to report, or the document has no markers.
    """
    settings = Settings.load(output_dir)
    runs = read_runs(output_dir, settings)
    for run in runs.values():
        if run.finished:
            run.summary.save(output_dir / run.name / SUMMARY)
    draw(runs, output_dir / "curves.png")
    texts = [_text(output_dir, settings, runs, command, picture) for picture in ("curves.png", DOCS_PICTURE)]
    write_atomic(output_dir / "report.md", texts[0])
    if docs is not None:
        _write_into(docs, texts[1])
        shutil.copyfile(output_dir / "curves.png", docs.parent / DOCS_PICTURE)
    return texts[0]


def _write_into(docs: Path, text: str) -> None:
    try:
        content = docs.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--docs {docs}: cannot be read ({error.strerror})") from error
    begin, end = (content.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise UsageError(f"--docs {docs}: must hold the lines {MARKERS[0]} and, below it, {MARKERS[1]}")
    write_atomic(docs, content[: begin + len(MARKERS[0])] + f"\n\n{text}\n" + content[end:])


def _text(output_dir: Path, settings: Settings, runs: dict[str, Run], command: str, picture: str) -> str:
    unfinished = [run.title for run in runs.values() if not run.finished]
    parts = [
        f"![Held-out masked-token loss over tokens]({picture})",
        table(output_dir, runs).rstrip("\n"),
        _machines(output_dir, runs),
        f"```\n{command}\n```",
        _description(settings, runs),
        *_findings(runs),
    ]
    if unfinished:
        parts.append(f"Not finished yet: {'; '.join(unfinished)}.")
    return "\n\n".join(parts) + "\n"


def _machines(output_dir: Path, runs: dict[str, Run]) -> str:
    entries = []
    for name in runs:
        path = output_dir / name / "machines.json"
        entries += json.loads(path.read_text()) if path.exists() else []
    if not entries:
        return "Run on a machine that was not recorded:"
    machines = ", ".join(dict.fromkeys(f"{entry['chip']} (torch {entry['torch']})" for entry in entries))
    dates = sorted({entry["date"] for entry in entries})
    return f"Run on {machines}, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}:"


def _description(settings: Settings, runs: dict[str, Run]) -> str:
    model, half = settings.model, settings.step_of(5)
    lines = [
        f"BERT of {model['num_hidden_layers']} layers, {model['hidden_size']} wide, vocabulary "
        f"{model['vocab_size']:,}; the text read {settings.epochs} times, in {settings.steps:,} steps of "
        f"{settings.global_batch_size} sequences of {settings.sequence_length} tokens; LAMB, peak learning rate "
        f"{settings.learning_rate:g} for what begins dense and {settings.sparse_learning_rate:g} for SLoPe, after a "
        f"warm-up of {settings.warmup_proportion:.0%} of the steps, then poly decay "
        f"of degree 0.5; {settings.precision}; seed {settings.seed}, the same order of the data for all. Times are "
        "sums over the steps, compilation included, evaluations and checkpoints left out.",
        f"Scores of fine-tuning in percent, mean ± sample standard deviation over the seeds {settings.finetune_seeds}; "
        f"SQuAD v1.1 of seed {SQUAD_SEED} alone, in windows that are longer than pretraining's sequences. Epochs: "
        + ", ".join(f"{task} {flags[flags.index('--num_train_epochs') + 1]}" for task, (flags, *_) in TASKS.items())
        + ".",
    ]
    if any(RECIPES[name].source == "slope" for name in runs):
        lines.append(
            "Runs with adapters are SLoPe's run up to the checkpoint at 90% of the steps and go on from there; their "
            "times count the part that they share."
            + (
                f" Their adapters' learning rate is {settings.lora_lr_scale:g} times that of all else."
                if settings.lora_lr_scale != 1
                else ""
            )
        )
    if "pruned_half" in runs:
        lines.append(
            f"`{runs['pruned_half'].title}` is the dense run up to step {half:,}, pruned by magnitude there; its "
            "learning rate goes on along the same curve, as a second phase without warm-up; LAMB's moments begin anew, "
            "and order, masks and dropout of its second half are those of the next seed. Its speed and memory are "
            "those after pruning."
        )
    return "\n".join(lines)


def _findings(runs: dict[str, Run]) -> list[str]:
    """Of finished runs: how far above dense each ends, where that needs an explanation."""
    dense = runs.get("dense")
    if dense is None or not dense.finished or not dense.last:
        return []
    found = []
    for run in runs.values():
        above = run.last.mlm_loss - dense.last.mlm_loss if run.finished and run.last else 0.0
        if above > TO_EXPLAIN:
            step = next(each.step for each in dense.summary.evaluations if each.mlm_loss <= run.last.mlm_loss)
            share = step / dense.settings.steps
            found.append(f"- {run.title}: {above:.2f}, where dense was by step {step:,}, {share:.0%} of the steps")
    if not found:
        return []
    return ["\n".join([f"**More than {TO_EXPLAIN} nats above dense at the end, to be explained:**", *found])]
