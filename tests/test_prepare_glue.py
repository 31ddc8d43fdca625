"""Data of the registries' packages as GLUE's files: the real STS-B, and sets in the shape of SST-2 and QNLI."""

import bz2
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from text_factory import contents

from data.glue import TASKS, read_examples
from data.prepare_glue import describe, main, write_answerability, write_sentiment, write_stsb
from training.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]

STSB_HEADER = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()


def tsv(*rows: list[str]) -> bytes:
    return "".join("\t".join(row) + "\n" for row in rows).encode()


def test_stsb_of_the_package_becomes_glue_s_own_layout(tmp_path):
    rows = [[*"abcd", "5.000", 'He said "x.', "y"], [*"abcd", "0.2", "v", "w", "s", "t"]]
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "dev", "test"):
        (source / f"sts-{split}.csv").write_bytes(tsv(*rows))
    write_stsb(source, tmp_path / "STS-B")
    task = TASKS["STS-B"]
    for split in ("train", "dev", "test"):
        assert read_examples(task, tmp_path / "STS-B", split) == read_examples(task, source, split)
    lines = (tmp_path / "STS-B" / "dev.tsv").read_text().split("\n")
    assert lines[0].split("\t") == STSB_HEADER
    assert lines[2].split("\t") == [*"1abcdst", "v", "w", "0.2"]
    test_lines = (tmp_path / "STS-B" / "test.tsv").read_text().splitlines()
    assert test_lines[0].split("\t") == STSB_HEADER[:-1]
    assert [line.split("\t")[-1] for line in test_lines[1:]] == ["y", "w"]  # GLUE's test split has no scores


def reviews_csv(rows: list[tuple[str, str, str]]) -> bytes:
    lines = [f'{kind},"{text}",{film},True' for kind, text, film in rows]
    return bz2.compress("\r\n".join(["category,text,movie_name,has_plot_and_reviews", *lines]).encode())


def test_reviews_are_split_by_film_without_plots_and_duplicates(tmp_path):
    rows = [
        (("fresh", "rotten")[n % 2], f"Review {n}, film {film}.", film)
        for film in map(str, range(60))
        for n in range(4)
    ]
    rows += [
        ("plot", "A plot.", "1"),
        ("fresh", "Review  0,\nFILM 1.", "2"),
        ("rotten", 'Two\nlines, a ""quote"".', "3"),
    ]
    source = tmp_path / "source"
    source.mkdir()
    (source / "rotten_tomatoes_corpus_full.csv.bz2").write_bytes(reviews_csv(rows))
    write_sentiment(source, tmp_path / "out")
    task = TASKS["SST-2-shaped"]
    read = {split: read_examples(task, tmp_path / "out", split) for split in ("train", "dev")}
    texts = {split: [example.sentence1 for example in examples] for split, examples in read.items()}
    films = {split: {text.rpartition(" ")[2] for text in texts[split] if "film" in text} for split in texts}
    assert films["dev"]
    assert not films["train"] & films["dev"]
    assert len(films["train"]) > 4 * len(films["dev"])
    both = texts["train"] + texts["dev"]
    assert len(both) == len(set(both)) == 241
    assert 'Two lines, a "quote".' in both
    assert {example.label for example in read["train"]} == {0, 1}
    fresh = [example for examples in read.values() for example in examples if example.sentence1 == "Review 0, film 7."]
    assert [task.labels[example.label] for example in fresh] == ["1"]
    before = (tmp_path / "out" / "train.tsv").read_bytes()
    write_sentiment(source, tmp_path / "out")
    assert (tmp_path / "out" / "train.tsv").read_bytes() == before
    assert "SST-2-shaped: train" in describe("SST-2-shaped", tmp_path / "out")


CONTEXT = "Ada wrote notes in 1843.  The notes were long. They\nwere on Babbage's engine. Dr. Smith read them in 1843."


def squad(*questions: tuple[str, str, str]) -> bytes:
    """Questions as (id, question, answer)."""
    qas = [
        {"id": key, "question": question, "answers": [{"text": answer, "answer_start": CONTEXT.index(answer)}]}
        for key, question, answer in questions
    ]
    return json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}).encode()


def test_questions_meet_the_sentence_that_holds_their_answer_or_the_closest_other(tmp_path):
    many = [(str(n), "Whose engine were the\tnotes on?", "Babbage's") for n in range(200)]
    over_the_end = ("x", "What is that?", "1843.  The notes")
    twice = [(f"y{n}", "When did Ada write and Dr. Smith read?", "1843") for n in range(50)]
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "dev"):
        (source / f"{split}-v1.1.json").write_bytes(squad(*many, over_the_end, *twice))
    write_answerability(source, tmp_path / "out")
    examples = read_examples(TASKS["QNLI-shaped"], tmp_path / "out", "train")
    assert len(examples) == 250
    assert {(example.sentence2, example.label) for example in examples[:200]} == {
        ("They were on Babbage's engine.", 0),
        ("The notes were long.", 1),
    }
    assert examples[0].sentence1 == "Whose engine were the notes on?"
    assert 70 < sum(example.label for example in examples[:200]) < 130
    # "Dr. Smith ... 1843." holds the answer's text, so it is no example of a sentence without it.
    assert {example.sentence2 for example in examples[200:]} == {
        "Ada wrote notes in 1843.",
        "The notes were long.",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sts-b"], "--output: must be given"),
        (["--output", "out", "squad"], "names squad: no such task"),
        (["--output", "out", "sts-b", "cola"], "CoLA: no package holds it, take it from GLUE"),
    ],
)
def test_preparing_what_is_not_there_is_one_line_and_exit_code_2(tmp_path, arguments, said):
    command = [sys.executable, "-m", "data.prepare_glue", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--output", "file"], "--output: file is no folder"),
        (["--output", "folder"], "--output: folder/STS-B is no folder"),
        (["--output", "out", "--download_dir", "file/x"], "--download_dir: file is no folder"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named_before_anything_is_fetched(tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("file", "folder/STS-B"):
        Path(name).write_text("mine")
    monkeypatch.setattr("data.prepare_glue.fetch_source", lambda *_: pytest.fail("a source was fetched"))
    monkeypatch.setattr(sys, "argv", ["prepare_glue", *flags, "sts-b"])
    with pytest.raises(UsageError, match=f"^{said}: give a folder"):
        main()
    assert contents(tmp_path) == {"file": b"mine", "folder/STS-B": b"mine"}
