"""What the fine-tuning doors begin with: the published scripts' common flags, and the model that they name."""

from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from configuration import BertConfig
from data.stages import check_file, check_folders
from data.tokenization import load_tokenizer, vocabulary_sha256
from optimization import DECAYS, OPTIMIZERS
from training.assembly import Source, read_source
from training.errors import UsageError
from training.flags import (
    add_dense_kernels_flag,
    add_graph_flag,
    add_padding_flags,
    add_precision_flags,
    add_switch,
    parse_seeds,
    real,
    settle_precision,
    whole,
)
from training.sparsity import (
    SparsityConfig,
    add_sparsity_flags,
    check_adapter_flags,
    check_backend_flag,
    sparsity_from_flags,
)


def add_finetuning_flags(parser, max_seq_length: int, epochs: float, batch_size: int, lr: float) -> None:
    """The flags that the published GLUE and SQuAD scripts have in common."""
    model = parser.add_argument_group("model and files")
    model.add_argument(
        "--init_checkpoint",
        metavar="PATH",
        help="weights to start from: a checkpoint of this suite or a Hugging Face folder",
    )
    model.add_argument(
        "--bert_model", metavar="NAME", help="a label for the run, or a Hugging Face folder to use as --init_checkpoint"
    )
    model.add_argument("--config_file", metavar="JSON", help="the model's sizes; by default as the checkpoint says")
    model.add_argument(
        "--vocab_file", metavar="FILE", help="the vocabulary, one token a line; a Hugging Face folder has its own"
    )
    model.add_argument("--tokenizer", choices=("wordpiece", "bpe"), help="kind of vocabulary; by default the model's")
    lower = "lower-case the text; when not given, as the model's configuration says"
    add_switch(model, "--do_lower_case", lower, default=None)
    model.add_argument("--output_dir", metavar="DIR", help="folder for results, checkpoints and logs")
    model.add_argument(
        "--cache_dir", metavar="DIR", help="where encoded examples are kept; by default below --output_dir"
    )
    add_switch(model, "--skip_cache", "encode anew and keep nothing")
    add_switch(model, "--skip_checkpoint", "write no checkpoints")
    work = parser.add_argument_group("training")
    add_switch(work, "--do_train", "train")
    work.add_argument("--max_seq_length", default=max_seq_length, type=whole(8), help="most tokens of an example")
    work.add_argument(
        "--train_batch_size",
        default=batch_size,
        type=whole(1),
        help="examples of one optimizer step, over all processes",
    )
    work.add_argument(
        "--gradient_accumulation_steps", default=1, type=whole(1), help="micro-steps that a step is cut into"
    )
    work.add_argument("--num_train_epochs", default=epochs, type=real(0), help="passes over the training set")
    work.add_argument("--max_steps", default=-1, type=whole(-1), help="optimizer steps; -1: as --num_train_epochs says")
    work.add_argument("--optimizer", default="adamw", choices=tuple(OPTIMIZERS), help="the optimizer")
    work.add_argument("--learning_rate", default=lr, type=real(0), help="peak learning rate")
    work.add_argument("--lr_decay", default="linear", choices=tuple(DECAYS), help="schedule after the warm-up")
    work.add_argument(
        "--warmup_proportion", default=0.1, type=real(0, 1), help="share of the steps that the rate rises in"
    )
    work.add_argument("--weight_decay", default=0.01, type=real(0), help="of all weights but biases and LayerNorms")
    work.add_argument("--max_grad_norm", default=1.0, type=real(0), help="clip the global gradient norm to this")
    work.add_argument("--seed", default=42, type=whole(0), help="of new weights, the order of examples and dropout")
    work.add_argument("--seeds", metavar="LIST", help="several seeds, 0,1,2: one run each, then mean and spread")
    add_precision_flags(work)
    add_switch(work, "--amp", "the same as --fp16")
    work.add_argument("--loss_scale", default=0.0, type=real(), help="0: dynamic loss scaling, the only kind here")
    add_switch(work, "--no_cuda", "run on the CPU")
    speed = parser.add_argument_group("speed")
    add_switch(
        speed, "--compile", "torch.compile for the blocks, on a GPU: takes some 20 seconds before the first step"
    )
    add_graph_flag(speed)
    add_padding_flags(speed)
    add_dense_kernels_flag(speed)
    add_sparsity_flags(parser)
    logs = parser.add_argument_group("logs and checkpoints")
    logs.add_argument("--log_freq", default=50, type=whole(1), help="steps between two lines in the text log")
    logs.add_argument(
        "--json-summary",
        metavar="FILE",
        help="write the metrics as a dllogger line here; without --do_eval, the training's",
    )
    add_switch(logs, "--disable_progress_bar", "no progress bar", aliases=("--disable-progress-bar",))
    logs.add_argument("--num_steps_per_checkpoint", default=500, type=whole(1), help="steps between two checkpoints")
    logs.add_argument("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch; not needed")


