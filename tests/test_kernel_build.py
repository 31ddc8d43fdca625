"""The kernels' build: found tools, cache keys, one compilation for many processes, and one line where it fails.

A script stands in for nvcc, so that nothing here needs the CUDA toolkit; one test takes the real one where it is.
"""

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from pretraining_runs import ROOT

from kernels import build, native

FAKE_NVCC = """\
#!/bin/sh
# Writes its arguments into what it makes, and a line into calls.txt.
here=$(dirname "$0")
[ "$1" = --version ] && { cat "$here/version.txt"; exit 0; }
echo "$@" >> "$here/calls.txt"
sleep "$(cat "$here/seconds.txt")"
if grep -q broken "$here/version.txt"; then
    echo "nvcc warning : this is old"
    echo "operands.cu(7): error: identifier \\"wgmma\\" is undefined"
    exit 2
fi
while [ $# -gt 1 ]; do [ "$1" = -o ] && to=$2; shift; done
echo made > "$to"
"""


class Machine:
    """A machine's nvcc, CUTLASS headers, sources and cache, all below one folder."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.cache = folder, folder / "cache"
        self.sources, self.cuda = folder / "sources", folder / "cuda"
        for path in (self.sources, self.cuda / "bin", folder / "cutlass" / "include" / "cutlass"):
            path.mkdir(parents=True)
        self.write("cuda/bin/nvcc", FAKE_NVCC).chmod(stat.S_IRWXU)
        self.write("cuda/bin/version.txt", "release 13.0")
        self.write("cuda/bin/seconds.txt", "0")
        self.write("cutlass/include/cutlass/version.h", "#define CUTLASS_MAJOR 4")
        self.write("sources/operands.cu", '#include "rules.cuh"\n')
        self.write("sources/rules.cuh", '#include "deeper.cuh"\n')
        self.write("sources/deeper.cuh", "int x;\n")
        self.write("sources/other.cuh", "int y;\n")
        self.write("sources/sparse_gemm.cu", '#include "other.cuh"\n#include <cutlass/version.h>\n')
        monkeypatch.setattr(build, "SOURCES", self.sources)
        for name in ("CUDACXX", "CUDA_HOME", "CUTLASS_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SLOPE_KERNEL_CACHE", str(self.cache))
        monkeypatch.setenv("CUDA_HOME", str(self.cuda))
        monkeypatch.setenv("CUTLASS_PATH", str(folder / "cutlass"))

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def calls(self) -> list[str]:
        path = self.cuda / "bin" / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_second_use_compiles_nothing(machine, capfd):
    path = build.library("operands")
    assert path.parent == machine.cache and path.read_text() == "made\n"
    compiled, linked = machine.calls()
    assert "-gencode=arch=compute_90a,code=sm_90a" in compiled and "-c" in compiled.split()
    assert "-shared" in linked.split() and "-cudart static" in linked and "-lcuda" not in linked
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "compiling the operands kernels (1 unit, first use) ..."
    assert lines[1].startswith("compiled the operands kernels (1 unit): ") and lines[1].endswith(f" s, {path}")
    assert build.library("operands") == path
    assert len(machine.calls()) == 2 and capfd.readouterr().err == ""
    assert {entry.suffix for entry in machine.cache.iterdir()} == {".so", ".lock"}  # no temporary file stays


def test_a_library_is_its_units(machine, monkeypatch):
    units = tuple(build.Unit("sparse_gemm.cu", {"VARIANT": i}) for i in range(3))
    monkeypatch.setitem(build.LIBRARIES, "sparse_gemm", build.Library(units, needs_cutlass=True))
    build.library("sparse_gemm", {"EXTRA": "on"}, jobs=3)
    *compiled, linked = machine.calls()
    assert len(compiled) == 3
    for i in range(3):
        assert sum(f"-DVARIANT={i} -DEXTRA=on" in call for call in compiled) == 1
    assert all(f"-I{machine.folder / 'cutlass' / 'include'}" in call.split() for call in compiled)
    assert sum(word.endswith(".o") for word in linked.split()) == 3


def test_every_tile_of_the_source_is_a_unit_and_can_be_chosen():
    source = (ROOT / "kernels" / "sparse_gemm.cu").read_text()
    every = [str(i) for i in range(build.SPARSE_GEMM_VARIANTS)]
    assert re.findall(r"^#(?:el)?if VARIANT == (\d+)", source, re.MULTILINE) == every
    chosen = re.search(r"^#define SLOPE_FOR_VARIANTS\(DO\) (.*)", source, re.MULTILINE)[1]
    assert re.findall(r"DO\((\d+)\)", chosen) == every
    units = [unit.defines.get("VARIANT") for unit in build.LIBRARIES["sparse_gemm"].units]
    assert units == [None, *map(int, every)]


def test_units_compile_side_by_side(machine, monkeypatch):
    units = tuple(build.Unit("operands.cu", {"VARIANT": i}) for i in range(4))
    monkeypatch.setitem(build.LIBRARIES, "operands", build.Library(units))
    machine.write("cuda/bin/seconds.txt", "1")
    began = os.times().elapsed
    build.library("operands", jobs=4)
    assert os.times().elapsed - began < 4  # 1 s for all units, 1 s for the link


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (("sources/operands.cu", '#include "rules.cuh"\nint z;\n'), True),
        (("sources/deeper.cuh", "int changed;\n"), True),
        (("cuda/bin/version.txt", "release 13.1"), True),
        (("sources/other.cuh", "int changed;\n"), False),
        (("cutlass/include/cutlass/version.h", "#define CUTLASS_MAJOR 5"), False),
    ],
)
def test_key_holds_what_the_library_depends_on(machine, change, again):
    first = build.library("operands")
    machine.write(*change)
    assert (build.library("operands") != first) == again


def test_key_holds_flags_macros_and_cutlass(machine, monkeypatch):
    paths = [
        build.library("sparse_gemm"),
        build.library("sparse_gemm", {"A": 1}),
        build.library("sparse_gemm", {"A": 2}),
    ]
    machine.write("cutlass/include/cutlass/version.h", "#define CUTLASS_MAJOR 5")
    paths.append(build.library("sparse_gemm"))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-lineinfo"))
    paths.append(build.library("sparse_gemm"))
    assert len(set(paths)) == 5


def in_processes(machine: Machine, count: int) -> list[subprocess.CompletedProcess]:
    """`library("operands")` in as many processes at once."""
    code = f"""
        from pathlib import Path
        from kernels import build
        build.SOURCES = Path({str(machine.sources)!r})
        try:
            print(build.library("operands"))
        except build.KernelsUnavailable as reason:
            print(reason)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
    return [subprocess.CompletedProcess(command, 0, *process.communicate()) for process in running]


