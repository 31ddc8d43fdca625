"""Compiles the CUDA sources of this folder into shared libraries, at first use or ahead of time.

    python -m kernels.build            # compile what is not in the cache yet, print the paths

A library has a plain C interface and is loaded with ctypes, so one build serves every version of torch. It lies in the
cache under a key of all that it depends on: sources and the headers of this folder that they include, flags, the
compiler's version and CUTLASS's. Processes that need it at the same time compile it once: the others wait for a lock.
On a machine without nvcc (or the headers), a build of the same sources that is already in the cache is used.

Cache:  $SLOPE_KERNEL_CACHE, or $XDG_CACHE_HOME/slope_bert/kernels, or ~/.cache/slope_bert/kernels
nvcc:   $CUDACXX, or $CUDA_HOME/bin/nvcc, or on PATH
CUTLASS headers (requirements-cuda.txt): the pip package nvidia-cutlass, or $CUTLASS_PATH/include
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from training.errors import UsageError
from training.flags import Parser, run_door, whole

SOURCES = Path(__file__).resolve().parent
FLAGS = (
    *("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"),
    "-gencode=arch=compute_90a,code=sm_90a",  # wgmma and its metadata exist on Hopper alone
)
LINK_FLAGS = ("-shared", "-cudart", "static")  # static: whatever CUDA runtime torch came with


class KernelsUnavailable(Exception):  # noqa: N818 - a state of the machine, not always an error
    """The kernels cannot be had on this machine; the message is one line that says why."""


@dataclass(frozen=True)
class Unit:
    """One run of nvcc: a source of this folder and its macros."""

    source: str
    defines: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Library:
    units: tuple[Unit, ...]
    needs_cutlass: bool = False


SPARSE_GEMM_VARIANTS = 6
LIBRARIES = {
    "operands": Library((Unit("operands.cu"),)),
    "adapters": Library((Unit("adapters.cu"),)),
    "sparse_gemm": Library(
        (Unit("sparse_gemm.cu"), *(Unit("sparse_gemm.cu", {"VARIANT": i}) for i in range(SPARSE_GEMM_VARIANTS))),
        needs_cutlass=True,
    ),
}


# ----------------------------------------------------------------------------------------------------------- toolchain
@dataclass(frozen=True)
class Toolchain:
    nvcc: str
    include: Path | None
    identity: str
    """The versions of nvcc and CUTLASS, as they say them."""


def find_nvcc() -> str:
    """The path of nvcc.

    Raises:
        KernelsUnavailable: when there is none.
    """
    if os.environ.get("CUDACXX"):
        given = shutil.which(os.environ["CUDACXX"])
        if given is None:
            raise KernelsUnavailable(f"CUDACXX={os.environ['CUDACXX']} is no program")
        return given
    folders = [str(Path(os.environ["CUDA_HOME"]) / "bin")] if os.environ.get("CUDA_HOME") else []
    found = shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise KernelsUnavailable("no nvcc: install the CUDA toolkit, and set CUDA_HOME or put nvcc on PATH")
    return found


def find_cutlass() -> Path:
    """The folder of CUTLASS's headers.

    Raises:
        KernelsUnavailable: when there is none.
    """
    if os.environ.get("CUTLASS_PATH"):
        include = Path(os.environ["CUTLASS_PATH"]) / "include"
    else:
        package = importlib.util.find_spec("cutlass_library")  # found, not imported: only its headers are used
        if package is None or package.origin is None:
            raise KernelsUnavailable(
                "no CUTLASS headers: pip install --no-deps -r requirements-cuda.txt, or set CUTLASS_PATH"
            )
        include = Path(package.origin).parent / "source" / "include"
    if not (include / "cutlass" / "version.h").is_file():
        raise KernelsUnavailable(f"no CUTLASS headers: {include} has no cutlass/version.h")
    return include


def find_toolchain(needs_cutlass: bool) -> Toolchain:
    nvcc = find_nvcc()
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelsUnavailable(f"{nvcc} --version fails: {error}") from error
    if not needs_cutlass:
        return Toolchain(nvcc, None, version)
    include = find_cutlass()
    return Toolchain(nvcc, include, version + (include / "cutlass" / "version.h").read_text())


# ----------------------------------------------------------------------------------------------------------------- keys
def cache_folder() -> Path:
    if os.environ.get("SLOPE_KERNEL_CACHE"):
        return Path(os.environ["SLOPE_KERNEL_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "slope_bert" / "kernels"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _with_headers(name: str, seen: dict[str, str]) -> dict[str, str]:
    """The texts of a source and of all headers of this folder that it includes, by name."""
    if name not in seen and (SOURCES / name).is_file():
        seen[name] = (SOURCES / name).read_text()
        for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', seen[name], re.MULTILINE):
            _with_headers(header, seen)
    return seen


def _source_key(units: tuple[Unit, ...]) -> str:
    texts: dict[str, str] = {}
    for unit in units:
        _with_headers(unit.source, texts)
    settings = [repr((unit.source, sorted(unit.defines.items()))) for unit in units]
    return _digest(*FLAGS, *LINK_FLAGS, *settings, *(part for item in sorted(texts.items()) for part in item))


# ---------------------------------------------------------------------------------------------------------------- build
def library(name: str, defines: Mapping[str, str | int] | None = None, jobs: int | None = None) -> Path:
    """The path of a compiled library of `LIBRARIES`; compiles it if the cache has none.

    Args:
        defines: macros for all its units, beside their own.
        jobs: units to compile at a time; as many as there are processors if None.

    Raises:
        KernelsUnavailable: no nvcc, no CUTLASS headers, no place to write, or an error in compiling.
    """
    known = LIBRARIES[name]
    units = tuple(Unit(unit.source, {**unit.defines, **(defines or {})}) for unit in known.units)
    cache, stem = cache_folder(), f"{name}-{_source_key(units)}"
    try:
        toolchain = find_toolchain(known.needs_cutlass)
    except KernelsUnavailable:
        ready = sorted(cache.glob(f"{stem}-*.so"), key=lambda path: path.stat().st_mtime)
        if not ready:
            raise
        return ready[-1]
    target = cache / f"{stem}-{_digest(toolchain.identity)}.so"
    if target.is_file():
        return target
    asked = time.time()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock")):
            if not target.is_file():
                _raise_if_just_failed(target, asked)
                _build(name, units, toolchain, target, jobs or os.cpu_count() or 1)
    except OSError as error:
        raise KernelsUnavailable(f"cannot write {error.filename or cache} ({error.strerror})") from error
    return target


def build_all(jobs: int | None = None) -> dict[str, Path]:
    """Paths of all libraries, compiled where the cache has none.

    Raises:
        KernelsUnavailable: as `library`.
    """
    return {name: library(name, jobs=jobs) for name in LIBRARIES}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file: one process of the machine at a time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _raise_if_just_failed(target: Path, asked: float) -> None:
    """What failed in another process while this one waited would fail again, one process after the other."""
    reason = target.with_suffix(".failed")
    if reason.is_file() and reason.stat().st_mtime >= asked:
        raise KernelsUnavailable(reason.read_text())


def _build(name: str, units: tuple[Unit, ...], toolchain: Toolchain, target: Path, jobs: int) -> None:
    count = f"{len(units)} unit{'s' if len(units) > 1 else ''}"
    print(f"compiling the {name} kernels ({count}, first use) ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as folder:
        objects = [Path(folder) / f"{i}.o" for i in range(len(units))]
        commands = [_compile_command(toolchain, *pair) for pair in zip(units, objects, strict=True)]
        built = Path(folder) / target.name
        link = [toolchain.nvcc, *FLAGS, *LINK_FLAGS, *map(str, objects), "-o", str(built)]
        with ThreadPoolExecutor(min(jobs, len(units))) as pool:
            results = list(pool.map(_run, commands))
        if all(result.returncode == 0 for result in results):
            results.append(_run(link))
        if any(result.returncode != 0 for result in results):
            _fail(name, target, results)
        os.replace(built, target)
    seconds = time.monotonic() - began
    print(f"compiled the {name} kernels ({count}): {seconds:.0f} s, {target}", file=sys.stderr, flush=True)


def _compile_command(toolchain: Toolchain, unit: Unit, to: Path) -> list[str]:
    include = [] if toolchain.include is None else [f"-I{toolchain.include}"]
    defines = [f"-D{name}={value}" for name, value in unit.defines.items()]
    return [toolchain.nvcc, *FLAGS, *include, *defines, "-c", str(SOURCES / unit.source), "-o", str(to)]


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


def _fail(name: str, target: Path, results: list[subprocess.CompletedProcess]) -> None:
    log = target.with_suffix(".log")
    log.write_text("\n".join(f"$ {' '.join(result.args)}\n{result.stdout}" for result in results))
    lines = [line.strip() for result in results if result.returncode for line in result.stdout.splitlines()]
    first = next((line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)), "nvcc fails")
    message = f"the {name} kernels do not compile: {first} (see {log})"
    target.with_suffix(".failed").write_text(message)
    raise KernelsUnavailable(message)


# --------------------------------------------------------------------------------------------------------- command line
def _known(word: str) -> str:
    if word not in LIBRARIES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(LIBRARIES)}, not {word}")
    return word


def main() -> None:
    parser = Parser(
        prog="python -m kernels.build",
        description="Compile the CUDA kernels ahead of their first use, and print where the libraries lie. "
        "Needs nvcc (CUDACXX, CUDA_HOME or PATH) and CUTLASS's headers (requirements-cuda.txt or CUTLASS_PATH), "
        "no GPU. The cache is SLOPE_KERNEL_CACHE, or slope_bert/kernels in XDG_CACHE_HOME or ~/.cache.",
    )
    parser.add_argument("names", nargs="*", type=_known, metavar="LIBRARY", help=f"{' or '.join(LIBRARIES)}; else all")
    parser.add_argument("--jobs", type=whole(1), help="units to compile at a time (default: the processors)")
    args = parser.parse_args()
    try:
        for name in args.names or LIBRARIES:
            print(library(name, jobs=args.jobs), flush=True)
    except KernelsUnavailable as error:
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    run_door(main)
