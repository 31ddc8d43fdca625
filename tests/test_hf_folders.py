"""Hugging Face folders in and out: what we write they read, what they write we read, and what is wrong is refused."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data.tokenization import build_bpe_tokenizer, load_tokenizer
from modeling import (
    PADDED_BIAS,
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)
from training.errors import UsageError
from training.hf_folders import ARCHITECTURE_KEYS, load_hf_folder, save_hf_folder

TINY = BertConfig(
    vocab_size=61,  # padded to 64
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    hidden_act="gelu_new",  # not the default: a config that is not read would show
    max_position_embeddings=32,
    initializer_range=0.3,
    layer_norm_eps=1e-5,
)
WORDS = [chr(ord("a") + index // 2) * (1 + index % 2) for index in range(40)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"##{word}" for word in WORDS[:16])]


@pytest.fixture
def vocab_file(tmp_path):
    assert len(VOCABULARY) == TINY.vocab_size
    path = tmp_path / "corpus" / "vocab.txt"
    path.parent.mkdir()
    path.write_text("\n".join(VOCABULARY) + "\n")
    return path


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, TINY.vocab_size, (3, 12), generator=generator)
    attention_mask = (torch.arange(12) < torch.tensor([12, 7, 3])[:, None]).long()
    token_type_ids = (torch.arange(12) >= 2).long().expand(3, 12) * attention_mask
    return {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": attention_mask}


def make(build, *args):
    """A model in which no tensor is at its initial 0 or 1, except for the padded vocabulary."""
    torch.manual_seed(1)
    model = build(*args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.bert.embeddings.word_embeddings.weight[TINY.vocab_size :] = 0
        if hasattr(model, "cls"):
            model.cls.predictions.bias[TINY.vocab_size :] = PADDED_BIAS
    return model


def hf_config(**extra):
    values = {key: value for key, value in TINY.to_dict().items() if key in ARCHITECTURE_KEYS}
    return transformers.BertConfig(**values, **extra)


def loaded_by_hugging_face(auto_class, folder):
    """Their model, after a check that it found each of its weights and left none of the file's."""
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def test_hugging_face_reads_what_we_write(tmp_path, vocab_file, inputs):
    model = make(BertForPreTraining, TINY)
    save_hf_folder(tmp_path / "out", TINY, model.state_dict(), vocab_file)

    theirs = loaded_by_hugging_face(transformers.AutoModelForPreTraining, tmp_path / "out")
    assert type(theirs) is transformers.BertForPreTraining
    assert theirs.config.vocab_size == 61
    assert theirs.config.architectures == ["BertForPreTraining"]
    scores, sentence_scores = model(**inputs)
    expected = theirs(**inputs)
    torch.testing.assert_close(scores[..., :61], expected.prediction_logits, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(sentence_scores, expected.seq_relationship_logits, rtol=1e-4, atol=2e-5)
    assert load_file(tmp_path / "out" / "model.safetensors")["cls.predictions.bias"].shape == (61,)


@pytest.mark.parametrize("lowercase", [True, False])
def test_hugging_face_reads_the_tokenizer_that_we_write(lowercase, tmp_path, vocab_file):
    config = replace(TINY, lowercase=lowercase)
    save_hf_folder(tmp_path / "out", config, make(BertForPreTraining, config).state_dict(), vocab_file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 32
    ids = tokenizer("Ab", "cc d")["input_ids"]
    first = ["a", "##b"] if lowercase else ["[UNK]"]
    assert [VOCABULARY[index] for index in ids] == ["[CLS]", *first, "[SEP]", "cc", "d", "[SEP]"]
    assert load_hf_folder(tmp_path / "out")[0].lowercase is lowercase


def test_hugging_face_reads_the_bpe_tokenizer_that_we_write(tmp_path):
    text, vocab_file = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    text.write_text("some words are some words again\n" * 9)
    vocab_size = build_bpe_tokenizer([text], 280, lowercase=True, output=vocab_file)
    config = replace(TINY, vocab_size=vocab_size, tokenizer="bpe")
    save_hf_folder(tmp_path / "out", config, make(BertForPreTraining, config).state_dict(), vocab_file)
    ours = load_tokenizer(vocab_file, lowercase=True, kind="bpe").encode("Some words", "again")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.tokens[0] == "[CLS]"
    assert theirs("Some words", "again")["input_ids"] == ours.ids
    assert load_hf_folder(tmp_path / "out")[0] == replace(config, vocab_file=str(tmp_path / "out" / "tokenizer.json"))


def test_the_tokenizer_file_that_hugging_face_writes_is_found(tmp_path, vocab_file):
    """transformers 5 writes a tokenizer.json and no vocab.txt."""
    save_hf_folder(tmp_path / "out", TINY, make(BertForPreTraining, TINY).state_dict(), vocab_file)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "vocab.txt").unlink()
    theirs.save_pretrained(tmp_path / "out")
    config, _ = load_hf_folder(tmp_path / "out")
    ours = load_tokenizer(config.vocab_file, config.lowercase, config.tokenizer)
    assert ours.encode("Ab", "cc d").ids == theirs("Ab", "cc d")["input_ids"]


@pytest.mark.parametrize(
    ("build", "args", "auto_class"),
    [
        (BertForSequenceClassification, (5,), transformers.AutoModelForSequenceClassification),
        (BertForQuestionAnswering, (), transformers.AutoModelForQuestionAnswering),
    ],
)
def test_task_models_go_out_and_come_back(build, args, auto_class, tmp_path, inputs):
    model = make(build, TINY, *args)
    save_hf_folder(tmp_path / "out", TINY, model.state_dict())
    theirs = loaded_by_hugging_face(auto_class, tmp_path / "out")(**inputs)
    expected = (theirs.start_logits, theirs.end_logits) if args == () else theirs.logits
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=2e-5)
    _, state_dict = load_hf_folder(tmp_path / "out")
    torch.testing.assert_close(state_dict, dict(model.state_dict()), rtol=0, atol=0)


