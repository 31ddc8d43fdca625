#!/usr/bin/env python3
"""Draw the loss curves of one or more pretraining runs into one picture.

    python scripts/plot_curves.py --runs OUT/slope OUT/dense --labels SLoPe dense --output curves.png --heldout

A run is its output folder, whose phases are joined by their cumulative step, or one <log_prefix>_metrics.csv.
"""

import csv
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")  # a picture in a file, on machines without a screen
import matplotlib.pyplot as plt
import numpy as np

from training.errors import UsageError
from training.flags import Parser, run_door, whole

COLUMNS = {
    "step_loss": "loss of the step",
    "average_loss": "average loss of the phase so far",
    "mlm_loss": "masked-token loss of the step",
    "nsp_loss": "next-sentence loss of the step",
}
HELDOUT = "heldout_mlm_loss"


@dataclass
class Curve:
    """One run: its training loss and, where the logs have them, its held-out loss and where the adapters joined."""

    label: str
    steps: np.ndarray
    """Cumulative optimizer steps, increasing."""
    losses: np.ndarray
    """Nats, one a step."""
    heldout: list[tuple[int, float]] = field(default_factory=list)
    """(step, MLM loss in nats)."""
    adapters_from: int | None = None
    """First step with adapters, when there were steps without."""


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="+", required=True, metavar="PATH", help="output folders or metrics files")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="one a run; by default the folders' names")
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture")
    parser.add_argument(
        "--column", choices=tuple(COLUMNS), help="what to draw; by default step_loss, and mlm_loss beside --heldout"
    )
    parser.add_argument(
        "--smooth", type=whole(1), metavar="N", help="mean of N steps around each; by default 2%% of the longest run"
    )
    parser.add_argument("--heldout", action="store_true", help="also draw the held-out masked-token loss")
    args = parser.parse_args(argv)
    if args.column is None:  # the held-out loss is one of masked tokens alone
        args.column = "mlm_loss" if args.heldout else "step_loss"
    if args.labels is None:
        args.labels = [_default_label(Path(run)) for run in args.runs]
    if len(args.labels) != len(args.runs):
        raise UsageError(f"--labels: {len(args.labels)} labels for {len(args.runs)} runs; give one a run")
    if Path(args.output).suffix.lower() != ".png":
        raise UsageError(f"--output {args.output}: must end in .png")
    return args


def _default_label(run: Path) -> str:
    return run.stem.removesuffix("_metrics") if run.suffix == ".csv" else run.resolve().name


def read_run(path: Path, label: str, column: str) -> Curve:
    """The curve of a run's folder or metrics file.

    Raises:
        UsageError: when there are no metrics there, or not this suite's.
    """
    files = [path] if path.is_file() else sorted(path.glob("*_metrics.csv"))
    if not files:
        wrong = "holds no *_metrics.csv, which run_pretraining.py writes" if path.is_dir() else "no such folder or file"
        raise UsageError(f"--runs {path}: {wrong}")
    rows = [row for file in files for row in read_metrics(file, column)]
    rows.sort(key=lambda row: row["step"])
    with_adapters = [row["step"] for row in rows if row.get("adapters")]
    joined = bool(with_adapters) and with_adapters[0] > rows[0]["step"]
    return Curve(
        label,
        steps=np.array([row["step"] for row in rows]),
        losses=np.array([row[column] for row in rows]),
        heldout=[(row["step"], row[HELDOUT]) for row in rows if HELDOUT in row],
        adapters_from=int(with_adapters[0]) if joined else None,
    )


def read_metrics(path: Path, column: str) -> list[dict[str, float]]:
    """The rows of one metrics file, as numbers; cells that are empty are left out.

    Raises:
        UsageError: no rows, no such column, or a cell that is not a number.
    """
    wanted = ("step", column, "adapters", HELDOUT)
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            for name in ("step", column):
                if name not in names:
                    raise UsageError(f"--runs {path}: has no column {name}, so it is no metrics file of this suite")
            rows = [_numbers(row, wanted, f"--runs {path}: line {reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--runs {path}: cannot be read as a metrics file ({error})") from error
    if not rows:
        raise UsageError(f"--runs {path}: holds no step yet")
    return rows


def _numbers(row: dict[str, str | None], wanted: tuple[str, ...], where: str) -> dict[str, float]:
    numbers = {}
    for name in wanted:
        cell = row.get(name)
        if cell:
            try:
                numbers[name] = float(cell)
            except ValueError as error:
                raise UsageError(f"{where}: {name} must be a number, not {cell}") from error
        elif name in wanted[:2]:
            raise UsageError(f"{where}: {name} is empty")
    return numbers


def default_window(curves: list[Curve], column: str) -> int:
    """2% of the longest run's steps; 1 for a column that is an average already."""
    return 1 if column == "average_loss" else max(1, max(len(curve.steps) for curve in curves) // 50)


def centred_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` values around each, over fewer at the two ends. Same length as `values`; it does not lag."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts = np.maximum(places - (window - 1) // 2, 0)
    ends = np.minimum(places + window // 2 + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(curves: list[Curve], column: str, smooth: int, heldout: bool, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5.4), dpi=150, layout="constrained")
    for index, curve in enumerate(curves):
        _draw_curve(axes, curve, f"C{index}", smooth, heldout)
    title = f"Pretraining: {COLUMNS[column]}"
    axes.set_title(title if smooth == 1 else f"{title}, mean of {smooth} steps", loc="left")
    axes.set_xlabel("optimizer step, over all phases")
    axes.set_ylabel("loss (nats)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    try:
        figure.savefig(output)
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written ({error.strerror})") from error
    plt.close(figure)


def _draw_curve(axes, curve: Curve, color: str, smooth: int, heldout: bool) -> None:
    if smooth > 1:
        axes.plot(curve.steps, curve.losses, color=color, alpha=0.18, linewidth=0.5)
    axes.plot(curve.steps, centred_mean(curve.losses, smooth), color=color, linewidth=1.3, label=curve.label)
    if heldout and curve.heldout:
        label = f"{curve.label}, held-out masked tokens"
        steps, losses = zip(*curve.heldout, strict=True)
        axes.plot(
            steps, losses, color=color, linestyle="--", linewidth=0.8, marker="o", markeredgecolor="w", label=label
        )
    if curve.adapters_from is not None:
        label = f"{curve.label}, adapters join at step {curve.adapters_from:,}"
        axes.axvline(curve.adapters_from, color=color, linestyle=":", linewidth=1.3, label=label)


def main() -> None:
    args = parse_arguments()
    curves = [read_run(Path(run), label, args.column) for run, label in zip(args.runs, args.labels, strict=True)]
    if args.heldout and not any(curve.heldout for curve in curves):
        raise UsageError("--heldout: no run has a held-out loss; train with --eval_dir")
    draw(curves, args.column, args.smooth or default_window(curves, args.column), args.heldout, Path(args.output))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_door(main)
