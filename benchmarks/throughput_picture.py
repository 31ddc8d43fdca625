"""The picture of benchmarks/pretraining_throughput.py: tokens/s, and where the time of a step goes."""

from collections.abc import Sequence
from pathlib import Path

COLOURS = {"dense": "C0", "slope": "C1", "slope-16": "C2", "slope-64": "C3", "huggingface": "C7"}


def draw(rows: Sequence[dict], heading: str, output: Path) -> None:
    """Draw bars by shape and variant; the second panel is there where steps were profiled.

    Args:
        rows: with `sequence_length, sequences, variant, tokens_per_second, kernel_seconds`.
        output: a PNG.
    """
    import matplotlib  # here, since what measures does without

    matplotlib.use("Agg")  # a picture in a file, on machines without a screen
    import matplotlib.pyplot as plt

    profiled = [row for row in rows if row["kernel_seconds"]]
    height = max(4.0, 0.32 * len(profiled) + 1.5)
    figure, panels = plt.subplots(
        1, 2 if profiled else 1, figsize=(14 if profiled else 8, height), dpi=150, layout="constrained", squeeze=False
    )
    draw_speed(panels[0, 0], rows)
    panels[0, 0].set_title(heading, loc="left", fontsize="medium")
    if profiled:
        draw_kinds(panels[0, 1], profiled)
    figure.savefig(output)
    plt.close(figure)


def shape_of(row: dict) -> str:
    return f"{row['sequences']} x {row['sequence_length']}"


def draw_speed(axes, rows: Sequence[dict]) -> None:
    """Tokens/s, a group of bars a shape."""
    shapes = list(dict.fromkeys(map(shape_of, rows)))
    variants = [name for name in COLOURS if any(row["variant"] == name for row in rows)]
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        own = [row for row in rows if row["variant"] == variant]
        places = [shapes.index(shape_of(row)) + (number - (len(variants) - 1) / 2) * width for row in own]
        axes.bar(places, [row["tokens_per_second"] for row in own], width, color=COLOURS[variant], label=variant)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_xlabel("sequences x tokens of a step")
    axes.set_ylabel("tokens/s")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(variants), loc="upper center", bbox_to_anchor=(0.5, -0.12))


def draw_kinds(axes, rows: Sequence[dict]) -> None:
    """Nanoseconds a token by kind of kernel, a bar a row, so that shapes of any size compare."""
    labels = [f"{shape_of(row)}, {row['variant']}" for row in rows]
    left = [0.0] * len(rows)
    for kind in rows[0]["kernel_seconds"]:
        lengths = [nanoseconds_a_token(row, kind) for row in rows]
        axes.barh(labels, lengths, left=left, label=kind)
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("GPU time, ns a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize="small")


def nanoseconds_a_token(row: dict, kind: str) -> float:
    tokens = row["sequences"] * row["sequence_length"] * row["accumulation"]
    return row["kernel_seconds"][kind] * 1e9 / tokens
