"""What the stages of the data pipeline share: whole files or none, resuming, worker processes, progress and MB/s."""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from training.errors import UsageError

READING_BYTES_PER_PROCESS = 256_000_000
"""For `run_tasks` where a task does little more than read."""

_HASH_BLOCK_BYTES = 1 << 20


def check_folders(flag: str, *folders: Path) -> None:
    """Refuse folders that are not there and cannot be made. Nothing is written.

    Raises:
        UsageError: a folder, or the nearest that there is above it, is something else or may not be written.
    """
    for folder in folders:
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir():
            raise UsageError(f"{flag}: {there} is no folder: give a folder, or a path where one can be made")
        if there != folder and not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"{flag}: {there} may not be written: give a folder, or a path where one can be made")


def check_file(flag: str, path: Path) -> None:
    """Refuse what cannot become a file. Nothing is written.

    Raises:
        UsageError: it is a folder, may not be written, or lies where no folder can be made.
    """
    if path.is_dir():
        raise UsageError(f"{flag}: {path} is a folder: give the name of a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"{flag}: {path} may not be written: give another file")
    check_folders(flag, path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, wholly or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(parts: Iterable[object]) -> str:
    """One short hash of a sequence of values that JSON can hold."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------------------ resuming
def claim_outputs(manifest: Path, settings: dict, outputs: Sequence[Path], overwrite: bool) -> None:
    """Make sure that the files which `settings` will write may stand beside those that are there.

    Outputs of the same settings stay, so that a stage resumes; with `overwrite` those of other settings are removed.

    Args:
        manifest: the JSON file that says which settings the outputs were made with.
        settings: everything that the outputs depend on, as JSON values.
        outputs: the outputs that exist.

    Raises:
        UsageError: outputs exist that were made with other settings, or by something else.
    """
    there = read_manifest(manifest)
    if there == settings:
        return
    if outputs and not overwrite:
        raise UsageError(f"{manifest.parent} {_difference(there, settings)}: give --overwrite or another --output")
    manifest.unlink(missing_ok=True)
    for path in outputs:
        path.unlink()
    write_atomic(manifest, json.dumps(settings, indent=2) + "\n")


def read_manifest(manifest: Path) -> dict | None:
    """The settings stored in `manifest`, None where there is no such file or it is damaged."""
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _difference(there: dict | None, settings: dict) -> str:
    if there is None:
        return "holds files that this stage did not make"
    names = [name for name in settings if there.get(name) != settings[name]] or sorted(there.keys() - settings.keys())
    changes = ", ".join(f"{name} {there.get(name)}, now {settings.get(name)}" for name in names)
    return f"was made with other settings ({changes})"


# ----------------------------------------------------------------------------------------------------------- processes
def run_tasks(
    function: Callable, tasks: Sequence, sizes: Sequence[int], nproc: int, description: str, bytes_per_process: int = 1
) -> list:
    """Call `function` on each task, in up to `nproc` processes, with a progress bar in bytes.

    Args:
        function: takes one task; defined at the top of a module, so that other processes can import it.
        sizes: bytes of text in each task.
        bytes_per_process: how much text is worth the start of another process.

    Returns:
        The results in the order of the tasks.

    Raises:
        UsageError: what a task raised; the tasks that had not begun are dropped.
    """
    with _progress_bar(sum(sizes), description) as bar:
        processes = min(nproc, len(tasks), 1 + sum(sizes) // bytes_per_process)
        if processes <= 1:
            results = []
            for task, size in zip(tasks, sizes, strict=True):
                results.append(function(task))
                bar.update(size)
            return results
        return _run_in_processes(function, tasks, sizes, processes, bar)


@contextmanager
def _progress_bar(size: int, description: str) -> Iterator[tqdm]:
    """A bar in bytes: wiped away where the work fails, and not begun where it fails at once: an error is one line."""
    with tqdm(total=size, unit="B", unit_scale=True, desc=description, delay=2, leave=False) as bar:
        yield bar
        bar.leave = True


def _run_in_processes(function: Callable, tasks: Sequence, sizes: Sequence[int], processes: int, bar: tqdm) -> list:
    # Spawned, not forked: the tokenizers library has threads, which a fork would leave behind holding their locks.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        places = {pool.submit(function, task): place for place, task in enumerate(tasks)}
        results = [None] * len(tasks)
        for future in as_completed(places):
            place = places[future]
            results[place] = future.result()
            bar.update(sizes[place])
        return results
    except BrokenProcessPool as error:
        raise UsageError(
            f"one of {processes} processes died, perhaps for lack of memory: give a smaller --nproc; the same command "
            "goes on from the files that are finished"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker end when its parent does, also when the parent was killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# -------------------------------------------------------------------------------------------------------------- report
class Stopwatch:
    """Times a stage from its construction and prints its speed."""

    def __init__(self, stage: str, nproc: int | None = None):
        self._stage = stage
        self._nproc = nproc
        self._start = time.monotonic()

    def report(self, text_bytes: int, result: str) -> None:
        """Print `result` and the MB (1e6 bytes) of text a second that `text_bytes` of text make."""
        seconds = time.monotonic() - self._start
        megabytes = text_bytes / 1e6
        speed = f"{megabytes / seconds:.2f} MB/s" + (f", --nproc {self._nproc}" if self._nproc else "")
        print(f"{self._stage}: {result}; {megabytes:.1f} MB of text in {seconds:.1f} s ({speed})", flush=True)
