"""Format text corpora: one sentence a line, a blank line after each document, train and held-out documents apart.

Read are the named corpora (`demo`, `large`, as data.fetch left them) and folders of your own UTF-8 text. In a folder
each file is taken for what its content says: wikiextractor's <doc ...> ... </doc>; JSON lines with the document in
"text" (wikiextractor --json, Hugging Face datasets' to_json); else plain text, one document a file, blank lines
between paragraphs. With --one_sentence_per_line every file is text that is formatted already: one sentence a line, a
blank line between documents. Hidden files are passed over.

Written are OUTPUT/train/part_*.txt, OUTPUT/heldout/part_*.txt and OUTPUT/summary.json. A document is held out or not by
a hash of its text, whatever else the corpus holds. A stage that was stopped goes on where it was.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data.corpora import NAMED_FILES, READERS, Stretch, cut_file, detect_reader, in_split
from data.fetch import CORPORA, is_complete
from data.sentences import split_sentences
from data.stages import (
    READING_BYTES_PER_PROCESS,
    Stopwatch,
    atomic_path,
    check_folders,
    claim_outputs,
    fingerprint,
    read_manifest,
    run_tasks,
    write_atomic,
)
from training.errors import UsageError

SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
SUMMARY = "summary.json"
FORMAT_VERSION = 1

_PART_BYTES = 4 << 20
_FILES_PER_INSPECTION = 64
_BLOCK_BYTES = 1 << 20
_BYTES_PER_PROCESS = 8_000_000


class CorpusFile(NamedTuple):
    """A file of the corpus and how to read it."""

    path: Path
    name: str
    """Path relative to the corpus."""
    reader: str
    """A key of READERS, or "" to go by the content."""


class Inspected(NamedTuple):
    """What a first look at a file found."""

    name: str
    reader: str
    sha256: str
    has_text: bool
    stretches: list[Stretch]


class PartTask(NamedTuple):
    """One part of the output, and what it is made from."""

    paths: tuple[Path, Path]
    """The part's file in each of SPLITS."""
    stretches: list[tuple[str, Stretch]]
    """Reader and stretch."""
    heldout_fraction: float


# ------------------------------------------------------------------------------------------------------------ planning
def find_files(corpus: str, download_dir: Path | None, one_sentence_per_line: bool) -> list[CorpusFile]:
    """The files of a corpus, in the order of their names.

    Args:
        corpus: a key of CORPORA, a folder or an `s3://` address.
        download_dir: where data.fetch put the sources of the named corpora.

    Raises:
        UsageError: no such corpus, not fetched yet, or no files in it.
    """
    check_corpus(corpus)
    if corpus in CORPORA:
        return _find_named_files(corpus, download_dir)
    folder = _local_folder(corpus)
    names = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not names:
        raise UsageError(f"--corpus {corpus}: the folder holds no files")
    reader = "sentences" if one_sentence_per_line else ""
    return [CorpusFile(folder / name, name.as_posix(), reader) for name in names]


def _find_named_files(corpus: str, download_dir: Path | None) -> list[CorpusFile]:
    files = []
    for source in CORPORA[corpus]:
        if download_dir is None or not is_complete(source, download_dir / source):
            raise UsageError(
                f"--corpus {corpus}: {source} is not (or not wholly) in --download_dir {download_dir}: fetch it first "
                f"(python -m data.fetch --output {download_dir or 'FOLDER'} {corpus})"
            )
        pattern, reader = NAMED_FILES[source]
        paths = sorted((download_dir / source).glob(pattern))
        files.extend(CorpusFile(path, f"{source}/{path.name}", reader) for path in paths)
    return files


def check_corpus(corpus: str) -> None:
    """Refuse what cannot be a corpus, fetched or not.

    Raises:
        UsageError: it is no key of CORPORA, no folder and no `s3://` address.
    """
    if corpus not in CORPORA and not corpus.startswith("s3://") and not Path(corpus).is_dir():
        raise UsageError(
            f"--corpus {corpus}: give {', '.join(CORPORA)}, a folder that exists or an s3:// address; it is neither a "
            "folder nor a known corpus"
        )


