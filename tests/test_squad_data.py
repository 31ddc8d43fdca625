"""Reading SQuAD's files, and the windows that a model reads: against the published rules, written out slowly."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from squad_factory import WORDS, question, squad_json, write_squad, write_vocabulary

from data import squad_windows
from data.fetch import fetch_source
from data.squad import Answer, Example, read_squad
from data.squad_windows import encode, load_squad
from data.tokenization import load_tokenizer
from training.errors import UsageError

TOWER = "The Eiffel Tower was built between 1887 and 1889."
SIZES = {"max_seq_length": 14, "doc_stride": 3, "max_query_length": 5}
REAL_DATA = "SLOPE_TEST_DATA"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "vocab.txt"))


@pytest.fixture
def tower_file(tmp_path):
    questions = [question("q1", TOWER, "1887"), question("q2", TOWER, "Eiffel Tower", text="What was built?")]
    return write_squad(tmp_path / "train.json", (TOWER, questions))


# ------------------------------------------------------------------------------------------------------------- reading
def test_questions_come_in_the_order_of_the_file_with_all_answers(tmp_path):
    path = write_squad(
        tmp_path / "dev.json",
        (TOWER, [question("q1", TOWER, "1887", "1887 and 1889"), question("q2", TOWER, "Tower", text="What?")]),
        ("Paris", [question("q3", "Paris", "Paris", text="Where?")]),
    )
    assert read_squad(path) == [
        Example("q1", "When was it built?", TOWER, (Answer("1887", 35), Answer("1887 and 1889", 35)), False),
        Example("q2", "What?", TOWER, (Answer("Tower", 11),), False),
        Example("q3", "Where?", "Paris", (Answer("Paris", 0),), False),
    ]


def test_version_2_knows_questions_without_an_answer(tmp_path):
    plausible = [{"text": "1889", "answer_start": 44}]
    questions = [
        question("q1", TOWER, "1887", is_impossible=False),
        question("q2", TOWER, is_impossible=True, plausible_answers=plausible),
        question("q3", TOWER),
        question("q4", TOWER, "1889"),
    ]
    path = write_squad(tmp_path / "dev.json", (TOWER, questions), version="v2.0")
    assert [(len(example.answers), example.is_impossible) for example in read_squad(path, version_2=True)] == [
        *[(1, False), (0, True), (0, True), (1, False)]
    ]


def test_a_file_without_answers_can_be_predicted_but_not_trained_on(tmp_path, tokenizer):
    bare = {"id": "q1", "question": "When?"}
    path = write_squad(tmp_path / "test.json", (TOWER, [bare]))
    assert read_squad(path, need_answers=False) == [Example("q1", "When?", TOWER, (), False)]
    with pytest.raises(UsageError, match=r"test.json: question q1: has no answers \(list\)"):
        read_squad(path)
    _, features = load_squad(path, tokenizer, need_answers=False)
    assert features.start_positions.tolist() == features.end_positions.tolist() == [0]


def first_question(content: dict) -> dict:
    return content["data"][0]["paragraphs"][0]["qas"][0]


MISTAKES: dict[str, tuple[Callable[[dict], object], str]] = {
    "no data": (lambda content: content.pop("data"), r"has no data \(list\)"),
    "no paragraphs": (lambda content: content["data"][0].pop("paragraphs"), r"has no paragraphs \(list\)"),
    "article of another kind": (lambda content: content["data"].insert(0, "text"), r"has no paragraphs \(list\)"),
    "no context": (lambda content: content["data"][0]["paragraphs"][0].pop("context"), r"has no context \(str\)"),
    "no qas": (lambda content: content["data"][0]["paragraphs"][0].pop("qas"), r"'The Eiffel.* has no qas \(list\)"),
    "no questions": (lambda content: content["data"].clear(), "holds no questions"),
    "no id": (lambda content: first_question(content).pop("id"), r"'The Eiffel.* has no id \(str\)"),
    "no question": (lambda content: first_question(content).pop("question"), r"question q1: has no question \(str\)"),
    "no answers": (lambda content: first_question(content).pop("answers"), r"question q1: has no answers \(list\)"),
    "no text": (lambda content: first_question(content)["answers"][0].pop("text"), r"question q1: an .* no text"),
    "start of another kind": (
        lambda content: first_question(content)["answers"][0].update(answer_start="35"),
        r"question q1: answer '1887': has no answer_start \(int\)",
    ),
    "answer elsewhere": (
        lambda content: first_question(content)["answers"][0].update(answer_start=34),
        r"question q1: answer '1887' is not at character 34",
    ),
    "answer before the context": (
        lambda content: first_question(content)["answers"][0].update(answer_start=35 - len(TOWER)),
        r"question q1: answer '1887' is not at character -14",
    ),
    "empty answer": (lambda content: first_question(content)["answers"][0].update(text=""), "question q1: answer ''"),
    "id twice": (lambda content: first_question(content).update(id="q2"), "question q2 occurs twice"),
    "v2.0 file": (
        lambda content: first_question(content).update(answers=[], is_impossible=True),
        "question q1: has no answer, .* --version_2_with_negative",
    ),
    "contradiction": (
        lambda content: first_question(content).update(is_impossible=True),
        "question q1: is_impossible is True and it has 1 answers",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_is_one_line_that_names_the_file_and_the_question(mistake, tmp_path):
    change, message = MISTAKES[mistake]
    content = squad_json((TOWER, [question("q1", TOWER, "1887"), question("q2", TOWER, "1889")]))
    change(content)
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=f"^{path}: .*{message}") as error:
        read_squad(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['{"data": [', "\xff\xfe", "[]", "12"])
def test_a_file_that_is_not_squad_is_one_line(text, tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=f"^{path}: .*(is not JSON|has no data)"):
        read_squad(path)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=f"^{tmp_path}/none.json: cannot be read"):
        read_squad(tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------------------- windows
def windows_by_hand(example: Example, tokenizer, max_seq_length: int, doc_stride: int, max_query_length: int):
    """The windows of one question, one token at a time."""
    query = tokenizer.encode(example.question, add_special_tokens=False).ids[:max_query_length]
    context = tokenizer.encode(example.context, add_special_tokens=False)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    room = max_seq_length - len(query) - 3
    stretches, begin = [], 0
    while True:
        stretches.append(range(begin, min(begin + room, len(context))))
        if stretches[-1].stop == len(context):
            break
        begin += min(room, doc_stride)

    def context_score(window: int, token: int) -> int:
        stretch = stretches[window]
        return 100 * min(token - stretch[0], stretch[-1] - token) + len(stretch)

    answer = []
    if example.answers:
        text, start = example.answers[0]
        answer = [t for t, (b, e) in enumerate(context.offsets) if b < start + len(text) and e > start]
    for window, stretch in enumerate(stretches):
        shift = len(query) + 2 - stretch.start
        owned = [
            token + shift
            for token in stretch
            if window
            == max(
                (other for other in range(len(stretches)) if token in stretches[other]),
                key=lambda other, token=token: (context_score(other, token), -other),
            )
        ]
        held = bool(answer) and answer[0] in stretch and answer[-1] in stretch
        yield {
            "input_ids": [cls, *query, sep, *(context.ids[token] for token in stretch), sep],
            "context_begin": len(query) + 2,
            "chars": [context.offsets[token] for token in stretch],
            "owned": owned,
            "answer": (answer[0] + shift, answer[-1] + shift) if held else (0, 0),
        }


def window(features, row: int) -> dict:
    """Window `row` in the form of `windows_by_hand`."""
    begin, length = features.row_begins[row], features.lengths[row]
    first, context_begin = features.first_tokens[row], features.context_begins[row]
    return {
        "input_ids": features.input_ids[begin : begin + length].tolist(),
        "context_begin": context_begin,
        "chars": [tuple(span) for span in features.token_chars[first : first + length - 1 - context_begin].tolist()],
        "owned": list(range(features.own_begins[row], features.own_ends[row])),
        "answer": (features.start_positions[row], features.end_positions[row]),
    }


texts = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join),
    # An accent of its own, a letter that becomes three when accents are split off, a character that is removed.
    st.text(alphabet="ab1 .-E\u00e9\u0301\ud55c\u0000", max_size=40),
)


@st.composite
def examples_of(draw):
    contexts = draw(st.lists(texts.map(lambda text: f"{text} in"), min_size=1, max_size=3))
    examples = []
    for number in range(draw(st.integers(1, 5))):
        context = draw(st.sampled_from(contexts))
        start = draw(st.integers(0, len(context) - 1))
        end = draw(st.integers(start + 1, len(context)))
        answers = draw(st.sampled_from([(Answer(context[start:end], start), Answer("in", len(context) - 2)), ()]))
        examples.append(Example(f"q{number}", draw(texts), context, answers, not answers))
    return examples


@settings(max_examples=300, deadline=None)
@given(
    examples=examples_of(),
    max_query_length=st.integers(1, 6),
    room=st.one_of(st.integers(1, 12), st.just(60)),
    doc_stride=st.integers(1, 14),
)
def test_windows_are_those_of_the_published_rules(tokenizer, examples, max_query_length, room, doc_stride):
    sizes = {
        "max_seq_length": max_query_length + 3 + room,
        "doc_stride": doc_stride,
        "max_query_length": max_query_length,
    }
    features = encode(examples, tokenizer, **sizes)
    expected = [(number, made) for number, e in enumerate(examples) for made in windows_by_hand(e, tokenizer, **sizes)]
    assert [(features.examples[row], window(features, row)) for row in range(len(features))] == expected


def test_the_size_of_a_window_counts_where_the_context_is_about_the_same(tokenizer):
    # Windows of tokens 0 to 121 and 120 to 122. Token 121 has one neighbour on its weaker side in the second window and
    # none in the first, which is 119 tokens larger: 0 + 1.22 against 1 + 0.03.
    example = Example("q", "who", " ".join(WORDS[number % len(WORDS)] for number in range(123)), (), True)
    sizes = {"max_seq_length": 126, "doc_stride": 120, "max_query_length": 4}
    features = encode([example], tokenizer, **sizes)
    assert [window(features, row) for row in range(2)] == list(windows_by_hand(example, tokenizer, **sizes))
    assert features.own_ends[0] - features.own_begins[0] == 122


def test_the_characters_of_a_token_are_in_the_original_text(tokenizer):
    context = "Über  TOWER, é\u0301x"
    features = encode([Example("q", "who", context, (), True)], tokenizer)
    pieces = [context[begin:end] for begin, end in features.token_chars]
    assert pieces == ["Ü", "b", "e", "r", "TOWER", ",", "é", "x"]


def test_an_answer_in_no_window_and_none_at_all_point_to_cls(tokenizer):
    context = "eiffel tower was built in paris"
    across = Example("q1", "who", context, (Answer("was built", 13),), False)
    features = encode([across], tokenizer, max_seq_length=7, doc_stride=3, max_query_length=1)
    assert features.start_positions.tolist() == features.end_positions.tolist() == [0, 0]
    features = encode([across._replace(answers=(), is_impossible=True)], tokenizer)
    assert features.start_positions.tolist() == features.end_positions.tolist() == [0]


def test_a_batch_is_padded_to_its_longest_or_to_a_given_length(tokenizer):
    short = Example("q1", "who", "eiffel tower", (Answer("tower", 7),), False)
    long = Example("q2", "who built", "paris", (Answer("paris", 0),), False)
    longest = Example("q3", "when", TOWER, (), True)
    features = encode([short, long, longest], tokenizer)
    ids = {token: tokenizer.token_to_id(token) for token in ["[CLS]", "[SEP]", *WORDS]}
    rows = [["[CLS]", "who", "built", "[SEP]", "paris", "[SEP]"], ["[CLS]", "who", "[SEP]", "eiffel", "tower", "[SEP]"]]
    batch = features.batch([1, 0])
    assert batch["input_ids"].tolist() == [[ids[token] for token in row] for row in rows]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert batch["start_positions"].tolist() == batch["end_positions"].tolist() == [4, 4]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    padded = features.batch([0], length=8)
    assert padded["input_ids"].tolist() == [[ids[token] for token in rows[1]] + [0, 0]]
    assert padded["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]
    assert padded["attention_mask"].tolist() == [[1] * 6 + [0, 0]]
    assert features.batch([0, 2])["input_ids"].shape == (2, features.lengths[2])


def test_no_room_for_the_context_names_flag_and_question(tokenizer):
    examples = [Example(f"q{n}", " ".join(["who"] * n), "paris", (), True) for n in (1, 5)]
    assert len(encode(examples, tokenizer, max_seq_length=9, max_query_length=5)) == 2
    with pytest.raises(UsageError, match="--max_seq_length 8: leaves no room for the context beside question q5"):
        encode(examples, tokenizer, max_seq_length=8, max_query_length=5)


def test_a_context_without_words_names_its_question(tokenizer):
    with pytest.raises(UsageError, match="question q2: its context has no words"):
        encode([Example("q1", "who", "paris", (), True), Example("q2", "who", " \n", (), True)], tokenizer)


# --------------------------------------------------------------------------------------------------------------- cache
@pytest.fixture
def encodings(monkeypatch):
    """The calls of `encode` from now on."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        time.sleep(0.1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(squad_windows, "encode", counted)
    return calls


