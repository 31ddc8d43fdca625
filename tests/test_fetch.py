"""Fetching sources from package registries: verified, whole or not at all, errors in one line. No network is used."""

import base64
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from data import fetch
from data.fetch import CORPORA, RECORD, SOURCES, Package, Source, fetch_source, is_complete, resolve
from training.errors import UsageError

TEXT = b"Some words.\nMore words.\n"


def _write_wheel(folder: Path) -> Path:
    """A wheel of the package `tiny-words` 1.0, as pip accepts it."""
    files = {
        "tiny_words/data/words.txt": TEXT,
        "tiny_words/data/other.bin": b"not wanted",
        "tiny_words-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-words\nVersion: 1.0\n",
        "tiny_words-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files["tiny_words-1.0.dist-info/RECORD"] = record.encode()
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_words-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def _use_pip_folder(monkeypatch, folder: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def pip_source(tmp_path, monkeypatch) -> str:
    wheel = _write_wheel(tmp_path / "index")
    _use_pip_folder(monkeypatch, wheel.parent)
    package = Package("pip", "tiny-words", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), 0.1)
    monkeypatch.setitem(SOURCES, "tiny", Source(package, ("tiny_words/data/*.txt",), "two sentences", "CC0 1.0"))
    return "tiny"


@pytest.fixture
def npm_source(tmp_path, monkeypatch) -> str:
    archive = tmp_path / "words-2.0.tgz"
    with tarfile.open(archive, "w:gz") as tarball:
        info = tarfile.TarInfo("package/data/words.txt")
        info.size = len(TEXT)
        tarball.addfile(info, io.BytesIO(TEXT))
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1 $4" = "pack @some/words@2.0" ] && cp "{archive}" "$3/"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    package = Package("npm", "@some/words", "2.0", hashlib.sha256(archive.read_bytes()).hexdigest(), 0.1)
    monkeypatch.setitem(SOURCES, "tiny_npm", Source(package, ("package/data/*.txt",), "two sentences", "CC0 1.0"))
    return "tiny_npm"


def test_a_source_is_fetched_verified_and_its_licence_said(pip_source, tmp_path, capfd):
    folder = fetch_source(pip_source, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"words.txt", RECORD}
    assert (folder / "words.txt").read_bytes() == TEXT
    record = json.loads((folder / RECORD).read_text())
    assert record["licence"] == "CC0 1.0"
    assert record["files"] == {"words.txt": hashlib.sha256(TEXT).hexdigest()}
    assert "Licence: CC0 1.0" in capfd.readouterr().out


def test_what_is_there_is_not_fetched_again(pip_source, tmp_path, monkeypatch):
    folder = fetch_source(pip_source, tmp_path / "out")
    _use_pip_folder(monkeypatch, tmp_path / "nowhere")
    assert fetch_source(pip_source, tmp_path / "out") == folder


@pytest.mark.parametrize("damage", ["change", "remove", "no record"])
def test_what_is_damaged_is_fetched_again(pip_source, tmp_path, damage):
    folder = fetch_source(pip_source, tmp_path / "out")
    if damage == "change":
        (folder / "words.txt").write_bytes(TEXT[:-1])
    else:
        (folder / ("words.txt" if damage == "remove" else RECORD)).unlink()
    assert not is_complete(pip_source, folder)
    fetch_source(pip_source, tmp_path / "out")
    assert (folder / "words.txt").read_bytes() == TEXT
    assert is_complete(pip_source, folder)


def test_another_archive_than_the_expected_one_is_refused(pip_source, tmp_path):
    with (tmp_path / "index" / "tiny_words-1.0-py3-none-any.whl").open("ab") as wheel:
        wheel.write(b"x")
    with pytest.raises(UsageError, match=r"tiny-words 1\.0 .*has sha256 .*clear the cache") as error:
        fetch_source(pip_source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_failed_download_is_one_line_that_names_the_package(pip_source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    _use_pip_folder(monkeypatch, tmp_path / "empty")
    with pytest.raises(UsageError, match=r"pip could not download tiny-words 1\.0 .*check the network") as error:
        fetch_source(pip_source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_npm_archives_are_read_too(npm_source, tmp_path):
    folder = fetch_source(npm_source, tmp_path / "out")
    assert (folder / "words.txt").read_bytes() == TEXT


def test_a_missing_client_is_named(npm_source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"@some/words 2\.0 comes through npm, which is not installed"):
        fetch_source(npm_source, tmp_path / "out")


def test_words_name_sources_corpora_and_own_text(tmp_path):
    assert resolve(["large", "squad", "stsb"]) == [*CORPORA["large"], "stsb"]
    assert resolve([str(tmp_path), "s3://bucket/text"]) == []
    with pytest.raises(UsageError, match="unknown source wikipedia: give demo, large"):
        resolve(["wikipedia"])


def test_every_source_is_pinned_and_has_a_licence():
    for name, source in SOURCES.items():
        assert re.fullmatch("[0-9a-f]{64}", source.package.sha256), name
        assert source.package.registry in fetch.CLIENTS, name
        assert source.licence, name
    assert {name for names in CORPORA.values() for name in names} <= SOURCES.keys()