def _local_folder(corpus: str) -> Path:
    if corpus.startswith("s3://"):
        from data.storage import local_copy

        return local_copy(corpus)
    return Path(corpus)


def inspect_files(files: Sequence[CorpusFile]) -> list[Inspected]:
    """Read files once: hash them, see that they are UTF-8 text, and cut them where documents begin."""
    inspected = []
    for file in files:
        sha256, has_text = _check_text(file.path)
        reader = file.reader or detect_reader(file.path)
        stretches = cut_file(file.path, READERS[reader].boundary, _PART_BYTES)
        inspected.append(Inspected(file.name, reader, sha256, has_text, stretches))
    return inspected


def _check_text(path: Path) -> tuple[str, bool]:
    """The sha256 of a file, and whether it holds anything but white space."""
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    has_text = False
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                decoder.decode(block)
                has_text = has_text or bool(block.strip())
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text ({error.reason}): unpack archives, convert other encodings, or take it out"
        ) from error
    return digest.hexdigest(), has_text


def plan_parts(inspected: Sequence[Inspected], output: Path, heldout_fraction: float) -> list[PartTask]:
    """Gather stretches, in order, into parts of about 4 MB of input."""
    parts, part, size = [], [], 0
    for file in inspected:
        for stretch in file.stretches:
            part.append((file.reader, stretch))
            size += stretch.end - stretch.start
            if size >= _PART_BYTES:
                parts.append(part)
                part, size = [], 0
    if part:
        parts.append(part)
    return [
        PartTask(tuple(output / split / f"part_{index:05d}.txt" for split in SPLITS), stretches, heldout_fraction)
        for index, stretches in enumerate(parts)
    ]


# ---------------------------------------------------------------------------------------------------------- formatting
def format_part(task: PartTask) -> None:
    """Write one part, unless it is there. The train file comes last, so where it is the part is whole."""
    train, heldout = task.paths
    if train.is_file() and heldout.is_file():
        return
    with (
        atomic_path(train) as train_path,
        atomic_path(heldout) as heldout_path,
        _open_text(train_path) as train_file,
        _open_text(heldout_path) as heldout_file,
    ):
        for reader, stretch in task.stretches:
            for key, sentences in _sentences_by_document(reader, stretch):
                file = heldout_file if in_split(key, task.heldout_fraction) else train_file
                file.write("\n".join(sentences) + "\n\n")


def _open_text(path: Path):
    # JSON can spell half a surrogate pair, which UTF-8 cannot hold: it becomes a question mark.
    return path.open("w", encoding="utf-8", errors="replace", newline="\n")


def _sentences_by_document(reader_name: str, stretch: Stretch) -> Iterator[tuple[str, list[str]]]:
    reader = READERS[reader_name]
    for document in reader.read(stretch):
        sentences = document.paragraphs
        if not reader.one_sentence_per_line:
            sentences = [sentence for paragraph in document.paragraphs for sentence in split_sentences(paragraph)]
        if sentences:
            yield document.key, sentences


def summarize(output: Path) -> dict[str, dict[str, int]]:
    """Documents, sentences and bytes of each split, counted in the files."""
    summary = {}
    for split in SPLITS:
        documents = lines = size = 0
        for path in sorted((output / split).glob("part_*.txt")):
            content = path.read_bytes()
            documents += content.count(b"\n\n")
            lines += content.count(b"\n")
            size += len(content)
        summary[split] = {"documents": documents, "sentences": lines - documents, "bytes": size}
    return summary


