"""Hugging Face model folders: config.json, weights, tokenizer files.

Hugging Face keeps the vocabulary unpadded; `modeling` pads it (`BertConfig.padded_vocab_size`). Both directions do
nothing else to a weight.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.tokenization import KINDS, load_tokenizer, vocabulary_sha256
from modeling import (
    PADDED_BIAS,
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)
from training.errors import UsageError
from training.flags import read_json

CONFIG_NAME = "config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

SUITE_KEYS = ("lowercase", "model_name", "next_sentence", "tokenizer", "vocab_file", "vocabulary_sha256")
ARCHITECTURE_KEYS = tuple(field.name for field in fields(BertConfig) if field.name not in SUITE_KEYS)

# Hugging Face's keys by which a config.json asks for another network than ours, and the value that does not.
REQUIRED_VALUES = {
    "model_type": "bert",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
    "pad_token_id": 0,
}

# A folder holds each part in full or not at all; the first two it must hold.
ENCODER_PARTS = ("bert.embeddings.", "bert.encoder.")
OTHER_PARTS = ("bert.pooler.", "cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs.")

# The first name that a state dict holds decides which of Hugging Face's classes reads it.
HF_CLASSES = {
    "qa_outputs.weight": "BertForQuestionAnswering",
    "classifier.weight": "BertForSequenceClassification",
    "cls.seq_relationship.weight": "BertForPreTraining",
    "cls.predictions.bias": "BertForMaskedLM",
    "bert.embeddings.word_embeddings.weight": "BertModel",
}

HF_TOKENIZER_CLASSES = {"wordpiece": "BertTokenizer", "bpe": "PreTrainedTokenizerFast"}

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
DECODER_BIAS = "cls.predictions.bias"
TIED_NAMES = {"cls.predictions.decoder.weight": WORD_EMBEDDINGS, "cls.predictions.decoder.bias": DECODER_BIAS}

WeightsReader = Callable[[Path], dict[str, Tensor]]


def load_hf_folder(path: str | Path) -> tuple[BertConfig, dict[str, Tensor]]:
    """Read a folder that Hugging Face's BERT classes, or `save_hf_folder`, wrote.

    Returns the config and a state dict under our names, fp32, vocabulary padded, tied weights under both names. Only
    parts that the folder holds are in it, each of them in full: the encoder always; pooler, masked-token head and task
    heads where they are. The config's next_sentence says whether there is a next-sentence head.

    Raises UsageError, naming the file, for a missing or damaged config.json or weights file, another architecture than
    BERT's, an unknown tensor name, a wrong shape, or a part with tensors missing.
    """
    folder = Path(path)
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise UsageError(f"{folder}: no {CONFIG_NAME} there; it must be a Hugging Face BERT folder")
    values = read_json(config_path)
    for key, required in REQUIRED_VALUES.items():
        if values.get(key, required) != required:
            raise UsageError(f"{config_path}: {key} is {values[key]!r}; it must be {required!r} for this BERT")
    architecture = {key: values[key] for key in ARCHITECTURE_KEYS if key in values}
    config = BertConfig.from_dict(architecture, source=str(config_path))

    weights_path, read_weights = _find_weights(folder)
    state_dict = _our_names(read_weights(weights_path), source=weights_path)
    _check_unpadded(config, state_dict, source=weights_path)
    next_sentence = "cls.seq_relationship.weight" in state_dict
    config = replace(config, next_sentence=next_sentence, **_tokenizer_keys(folder))
    return config, _pad_vocabulary(config, state_dict)


def save_hf_folder(
    path: str | Path, config: BertConfig, state_dict: dict[str, Tensor], vocab_file: str | Path | None = None
) -> None:
    """Write what `AutoModelForPreTraining.from_pretrained(path)` and, with vocab_file, `AutoTokenizer` read.

    state_dict holds the dense weights of one of the models in `modeling`, under its names; config.json names the
    Hugging Face class that has its heads.

    Raises UsageError, before anything is written, for tensors that are not such a model's and for a vocabulary file
    that load_tokenizer or `BertConfig.check_vocabulary` refuses; and for a folder that is not writable.
    """
    folder = Path(path)
    tokenizer_files = {} if vocab_file is None else _tokenizer_files(config, Path(vocab_file))
    tensors = _unpad_vocabulary(config, state_dict)
    _check_unpadded(config, tensors, source=folder)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in ({CONFIG_NAME: _to_json(_hf_config(config, tensors))} | tokenizer_files).items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); it must be a writable folder") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: damaged or not a safetensors file ({_first_line(error)})") from error


def _read_torch_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise UsageError(f"{path}: damaged or not a file of tensors alone ({_first_line(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UsageError(f"{path}: it must hold one dict of tensors")
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


WEIGHTS_READERS: dict[str, WeightsReader] = {
    "model.safetensors": _read_safetensors,
    "pytorch_model.bin": _read_torch_pickle,
}


def _find_weights(folder: Path) -> tuple[Path, WeightsReader]:
    for name, reader in WEIGHTS_READERS.items():
        if (folder / name).is_file():
            return folder / name, reader
    raise UsageError(f"{folder}: no weights there; one of {', '.join(WEIGHTS_READERS)} must be in it")


def _our_names(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Names with the `bert.` prefix and without gamma and beta; no index buffers, no second copies of tied weights."""
    state_dict = {}
    for name, tensor in tensors.items():
        if name.endswith((".position_ids", ".token_type_ids")):
            continue
        if name.startswith(("embeddings.", "encoder.", "pooler.")):
            name = f"bert.{name}"
        stem, _, last = name.rpartition(".")
        name = f"{stem}.{ {'gamma': 'weight', 'beta': 'bias'}.get(last, last) }"
        state_dict[name] = tensor.float()
    for tied, name in TIED_NAMES.items():
        if tied in state_dict:
            copy = state_dict.pop(tied)
            if not torch.equal(copy, state_dict.setdefault(name, copy)):
                raise UsageError(f"{source}: {tied} differs from {name}; they must be tied")
    return state_dict