def test_processes_compile_once(machine):
    machine.write("cuda/bin/seconds.txt", "1")
    finished = in_processes(machine, 4)
    assert len({process.stdout for process in finished}) == 1
    assert Path(finished[0].stdout.strip()).is_file()
    assert len(machine.calls()) == 2
    assert sum(bool(process.stderr) for process in finished) == 1  # one of them says that it compiles


def test_processes_fail_once(machine):
    machine.write("cuda/bin/version.txt", "broken")
    machine.write("cuda/bin/seconds.txt", "2")  # longer than the processes need to start
    finished = in_processes(machine, 3)
    assert len(machine.calls()) == 1
    assert len({process.stdout for process in finished}) == 1 and 'identifier "wgmma"' in finished[0].stdout


def test_failure_is_one_line_with_the_first_error_and_the_log(machine):
    machine.write("cuda/bin/version.txt", "broken")
    for attempt in (1, 2):  # a later call tries again
        with pytest.raises(build.KernelsUnavailable) as caught:
            build.library("operands")
        assert len(machine.calls()) == attempt
    message = str(caught.value)
    assert "\n" not in message and 'operands.cu(7): error: identifier "wgmma" is undefined' in message
    log = Path(message.rpartition("see ")[2].rstrip(")"))
    assert "this is old" in log.read_text()
    assert not list(machine.cache.glob("*.so")) and not list(machine.cache.glob(".*"))


def test_no_nvcc(machine, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(machine.folder / "nothing"))
    monkeypatch.setenv("PATH", str(machine.folder))
    with pytest.raises(build.KernelsUnavailable, match="^no nvcc: .*CUDA_HOME"):
        build.library("operands")
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    with pytest.raises(build.KernelsUnavailable, match="^CUDACXX=/nowhere/nvcc is no program"):
        build.library("operands")


