"""Runs of the doors as processes: one after another, or several at a time, each with a GPU to itself or shared.

A *job* is a generator of `Command`s: it yields one, and gets its exit code once that has ended. Between two of them it
does what depends on the one and comes before the other.
"""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOOK_AGAIN = 0.05  # seconds


class StopRequestedError(Exception):
    """This process was told to end, and what it ran has ended."""


@dataclass(frozen=True)
class Command:
    words: Sequence[str]
    log: Path | None = None
    """Where its output is added to; None: this process's own streams."""
    with_children: bool = False
    """Its children are told, too, when it is to end: for a script that does not pass a signal on. The doors do without:
    their loaders have to outlive the step that is under way."""


Job = Generator[Command, int, None]


@dataclass(frozen=True)
class Planned:
    """A job, and when and where its commands may run."""

    job: Job
    ready: Callable[[Collection[str]], bool] = lambda unfinished: True
    """Whether it may begin, of the names of those that are not finished. Asked again and again, so it must be quick."""
    alone: bool = False
    """Takes a place for itself, with all its slots."""


@dataclass
class _Place:
    environment: Mapping[str, str]
    """What a command there has besides this process's."""
    free: int
    """Slots."""


@dataclass
class _Running:
    command: Command
    process: subprocess.Popen
    place: _Place
    slots: int

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            if self.command.with_children:
                os.killpg(self.process.pid, signal.SIGTERM)  # it leads a group of its own, see `start`
            else:
                self.process.send_signal(signal.SIGTERM)


class Processes:
    """Runs jobs. A signal to this process stops their commands, which save, and then this."""

    def __init__(self):
        self.running: dict[str, _Running] = {}
        self.slots = 1
        """Of all places together."""
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame) -> None:
        self.received = number
        self._end_all()

    def _end_all(self) -> None:
        for running in list(self.running.values()):
            running.end()

    def run(self, planned: Mapping[str, Planned], places: Sequence[Mapping[str, str]] = ({},), slots: int = 1) -> None:
        """Run all jobs to their ends, in their order as far as they are ready and there is room.

        Args:
            planned: by name. One that wants a place for itself holds back those after it until there is one.
            places: what a command's environment has besides this process's.
            slots: commands that run at a time in each place.

        Raises:
            StopRequestedError: a signal came.
            UsageError: from a job, as soon as all commands have ended; those of other jobs were told to.
        """
        waiting, rooms = dict(planned), [_Place(place, slots) for place in places]
        self.slots = len(places) * slots
        try:
            while waiting or self.running:
                self._begin_what_can(waiting, rooms, slots)
                self._go_on_where_one_ended(planned)
                if self.received is not None and not self.running:
                    raise StopRequestedError
                time.sleep(LOOK_AGAIN)
        finally:
            self._end_all()
            for running in self.running.values():
                running.process.wait()
            self.running.clear()
            for one in planned.values():
                one.job.close()

    def _begin_what_can(self, waiting: dict[str, Planned], rooms: list[_Place], all_slots: int) -> None:
        for name, one in list(waiting.items()):
            if not one.ready({*waiting, *self.running}):
                continue
            slots = all_slots if one.alone else 1
            room = max(rooms, key=lambda room: room.free)
            if room.free >= slots:
                self._go_on(name, waiting.pop(name).job, None, room, slots)
            elif one.alone:
                return

    def _go_on_where_one_ended(self, planned: Mapping[str, Planned]) -> None:
        for name in [name for name, running in self.running.items() if running.process.poll() is not None]:
            ended = self.running.pop(name)
            ended.place.free += ended.slots
            self._go_on(name, planned[name].job, ended.process.poll(), ended.place, ended.slots)

    def _threads(self, slots: int) -> dict[str, str]:
        """A command's share of the cores: each would take all for its threads, and then waits for the others'."""
        if slots == self.slots or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, cores() * slots // self.slots))}

    def _go_on(self, name: str, job: Job, code: int | None, place: _Place, slots: int) -> None:
        """Let a job take its next step, and start what that yields."""
        if self.received is not None:
            return
        try:
            command = job.send(code)
        except StopIteration:
            return
        if self.received is not None:
            return
        print("+", shown(command.words), *(() if command.log is None else (">>", command.log)), flush=True)
        process = start(command.words, self._threads(slots) | place.environment, command.log)
        place.free -= slots
        running = self.running[name] = _Running(command, process, place, slots)
        if self.received is not None:  # it came while the command was being started
            running.end()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def start(words: Sequence[str], place: Mapping[str, str], log: Path | None) -> subprocess.Popen:
    """A process that ends with this one, and that a terminal's Ctrl-C does not reach."""
    environment = os.environ | {"PYTHON": sys.executable} | place  # the first for the scripts of the data
    kill_me_too = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def before() -> None:
        if kill_me_too is not None:
            kill_me_too(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: an orphan would train on and hold its directory's lock

    how = {"cwd": ROOT, "env": environment, "start_new_session": True, "preexec_fn": before}
    if log is None:
        return subprocess.Popen(words, **how)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(words, **how, stdout=file, stderr=subprocess.STDOUT)


def shown(words: Sequence[str]) -> str:
    """The command as one would type it in the repository's folder."""
    return shlex.join(["python" if word == sys.executable else word.removeprefix(f"{ROOT}/") for word in words])


def gpu_places() -> list[dict[str, str]]:
    """For each of the machine's GPUs what a process adds to its environment to see that one; one place without any."""
    from torch.cuda import device_count  # takes seconds, so not for who only asks for help

    count = device_count()
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or map(str, range(count))
    return [{"CUDA_VISIBLE_DEVICES": name} for name, _ in zip(names, range(count), strict=False)] or [{}]