def settle_finetuning_flags(args) -> None:
    """Check what the flags say together; afterwards `args.precision` and `args.seed_list` hold the outcome."""
    if args.output_dir is None:
        raise UsageError("--output_dir: must be given")
    check_folders("--output_dir", Path(args.output_dir))
    if args.cache_dir is not None and not args.skip_cache:
        check_folders("--cache_dir", Path(args.cache_dir))
    if args.json_summary is not None:
        check_file("--json-summary", Path(args.json_summary))
        if not (args.do_train or args.do_eval):
            raise UsageError("--json-summary: predictions alone measure nothing; add --do_eval, or leave it out")
    if args.loss_scale != 0:
        raise UsageError(f"--loss_scale {args.loss_scale:g}: only 0, dynamic loss scaling, is supported")
    if args.max_steps == 0:
        raise UsageError("--max_steps 0: must be at least 1, or -1 to go by --num_train_epochs")
    if args.max_steps < 0 and args.num_train_epochs == 0:
        raise UsageError("--num_train_epochs 0: must be above 0; to evaluate alone, leave --do_train out")
    if args.amp:
        args.fp16 = True
        args.given_on_command_line.add("fp16")
    settle_precision(args)
    args.seed_list = [args.seed] if args.seeds is None else parse_seeds(args.seeds, "--seeds")
    if args.init_checkpoint is None and args.bert_model is not None and Path(args.bert_model).is_dir():
        args.init_checkpoint = args.bert_model
    if args.init_checkpoint is None:
        raise UsageError("--init_checkpoint: must name a checkpoint or a Hugging Face folder (nothing is downloaded)")


@dataclass(frozen=True)
class Setup:
    """What to fine-tune and how its text is read."""

    source: Source
    config: BertConfig
    sparsity: SparsityConfig
    tokenizer: Tokenizer


def read_setup(args) -> Setup:
    """Read the checkpoint and settle sizes, sparsity and vocabulary with the flags.

    Raises:
        UsageError: for contradictions, and when there is no vocabulary or another than the model was trained with.
    """
    source = read_source(args.init_checkpoint)
    config = source.config if args.config_file is None else BertConfig.from_json_file(args.config_file, "--config_file")
    if config.vocabulary_sha256 is None:
        config = replace(config, vocabulary_sha256=source.config.vocabulary_sha256)
    sparsity = sparsity_from_flags(args, source.sparsity if source.sparsity.sparse else None)
    check_adapter_flags(args, sparsity)
    check_backend_flag(args, sparsity)
    if args.add_lora == "True" and not sparsity.lora_rank:
        sparsity = replace(sparsity, lora_rank=args.lora_rank)
    if args.max_seq_length > config.max_position_embeddings:
        raise UsageError(
            f"--max_seq_length {args.max_seq_length}: the model has {config.max_position_embeddings} positions"
        )
    if (args.tokenizer or config.tokenizer) != "wordpiece":
        raise UsageError(
            f"--tokenizer {args.tokenizer or config.tokenizer}: fine-tuning reads wordpiece vocabularies only"
        )
    lowercase = config.lowercase if args.do_lower_case is None else args.do_lower_case
    vocab_file = _find_vocabulary(args, source, config)
    tokenizer = load_tokenizer(vocab_file, lowercase)
    config.check_vocabulary(vocab_file, tokenizer.get_vocab_size(), vocabulary_sha256(tokenizer))
    return Setup(source, config, sparsity, tokenizer)


def _find_vocabulary(args, source: Source, config: BertConfig) -> Path:
    candidates = [args.vocab_file, config.vocab_file]
    if source.path.is_dir():
        candidates.append(source.path / "vocab.txt")
    named = [Path(candidate) for candidate in candidates if candidate is not None]
    if not named:
        raise UsageError("--vocab_file: must be given, since the checkpoint does not name its vocabulary")
    if not named[0].is_file():
        raise UsageError(f"--vocab_file {named[0]}: no such file")
    return named[0]


def cache_dir(args) -> Path | None:
    """Where encoded examples are kept; None with `--skip_cache`."""
    return None if args.skip_cache else Path(args.cache_dir or Path(args.output_dir) / "cache")
