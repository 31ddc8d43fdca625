"""scripts/create_datasets.sh: from a folder of text to shards in one command; wrong input is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from text_factory import contents, make_corpus, read_shards

from data import encode, fetch, format
from data.shard_files import ShardSet
from training.flags import run_door

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "create_datasets.sh"
ENCODE = ["--vocab_size", "400", "--sequence_lengths", "32,48", "--dupe_factor", "2"]


def _run(*flags: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPT), *map(str, flags)]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "files")


@pytest.fixture(scope="module")
def dataset(corpus, tmp_path_factory) -> Path:
    """Made by one command in a folder whose own `data` package must not get in the way."""
    output = tmp_path_factory.mktemp("dataset")
    (output / "data").mkdir()
    (output / "data" / "__init__.py").write_text("raise ImportError('not the data package of this repository')\n")
    done = _run("--output", "out", "--corpus", corpus, "--heldout_fraction", 0.2, "--nproc", 2, *ENCODE, cwd=output)
    assert done.returncode == 0, done.stderr
    for stage in ("format", "vocabulary", "encode"):
        assert any(line.startswith(f"{stage}: ") and " MB/s" in line for line in done.stdout.splitlines())
    return output / "out"


def test_one_command_leads_from_text_to_shards(dataset):
    assert (dataset / "vocab.txt").is_file()
    for phase, length in (("phase1", 32), ("phase2", 48)):
        for split in ("train", "heldout"):
            shards = ShardSet(dataset / phase / split)
            assert shards.sequence_length == length
            assert shards.total > 30
            assert shards.files[0].name == "shard_00000.hdf5"


def test_the_same_command_again_changes_nothing(dataset, corpus):
    before = contents(dataset)
    done = _run("--output", dataset, "--corpus", corpus, "--heldout_fraction", 0.2, *ENCODE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("complete, nothing to do") == 2
    assert contents(dataset) == before


def test_stages_run_alone_and_make_the_same(dataset, corpus, tmp_path):
    for stage, made in (("--download", None), ("--format", "text/summary.json"), ("--encode", "phase2/manifest.json")):
        flags = {"--format": ["--heldout_fraction", 0.2], "--encode": ENCODE}.get(stage, [])
        done = _run("--output", tmp_path / "out", "--corpus", corpus, stage, *flags)
        assert done.returncode == 0, done.stderr
        assert made is None or (tmp_path / "out" / made).is_file()
    assert contents(tmp_path / "out") == contents(dataset)


def test_flags_reach_their_stages(dataset, corpus, tmp_path):
    flags = ["--one_sentence_per_line", "--heldout_fraction", 0, "--cased", "--no_next_sentence", "--premask"]
    more = [
        "--masked_token_fraction",
        0.3,
        "--shard_megabytes",
        0.01,
        "--seed",
        5,
        "--short_seq_prob",
        0,
        "--tokenizer",
        "bpe",
    ]
    done = _run("--output", tmp_path, "--corpus", corpus, *flags, *more, *ENCODE, "--dupe_factor", 1)
    assert done.returncode == 0, done.stderr
    shards = read_shards(tmp_path / "phase1_premasked" / "train")
    assert len(shards) > 1
    assert shards[0]["masked_lm_positions"].shape[1] == 10
    assert "next_sentence_labels" not in shards[0]
    assert not (tmp_path / "phase1_premasked" / "heldout").exists()
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nproc", "2"], "--output is needed"),
        (["--output"], "--output needs a value"),
        (["--output", "out", "--corpora", "demo"], "unknown flag --corpora"),
        (["--output", "out", "--corpus", "demos"], "--corpus demos: give demo, large, a folder that exists"),
        (["--output", "out", "--corpus", "squad"], "it is neither a folder nor a known corpus"),
        (["--output", "out", "--corpus", "t/nowhere", "--download"], "--corpus t/nowhere: give demo, large, wiki_summ"),
        (["--output", "out", "--corpus", "nowhere", "--download"], "it is neither a folder nor a known source"),
        (["--output", "out", "--encode"], "run data.format"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, flags, message):
    done = _run(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sequence_lengths", "4"], "--sequence_lengths: must be whole numbers of at least 8"),
        (["--sequence_lengths", "128,abc"], "--sequence_lengths: must be whole numbers"),
        (["--vocab_size", "3"], "--vocab_size: must be a whole number of at least 300"),
        (["--vocab_file", "nowhere"], "--vocab_file nowhere: no such file"),
        (["--masked_token_fraction", "0.2"], "--masked_token_fraction: has no effect without --premask"),
        (["--heldout_fraction", "2"], "--heldout_fraction: must be a number from 0 to 1"),
    ],
)
def test_a_later_stage_s_mistake_is_found_before_the_first_stage_begins(corpus, tmp_path, flags, message):
    done = _run("--output", "out", "--corpus", corpus, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""  # not even the first stage has spoken
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_the_stages_that_run_are_checked(corpus, tmp_path):
    done = _run("--output", "out", "--corpus", corpus, "--format", "--vocab_size", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_given_vocabulary_has_the_size_that_is_named_beside_it(dataset, corpus, tmp_path):
    entries = (dataset / "vocab.txt").read_text().splitlines()
    vocab_file = tmp_path / "vocab.txt"
    vocab_file.write_text("\n".join([*entries, *(f"[unused{number}]" for number in range(400 - len(entries)))]))
    given = ["--corpus", corpus, "--vocab_file", vocab_file, "--sequence_lengths", 32, "--dupe_factor", 1]
    done = _run("--output", tmp_path / "out", *given, "--vocab_size", 9000)
    assert done.returncode == 2
    assert f"--vocab_size 9000: --vocab_file {vocab_file} has 400 entries: give one of the two" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [vocab_file]
    for flags in ([], ["--vocab_size", 400]):
        done = _run("--output", tmp_path / "out", *given, *flags)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == vocab_file.read_bytes()


@pytest.mark.parametrize("python", ["/nowhere/python", "/dev", "false"])
def test_a_python_that_is_none_is_named(corpus, tmp_path, python):
    command = ["bash", str(SCRIPT), "--output", str(tmp_path / "out"), "--corpus", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": python}, timeout=60)
    assert done.returncode == 2
    assert (
        done.stderr == f"create_datasets.sh: error: PYTHON {python}: is no Python of 3.11 or later: set PYTHON to one\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_utf8_leaves_no_progress_bar_before_the_error(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.txt").write_bytes(b"caf\xe9 words\n")
    done = _run("--output", "out", "--corpus", "files", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1  # a bar's carriage return would part lines, too
    assert "files/a.txt is not UTF-8 text" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_a_file_in_the_place_of_the_output_is_one_line_and_exit_code_2(corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/below"):
        done = _run("--output", output, "--corpus", corpus, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "--output: file is no folder" in done.stderr
        assert contents(tmp_path) == {"file": b"mine"}


def refusal(stage, flags: list[str], monkeypatch, capsys) -> str:
    """The line with which the stage's module, given these flags, ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", [stage.__name__, *flags])
    with pytest.raises(SystemExit) as end:
        run_door(stage.main)
    errors = capsys.readouterr().err
    assert end.value.code == 2
    assert errors.count("\n") == 1
    return errors


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        (fetch, ["squad"], "give --output FOLDER and the names"),
        (fetch, ["--output", "out"], "give --output FOLDER and the names"),
        (format, ["--output", "out", "--corpus", "demo", "--download_dir", "out/download"], "fetch it first"),
        (format, ["--output", "out", "--corpus", "nowhere"], "--corpus nowhere: give demo, large, a folder"),
        (format, ["--output", "out", "--corpus", ".", "--heldout_fraction", "2"], "--heldout_fraction: must be"),
        (encode, ["--input", "in"], "--output"),
        (encode, ["--input", "in", "--output", "out", "--sequence_lengths", "128,x"], "must be whole numbers"),
        (encode, ["--input", "in", "--output", "out", "--sequence_lengths", "4"], "of at least 8"),
        (encode, ["--input", "in", "--output", "out", "--nproc", "0"], "--nproc: must be a whole number of at least 1"),
        (encode, ["--input", "in", "--output", "out", "--tokenizer", "words"], "--tokenizer: invalid choice"),
        (encode, ["--input", "in", "--output", "out", "--vocab_size", "100"], "--vocab_size: must be a whole number"),
        (
            encode,
            ["--input", "in", "--output", "out", "--masked_token_fraction", "0.15"],
            "--masked_token_fraction: has no effect without --premask",
        ),
    ],
)
def test_stages_refuse_wrong_flags_in_one_line(tmp_path, monkeypatch, capsys, stage, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(stage, flags, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        (fetch, ["--output", "file/x", "squad"], "--output: file is no folder"),
        (fetch, ["--output", "file", "folder"], "--output: file is no folder"),
        (fetch, ["--output", "folder", "stsb"], "--output: folder/stsb is no folder"),
        (format, ["--output", "file/x", "--corpus", "folder"], "--output: file is no folder"),
        (format, ["--output", "folder", "--corpus", "folder"], "--output: folder/heldout is no folder"),
        (format, ["--output", "out", "--corpus", "demo", "--download_dir", "file"], "in --download_dir file: fetch it"),
        (encode, ["--input", "folder", "--output", "file"], "--output: file is no folder"),
        (encode, ["--input", "folder", "--output", "folder"], "--output: folder/phase2 is no folder"),
        (encode, ["--input", "file", "--output", "out"], "--input file: holds no (or half a) formatted corpus"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_named_and_stays(tmp_path, monkeypatch, capsys, stage, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("file", "folder/stsb", "folder/heldout", "folder/phase2"):
        Path(name).write_text("mine")
    before = contents(tmp_path)
    assert message in refusal(stage, flags, monkeypatch, capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stage", [fetch, format, encode])
def test_every_stage_explains_itself(monkeypatch, capsys, stage):
    monkeypatch.setattr(sys, "argv", [stage.__name__, "--help"])
    with pytest.raises(SystemExit) as end:
        run_door(stage.main)
    assert end.value.code == 0
    assert "--output" in capsys.readouterr().out
