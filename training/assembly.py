"""From weights somewhere to a model that is pruned as described: what training, fine-tuning and export start with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from configuration import BertConfig
from data.storage import local_copy
from modeling import BertEncoder, BertForPreTraining, encoder_blocks, input_projections
from sparse_ops import add_adapters, sparsify
from training.checkpoint import load_checkpoint
from training.errors import UsageError
from training.hf_folders import load_hf_folder
from training.sparsity import SparsityConfig

ENCODER = "bert."  # what a source of weights must hold in full; heads may start anew
# What makes it the same network, also where the shapes of the weights do not show it.
NETWORK_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "max_position_embeddings", "type_vocab_size", "vocab_size", "layer_norm_eps"),
)


@dataclass(frozen=True)
class Source:
    """Weights that a model starts from, and what is known of them."""

    path: Path
    state: dict[str, Tensor]
    config: BertConfig
    sparsity: SparsityConfig


def read_source(address: str, flag: str = "--init_checkpoint") -> Source:
    """Read a checkpoint of this suite or a Hugging Face folder, here or at an `s3://` address.

    Raises:
        UsageError: when it is neither.
    """
    path = local_copy(address)
    if path.is_dir():
        try:
            config, state = load_hf_folder(path)
        except UsageError as error:  # which names the file in it
            raise UsageError(f"{flag} {error}") from error
        return Source(path, state, config, SparsityConfig())
    return source_of(load_checkpoint(path, flag), path)


def source_of(checkpoint: dict, path: Path) -> Source:
    config = BertConfig.from_dict(checkpoint["model_config"])
    return Source(path, checkpoint["model"], config, SparsityConfig.from_dict(checkpoint["sparsity"]))


def build_model(
    make_model: Callable[[], nn.Module],
    sparsity: SparsityConfig,
    source: Source | None = None,
    *,
    seed: int,
    mask_init: str = "magnitude",
    report: Callable[[str], None] = lambda line: None,
    with_operands: bool = True,
) -> nn.Module:
    """A model with the pruned layers of `sparsity`, its weights from `source` or freshly drawn from `seed`.

    A dense source is pruned on the way in; a sparse one brings its masks. Adapters that `sparsity` has are there.

    Args:
        report: takes a line about each part of the model that the source does not hold.
        with_operands: see `SparseLinear`; an `Engine` sets those that it wants.

    Raises:
        UsageError: when the source lacks the encoder, or does not fit the model or the pattern.
    """
    torch.manual_seed(seed)
    model = make_model()
    if source is not None and not source.sparsity.sparse:
        _load(model, source, report)
    for module in model.modules():
        if isinstance(module, BertEncoder):
            module.whole_last_block = not sparsity.weights_alone
    sparsify(model, sparsity, encoder_blocks(model), input_projections(model), seed, mask_init, with_operands)
    if sparsity.lora_rank:
        add_adapters(model, sparsity.lora_rank, seed)
    if source is not None and source.sparsity.sparse:
        _load(model, source, report)
    return model


def _load(model: nn.Module, source: Source, report: Callable[[str], None]) -> None:
    own = model.state_dict()
    held = {name: tensor for name, tensor in source.state.items() if name in own}
    if not held:
        raise UsageError(f"{source.path} holds none of this model's weights: is it a BERT checkpoint?")
    for key in NETWORK_KEYS:
        theirs, ours = getattr(source.config, key), getattr(model.config, key)
        if theirs != ours:
            raise UsageError(
                f"{source.path} is of a model with {key} {theirs}, but the model configuration says {ours}"
            )
    for name, tensor in held.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"{source.path}: {name} has shape {list(tensor.shape)}, but this model and these flags need "
                f"{list(own[name].shape)}"
            )
    adapters_join = not source.sparsity.lora_rank
    missing = [
        name for name in own if name not in held and not (adapters_join and name.rpartition(".")[2].startswith("lora_"))
    ]
    lacking = [name for name in missing if name.startswith(ENCODER) and not name.startswith(f"{ENCODER}pooler.")]
    if lacking:
        raise UsageError(f"{source.path} lacks {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else ""))
    if missing:
        report(f"{source.path} lacks, so these start anew: {', '.join(sorted(missing))}")
    model.load_state_dict(held, strict=False)


def build_pretraining_model(checkpoint: dict) -> nn.Module:
    """The model of a pretraining checkpoint (from `load_checkpoint`), on the CPU, in evaluation mode."""
    source = source_of(checkpoint, Path("the checkpoint"))
    model = build_model(lambda: BertForPreTraining(source.config), source.sparsity, source, seed=0)
    return model.eval()
