"""Sentence splitting, readers of corpora, and formatted text: train and held out apart, resumable."""

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_factory import contents

from data import corpora, format
from data.corpora import READERS, Stretch, cut_file, detect_reader, in_split
from data.fetch import RECORD, SOURCES
from data.format import format_corpus
from data.sentences import split_sentences
from data.stages import file_sha256
from training.errors import UsageError


# ----------------------------------------------------------------------------------------------------------- sentences
@pytest.mark.parametrize(
    "sentences",
    [
        ["It rained.", "Nobody came!", "Why?", "Who knows..."],
        ["Dr. Smith met Mr. J. R. R. Tolkien and Mrs. B. Jones.", "They talked."],
        ["Pi is 3.14159, e.g. in Paris.", "It costs $3.50 per vol. 2, No. 5, pp. 7 and Fig. 3."],
        ["He lives in the U.S. Senate building at 5 p.m. sharp.", "She does not."],
        ["He works for Apple Inc.", "The firm grew.", "He left Acme Co. Ltd. Berlin, etc. and so on."],
        ["He moved to the U.S.", "It was cold.", "Born c. 1500 in St. Louis, he died on Jan. 5, 1550."],
        ['"Why?" she asked.', '"Because!"', "He left.", "“So be it.”", "(Applause.)", "Thank you."],
        ["He said “Go.”", "(She went.)", "It ended [at last].", "1990 was a good year.", "$5 was lost."],
        ["1. First point.", "2. Second point."],
        ["The answer is no.", "Ask why.", "It was vitamin C.", "The end"],
        ["彼は来た。", "彼女は去った！", "終わり"],
        ["no full stop at all"],
    ],
)
def test_sentences_end_where_a_reader_would_end_them(sentences):
    wide = any("。" in sentence for sentence in sentences)
    assert split_sentences(("" if wide else " ").join(sentences)) == sentences


@given(st.text(alphabet=" \n.!?…。\"')(abcABC1$é", max_size=80))
def test_splitting_loses_nothing_but_white_space(paragraph):
    sentences = split_sentences(paragraph)
    assert "".join("".join(sentences).split()) == "".join(paragraph.split())
    assert all(sentence == " ".join(sentence.split()) and sentence for sentence in sentences)


# ------------------------------------------------------------------------------------------------------------- readers
def _read(path: Path, reader: str) -> list[list[str]]:
    documents = READERS[reader].read(Stretch(path, 0, path.stat().st_size))
    return [document.paragraphs for document in documents]


