"""scripts/plot_curves.py: what is read, what is drawn, and one line for what is wrong."""

import csv
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "plot_curves.py"
sys.path.insert(0, str(SCRIPT.parent))

import plot_curves  # noqa: E402  (a script, found through the line above)

from training.errors import UsageError  # noqa: E402
from training.pretraining import METRICS  # noqa: E402


def write_metrics(
    path: Path, steps: range, adapters_from: int | None = None, heldout_every: int = 0, **columns
) -> None:
    """A metrics file as run_pretraining.py writes it: loss 8 - step / 100, masked-token loss 0.7 below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, METRICS, restval="")
        writer.writeheader()
        for step in steps:
            loss = 8 - step / 100
            row = {"step": step, "step_loss": loss, "average_loss": loss + 0.5, "mlm_loss": loss - 0.7} | columns
            row["adapters"] = int(adapters_from is not None and step >= adapters_from)
            if heldout_every and step % heldout_every == 0:
                row["heldout_mlm_loss"] = loss - 0.6
            writer.writerow(row)


@pytest.fixture
def run(tmp_path):
    """Two phases, with names in the other order; the adapters join in the second."""
    folder = tmp_path / "slope"
    write_metrics(folder / "last_metrics.csv", range(41, 61), adapters_from=56, heldout_every=10)
    write_metrics(folder / "pre_metrics.csv", range(1, 41), heldout_every=10)
    return folder


def run_main(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", *map(str, arguments)])
    plot_curves.main()


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the picture, after `main` has closed it."""
    pictures = []
    monkeypatch.setattr(plt, "close", pictures.append)
    yield lambda: pictures[-1].axes[0]
    monkeypatch.undo()
    for picture in pictures:
        plt.close(picture)


def test_phases_are_joined_by_their_cumulative_step(run):
    curve = plot_curves.read_run(run, "SLoPe", "step_loss")
    assert curve.steps.tolist() == list(range(1, 61))
    np.testing.assert_allclose(curve.losses, 8 - np.arange(1, 61) / 100)
    assert [step for step, _ in curve.heldout] == [10, 20, 30, 40, 50, 60]
    assert curve.adapters_from == 56


def test_a_run_with_adapters_from_its_first_step_or_without_any_has_no_line_for_them(tmp_path):
    write_metrics(tmp_path / "a_metrics.csv", range(1, 5), adapters_from=1)
    write_metrics(tmp_path / "b_metrics.csv", range(1, 5))
    for name in ("a", "b"):
        assert plot_curves.read_run(tmp_path / f"{name}_metrics.csv", name, "step_loss").adapters_from is None


def test_the_picture_has_title_units_legend_and_the_adapters_line(run, drawn, monkeypatch, tmp_path):
    write_metrics(tmp_path / "dense.csv", range(1, 31))
    output = tmp_path / "curves.png"
    run_main(monkeypatch, "--runs", run, tmp_path / "dense.csv", "--labels", "SLoPe", "dense", "--output", output)
    assert output.read_bytes().startswith(b"\x89PNG")
    axes = drawn()
    assert axes.get_ylabel() == "loss (nats)"
    assert axes.get_xlabel() == "optimizer step, over all phases"
    assert axes.get_title(loc="left") == "Pretraining: loss of the step"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["SLoPe", "SLoPe, adapters join at step 56", "dense"]
    vertical = [line for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[-1]]
    assert [line.get_xdata()[0] for line in vertical] == [56]


def test_beside_the_held_out_loss_the_training_loss_is_of_masked_tokens_too(run, drawn, monkeypatch, tmp_path):
    run_main(monkeypatch, "--runs", run, "--output", tmp_path / "c.png", "--heldout", "--smooth", 1)
    training, heldout = drawn().lines[:2]
    np.testing.assert_allclose(training.get_ydata(), 8 - np.arange(1, 61) / 100 - 0.7)
    np.testing.assert_allclose(heldout.get_ydata(), 8 - np.arange(10, 61, 10) / 100 - 0.6)
    assert heldout.get_label() == "slope, held-out masked tokens"


