#!/usr/bin/env python3
"""Pretrain BERT with SLoPe: 2:4 double-pruned weights from the first step to the last, low-rank adapters at the end.

One process:        python run_pretraining.py --input_dir DATA/phase1/train --output_dir OUT --config_file CONFIG.json
GPUs of one node:   torchrun --nproc_per_node=8 run_pretraining.py ...
Several nodes:      scripts/run_pretraining_jobs_slurm.sh, scripts/run_pretraining_jobs_ssh.sh

The recipe's settings are in config/bert_pretraining_phase{1,2,3}_config.json; flags on the command line win over them.
A run goes on from the newest checkpoint in OUT/pretrain_ckpts, and a finished one ends at once.
"""

from dataclasses import replace
from pathlib import Path

from configuration import BertConfig
from data.shard_files import ShardSet
from data.storage import local_copy
from modeling import BertForPreTraining
from optimization import DECAYS, OPTIMIZERS
from training.assembly import build_model
from training.checkpoint import remove_unfinished_checkpoints
from training.distributed import OutputLock, StopSignal, World, agree, process_group, reporter, this_process
from training.errors import UsageError
from training.flags import (
    Parser,
    add_dense_kernels_flag,
    add_graph_flag,
    add_padding_flags,
    add_precision_flags,
    add_switch,
    parse_flags,
    real,
    run_door,
    settle_precision,
    whole,
)
from training.logs import Logger
from training.phases import Start, check_same_start, find_start
from training.pretraining import CHECKPOINTS, METRICS, PretrainingRun
from training.sparsity import (
    SparsityConfig,
    add_sparsity_flags,
    check_adapter_flags,
    check_backend_flag,
    sparsity_from_flags,
)


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    files = parser.add_argument_group("files")
    files.add_argument("--config_file", metavar="JSON", help="defaults for any of these flags")
    files.add_argument("--model_config_file", metavar="JSON", help="the model's sizes (required)")
    files.add_argument(
        "--input_dir", metavar="DIR", help="folder of HDF5 shards, here or s3://BUCKET/PREFIX (required)"
    )
    files.add_argument("--output_dir", metavar="DIR", help="folder for checkpoints and logs (required)")
    files.add_argument("--eval_dir", metavar="DIR", help="folder of held-out shards, here or s3://BUCKET/PREFIX")
    files.add_argument(
        "--init_checkpoint", metavar="PATH", help="start from these weights: a checkpoint or a Hugging Face folder"
    )
    batch = parser.add_argument_group("steps and batches")
    batch.add_argument("--max_steps", default=1000, type=whole(1), help="optimizer steps of this phase")
    batch.add_argument(
        "--previous_phase_end_step",
        default=0,
        type=whole(0),
        help="steps that the phases before took; this one starts from that checkpoint",
    )
    batch.add_argument("--global_batch_size", default=2**16, type=whole(1), help="sequences of one optimizer step")
    batch.add_argument(
        "--local_batch_size", default=8, type=whole(1), help="sequences of one micro-step of one process"
    )
    batch.add_argument(
        "--seed", default=42, type=whole(0, 2**32 - 1), help="seed of new weights, masks, sample order and dropout"
    )
    batch.add_argument("--masked_token_fraction", default=0.2, type=real(0, 1), help="share of the tokens to predict")
    batch.add_argument(
        "--max_predictions_per_seq", default=80, type=whole(1), help="most tokens to predict of a sequence"
    )
    batch.add_argument("--num_workers", default=1, type=whole(0), help="loader processes of each process; 0: none")
    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument(
        "--optimizer",
        default="lamb",
        choices=tuple(OPTIMIZERS),
        help="lamb is ours, by kernels of its own on a GPU; fused-lamb is NVIDIA's apex where it is installed",
    )
    optimizer.add_argument("--learning_rate", default=5e-5, type=real(0), help="peak learning rate")
    optimizer.add_argument("--lr_decay", default="poly", choices=tuple(DECAYS), help="schedule after the warm-up")
    optimizer.add_argument(
        "--warmup_proportion",
        default=0.01,
        type=real(0, 1),
        help="share of the phase's steps that the learning rate rises in",
    )
    optimizer.add_argument(
        "--weight_decay",
        default=0.01,
        type=real(0),
        help="weight decay; none on biases and LayerNorms, adapters have their own",
    )
    optimizer.add_argument("--max_grad_norm", default=1.0, type=real(0), help="clip the global gradient norm to this")
    add_precision_flags(optimizer)
    optimizer.add_argument(
        "--gradient_communication",
        default="fp32",
        choices=("fp32", "bf16"),
        help="what gradients are averaged over processes in; bf16 halves the bytes and rounds to 8 significant bits",
    )
    add_switch(optimizer, "--checkpoint_activations", "recompute activations in the backward pass, to save memory")
    speed = parser.add_argument_group("speed")
    add_switch(speed, "--no_compile", "no torch.compile, which a GPU's runs use")
    add_graph_flag(speed)
    add_padding_flags(speed)
    add_dense_kernels_flag(speed)
    sparsity = add_sparsity_flags(parser, add_lora_words=("True", "False", "lazy"))
    sparsity.add_argument(
        "--lazy_lora_fraction", default=0.01, type=real(0, 1), help="share of all steps that lazy adapters train for"
    )
    logs = parser.add_argument_group("logs and checkpoints")
    logs.add_argument("--log_prefix", default="logfile", metavar="NAME", help="name of this phase's log files")
    logs.add_argument("--num_steps_per_checkpoint", default=100, type=whole(1), help="steps between two checkpoints")
    logs.add_argument("--keep_checkpoints", default=3, type=whole(1), help="newest checkpoints of this phase to keep")
    add_switch(logs, "--skip_checkpoint", "write no checkpoints")
    logs.add_argument("--eval_interval", default=100, type=whole(1), help="steps between two held-out evaluations")
    logs.add_argument("--eval_samples", default=2000, type=whole(1), help="most held-out sequences to evaluate on")
    add_switch(logs, "--disable_progress_bar", "no progress bar")
    logs.add_argument(
        "--local_rank", "--local-rank", type=whole(-1), help="set by torch.distributed.launch; not needed"
    )
    args = parse_flags(parser, argv, file_flag="config_file")
    for name in ("input_dir", "output_dir", "model_config_file"):
        if not getattr(args, name):
            raise UsageError(f"--{name}: must be given, here or in --config_file")
    if args.eval_dir is not None and Path(args.eval_dir).resolve() == Path(args.input_dir).resolve():
        raise UsageError(f"--eval_dir {args.eval_dir}: is --input_dir, too; held-out shards must be others")
    if not args.log_prefix or "/" in args.log_prefix:
        raise UsageError(f"--log_prefix {args.log_prefix}: must be a name without directories")
    settle_precision(args)
    return args