def test_nvcc_on_path_or_by_name(machine, monkeypatch):
    nvcc = str(machine.cuda / "bin" / "nvcc")
    monkeypatch.setenv("CUDACXX", nvcc)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert build.find_nvcc() == nvcc
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("PATH", os.pathsep.join([os.path.dirname(nvcc), os.environ["PATH"]]))
    assert build.find_nvcc() == nvcc


def test_build_made_elsewhere_serves_a_machine_without_tools(machine, monkeypatch):
    paths = [build.library("operands"), build.library("sparse_gemm")]
    monkeypatch.setenv("CUTLASS_PATH", "/nowhere")
    assert build.library("sparse_gemm") == paths[1]
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert build.library("operands") == paths[0]
    machine.write("sources/operands.cu", "int other;\n")  # but never a build of other sources
    with pytest.raises(build.KernelsUnavailable, match="CUDACXX"):
        build.library("operands")


def test_no_cutlass_headers(machine, monkeypatch):
    monkeypatch.setenv("CUTLASS_PATH", "/nowhere")
    with pytest.raises(build.KernelsUnavailable, match="^no CUTLASS headers: /nowhere/include has no"):
        build.library("sparse_gemm")
    assert build.library("operands").is_file()  # which needs none
    monkeypatch.delenv("CUTLASS_PATH")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.KernelsUnavailable, match="pip install --no-deps -r requirements-cuda.txt"):
        build.library("sparse_gemm")


def test_headers_of_the_pip_package_are_found_without_importing_it(machine, monkeypatch):
    package = machine.folder / "site" / "cutlass_library"
    headers = package / "source" / "include" / "cutlass"
    headers.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (headers / "version.h").write_text("")
    monkeypatch.delenv("CUTLASS_PATH")
    monkeypatch.syspath_prepend(str(package.parent))
    assert build.find_cutlass() == headers.parent


def test_cache_folder(monkeypatch, tmp_path):
    for name in ("SLOPE_KERNEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "slope_bert" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path("/somewhere/slope_bert/kernels")


def test_cache_that_cannot_be_written(machine, monkeypatch):
    machine.write("file", "")
    monkeypatch.setenv("SLOPE_KERNEL_CACHE", str(machine.folder / "file" / "cache"))
    with pytest.raises(build.KernelsUnavailable, match="^cannot write .*file"):
        build.library("operands")


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kernels.build", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_command_prints_the_paths(machine):
    finished = run_command("--jobs", "2")
    assert finished.returncode == 0, finished.stderr
    paths = [Path(line) for line in finished.stdout.splitlines()]
    assert [path.name.split("-")[0] for path in paths] == list(build.LIBRARIES)
    assert all(path.is_file() for path in paths)
    assert run_command("operands").stdout == f"{paths[0]}\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["gemm"], {}, "LIBRARY: must be one of operands, adapters, sparse_gemm, not gemm"),
        (["--jobs", "0"], {}, "--jobs: must be a whole number of at least 1, not 0"),
        ([], {"CUDACXX": "/nowhere/nvcc"}, "CUDACXX=/nowhere/nvcc is no program"),
    ],
)
def test_command_ends_with_2_and_one_line(machine, arguments, environment, line):
    finished = run_command(*arguments, **environment)
    assert finished.returncode == 2
    assert finished.stderr.strip() == f"build.py: error: {line}" and finished.stdout == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH, and this machine has none")
def test_operands_compile_and_refuse_what_they_cannot_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SLOPE_KERNEL_CACHE", str(tmp_path))
    library = ctypes.CDLL(str(build.library("operands")))
    sizes = ctypes.c_int64
    invalid_value = 1
    for out, inp, m in [(64, 8, 4), (8, 64, 4), (64, 64, 2), (64, 64, 12), (64, 48, 32), (0, 64, 4), (1 << 22, 64, 4)]:
        code = library.slope_forward_metadata(None, None, sizes(out), sizes(inp), m, None)
        assert code == invalid_value, (out, inp, m)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH, and this machine has none")
@pytest.mark.parametrize("name", [name for name, library in build.LIBRARIES.items() if not library.needs_cutlass])
def test_compiled_libraries_have_the_functions_that_are_called(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOPE_KERNEL_CACHE", str(tmp_path))
    library = ctypes.CDLL(str(build.library(name)))
    assert all(hasattr(library, function) for function in native._SIGNATURES[name])