def test_without_next_sentence_the_folder_is_a_masked_language_model(tmp_path, inputs):
    config = replace(TINY, next_sentence=False)
    model = make(BertForPreTraining, config)
    save_hf_folder(tmp_path / "out", config, model.state_dict())
    theirs = loaded_by_hugging_face(transformers.AutoModelForMaskedLM, tmp_path / "out")
    torch.testing.assert_close(model(**inputs)[0][..., :61], theirs(**inputs).logits, rtol=1e-4, atol=2e-5)
    loaded, state_dict = load_hf_folder(tmp_path / "out")
    assert loaded.next_sentence is False
    torch.testing.assert_close(state_dict, dict(model.state_dict()), rtol=0, atol=0)


def test_a_folder_comes_back_as_it_was_saved(tmp_path, vocab_file):
    state_dict = make(BertForPreTraining, TINY).state_dict()
    save_hf_folder(tmp_path / "out", TINY, state_dict, vocab_file)
    config, loaded = load_hf_folder(tmp_path / "out")
    assert config == replace(TINY, vocab_file=str(tmp_path / "out" / "vocab.txt"))
    torch.testing.assert_close(loaded, dict(state_dict), rtol=0, atol=0)
    BertForPreTraining(config).load_state_dict(loaded)
    save_hf_folder(tmp_path / "out", config, loaded, config.vocab_file)  # onto itself, vocabulary included
    torch.testing.assert_close(load_hf_folder(tmp_path / "out")[1], loaded, rtol=0, atol=0)


def hugging_face_folder(path, hf_class, binary=False):
    torch.manual_seed(2)
    theirs = hf_class(hf_config()).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(path)
    if binary:
        (path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), path / "pytorch_model.bin")
    return theirs


@pytest.mark.parametrize("binary", [False, True])
def test_we_read_what_hugging_face_writes(binary, tmp_path, inputs):
    theirs = hugging_face_folder(tmp_path, transformers.BertForPreTraining, binary)
    config, state_dict = load_hf_folder(tmp_path)
    assert config == replace(TINY, vocab_file=None)
    ours = BertForPreTraining(config).eval()
    ours.load_state_dict(state_dict)
    expected = theirs(**inputs)
    scores, sentence_scores = ours(**inputs)
    torch.testing.assert_close(scores[..., :61], expected.prediction_logits, rtol=1e-4, atol=2e-5)
    assert not scores.softmax(-1)[..., 61:].any()
    torch.testing.assert_close(sentence_scores, expected.seq_relationship_logits, rtol=1e-4, atol=2e-5)


def test_an_encoder_alone_gives_no_heads(tmp_path):
    theirs = hugging_face_folder(tmp_path, transformers.BertModel)
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "model.safetensors")  # without the prefix
    config, state_dict = load_hf_folder(tmp_path)
    assert config.next_sentence is False
    expected = {f"bert.{name}": tensor for name, tensor in theirs.state_dict().items()}
    assert set(state_dict) == set(expected)
    torch.testing.assert_close(
        state_dict["bert.embeddings.word_embeddings.weight"][:61], expected["bert.embeddings.word_embeddings.weight"]
    )


