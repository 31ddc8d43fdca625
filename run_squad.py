#!/usr/bin/env python3
"""Fine-tune and evaluate on SQuAD v1.1 or v2.0, from a sparse or dense checkpoint; masks and adapters stay as they are.

python run_squad.py --train_file train-v1.1.json --predict_file dev-v1.1.json --init_checkpoint CKPT \\
    --vocab_file vocab.txt --do_train --do_predict --do_eval --output_dir results/squad
    (torchrun --nproc_per_node=N in place of python: N GPUs)

Results: OUTPUT_DIR/predictions.json, nbest_predictions.json and, with --do_eval, eval_results.json.
"""

import torch.nn.functional as F
from torch import Tensor

from data.squad import Example, read_squad
from data.squad_answers import Predictions, best_null_thresholds, evaluate, predict_answers, write_predictions
from data.squad_windows import SPECIAL_TOKENS_OF_A_WINDOW, Features, load_squad
from modeling import BertForQuestionAnswering
from training.distributed import World, reporter, this_process
from training.errors import UsageError
from training.finetune_setup import Setup, add_finetuning_flags, cache_dir, read_setup, settle_finetuning_flags
from training.finetuning import LOSING_SCORE, Batch, FineTuning, run_job
from training.flags import Parser, add_switch, parse_flags, real, run_door, whole


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    task = parser.add_argument_group("task")
    task.add_argument("--train_file", metavar="JSON", help="SQuAD's training questions")
    task.add_argument("--predict_file", metavar="JSON", help="the questions to answer")
    task.add_argument("--doc_stride", default=128, type=whole(1), help="tokens between the begins of two windows")
    task.add_argument("--max_query_length", default=64, type=whole(1), help="most tokens of a question")
    task.add_argument("--n_best_size", default=20, type=whole(1), help="answers of each question to keep")
    task.add_argument("--max_answer_length", default=30, type=whole(1), help="most tokens of an answer")
    add_switch(task, "--version_2_with_negative", "some questions have no answer, as in v2.0")
    task.add_argument(
        "--null_score_diff_threshold", default=0.0, type=real(), help="v2.0: no answer where its score leads by more"
    )
    add_finetuning_flags(parser, max_seq_length=384, epochs=2.0, batch_size=32, lr=3e-5)
    task.add_argument("--predict_batch_size", default=32, type=whole(1), help="windows of one batch of one process")
    add_switch(task, "--do_predict", "answer the questions of --predict_file")
    add_switch(task, "--do_eval", "score the answers: exact match and F1")
    task.add_argument(
        "--eval_script", metavar="FILE", help="accepted for old command lines: scoring is built in and the same"
    )
    args = parse_flags(parser, argv)
    if not (args.do_train or args.do_predict or args.do_eval):
        raise UsageError("--do_train, --do_predict, --do_eval: at least one must be given")
    for name, needed in (("train_file", args.do_train), ("predict_file", args.do_predict or args.do_eval)):
        if needed and getattr(args, name) is None:
            raise UsageError(f"--{name}: must be given")
    settle_finetuning_flags(args)
    most = args.max_seq_length - SPECIAL_TOKENS_OF_A_WINDOW - 1  # beside a question of one token
    if args.doc_stride > most:
        raise UsageError(
            f"--doc_stride {args.doc_stride}: a window of --max_seq_length {args.max_seq_length} holds {most} tokens "
            "of the context at most, so it must not be larger than that"
        )
    if args.null_score_diff_threshold != 0 and not args.version_2_with_negative:
        raise UsageError(
            f"--null_score_diff_threshold {args.null_score_diff_threshold:g}: only with --version_2_with_negative may "
            "a question have no answer; give that, too, or leave this out"
        )
    return args


def main() -> None:
    args = parse_arguments()
    world = this_process(use_cuda=not args.no_cuda)
    setup = read_setup(args)
    setup.config.check_pairs(f"--init_checkpoint {args.init_checkpoint}")
    run_job(args, world, setup, SquadJob(args, world, setup), reporter(world))


class SquadJob:
    """Start and end of each answer, from the windows that a question's context is read through."""

    def __init__(self, args, world: World, setup: Setup):
        self.args, self.world, self.setup = args, world, setup
        self.name = "SQuAD v2.0" if args.version_2_with_negative else "SQuAD v1.1"
        self.answers = args.do_predict or args.do_eval

    def make_model(self) -> BertForQuestionAnswering:
        return BertForQuestionAnswering(self.setup.config)

    def losses(self, logits: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """Mean cross-entropy of the answer's first and last position, [B]; no position is in the padding.

        Else a window's loss would depend on the length that its batch happens to have.
        """
        padding = batch["attention_mask"] == 0
        start, end = (scores.float().masked_fill(padding, LOSING_SCORE) for scores in logits)
        of_start = F.cross_entropy(start, batch["start_positions"], reduction="none")
        return (of_start + F.cross_entropy(end, batch["end_positions"], reduction="none")) / 2

    def load(self) -> Features | None:
        if self.args.do_train and self.answers:
            # A mistake in this file is found before the other one is encoded and kept.
            read_squad(self.args.train_file, self.args.version_2_with_negative)
        if self.answers:
            self.questions, self.windows = self.read(self.args.predict_file, need_answers=self.args.do_eval)
        return self.read(self.args.train_file)[1] if self.args.do_train else None

    def read(self, path: str, need_answers: bool = True) -> tuple[list[Example], Features]:
        args = self.args
        return load_squad(
            path,
            self.setup.tokenizer,
            version_2=args.version_2_with_negative,
            need_answers=need_answers,
            max_seq_length=args.max_seq_length,
            doc_stride=args.doc_stride,
            max_query_length=args.max_query_length,
            cache_dir=cache_dir(args),
            show_progress=self.world.is_main,
        )

    def finish(self, tuning: FineTuning) -> dict[str, float]:
        if not self.answers:
            return {}
        args = self.args
        logits = tuning.predict(self.windows, args.predict_batch_size, args.max_seq_length, "answering")
        predictions = predict_answers(
            self.questions,
            self.windows,
            logits[:, 0],
            logits[:, 1],
            n_best_size=args.n_best_size,
            max_answer_length=args.max_answer_length,
            version_2=args.version_2_with_negative,
            null_score_diff_threshold=args.null_score_diff_threshold,
        )
        if self.world.is_main:
            tuning.directory.mkdir(parents=True, exist_ok=True)
            write_predictions(tuning.directory, predictions)
        return self.score(predictions) if args.do_eval else {}

    def score(self, predictions: Predictions) -> dict[str, float]:
        metrics = evaluate(self.questions, predictions.answers, self.args.version_2_with_negative)
        return metrics | (best_null_thresholds(self.questions, predictions) if predictions.null_odds else {})


if __name__ == "__main__":
    run_door(main)