def test_the_chosen_column_is_drawn_and_an_average_is_not_smoothed_again(drawn, monkeypatch, tmp_path):
    write_metrics(tmp_path / "long_metrics.csv", range(1, 201))
    flags = ["--runs", tmp_path, "--output", tmp_path / "c.png", "--column"]
    run_main(monkeypatch, *flags, "step_loss")
    assert drawn().get_title(loc="left").endswith("mean of 4 steps")
    run_main(monkeypatch, *flags, "average_loss")
    (line,) = drawn().lines
    np.testing.assert_allclose(line.get_ydata(), 8.5 - np.arange(1, 201) / 100)
    assert "average loss of the phase so far" in drawn().get_title(loc="left")


def test_smoothing_draws_the_mean_over_the_steps_itself_and_says_so(run, drawn, monkeypatch, tmp_path):
    run_main(monkeypatch, "--runs", run, "--output", tmp_path / "c.png", "--smooth", 5)
    raw, smooth = drawn().lines[:2]
    np.testing.assert_allclose(smooth.get_ydata(), plot_curves.centred_mean(raw.get_ydata(), 5))
    assert drawn().get_title(loc="left").endswith("mean of 5 steps")


def test_the_mean_is_centred_and_shortens_at_the_ends():
    values = np.array([4.0, 0.0, 2.0, 6.0])
    np.testing.assert_allclose(plot_curves.centred_mean(values, 1), values)
    np.testing.assert_allclose(plot_curves.centred_mean(values, 3), [2.0, 2.0, 8 / 3, 4.0])
    np.testing.assert_allclose(plot_curves.centred_mean(values, 2), [2.0, 1.0, 4.0, 6.0])
    straight = np.arange(50.0)
    np.testing.assert_allclose(plot_curves.centred_mean(straight, 9)[4:-4], straight[4:-4])  # no lag


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "no such folder or file"),
        ("", "has no column step"),
        ("epoch,loss\n1,2\n", "has no column step"),
        ("step,loss\n1,2\n", "has no column step_loss"),
        ("step,step_loss\n", "holds no step yet"),
        ("step,step_loss\n1,2.5\n2,much\n", "line 3: step_loss must be a number, not much"),
        ("step,step_loss\n1,2.5\n2\n", "line 3: step_loss is empty"),
        (b"\x89HDF\r\n\x1a\n\xff\xfe", "cannot be read as a metrics file"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "some_metrics.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as error:
        plot_curves.read_run(path, "", "step_loss")
    assert str(error.value).startswith(f"--runs {path}")
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_one_line(run, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    write_metrics(tmp_path / "plain_metrics.csv", range(1, 5))
    picture = tmp_path / "c.png"
    cases = [
        (["--runs", tmp_path / "empty", "--output", picture], "holds no .*_metrics.csv"),
        (["--runs", run, "--labels", "a", "b", "--output", picture], "--labels: 2 labels for 1 runs"),
        (["--runs", run, "--output", "c.pdf"], "--output c.pdf: must end in .png"),
        (["--runs", tmp_path / "plain_metrics.csv", "--output", picture, "--heldout"], "--heldout: no run"),
        (["--runs", run, "--output", tmp_path / "nowhere" / "c.png"], "--output .*: cannot be written"),
        (["--runs", run, "--output", picture, "--smooth", "0"], "--smooth: must be a whole number"),
    ]
    for arguments, message in cases:
        with pytest.raises(UsageError, match=message):
            run_main(monkeypatch, *arguments)
    assert not picture.exists()


def test_the_script_runs_from_any_directory_and_ends_with_2_on_a_mistake(run, tmp_path):
    command = [sys.executable, SCRIPT, "--output", "c.png", "--runs"]
    good = subprocess.run([*command, run], cwd=tmp_path, capture_output=True, text=True)
    assert (good.returncode, good.stdout) == (0, "wrote c.png\n"), good.stderr
    bad = subprocess.run([*command, "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "--runs nowhere: no such folder or file" in bad.stderr
