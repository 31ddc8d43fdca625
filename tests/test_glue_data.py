"""GLUE's files as they are published, its table of tasks, and its submission format."""

from pathlib import Path

import numpy as np
import pytest

from data.glue import (
    TASKS,
    Example,
    baseline,
    decide,
    find_file,
    get_task,
    labels_array,
    read_examples,
    score,
    write_predictions,
)
from training.errors import UsageError

STSB_HEADER = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()
MNLI_HEADER = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse".split()
MNLI_HEADER += ["sentence2_parse", "sentence1", "sentence2"]
MRPC_HEADER = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
QQP_HEADER = "id qid1 qid2 question1 question2 is_duplicate".split()
INDEXED_PAIR = ["index", "sentence1", "sentence2", "label"]


def tsv(*rows: list[str], end: str = "\n") -> bytes:
    return "".join("\t".join(row) + end for row in rows).encode()


def write(folder: Path, **files: bytes) -> Path:
    """Files named as `train_tsv`: an underscore before the suffix stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_bytes(content)
    return folder


# Task, split, file, its rows, and the example that the second row is.
PUBLISHED = [
    (
        "CoLA",
        "train",
        "train.tsv",
        [["gj04", "1", "", "Fine."], ["gj04", "0", "*", 'Say "so.']],
        ("1", 'Say "so.', None, 0),
    ),
    ("CoLA", "dev", "dev.tsv", [["gj04", "1", "", "Fine."], ["gj04", "0", "*", "Not."]], ("1", "Not.", None, 0)),
    ("CoLA", "test", "test.tsv", [["index", "sentence"], ["0", "a"], ["1", "Which?"]], ("1", "Which?", None, None)),
    (
        "SST-2",
        "train",
        "train.tsv",
        [["sentence", "label"], ["a ", "1"], ["bad film ", "0"]],
        ("1", "bad film ", None, 0),
    ),
    ("SST-2", "test", "test.tsv", [["index", "sentence"], ["0", "a"], ["1", "b"]], ("1", "b", None, None)),
    ("MRPC", "dev", "dev.tsv", [MRPC_HEADER, ["0", "8", "9", "a", "b"], ["1", "3", "4", "c", "d"]], ("1", "c", "d", 1)),
    (
        "MRPC",
        "test",
        "test.tsv",
        [["index", *MRPC_HEADER[1:]], ["0", "8", "9", "a", "b"], ["1", "3", "4", "c", "d"]],
        ("1", "c", "d", None),
    ),
    (
        "STS-B",
        "train",
        "train.tsv",
        [STSB_HEADER, [*"0abcdef", "x", "y", "5.000"], [*"1abcdef", "x", "z", "2.25"]],
        ("1", "x", "z", 2.25),
    ),
    (
        "STS-B",
        "test",
        "test.tsv",
        [STSB_HEADER[:-1], [*"0abcdef", "x", "y"], [*"1abcdef", "x", "z"]],
        ("1", "x", "z", None),
    ),
    (
        "STS-B",
        "dev",
        "sts-dev.csv",
        [[*"abcd", "5.000", "x", "y"], [*"abcd", "0", "v", "w", "s", "t"]],
        ("1", "v", "w", 0.0),
    ),
    ("STS-B", "test", "sts-test.csv", [[*"abcd", "5.000", "x", "y"], [*"abcd", "1", "v", "w"]], ("1", "v", "w", None)),
    ("QQP", "train", "train.tsv", [QQP_HEADER, [*"123", "a?", "b?", "1"], [*"456", "c?", "", "0"]], ("4", "c?", "", 0)),
    ("QQP", "test", "test.tsv", [["id", "question1", "question2"], [*"0ab"], [*"1cd"]], ("1", "c", "d", None)),
    (
        "MNLI",
        "train",
        "train.tsv",
        [
            [*MNLI_HEADER, "label1", "gold_label"],
            [*"0bcdefgh", "p", "q", "neutral", "neutral"],
            [*"1bcdefgh", "r", "s", "neutral", "contradiction"],
        ],
        ("1", "r", "s", 0),
    ),
    (
        "MNLI",
        "dev_mismatched",
        "dev_mismatched.tsv",
        [
            [*MNLI_HEADER, *(f"label{n}" for n in range(1, 6)), "gold_label"],
            [*"0bcdefgh", "p", "q", *["neutral"] * 5, "neutral"],
            [*"1bcdefgh", "r", "s", *["neutral"] * 5, "entailment"],
        ],
        ("1", "r", "s", 1),
    ),
    (
        "MNLI-mm",
        "test_mismatched",
        "test_mismatched.tsv",
        [MNLI_HEADER, [*"0bcdefgh", "p", "q"], [*"1bcdefgh", "r", "s"]],
        ("1", "r", "s", None),
    ),
    (
        "QNLI",
        "dev",
        "dev.tsv",
        [["index", "question", "sentence", "label"], [*"0ab", "entailment"], [*"7cd", "not_entailment"]],
        ("7", "c", "d", 1),
    ),
    ("RTE", "dev", "dev.tsv", [INDEXED_PAIR, [*"0ab", "entailment"], [*"1cd", "entailment"]], ("1", "c", "d", 0)),
    ("WNLI", "train", "train.tsv", [INDEXED_PAIR, [*"0ab", "1"], [*"1cd", "0"]], ("1", "c", "d", 0)),
]


# --------------------------------------------------------------------------------------------------------------- table
@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("sts-b", "STS-B"),
        ("stsb", "STS-B"),
        ("STS_B", "STS-B"),
        ("cola", "CoLA"),
        ("sst2", "SST-2"),
        ("mnli-mm", "MNLI-mm"),
        ("MNLI", "MNLI"),
        ("sst-2-shaped", "SST-2-shaped"),
    ],
)
def test_task_names_have_no_case_and_no_punctuation(given, name):
    assert get_task(given).name == name


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="--task_name squad: no such task; it must be one of CoLA, SST-2, MRPC"):
        get_task("squad")


def test_the_table_has_glue_s_tasks_with_its_metrics_and_file_names():
    files = {name for task in TASKS.values() for name in task.submissions.values()}
    named = "CoLA SST-2 MRPC STS-B QQP MNLI-m MNLI-mm QNLI RTE WNLI SST-2-shaped QNLI-shaped"
    assert files == {f"{name}.tsv" for name in named.split()}
    official = {
        "CoLA": {"matthews_correlation"},
        "MRPC": {"f1", "accuracy"},
        "QQP": {"f1", "accuracy"},
        "STS-B": {"pearson", "spearman"},
    }
    for name, task in TASKS.items():
        assert set(task.metrics) == official.get(name, {"accuracy"})
    assert get_task("mnli").num_labels == 3
    assert get_task("sts-b").num_labels == 1
    assert get_task("sts-b").regression
    counted = [name for name, task in TASKS.items() if task.mean_metrics]
    assert counted == ["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE"]


# ------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize(("name", "split", "file", "rows", "second"), PUBLISHED)
def test_published_files_are_read(tmp_path, name, split, file, rows, second):
    (tmp_path / file).write_bytes(tsv(*rows))
    examples = read_examples(TASKS[name], tmp_path, split)
    assert len(examples) == 2
    assert examples[1] == Example(*second)


@pytest.mark.parametrize(("name", "split", "file", "rows", "second"), PUBLISHED)
def test_a_bom_crlf_blank_lines_and_no_final_newline_change_nothing(tmp_path, name, split, file, rows, second):
    (tmp_path / file).write_bytes(tsv(*rows))
    plain = read_examples(TASKS[name], tmp_path, split)
    lines = tsv(*rows, end="\r\n").split(b"\r\n")
    (tmp_path / file).write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines[:-1]))
    assert read_examples(TASKS[name], tmp_path, split) == plain


@pytest.mark.parametrize(
    "text", ['"Stray', 'say "no"" twice', "'", "a\rb", "a\u2028b", "a\x85b", "a\x1cb", "naïve 東京"]
)
def test_sentences_keep_every_character_but_tab_and_line_feed(tmp_path, text):
    write(tmp_path, train_tsv=tsv(["sentence", "label"], [text, "1"], ["next", "0"]))
    assert [example.sentence1 for example in read_examples(TASKS["SST-2"], tmp_path, "train")] == [text, "next"]


def test_rows_of_qqp_that_lack_columns_are_left_out_and_counted(tmp_path):
    broken = [["7", "8", "9", '"Was he real?'], ["", "Was he?", "0"]]  # one row, cut by a line feed inside a question
    write(tmp_path, train_tsv=tsv(QQP_HEADER, [*"123", "a", "b", "1"], *broken, [*"456", "c", "d", "0"]))
    said = []
    examples = read_examples(TASKS["QQP"], tmp_path, "train", said.append)
    assert [example.sentence1 for example in examples] == ["a", "c"]
    assert said == [f"{tmp_path}/train.tsv: 2 of 4 rows left out, their columns are not all there"]


def test_a_test_row_that_lacks_columns_is_refused_even_in_qqp(tmp_path):
    write(tmp_path, test_tsv=tsv(["id", "question1", "question2"], ["0", "a", "b"], ["1", "c"]))
    with pytest.raises(UsageError, match=r"test\.tsv, line 3: has 2 columns; QQP needs 3"):
        read_examples(TASKS["QQP"], tmp_path, "test")


def test_mrpc_s_own_corpus_is_split_by_glue_s_list(tmp_path):
    rows = [["1", "10", "20", "a", "b"], ["0", "30", "40", "c", "d"], ["1", "20", "10", "e", "f"]]
    write(
        tmp_path,
        msr_paraphrase_train_txt=b"\xef\xbb\xbf" + tsv(MRPC_HEADER, *rows, end="\r\n"),
        msr_paraphrase_test_txt=tsv(MRPC_HEADER, ["1", "5", "6", "g", "h"]),
        dev_ids_tsv=tsv(["10", "20"], ["70", "80"]),
    )
    read = {split: read_examples(TASKS["MRPC"], tmp_path, split) for split in ("train", "dev", "test")}
    assert [example.sentence1 for example in read["train"]] == ["c", "e"]
    assert [example.sentence1 for example in read["dev"]] == ["a"]
    assert read["test"] == [Example("0", "g", "h", None)]


def test_mrpc_s_own_corpus_without_the_list_is_refused(tmp_path):
    write(tmp_path, msr_paraphrase_train_txt=tsv(MRPC_HEADER, ["1", "10", "20", "a", "b"]))
    with pytest.raises(UsageError, match=r"hold train\.tsv, or msr_paraphrase_train\.txt with dev_ids\.tsv"):
        find_file(TASKS["MRPC"], tmp_path, "train")


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("CoLA", [["a", "1", "", "x"], ["a", "2", "", "y"]], "line 2: '2' is no label of CoLA; its labels are 0, 1"),
        ("RTE", [INDEXED_PAIR, [*"0ab", "neutral"]], "line 2: 'neutral' is no label of RTE"),
        (
            "STS-B",
            [STSB_HEADER, [*"0abcdef", "x", "y", "5.2"]],
            "line 2: '5.2' is no score of STS-B; it must be from 0 to 5",
        ),
        ("STS-B", [STSB_HEADER, [*"0abcdef", "x", "y", "nan"]], "line 2: 'nan' is no score of STS-B"),
        ("STS-B", [STSB_HEADER, [*"0abcdef", "x", "y", "high"]], "line 2: 'high' is no score of STS-B"),
        ("WNLI", [INDEXED_PAIR, [*"0ab", "1"], ["1", "c"]], "line 3: has 2 columns; WNLI needs 4"),
        ("QNLI", [INDEXED_PAIR, [*"0ab", "entailment"]], "line 1: the header has no column question"),
        ("SST-2", [["sentence", "label"]], "holds no rows"),
        ("SST-2", [], "line 1: the header has no column sentence"),
        ("CoLA", [], "holds no rows"),
    ],
)
def test_what_a_file_may_not_hold_names_file_and_line(tmp_path, name, rows, said):
    write(tmp_path, train_tsv=tsv(*rows))
    with pytest.raises(UsageError) as caught:
        read_examples(TASKS[name], tmp_path, "train")
    assert str(caught.value).startswith(f"{tmp_path}/train.tsv")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf_8_name_their_line(tmp_path):
    write(tmp_path, train_tsv=b"sentence\tlabel\nfine\t1\ncaf\xe9\t0\n")
    with pytest.raises(UsageError, match=r"train\.tsv, line 3: is not UTF-8 text"):
        read_examples(TASKS["SST-2"], tmp_path, "train")


def test_a_folder_without_the_split_is_refused_and_the_right_one_named(tmp_path):
    (tmp_path / "train.tsv").write_bytes(tsv(INDEXED_PAIR, [*"0ab", "entailment"]))
    with pytest.raises(
        UsageError, match=r"--data_dir .* must be the folder of RTE and hold dev\.tsv for its dev split$"
    ):
        find_file(TASKS["RTE"], tmp_path, "dev")
    write(tmp_path / "RTE", dev_tsv=tsv(INDEXED_PAIR, [*"0ab", "entailment"]))
    with pytest.raises(UsageError, match="RTE holds it"):
        read_examples(TASKS["RTE"], tmp_path, "dev")


# -------------------------------------------------------------------------------------------------------------- scores
def test_mnli_s_second_dev_split_has_metrics_of_its_own_name():
    predictions, labels = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0])
    assert score(TASKS["MNLI"], "dev_matched", predictions, labels) == {"accuracy": 0.75}
    assert score(TASKS["MNLI"], "dev_mismatched", predictions, labels) == {"mismatched_accuracy": 0.75}
    assert score(TASKS["MNLI-mm"], "dev_mismatched", predictions, labels) == {"accuracy": 0.75}


def test_decide_takes_the_largest_output_or_the_score():
    assert decide(TASKS["MNLI"], np.array([[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]])).tolist() == [1, 0]
    assert decide(TASKS["STS-B"], np.array([[4.5], [-0.5]])).tolist() == [4.5, -0.5]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused(bad):
    with pytest.raises(UsageError, match=r"STS-B: .* its training diverged"):
        decide(TASKS["STS-B"], np.array([[1.0], [bad]]))


def test_the_baseline_is_the_most_frequent_class_or_the_mean_score():
    examples = [Example(str(n), "a", "b", label) for n, label in enumerate([1, 0, 1])]
    labels = labels_array(TASKS["RTE"], examples)
    assert (labels.dtype, baseline(TASKS["RTE"], labels, 2).tolist()) == (np.int64, [1, 1])
    scores = labels_array(TASKS["STS-B"], [Example("0", "a", "b", 1.0), Example("1", "a", "b", 4.0)])
    assert (scores.dtype, baseline(TASKS["STS-B"], scores, 2).tolist()) == (np.float32, [2.5, 2.5])
    assert score(TASKS["STS-B"], "dev", baseline(TASKS["STS-B"], scores, 2), scores) == {"pearson": 0, "spearman": 0}


@pytest.mark.parametrize(
    ("name", "predictions", "words"),
    [
        ("CoLA", [1, 0], ["1", "0"]),
        ("WNLI", [0, 1], ["0", "1"]),
        ("MNLI", [0, 2], ["contradiction", "neutral"]),
        ("RTE", [0, 1], ["entailment", "not_entailment"]),
        ("QNLI", [1, 0], ["not_entailment", "entailment"]),
        ("STS-B", [5.31, -0.2], ["5.000", "0.000"]),
        ("STS-B", [3.14159, 2.0], ["3.142", "2.000"]),
    ],
)
def test_predictions_are_written_as_glue_takes_them(tmp_path, name, predictions, words):
    examples = [Example(index, "a", None, None) for index in ("4", "9")]
    write_predictions(TASKS[name], tmp_path / "out" / "X.tsv", examples, np.array(predictions))
    assert (tmp_path / "out" / "X.tsv").read_text() == f"index\tprediction\n4\t{words[0]}\n9\t{words[1]}\n"