def main() -> None:
    args = parse_arguments()
    world = this_process()
    report = reporter(world)

    # Everything that can be wrong is found here, on every rank, before anything is started or written.
    config = BertConfig.from_json_file(args.model_config_file, "--model_config_file")
    shards, heldout = open_shards(args, config)
    start = find_start(args, Path(args.output_dir) / CHECKPOINTS, report)
    if start.finished:
        report(f"finished: {args.output_dir} has step {start.step}, and this phase ends at {start.phase_end}")
        return
    config = replace(config, vocabulary_sha256=agreed_vocabulary(config, start, shards, heldout))
    sparsity = settle_sparsity(args, start)
    model = build_model(
        lambda: BertForPreTraining(config),
        sparsity,
        start.source,
        seed=args.seed,
        mask_init=args.mask_init,
        report=report,
        with_operands=False,
    )
    run = PretrainingRun(args, config, world, start, sparsity, model, shards, heldout)
    start = replace(start, source=None, checkpoint=None)  # as large as model and optimizer together

    stop = StopSignal()
    with process_group(world):
        lock = OutputLock(world, Path(args.output_dir))
        check_same_start(world, start, Path(args.output_dir) / CHECKPOINTS, shards.total)
        if world.is_main:
            remove_unfinished_checkpoints(Path(args.output_dir) / CHECKPOINTS)
        logger = open_logger(args, world, start)
        try:
            run.train(logger, stop)
        finally:
            run.engine.disconnect()
            logger.close()
            lock.release()


def open_shards(args, config: BertConfig) -> tuple[ShardSet, ShardSet | None]:
    """The training and held-out shards, checked against the model."""
    opened = []
    for name in ("input_dir", "eval_dir"):
        address = getattr(args, name)
        if address is None:
            opened.append(None)
            continue
        shards = ShardSet(local_copy(address), flag=f"--{name}")
        sizes = (config.vocab_size, config.max_position_embeddings, args.max_predictions_per_seq)
        shards.check(*sizes, config.type_vocab_size)
        if config.next_sentence and not shards.has_next_sentence:
            raise UsageError(
                f"--{name} {address}: holds single sequences, but the model configuration asks for next-sentence "
                "prediction; set next_sentence in it to false, or give shards of sentence pairs"
            )
        opened.append(shards)
    return opened[0], opened[1]


def agreed_vocabulary(config: BertConfig, start: Start, shards: ShardSet, heldout: ShardSet | None) -> str | None:
    """The hash of the vocabulary that model and shards are of, from those that know it.

    Raises:
        UsageError: they are of different ones.
    """
    known = {"the model configuration": config.vocabulary_sha256}
    if start.source is not None:
        known[f"the model of {start.source.path}"] = start.source.config.vocabulary_sha256
    for part in (shards, heldout):
        if part is not None:
            known[f"{part.flag} {part.files[0].parent}"] = part.vocabulary_sha256
    first, agreed = None, None
    for who, sha256 in known.items():
        if agreed is None:
            first, agreed = who, sha256
        elif sha256 not in (None, agreed):
            raise UsageError(f"{who}: is of another vocabulary than {first}; give what belongs together")
    return agreed


def settle_sparsity(args, start: Start) -> SparsityConfig:
    """The sparsity that flags and checkpoint agree on; a dense checkpoint may be pruned where a phase begins."""
    saved = None if start.source is None else start.source.sparsity
    decided = saved is not None and (saved.sparse or start.within_phase)
    sparsity = sparsity_from_flags(args, saved if decided else None)
    check_adapter_flags(args, sparsity)
    check_backend_flag(args, sparsity)
    return sparsity


def open_logger(args, world: World, start: Start) -> Logger:
    """This run's logs; where rank 0 cannot write them, all ranks end."""
    logger = error = None
    try:
        logger = Logger(Path(args.output_dir), args.log_prefix, METRICS, start.step, enabled=world.is_main)
    except OSError as failed:
        error = UsageError(f"--output_dir {args.output_dir}: cannot write {failed.filename} ({failed.strerror})")
    agree(world, error)
    return logger


if __name__ == "__main__":
    run_door(main)