def test_a_folder_of_the_first_release_is_read(tmp_path):
    """gamma and beta for LayerNorm's weight and bias, saved index buffers, a second copy of the tied weight, fp16."""
    hugging_face_folder(tmp_path, transformers.BertForPreTraining)
    expected = load_hf_folder(tmp_path)[1]
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    tensors = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in tensors.items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(32)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    (tmp_path / "model.safetensors").unlink()
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
    loaded = load_hf_folder(tmp_path)[1]
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    torch.testing.assert_close(loaded, {name: tensor.half().float() for name, tensor in expected.items()})


def rewrite_config(folder, **change):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))


def rewrite_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_weights_file(content):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")

    return damage


class Arbitrary:
    """An object that weights_only loading refuses."""


LAST_BIAS = "bert.encoder.layer.1.output.dense.bias"
DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), r"no config\.json there"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json: is not JSON"),
    "no size": (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "key 'vocab_size' is missing"),
    "another model": (lambda d: rewrite_config(d, model_type="roberta"), "model_type is 'roberta'; it must be 'bert'"),
    "a decoder": (lambda d: rewrite_config(d, is_decoder=True), "is_decoder is True; it must be False"),
    "untied by config": (lambda d: rewrite_config(d, tie_word_embeddings=False), "tie_word_embeddings is False"),
    "relative positions": (
        lambda d: rewrite_config(d, position_embedding_type="relative_key"),
        "position_embedding_type is 'relative_key'; it must be 'absolute'",
    ),
    "unknown activation": (lambda d: rewrite_config(d, hidden_act="silu"), "hidden_act is 'silu'"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights there; one of model.safetensors, pytorch"),
    "truncated": (truncate, r"model\.safetensors: damaged"),
    "binary no archive": (other_weights_file(b"no archive"), r"pytorch_model\.bin: damaged"),
    "binary empty": (other_weights_file(b""), r"pytorch_model\.bin: damaged"),
    "binary of objects": (other_weights_file({"a": Arbitrary()}), r"pytorch_model\.bin: damaged or not a file of ten"),
    "binary no dict": (other_weights_file([torch.ones(2)]), "it must hold one dict of tensors"),
    "unknown tensor": (
        lambda d: rewrite_tensors(d, lambda t: t.update({"bert.encoder.layer.2.output.dense.bias": torch.ones(24)})),
        r"unknown tensor bert\.encoder\.layer\.2\.output\.dense\.bias; .*2 blocks",
    ),
    "wrong shape": (
        lambda d: rewrite_tensors(d, lambda t: t.update({LAST_BIAS: torch.ones(25)})),
        r"has the shape \[25\]; by its config it must be \[24\]",
    ),
    "vocabulary padded in the file": (lambda d: rewrite_config(d, vocab_size=57), r"shape \[61, 24\].* \[57, 24\]"),
    "tensor missing": (lambda d: rewrite_tensors(d, lambda t: t.pop(LAST_BIAS)), f"{LAST_BIAS} is missing"),
    "half a head": (
        lambda d: rewrite_tensors(d, lambda t: t.pop("cls.predictions.bias")),
        r"cls\.predictions\.bias is missing",
    ),
    "untied by weights": (
        lambda d: rewrite_tensors(d, lambda t: t.update({"cls.predictions.decoder.weight": torch.ones(61, 24)})),
        "cls.predictions.decoder.weight differs from",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_wrong_folder_is_one_line_that_names_it(damage, message, tmp_path):
    save_hf_folder(tmp_path, TINY, make(BertForPreTraining, TINY).state_dict())
    damage(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        load_hf_folder(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_reading_a_folder_draws_no_random_number(tmp_path):
    save_hf_folder(tmp_path, TINY, make(BertForPreTraining, TINY).state_dict())
    before = torch.get_rng_state()
    load_hf_folder(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_input_to_saving_is_refused_and_nothing_is_written(tmp_path, vocab_file):
    state_dict = make(BertForPreTraining, TINY).state_dict()
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="unknown tensor bert.lora_left"):
        save_hf_folder(out, TINY, state_dict | {"bert.lora_left": torch.ones(24, 4)})
    with pytest.raises(UsageError, match=r"missing\.txt: no such file"):
        save_hf_folder(out, TINY, state_dict, tmp_path / "missing.txt")
    vocab_file.write_text("\n".join([*VOCABULARY, "one", "more"]))
    with pytest.raises(UsageError, match=r"vocab\.txt: holds 63 entries; the model's vocab_size is 61"):
        save_hf_folder(out, TINY, state_dict, vocab_file)
    assert not out.exists()
    with pytest.raises(UsageError, match="cannot be written"):
        save_hf_folder(vocab_file, TINY, state_dict)
