"""Checkpoints: written whole or not at all, verified before they are trusted, loadable with weights_only=True."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from training.errors import UsageError

FORMAT_VERSION = 1
PARTS = ("model", "model_config", "sparsity")  # what every checkpoint holds
_NAME = re.compile(r"ckpt_(\d+)\.pt")
_MAGIC = b"PK\x03\x04"  # what an archive begins with
_CHUNK = 2**24  # bytes read at a time
_FOLDER = 0x10  # attribute of an archive's member; torch reads nothing from such a one, and returns what memory held


def checkpoint_path(directory: Path, step: int) -> Path:
    return Path(directory) / f"ckpt_{step}.pt"


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in `directory`, ascending."""
    names = (_NAME.fullmatch(path.name) for path in Path(directory).glob("ckpt_*.pt"))
    return sorted(int(name[1]) for name in names if name)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` under a temporary name, flush it to the disk, and only then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"format_version": FORMAT_VERSION} | state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)  # the new name, too, must survive a crash of the machine
    os.fsync(directory)
    os.close(directory)


def load_checkpoint(path: str | Path, flag: str = "--init_checkpoint") -> dict:
    """Read and verify one checkpoint of this suite onto the CPU.

    Raises:
        UsageError: when it is missing, damaged, or no checkpoint of this suite.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file")
    if not _begins_as_archive(path):
        raise UsageError(f"{flag} {path}: not a checkpoint of this suite (no archive, as torch.save writes)")
    problem = damage(path)
    if problem:
        raise UsageError(f"{flag} {path}: damaged ({problem})")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"{flag} {path}: not a checkpoint of this suite ({reason})") from error
    if not isinstance(state, dict) or "format_version" not in state:
        raise UsageError(f"{flag} {path}: not a checkpoint of this suite (it has no format_version)")
    if state["format_version"] != FORMAT_VERSION:
        raise UsageError(
            f"{flag} {path}: has format version {state['format_version']}; this suite reads version {FORMAT_VERSION}"
        )
    for part in PARTS:
        if part not in state:
            raise UsageError(f"{flag} {path}: not a checkpoint of this suite (it has no {part})")
    return state


def _begins_as_archive(path: Path) -> bool:
    """Also true of a file that was cut off within its first bytes, or cannot be read: `damage` says so."""
    try:
        with path.open("rb") as file:
            return _MAGIC.startswith(file.read(len(_MAGIC)))
    except OSError:
        return True


def damage(path: Path) -> str | None:
    """What is wrong with the file, or None: every member of the archive is read against its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():  # not `testzip`, which finds members by name: a damaged one hides another
                if member.external_attr & _FOLDER:
                    return f"{member.filename} is marked as a folder"
                with archive.open(member) as file:
                    while file.read(_CHUNK):
                        pass
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        return str(error)
    return None


def newest_checkpoint(directory: Path, report: Callable[[str], None]) -> tuple[int, Path, dict] | None:
    """Step, path and content of the newest checkpoint that verifies; `report` takes a line about each that does not.

    Raises:
        UsageError: when there are checkpoints and none of them can be used.
    """
    problems = []
    for step in reversed(saved_steps(directory)):
        path = checkpoint_path(directory, step)
        try:
            found = step, path, load_checkpoint(path, "--output_dir")
        except UsageError as error:
            problems.append(error)
            continue
        for problem in problems:
            report(f"{problem}: using the one before it")
        return found
    if problems:
        raise UsageError(f"{problems[0]}, and no other checkpoint there can be used; remove them to start anew")
    return None


def remove_old_checkpoints(directory: Path, keep: int, phase_start: int, newest: int) -> None:
    """Of this phase's checkpoints up to the one just saved, `newest`, keep that many; earlier phases' stay.

    What lies beyond `newest` was found damaged when the run began, so it counts for nothing.
    """
    of_phase = [step for step in saved_steps(directory) if phase_start < step <= newest]
    for step in of_phase[:-keep]:
        checkpoint_path(directory, step).unlink(missing_ok=True)


def remove_unfinished_checkpoints(directory: Path) -> None:
    """Remove what a killed run left half-written. Only for who holds the output directory's lock."""
    for path in directory.glob("ckpt_*.tmp"):
        path.unlink()