def same(features, others) -> bool:
    return all(np.array_equal(getattr(features, name), getattr(others, name)) for name in vars(features))


def test_windows_are_made_once_for_a_file_a_tokenizer_and_settings(tower_file, tokenizer, tmp_path, encodings):
    cache = tmp_path / "a" / "cache"
    examples, features = load_squad(tower_file, tokenizer, **SIZES, cache_dir=cache)
    again_examples, again = load_squad(tower_file, tokenizer, **SIZES, cache_dir=cache)
    assert len(encodings) == 1
    assert examples == again_examples
    assert len(features) > 2
    assert same(features, again)
    assert same(features, encode(examples, tokenizer, **SIZES))
    assert {path.suffix for path in cache.iterdir()} == {".npz", ".lock"}


def test_another_file_tokenizer_or_setting_is_made_anew(tower_file, tokenizer, tmp_path, encodings):
    cased = load_tokenizer(write_vocabulary(tmp_path / "vocab.txt"), lowercase=False)
    other_file = write_squad(tmp_path / "other.json", (TOWER, [question("q1", TOWER, "1889")]))
    combinations = [(tower_file, tokenizer, SIZES), (tower_file, cased, SIZES), (other_file, tokenizer, SIZES)]
    combinations += [(tower_file, tokenizer, SIZES | {name: value + 1}) for name, value in SIZES.items()]
    for _ in range(2):
        for file, tokens, sizes in combinations:
            examples, features = load_squad(file, tokens, **sizes, cache_dir=tmp_path / "cache")
            assert same(features, encode(examples, tokens, **sizes))
    assert len(encodings) == len(combinations)


