"""The picture of benchmarks/scaling.py: tokens/s and efficiency against the number of processes."""

from collections.abc import Sequence
from pathlib import Path

STYLES = {"dense": "C0", "slope": "C1", "fp32": "-", "bf16": "--", None: "-"}
MARKERS = "os^vD"


def draw(rows: Sequence[dict], heading: str, output: Path) -> None:
    """Draw the rows of all launches; those of one process belong to every kind of communication.

    Args:
        rows: with `processes, model, accumulation, gradients, tokens_per_second, efficiency`.
        output: a PNG.
    """
    import matplotlib  # here, since the processes that measure do without

    matplotlib.use("Agg")  # a picture in a file, on machines without a screen
    import matplotlib.pyplot as plt

    figure, (speed, efficiency) = plt.subplots(1, 2, figsize=(12, 5), dpi=150, layout="constrained")
    for label, points, style in curves(rows):
        counts, speeds, efficiencies = zip(*points, strict=True)
        speed.plot(counts, speeds, label=label, **style)
        efficiency.plot(counts, efficiencies, label=label, **style)
    ticks = sorted({row["processes"] for row in rows})
    for axes, what in ((speed, "tokens/s"), (efficiency, "efficiency against one process")):
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{count}" for count in ticks])
        axes.set_xlabel("processes")
        axes.set_ylabel(what)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.set_title(heading, loc="left", fontsize="medium")
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(output)
    plt.close(figure)


def curves(rows: Sequence[dict]) -> list[tuple[str, list[tuple[int, float, float]], dict]]:
    """Label, points (processes, tokens/s, efficiency) and style of each line."""
    accumulations = sorted({row["accumulation"] for row in rows})
    communications = sorted({row["gradients"] for row in rows if row["gradients"]}, reverse=True) or [None]
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for number, accumulation in enumerate(accumulations):
            for gradients in communications:
                points = [
                    (row["processes"], row["tokens_per_second"], row["efficiency"].median)
                    for row in sorted(rows, key=lambda row: row["processes"])
                    if (row["model"], row["accumulation"]) == (model, accumulation)
                    and row["gradients"] in (None, gradients)
                ]
                label = f"{model}, accumulation {accumulation}" + (f", gradients in {gradients}" if gradients else "")
                style = {"color": STYLES[model], "linestyle": STYLES[gradients], "marker": MARKERS[number % 5]}
                found.append((label, points, style))
    return found
