"""One logger: a text file, a CSV of metrics, JSON lines for NVIDIA's dllogger tools, TensorBoard, and a progress bar.

Only rank 0 writes. Opened on a resumed run, it drops what was logged after the checkpoint that the run resumes from.
"""

import csv
import json
import sys
import time
from datetime import datetime
from importlib import import_module
from pathlib import Path

from tqdm import tqdm


class Logger:
    """Logs of one phase, named after `--log_prefix`.

    Args:
        columns: of the CSV, in order; a step's metrics may leave some out.
        resume_step: last step that counts; later rows of an earlier attempt are dropped.
        enabled: False on every rank but 0: all methods then do nothing.
    """

    def __init__(self, output_dir: Path, prefix: str, columns: list[str], resume_step: int, enabled: bool = True):
        self.enabled, self.columns, self.bar = enabled, columns, None
        if not enabled:
            return
        self._text = (output_dir / f"{prefix}.txt").open("a", buffering=1)
        self._csv_file, self._csv = _open_csv(output_dir / f"{prefix}_metrics.csv", columns, resume_step)
        _drop_later_lines(output_dir / f"{prefix}.json", resume_step)
        self._json = open_json_lines(output_dir / f"{prefix}.json")
        from torch.utils.tensorboard import SummaryWriter  # here, since it takes a second to import

        self._tensorboard = SummaryWriter(output_dir / "tensorboard", purge_step=resume_step + 1)

    def start_bar(self, first: int, last: int, done: int, disable: bool) -> None:
        """A progress bar over the phase's steps, `done` of them already taken."""
        if self.enabled:
            self.bar = tqdm(total=last - first + 1, initial=done, unit="step", disable=disable, dynamic_ncols=True)

    def text(self, message: str) -> None:
        """One line to the terminal and the text log."""
        if not self.enabled:
            return
        tqdm.write(message, file=sys.stderr)
        self._text.write(f"[{datetime.now().isoformat(timespec='seconds')}] {message}\n")

    def parameters(self, values: dict) -> None:
        """The run's settings, into the JSON lines and the text log."""
        if self.enabled:
            self._json.log(step="PARAMETER", data=values)
            self._text.write(f"settings: {json.dumps(values)}\n")

    def step(self, step: int, metrics: dict) -> None:
        """The metrics of one step; `metrics` may hold any of the columns."""
        if not self.enabled:
            return
        self._csv.writerow({"step": step} | metrics)
        self._csv_file.flush()
        self._json.log(step=step, data=metrics)
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(name, value, step)
        if self.bar is not None:
            shown = {"loss": f"{metrics['step_loss']:.4f}", "lr": f"{metrics['learning_rate']:.3g}"}
            self.bar.set_postfix(shown | {"seq/s": f"{metrics['sequences_per_second']:.1f}"}, refresh=False)
            self.bar.update()

    def close(self) -> None:
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.close()
        for sink in (self._text, self._csv_file, self._json, self._tensorboard):
            sink.close()


def _open_csv(path: Path, columns: list[str], resume_step: int):
    """A DictWriter that appends after the rows up to `resume_step`."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            steps = [(row.get("step") or "", row) for row in csv.DictReader(file)]
        kept = [row for step, row in steps if step.isdigit() and int(step) <= resume_step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
    temporary.replace(path)
    file = path.open("a", newline="")
    return file, csv.DictWriter(file, columns)


def _drop_later_lines(path: Path, resume_step: int) -> None:
    """Keep the JSON lines of the steps up to `resume_step`, and those of no step."""
    if not path.exists():
        return

    def counts(line: str) -> bool:
        try:
            step = json.loads(line.removeprefix("DLLL "))["step"]
        except (ValueError, KeyError, TypeError):
            return False  # the torn last line of a killed run
        return not (isinstance(step, list) and step and step[0] > resume_step)

    with path.open() as file:
        kept = [line for line in file if counts(line)]
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


class _JsonLines:
    """The lines that dllogger's JSONStreamBackend writes: `DLLL {...}`."""

    def __init__(self, path: Path):
        self._file, self._start = path.open("a", buffering=1), time.time()

    def log(self, step, data: dict) -> None:
        now = time.time()
        line = {
            "timestamp": str(now),
            "datetime": str(datetime.fromtimestamp(now)),
            "elapsedtime": str(now - self._start),
            "type": "LOG",
            "step": step if isinstance(step, str) else [step],
            "data": data,
        }
        self._file.write(f"DLLL {json.dumps(line)}\n")

    def close(self) -> None:
        self._file.close()


class _DLLogger:
    """NVIDIA's dllogger itself, where the machine has it."""

    def __init__(self, dllogger, path: Path):
        backend = dllogger.JSONStreamBackend(dllogger.Verbosity.VERBOSE, str(path), append=True)
        self._logger = dllogger.Logger([backend])

    def log(self, step, data: dict) -> None:
        self._logger.log(step=step if isinstance(step, str) else (step,), data=data)

    def close(self) -> None:
        self._logger.flush()


def open_json_lines(path: Path) -> _JsonLines | _DLLogger:
    """Where dllogger's JSON lines go: dllogger itself, or what writes the same lines."""
    try:
        dllogger = import_module("dllogger")
    except ImportError:
        return _JsonLines(path)
    # PyPI's placeholder of a similar name has no backend
    return _DLLogger(dllogger, path) if hasattr(dllogger, "JSONStreamBackend") else _JsonLines(path)