def test_without_a_cache_nothing_is_kept(tower_file, tokenizer, encodings):
    before = set(tower_file.parent.iterdir())
    for _ in range(2):
        load_squad(tower_file, tokenizer, **SIZES)
    assert len(encodings) == 2
    assert set(tower_file.parent.iterdir()) == before


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "one byte wrong": lambda content: content[:400] + bytes([content[400] ^ 255]) + content[401:],
    "something else": lambda content: b"windows",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(damage, tower_file, tokenizer, tmp_path, encodings):
    _, features = load_squad(tower_file, tokenizer, **SIZES, cache_dir=tmp_path)
    (cached,) = tmp_path.glob("*.npz")
    cached.write_bytes(DAMAGES[damage](cached.read_bytes()))
    for _ in range(2):
        assert same(load_squad(tower_file, tokenizer, **SIZES, cache_dir=tmp_path)[1], features)
    assert len(encodings) == 2


def test_of_many_readers_at_once_one_encodes_and_the_others_wait(tower_file, tokenizer, tmp_path, encodings):
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load_squad, tower_file, tokenizer, **SIZES, cache_dir=tmp_path / "c") for _ in range(4)]
        results = [load.result()[1] for load in loads]
    assert len(encodings) == 1
    assert all(same(result, results[0]) for result in results)


