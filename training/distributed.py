"""Process groups: who this process is, what all ranks agree on, and how a job ends."""

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from training.errors import UsageError

WATCH_SECONDS = 1.0
LEAVE_SECONDS = 30.0
JOIN_TIME = timedelta(minutes=30)  # that a rank waits for the others: to come, and in each exchange
# A thread of the process group frees the last collective's tensors, for which it needs the interpreter's lock. Were it
# still waiting for that when this process ends, the process would hang, or abort.
SETTLE_SECONDS = 0.1
_LAUNCHER = os.getppid()  # as this process began


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def this_process(use_cuda: bool = True) -> World:
    """Read the launcher's environment; joins nothing yet, so that flags and files can be checked first.

    Raises:
        UsageError: when a node has more processes than GPUs.
    """
    _end_with_launcher()
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if not (use_cuda and torch.cuda.is_available()):
        return World(rank, size, local_rank, torch.device("cpu"))
    if max(local_size, local_rank + 1) > torch.cuda.device_count():  # on every rank, so that the first one can say it
        raise UsageError(
            f"--nproc_per_node: at most {torch.cuda.device_count()}, the GPUs of this node: each takes one process"
        )
    return World(rank, size, local_rank, torch.device("cuda", local_rank))


def reporter(world: World) -> Callable[[str], None]:
    """Prints lines to stderr on rank 0 and nothing elsewhere: for what happens before there is a logger."""

    def report(line: str) -> None:
        if world.is_main:
            print(line, file=sys.stderr, flush=True)

    return report


@contextlib.contextmanager
def process_group(world: World):
    """Join the other ranks for the duration: NCCL between GPUs, gloo between CPUs and for what stays on the host."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1:
        yield
        return
    # A rank captures its graphs when it needs them; NCCL would then register their buffers, together with all ranks.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    store = _store_of_this_start(world) if _under_torchrun() else None
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=JOIN_TIME)
    try:
        yield
    finally:
        time.sleep(SETTLE_SECONDS)
        dist.destroy_process_group()


def _under_torchrun() -> bool:
    """Whether a launcher keeps a store for its ranks, at MASTER_ADDR and MASTER_PORT."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launchers_store(timeout: timedelta) -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)


def _store_of_this_start(world: World) -> dist.Store:
    """The launcher's store, below a name that only the ranks of this start know.

    torchrun keeps one store over restarts, and in it the addresses of ranks that are gone: a rank that reads one of
    those fails, or hangs. Restarts are counted by each node for itself, so the ranks agree on a name of their own: the
    first one tells it to whom greets it with a new word, until all have heard it.
    """
    store, own = _launchers_store(JOIN_TIME), uuid.uuid4().hex
    if not world.is_main:
        store.set(f"greeting/{world.rank}", own)
        name = store.get(f"answer/{own}").decode()  # waits for it
        store.add(f"{name}/heard", 1)
        return dist.PrefixStore(name, store)
    greetings, answered = [f"greeting/{rank}" for rank in range(1, world.size)], set()
    deadline = time.monotonic() + JOIN_TIME.total_seconds()
    while store.add(f"{own}/heard", 0) < len(greetings):
        for word in (store.get(key).decode() for key in greetings if store.check([key])):
            if word not in answered:
                store.set(f"answer/{word}", own)
                answered.add(word)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {world.size} ranks came within {JOIN_TIME}")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def _end_with_launcher() -> None:
    """End this process when torchrun dies: its workers live in sessions of their own and would run on.

    Only under an elastic launcher; a plain process may outlive the shell that started it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()


def leave_together() -> None:
    """Wait until every rank under this launcher has come here to end with a usage error, but not for long.

    A launcher that sees one rank fail ends the others at once: also one that has yet to say what is wrong, and it
    would report that signal instead of their exit code. Works without a process group. A rank that found nothing wrong
    never comes; then the launcher ends it once this one has gone. A launcher that would start the ranks again
    (`--max_restarts`) is ended too, by one rank of each node: they would only find the same error.
    """
    if not _under_torchrun():
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    key = f"usage_errors/{attempt}"
    deadline = time.monotonic() + LEAVE_SECONDS
    try:
        store = _launchers_store(timedelta(seconds=LEAVE_SECONDS))
        first_of_node = store.add(f"{key}/of_node/{os.environ.get('GROUP_RANK', 0)}", 1) == 1
        arrived = store.add(key, 1)
        while arrived < int(os.environ["WORLD_SIZE"]) and time.monotonic() < deadline:
            time.sleep(0.05)
            arrived = store.add(key, 0)
    except dist.DistError:
        return  # the launcher is gone
    would_retry = attempt < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if would_retry and first_of_node and os.getppid() == _LAUNCHER:
        os.kill(_LAUNCHER, signal.SIGTERM)


def sum_over_ranks(world: World, values: list[float]) -> list[float]:
    """Element-wise sums over all ranks, on the host: no GPU waits for it."""
    if world.size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(world: World, own: object) -> list:
    """What every rank holds, by rank; `own` alone without other ranks."""
    if world.size == 1:
        return [own]
    found = [None] * world.size
    dist.all_gather_object(found, own)
    return found


def agree(world: World, error: UsageError | None) -> None:
    """Every rank calls this with what it found wrong, or None; if any did, all raise the first rank's error."""
    found = gather_objects(world, None if error is None else str(error))
    messages = [message for message in found if message is not None]
    if messages:
        raise UsageError(messages[0])


class StopSignal:
    """SIGTERM and SIGUSR1 (what clusters send before the time is up) become a flag that the loop reads.

    The first is remembered, so that the step in progress is finished and saved.
    """

    def __init__(self):
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name


class OutputLock:
    """One run per output directory: rank 0 holds an advisory lock on `OUTPUT_DIR/.lock` until `release`."""

    def __init__(self, world: World, output_dir: Path):
        self._file = None
        error = None
        if world.is_main:
            try:
                self._take(output_dir)
            except UsageError as refused:
                error = refused
        agree(world, error)

    def _take(self, output_dir: Path) -> None:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._file = (output_dir / ".lock").open("a+")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            self._file.flush()
        except BlockingIOError as error:
            self._file.seek(0)
            raise UsageError(
                f"--output_dir {output_dir}: another run is using it ({self._file.read().strip()}); "
                "wait for it or give another directory"
            ) from error
        except OSError as error:  # no rights, a full disk, a file system without locks
            raise UsageError(f"--output_dir {output_dir}: cannot be written or locked ({error.strerror})") from error

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