def format_corpus(
    corpus: str,
    output: Path,
    *,
    download_dir: Path | None = None,
    one_sentence_per_line: bool = False,
    heldout_fraction: float = 0.05,
    nproc: int = 1,
    overwrite: bool = False,
) -> dict[str, dict[str, int]]:
    """Format a corpus into `output`; see the module's text. Returns what `summarize` does.

    Raises:
        UsageError: no such corpus, no text in it, text that is not UTF-8, or an output of other settings.
    """
    watch = Stopwatch("format", nproc)
    files = find_files(corpus, download_dir, one_sentence_per_line)
    is_folder = corpus not in CORPORA and Path(corpus).is_dir()  # ./demo for a folder that has a corpus's name
    if is_folder and output.resolve().is_relative_to(Path(corpus).resolve()):
        raise UsageError(f"--output {output} lies inside --corpus {corpus}: give a folder outside it")
    inspected = _inspect(files, nproc)
    if not any(file.has_text for file in inspected):
        raise UsageError(f"--corpus {corpus}: there is no text in its {len(files)} files")

    settings = {
        "format_version": FORMAT_VERSION,
        "corpus": fingerprint((file.name, file.reader, file.sha256) for file in inspected),
        "heldout_fraction": heldout_fraction,
    }
    claim_outputs(output / MANIFEST, settings, _existing_outputs(output), overwrite)
    tasks = plan_parts(inspected, output, heldout_fraction)
    summary = read_manifest(output / SUMMARY)
    if summary is not None and all(path.is_file() for task in tasks for path in task.paths):
        print(f"format: {output} is complete, nothing to do", flush=True)
        return summary
    sizes = [sum(stretch.end - stretch.start for _, stretch in task.stretches) for task in tasks]
    run_tasks(format_part, tasks, sizes, nproc, "formatting", _BYTES_PER_PROCESS)
    summary = _finish(corpus, output)
    documents = " + ".join(f"{summary[split]['documents']:,} {split}" for split in SPLITS)
    watch.report(sum(sizes), f"{documents} documents in {output}")
    return summary


def _inspect(files: Sequence[CorpusFile], nproc: int) -> list[Inspected]:
    batches = [files[start : start + _FILES_PER_INSPECTION] for start in range(0, len(files), _FILES_PER_INSPECTION)]
    sizes = [sum(file.path.stat().st_size for file in batch) for batch in batches]
    checked = run_tasks(inspect_files, batches, sizes, nproc, "checking text", READING_BYTES_PER_PROCESS)
    return [file for batch in checked for file in batch]


def _finish(corpus: str, output: Path) -> dict[str, dict[str, int]]:
    """Write the summary that says that the text is whole; text with nothing to train on is removed instead."""
    summary = summarize(output)
    if summary["train"]["documents"] == 0:
        for path in [*_existing_outputs(output), output / MANIFEST]:
            path.unlink()
        raise UsageError(
            f"--corpus {corpus}: no document is left to train on ({summary['heldout']['documents']} held out): "
            "give more text or a smaller --heldout_fraction"
        )
    write_atomic(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def _existing_outputs(output: Path) -> list[Path]:
    parts = [path for split in SPLITS for path in sorted((output / split).glob("part_*.txt"))]
    summary = output / SUMMARY
    return [*parts, summary] if summary.is_file() else parts


# ---------------------------------------------------------------------------------------------------------------- main
def main() -> None:
    from argparse import RawDescriptionHelpFormatter

    from training.flags import Parser, add_switch, real, whole

    parser = Parser(prog="data.format", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help=f"{', '.join(CORPORA)}, a folder of text, or an s3:// address")
    parser.add_argument("--output", type=Path, required=True, help="folder for the formatted text")
    parser.add_argument("--download_dir", type=Path, help="where data.fetch put the sources of a named corpus")
    add_switch(parser, "--one_sentence_per_line", "the folder's text is one sentence a line, a blank line a document")
    parser.add_argument(
        "--heldout_fraction", type=real(0, 1), default=0.05, help="share of documents held out (default 0.05)"
    )
    parser.add_argument("--nproc", type=whole(1), default=1, help="processes (default 1)")
    add_switch(parser, "--overwrite", "replace text that was formatted with other settings")
    add_switch(parser, "--check", "end in silence where these flags do, in an error where they do not; write nothing")
    args = parser.parse_args()
    check_corpus(args.corpus)
    check_folders("--output", *(args.output / split for split in SPLITS))
    if not args.check:
        rest = {name: value for name, value in vars(args).items() if name not in ("corpus", "output", "check")}
        format_corpus(args.corpus, args.output, **rest)


if __name__ == "__main__":
    from training.flags import run_door

    run_door(main)