def test_plain_text_is_one_document_a_file_with_wrapped_lines_joined(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffA wrapped\r\nsentence. Another.\r\n\r\nNext paragraph.\n".encode())
    format_corpus(str(tmp_path), tmp_path.parent / "plain_out", heldout_fraction=0)
    text = (tmp_path.parent / "plain_out" / "train" / "part_00000.txt").read_text()
    assert text == "A wrapped sentence.\nAnother.\nNext paragraph.\n\n"


def test_one_sentence_per_line_is_taken_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Mr. A. B came. He went\nsecond  line\n \n\nother document\n")
    assert _read(path, "sentences") == [["Mr. A. B came. He went", "second line"], ["other document"]]


WIKI = (
    '<doc id="1" url="u" title="A &amp; B">\nA &amp; B\n\nA &lt;tag&gt; is one. It ends.\nSecond paragraph.\n\n</doc>\n'
    '<doc id="2" url="u" title="C">\nC\n\nC is short.\n</doc>\n'
)


def test_wikiextractor_documents_lose_their_title_line(tmp_path):
    path = tmp_path / "wiki_00"
    path.write_text(WIKI)
    assert detect_reader(path) == "wikiextractor"
    assert _read(path, "wikiextractor") == [["A <tag> is one. It ends.", "Second paragraph."], ["C is short."]]


def test_json_lines_give_their_text(tmp_path):
    path = tmp_path / "wiki_00"
    path.write_text('{"id": "1", "title": "A", "text": "One &amp; two.\\n\\nThree."}\n\n{"text": "Four."}\n')
    assert detect_reader(path) == "json_lines"
    assert _read(path, "json_lines") == [["One & two.", "Three."], ["Four."]]


@pytest.mark.parametrize("text", ["Plain words.", "{curly} words", "<b>html</b>", "a <doc> inside"])
def test_anything_else_is_plain_text(tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert detect_reader(tmp_path / "a") == "plain"


def _write_many(path: Path, reader: str, documents: list[list[str]]) -> None:
    if reader == "sentences":
        path.write_text("\n\n".join("\n".join(sentences) for sentences in documents) + "\n")
    elif reader == "json_lines":
        path.write_text("".join(json.dumps({"text": "\n".join(sentences)}) + "\n" for sentences in documents))
    else:
        bodies = ["\n".join(sentences) for sentences in documents]
        path.write_text("".join(f'<doc id="{i}" title="T{i}">\nT{i}\n\n{b}\n</doc>\n' for i, b in enumerate(bodies)))


@pytest.mark.parametrize("reader", ["sentences", "json_lines", "wikiextractor"])
def test_a_file_cut_into_stretches_holds_each_document_once(tmp_path, reader):
    rng = random.Random(1)
    documents = [[f"Sentence {i} of {d}." for i in range(rng.randint(1, 6))] for d in range(60)]
    path = tmp_path / "file"
    _write_many(path, reader, documents)
    for target in (1, 100, 1000):
        stretches = cut_file(path, READERS[reader].boundary, target)
        assert [s.start for s in stretches[1:]] == [s.end for s in stretches[:-1]]
        assert (stretches[0].start, stretches[-1].end) == (0, path.stat().st_size)
        assert len(stretches) > 3
        content = path.read_bytes()
        assert all(content[s.start - 1 : s.start] == b"\n" != content[s.start : s.start + 1] for s in stretches[1:])
        read = [document.paragraphs for stretch in stretches for document in READERS[reader].read(stretch)]
        assert [paragraphs for paragraphs in read if paragraphs] == documents


@pytest.mark.parametrize("reader", ["plain", "sentences"])
def test_a_huge_document_comes_in_pieces_of_one_split(tmp_path, monkeypatch, reader):
    monkeypatch.setattr(corpora, "_LONGEST_DOCUMENT_BYTES", 200)
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {i} of the book.\n" for i in range(100)))
    pieces = list(READERS[reader].read(Stretch(path, 0, path.stat().st_size)))
    assert len(pieces) > 5
    assert len({piece.key for piece in pieces if piece.paragraphs}) == 1
    assert " ".join(" ".join(piece.paragraphs).replace("\n", " ") for piece in pieces).split()[-1] == "book."


# -------------------------------------------------------------------------------------------------------------- stage
def _write_folder(folder: Path, documents: int = 40, first: int = 0) -> Path:
    for number in range(first, first + documents):
        path = folder / f"{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"Document {number} has a sentence {i}. " for i in range(number % 5 + 1)))
    return folder


def _documents(output: Path, split: str) -> list[str]:
    text = "".join(path.read_text() for path in sorted((output / split).glob("part_*.txt")))
    return [document for document in text.split("\n\n") if document]


@pytest.fixture
def small_parts(monkeypatch):
    """Several parts and processes for a few bytes of text."""
    monkeypatch.setattr(format, "_PART_BYTES", 300)
    monkeypatch.setattr(format, "_BYTES_PER_PROCESS", 1)


def test_each_document_is_in_one_split_and_stays_there(tmp_path, small_parts):
    corpus = _write_folder(tmp_path / "corpus")
    summary = format_corpus(str(corpus), tmp_path / "out", heldout_fraction=0.3)
    train, heldout = (_documents(tmp_path / "out", split) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (summary["train"]["documents"], summary["heldout"]["documents"])
    assert len(train) + len(heldout) == 40
    assert not set(train) & set(heldout)
    assert 3 <= len(heldout) <= 21

    _write_folder(corpus, documents=40, first=40)
    format_corpus(str(corpus), tmp_path / "more", heldout_fraction=0.3)
    assert set(train) < set(_documents(tmp_path / "more", "train"))
    assert set(heldout) < set(_documents(tmp_path / "more", "heldout"))


def test_the_held_out_share_is_the_one_asked_for():
    keys = [f"document {i}" for i in range(20000)]
    for fraction in (0, 0.05, 0.5, 1):
        assert abs(sum(in_split(key, fraction) for key in keys) / len(keys) - fraction) < 0.01
    assert all(in_split(key, 0.5) for key in keys if in_split(key, 0.1))


def test_the_text_does_not_depend_on_the_number_of_processes(tmp_path, small_parts):
    corpus = _write_folder(tmp_path / "corpus")
    for nproc in (1, 2):
        format_corpus(str(corpus), tmp_path / f"out{nproc}", nproc=nproc)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert len(contents(tmp_path / "out1")) > 10


@pytest.mark.parametrize("finished", [False, True])
def test_a_stopped_stage_makes_only_what_is_missing(tmp_path, small_parts, finished):
    corpus = _write_folder(tmp_path / "corpus")
    output = tmp_path / "out"
    format_corpus(str(corpus), output)
    whole = contents(output)
    for path in output.rglob("*.*"):
        os.utime(path, (1, 1))
    if not finished:
        (output / "summary.json").unlink()
    (output / "train" / "part_00001.txt").unlink()
    (output / "train" / "part_00001.txt.tmp").write_text("half a docu")
    format_corpus(str(corpus), output)
    assert contents(output) == whole
    made = {path.name for path in output.rglob("*.*") if path.stat().st_mtime > 1}
    assert made == {"part_00001.txt", "summary.json"}


def test_other_settings_need_a_word(tmp_path):
    corpus = _write_folder(tmp_path / "corpus")
    format_corpus(str(corpus), tmp_path / "out")
    with pytest.raises(UsageError, match=r"other settings \(heldout_fraction 0.05, now 0.2\): give --overwrite"):
        format_corpus(str(corpus), tmp_path / "out", heldout_fraction=0.2)
    _write_folder(corpus, documents=1, first=99)
    with pytest.raises(UsageError, match=r"other settings \(corpus "):
        format_corpus(str(corpus), tmp_path / "out")
    summary = format_corpus(str(corpus), tmp_path / "out", overwrite=True)
    assert summary["train"]["documents"] + summary["heldout"]["documents"] == 41


def test_an_output_of_something_else_is_not_touched(tmp_path):
    corpus = _write_folder(tmp_path / "corpus")
    foreign = tmp_path / "out" / "train" / "part_00007.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(UsageError, match="holds files that this stage did not make"):
        format_corpus(str(corpus), tmp_path / "out")
    assert foreign.read_text() == "mine"


def _fetched(folder: Path, source: str, files: dict[str, str]) -> None:
    """The files of a source as data.fetch leaves them."""
    for name, content in files.items():
        (folder / source).mkdir(parents=True, exist_ok=True)
        (folder / source / name).write_text(content)
    hashes = {name: file_sha256(folder / source / name) for name in files}
    record = {"package_sha256": SOURCES[source].package.sha256, "files": hashes}
    (folder / source / RECORD).write_text(json.dumps(record))


def test_the_named_corpora_are_read_and_questions_and_dev_articles_left_out(tmp_path):
    download = tmp_path / "download"
    summaries = {"A": {"title": "A", "extract": "A is one. It is."}, "B": {"title": "B", "extract": "B is two."}}
    _fetched(download, "wiki_summaries", {"summaries_en-us.json": json.dumps(summaries)})
    format_corpus("demo", tmp_path / "demo", download_dir=download, heldout_fraction=0)
    assert _documents(tmp_path / "demo", "train") == ["A is one.\nIt is.", "B is two."]

    with pytest.raises(UsageError, match="--corpus large: squad is not"):
        format_corpus("large", tmp_path / "large", download_dir=download)
    article = {
        "title": "C",
        "paragraphs": [{"context": "C one. C two.", "qas": [{"question": "Q?"}]}, {"context": "E."}],
    }
    dev = {"data": [{"title": "D", "paragraphs": [{"context": "Unseen."}]}]}
    squad = {"train-v1.1.json": json.dumps({"data": [article]}), "dev-v1.1.json": json.dumps(dev)}
    _fetched(download, "squad", squad)
    _fetched(download, "sotu", {"1790_x.txt": "Fellow citizens. I speak."})
    format_corpus("large", tmp_path / "large", download_dir=download, heldout_fraction=0)
    expected = ["A is one.\nIt is.", "B is two.", "C one.\nC two.\nE.", "Fellow citizens.\nI speak."]
    assert _documents(tmp_path / "large", "train") == expected


def test_an_s3_corpus_is_read_from_its_local_copy(tmp_path, monkeypatch):
    corpus = _write_folder(tmp_path / "copy")
    monkeypatch.setattr("data.storage.local_copy", {"s3://bucket/text": corpus}.__getitem__)
    format_corpus("s3://bucket/text", tmp_path / "out", heldout_fraction=0)
    assert len(_documents(tmp_path / "out", "train")) == 40


# ----------------------------------------------------------------------------------------------------------- bad input
def _bad_corpus(folder: Path, kind: str) -> str:
    folder.mkdir()
    if kind == "blank files":
        (folder / "a.txt").write_text(" \n\n")
    elif kind == "only hidden files":
        (folder / ".a.txt").write_text("Words.")
    elif kind == "not UTF-8":
        (folder / "a.txt").write_text("Words.")
        (folder / "b.gz").write_bytes(b"\x1f\x8b\x08\xff\xff words")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("blank files", "there is no text in its 1 files"),
        ("only hidden files", "the folder holds no files"),
        ("not UTF-8", r"b\.gz is not UTF-8 text .*unpack archives"),
    ],
)
def test_a_folder_without_text_is_refused_and_nothing_is_written(tmp_path, kind, message):
    corpus = _bad_corpus(tmp_path / "corpus", kind)
    with pytest.raises(UsageError, match=message) as error:
        format_corpus(corpus, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("corpus", ["demos", "/nowhere/at/all"])
def test_an_unknown_corpus_is_refused(tmp_path, corpus):
    with pytest.raises(UsageError, match=f"--corpus {corpus}: give demo, large, a folder that exists"):
        format_corpus(corpus, tmp_path / "out")


def test_a_named_corpus_must_be_fetched_first(tmp_path):
    with pytest.raises(UsageError, match="fetch it first"):
        format_corpus("demo", tmp_path / "out", download_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_output_may_not_lie_in_the_corpus(tmp_path):
    corpus = _write_folder(tmp_path / "corpus")
    with pytest.raises(UsageError, match="lies inside"):
        format_corpus(str(corpus), corpus / "out")


def test_text_that_is_all_held_out_leaves_nothing_behind(tmp_path):
    corpus = _write_folder(tmp_path / "corpus")
    with pytest.raises(UsageError, match=r"no document is left to train on \(40 held out\)"):
        format_corpus(str(corpus), tmp_path / "out", heldout_fraction=1)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"title": "no text"}\n', 'no JSON object with a "text"'), (WIKI[:-8], "ends inside a <doc>")],
)
def test_a_malformed_file_is_named(tmp_path, content, message):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "wiki_00").write_text(content)
    with pytest.raises(UsageError, match=message):
        format_corpus(str(tmp_path / "corpus"), tmp_path / "out")
    assert set(contents(tmp_path / "out")) <= {"manifest.json"}


def test_a_folder_that_has_a_corpus_name_does_not_hide_the_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    monkeypatch.setattr(format, "find_files", lambda *_: [])  # that it lies inside the folder must not be what is wrong
    with pytest.raises(UsageError, match="there is no text in its 0 files"):
        format_corpus("demo", tmp_path / "demo" / "data" / "text")