def _check_unpadded(config: BertConfig, state_dict: dict[str, Tensor], source: Path) -> None:
    """Unknown names, wrong shapes, incomplete parts: one UsageError that names the first such tensor."""
    shapes = _unpadded_shapes(config, num_labels=len(state_dict.get("classifier.bias", [None])))
    for name, tensor in state_dict.items():
        if name not in shapes:
            raise UsageError(
                f"{source}: unknown tensor {name}; its model is not a BERT of {config.num_hidden_layers} blocks"
            )
        if tensor.shape != shapes[name]:
            raise UsageError(
                f"{source}: {name} has the shape {list(tensor.shape)}; by its config it must be {list(shapes[name])}"
            )
    held = [part for part in OTHER_PARTS if any(name.startswith(part) for name in state_dict)]
    for name in shapes:
        if name.startswith((*ENCODER_PARTS, *held)) and name not in state_dict:
            raise UsageError(f"{source}: {name} is missing; the file must hold the whole encoder and whole heads")


def _unpadded_shapes(config: BertConfig, num_labels: int) -> dict[str, torch.Size]:
    """Shape of every tensor that a folder of this config may hold, whatever its heads."""
    with torch.device("meta"):
        models = (
            BertForPreTraining(replace(config, next_sentence=True)),
            BertForSequenceClassification(config, num_labels),
            BertForQuestionAnswering(config),
        )
    tensors = {name: tensor for model in models for name, tensor in model.state_dict().items()}
    return {name: tensor.shape for name, tensor in _unpad_vocabulary(config, tensors).items()}


def _pad_vocabulary(config: BertConfig, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    added = config.padded_vocab_size - config.vocab_size
    padded = dict(state_dict)
    padded[WORD_EMBEDDINGS] = torch.nn.functional.pad(state_dict[WORD_EMBEDDINGS], (0, 0, 0, added))
    if DECODER_BIAS in state_dict:
        padded[DECODER_BIAS] = torch.nn.functional.pad(state_dict[DECODER_BIAS], (0, added), value=PADDED_BIAS)
        padded |= {tied: padded[name] for tied, name in TIED_NAMES.items()}
    return padded


def _unpad_vocabulary(config: BertConfig, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Also drops the second names of tied weights: a safetensors file has one name for one tensor."""
    unpadded = {name: tensor.detach() for name, tensor in state_dict.items() if name not in TIED_NAMES}
    for name in (WORD_EMBEDDINGS, DECODER_BIAS):
        if name in unpadded and len(unpadded[name]) == config.padded_vocab_size:
            unpadded[name] = unpadded[name][: config.vocab_size]
    return {name: tensor.contiguous() for name, tensor in unpadded.items()}


def _tokenizer_keys(folder: Path) -> dict:
    """The config's keys about the tokenizer. Without a vocab.txt, a tokenizer.json is taken, which `bpe` stands for.

    Such a file says by itself whether it splits words by BPE or by WordPiece, and whether it lower-cases.
    """
    path = folder / TOKENIZER_CONFIG_NAME
    lowercase = read_json(path).get("do_lower_case", True) if path.is_file() else True
    kind = next((kind for kind, name in KINDS.items() if (folder / name).is_file()), None)
    if kind is None:
        return {"lowercase": bool(lowercase)}
    return {"lowercase": bool(lowercase), "tokenizer": kind, "vocab_file": str(folder / KINDS[kind])}


def _hf_config(config: BertConfig, state_dict: dict[str, Tensor]) -> dict:
    hf_class = next(hf_class for name, hf_class in HF_CLASSES.items() if name in state_dict)
    values = {"architectures": [hf_class], **REQUIRED_VALUES}
    values |= {key: value for key, value in config.to_dict().items() if key in ARCHITECTURE_KEYS}
    if "classifier.bias" in state_dict:
        labels = [f"LABEL_{label}" for label in range(len(state_dict["classifier.bias"]))]
        values["id2label"] = {str(index): label for index, label in enumerate(labels)}
        values["label2id"] = {label: index for index, label in enumerate(labels)}
    return values


def _tokenizer_files(config: BertConfig, vocab_file: Path) -> dict[str, str]:
    """Names and contents of the files from which AutoTokenizer makes the tokenizer that encoded the data."""
    tokenizer = load_tokenizer(vocab_file, config.lowercase, config.tokenizer)
    config.check_vocabulary(vocab_file, tokenizer.get_vocab_size(), vocabulary_sha256(tokenizer))
    # A BPE file that we built lacks what load_tokenizer adds, the [CLS] and [SEP] around sequences.
    content = vocab_file.read_text(encoding="utf-8") if config.tokenizer == "wordpiece" else tokenizer.to_str()
    tokenizer_config = {
        "tokenizer_class": HF_TOKENIZER_CLASSES[config.tokenizer],
        "do_lower_case": config.lowercase,
        "model_max_length": config.max_position_embeddings,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return {KINDS[config.tokenizer]: content, TOKENIZER_CONFIG_NAME: _to_json(tokenizer_config)}


def _to_json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"
