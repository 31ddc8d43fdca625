"""GPU time of things that are compared: they take turns, sample by sample, and ratios are taken pair by pair.

A GPU at its power limit is slower when hot, and what is measured first, on a cool chip, looks faster than it is. So
nothing is measured alone: in each round every candidate follows its own sample of the base (base, A, base, B, ...), the
median of the rounds' ratios counts, and the SM clock and the power are read meanwhile.
"""

import ctypes
import functools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.autotune import Stopwatch

WARM_UP_SECONDS = 0.2
SAMPLE_SECONDS = 10e-3  # of one sample: longer than the launch of a graph by far


# -------------------------------------------------------------------------------------------------------------- samples
@dataclass(frozen=True)
class Spread:
    """A measured quantity: median, least and greatest of its samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        return cls(statistics.median(samples), min(samples), max(samples))

    def text(self, digits: int = 2, unit: float = 1.0) -> str:
        median, low, high = (f"{part * unit:.{digits}f}" for part in (self.median, self.low, self.high))
        return f"{median} ({low}–{high})"


class Timer(Stopwatch):
    """A stopwatch whose samples replay its graph back to back until they last `sample_seconds`."""

    replays = 1  # until a first sample tells how many it takes

    def __init__(self, run: Callable[[], object], sample_seconds: float = SAMPLE_SECONDS):
        super().__init__(run)
        self.replays = max(1, round(sample_seconds / (self.repeats * self.seconds())))

    def seconds(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / self.replays / self.repeats / 1e3


@dataclass(frozen=True)
class Timings:
    """Seconds of one call, a sample a round."""

    base: str
    samples: Mapping[str, list[float]]
    """Of each candidate."""
    base_samples: Mapping[str, list[float]]
    """Of the base, right before those of each candidate."""
    gpu: "GpuState"

    def seconds(self, name: str) -> float:
        """The median of all samples."""
        if name == self.base:
            return statistics.median([sample for samples in self.base_samples.values() for sample in samples])
        return statistics.median(self.samples[name])

    def speedup(self, name: str) -> Spread:
        """Time of the base over time of the candidate."""
        pairs = zip(self.base_samples[name], self.samples[name], strict=True)
        return Spread.of([base / own for base, own in pairs])

    def ratio(self, name: str, other: str) -> Spread:
        """Time of one candidate over time of another one, of the same rounds."""
        pairs = zip(self.samples[name], self.samples[other], strict=True)
        return Spread.of([own / others for own, others in pairs])


def interleave(timers: Mapping[str, Timer], rounds: int) -> Timings:
    """Let the timers take turns; the first one is the base."""
    base, *candidates = timers
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    base_samples: dict[str, list[float]] = {name: [] for name in candidates}
    warm_up = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < warm_up:
        for timer in timers.values():
            timer.seconds()
    with GpuWatch() as watch:
        for _ in range(rounds):
            for name in candidates:
                base_samples[name].append(timers[base].seconds())
                samples[name].append(timers[name].seconds())
    return Timings(base, samples, base_samples, watch.state)


def host_seconds(call: Callable[[], object], wait: Callable[[], None], rounds: int) -> Spread:
    """Host time of a call that only launches work: the GPU is idle when it begins, and it does not wait at its end."""
    samples = []
    for _ in range(rounds + 1):
        wait()
        began = time.perf_counter()
        call()
        samples.append(time.perf_counter() - began)
    wait()
    return Spread.of(samples[1:])  # the first one loads


# --------------------------------------------------------------------------------------------------------------- clocks
@dataclass(frozen=True)
class GpuState:
    """What the chip did while a row was measured; None where the driver does not say."""

    sm_mhz: Spread | None
    watts: float | None
    """Mean power, from the energy counter."""
    power_capped: float | None
    """Share of the readings at which the power limit held the clock down."""

    def text(self) -> str:
        if self.sm_mhz is None:
            return "–"
        watts = "" if self.watts is None else f", {self.watts:.0f} W"
        capped = "" if self.power_capped is None else f", {self.power_capped:.0%}"
        return f"{self.sm_mhz.median:.0f} MHz{watts}{capped}"


class Nvml:
    """The few calls of the driver's management library (what nvidia-smi prints) that say how one GPU fares."""

    SM_CLOCK, POWER_CAP = 1, 0x4

    def __init__(self, uuid: str):
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        self.handle = ctypes.c_void_p()
        codes = (
            self.library.nvmlInit_v2(),
            self.library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self.handle)),
        )
        if any(codes):
            raise OSError(f"the driver's management library does not know GPU {uuid}: NVML {codes}")

    def read(self, function: str, *arguments: int, kind: type = ctypes.c_uint) -> int | None:
        """The number that an NVML function of this device gives; None where this GPU or driver has none."""
        number = kind()
        found = getattr(self.library, function, None)
        if found is None or found(self.handle, *arguments, ctypes.byref(number)):
            return None
        return number.value

    def sm_mhz(self) -> int | None:
        return self.read("nvmlDeviceGetClockInfo", self.SM_CLOCK)

    def limits(self) -> dict[str, float | None]:
        milliwatts = self.read("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "power_limit_watts": None if milliwatts is None else milliwatts / 1e3,
            "max_sm_mhz": self.read("nvmlDeviceGetMaxClockInfo", self.SM_CLOCK),
        }

    def joules(self) -> float | None:
        millijoules = self.read("nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong)
        return None if millijoules is None else millijoules / 1e3

    def power_capped(self) -> bool | None:
        reasons = self.read("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong)
        return None if reasons is None else bool(reasons & self.POWER_CAP)

    def driver(self) -> str:
        text = ctypes.create_string_buffer(96)
        self.library.nvmlSystemGetDriverVersion(text, len(text))
        return text.value.decode()


@functools.cache
def nvml() -> Nvml | None:
    """The management library's view of the current GPU; None where it is not installed or not allowed."""
    try:
        return Nvml(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    except OSError:
        return None


class GpuWatch:
    """A context that reads clock and power every few milliseconds, and afterwards holds a `state`.

    Entered again, it goes on: the state is that of all times together.
    """

    INTERVAL = 0.01

    def __init__(self):
        self.clocks, self.capped, self.seconds, self.energy = [], [], 0.0, 0.0
        self.state = GpuState(None, None, None)

    def __enter__(self) -> "GpuWatch":
        self.gpu = nvml()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.began, self.joules = time.monotonic(), self.gpu and self.gpu.joules()
        self.thread.start()
        return self

    def _read(self) -> None:
        while self.gpu is not None:
            self.clocks.append(self.gpu.sm_mhz())
            self.capped.append(self.gpu.power_capped())
            if self.stop.wait(self.INTERVAL):
                return

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()
        joules = self.gpu and self.gpu.joules()
        self.seconds += time.monotonic() - self.began
        known = None not in (joules, self.joules, self.energy)
        self.energy = self.energy + joules - self.joules if known else None
        clocks = [clock for clock in self.clocks if clock is not None]
        capped = [known for known in self.capped if known is not None]
        self.state = GpuState(
            Spread.of(clocks) if clocks else None,
            None if self.energy is None else self.energy / self.seconds,
            sum(capped) / len(capped) if capped else None,
        )