def test_an_encoding_that_fails_leaves_no_cache(tower_file, tokenizer, tmp_path):
    with pytest.raises(UsageError, match="--max_seq_length 5"):
        load_squad(tower_file, tokenizer, **SIZES | {"max_seq_length": 5}, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npz*"))


def test_a_cache_that_cannot_be_written_names_the_flag(tower_file, tokenizer):
    with pytest.raises(UsageError, match=f"--cache_dir {tower_file}/cache: cannot be used"):
        load_squad(tower_file, tokenizer, **SIZES, cache_dir=tower_file / "cache")


# ----------------------------------------------------------------------------------------------------------- real data
@pytest.mark.slow
@pytest.mark.skipif(REAL_DATA not in os.environ, reason=f"fetches 158 MB into the folder {REAL_DATA}, which is not set")
@pytest.mark.parametrize(("name", "questions", "windows"), [("train", 87_599, 88_641), ("dev", 10_570, 10_833)])
def test_squad_itself_is_read_whole(name, questions, windows, tmp_path):
    """The numbers of windows are those that the code published with BERT makes of the same files and vocabulary."""
    folder = Path(os.environ[REAL_DATA])
    path = fetch_source("squad", folder) / f"{name}-v1.1.json"
    tokenizer = load_tokenizer(fetch_source("minilm", folder) / "vocab.txt")
    begin = time.monotonic()
    examples, features = load_squad(path, tokenizer, cache_dir=tmp_path)
    assert time.monotonic() - begin < 120
    assert len(examples) == questions
    assert len(features) == windows
    holding = np.flatnonzero(features.start_positions)
    assert np.array_equal(np.unique(features.examples[holding]), np.arange(questions))
    shift = features.first_tokens - features.context_begins
    begins = features.token_chars[(features.start_positions + shift)[holding], 0]
    ends = features.token_chars[(features.end_positions + shift)[holding], 1]
    answers = [examples[features.examples[row]].answers[0] for row in holding]
    assert all(
        begin <= a.start and a.start + len(a.text) <= end for begin, end, a in zip(begins, ends, answers, strict=True)
    )
    exact = {
        features.examples[row]
        for row, begin, end, answer in zip(holding, begins, ends, answers, strict=True)
        if (begin, end) == (answer.start, answer.start + len(answer.text))
    }
    assert len(exact) > 0.995 * questions  # the rest begins or ends inside of a token
