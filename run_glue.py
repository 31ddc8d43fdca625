#!/usr/bin/env python3
"""Fine-tune and evaluate on a GLUE task, from a sparse or dense checkpoint; masks and adapters stay as they are.

python run_glue.py --task_name sts-b --data_dir glue/STS-B --init_checkpoint CKPT --vocab_file vocab.txt \\
    --do_train --do_eval --output_dir results/sts-b        (torchrun --nproc_per_node=N in place of python: N GPUs)

Results: OUTPUT_DIR/eval_results.json, predictions in GLUE's submission format with --do_predict.
scripts/summarize_glue.py gathers finished tasks into the 8-task mean.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from data.features import encode
from data.glue import (
    TASKS,
    Example,
    Task,
    decide,
    find_file,
    get_task,
    labels_array,
    read_examples,
    score,
    write_predictions,
)
from modeling import BertForSequenceClassification
from training.distributed import World, reporter, this_process
from training.errors import UsageError
from training.finetune_setup import Setup, add_finetuning_flags, cache_dir, read_setup, settle_finetuning_flags
from training.finetuning import Batch, FineTuning, LabelledFeatures, run_job
from training.flags import Parser, add_switch, parse_flags, run_door, whole


def parse_arguments(argv: list[str] | None = None):
    parser = Parser(description=__doc__.split("\n")[0])
    task = parser.add_argument_group("task")
    task.add_argument(
        "--task_name", metavar="TASK", help=f"a task of GLUE, or of the shape of one: {', '.join(TASKS).lower()}"
    )
    task.add_argument("--data_dir", metavar="DIR", help="the task's folder of TSV files, as GLUE's zip holds it")
    add_finetuning_flags(parser, max_seq_length=128, epochs=3.0, batch_size=32, lr=5e-5)
    task.add_argument("--eval_batch_size", default=64, type=whole(1), help="examples of one batch of one process")
    add_switch(task, "--do_eval", "score the dev split")
    add_switch(task, "--do_predict", "write predictions for the test split")
    args = parse_flags(parser, argv)
    for name in ("task_name", "data_dir"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name}: must be given")
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UsageError("--do_train, --do_eval, --do_predict: at least one must be given")
    settle_finetuning_flags(args)
    return args


def main() -> None:
    args = parse_arguments()
    world = this_process(use_cuda=not args.no_cuda)
    report = reporter(world)
    task, setup = get_task(args.task_name), read_setup(args)
    if task.pairs:
        setup.config.check_pairs(f"--task_name {args.task_name}")
    args.task_name = task.name  # its one spelling: a run is the same run when it is started again with another
    for split in splits_to_read(args, task):
        find_file(task, args.data_dir, split)
    run_job(args, world, setup, GlueJob(args, world, task, setup, report), report)


def splits_to_read(args, task: Task) -> list[str]:
    wanted = ((args.do_train, ["train"]), (args.do_eval, task.dev_splits), (args.do_predict, task.submissions))
    return [split for asked, splits in wanted if asked for split in splits]


class GlueJob:
    """One task: its classifier, its examples, its scores."""

    def __init__(self, args, world: World, task: Task, setup: Setup, report):
        self.args, self.world, self.task, self.setup, self.report = args, world, task, setup, report
        self.name = task.name
        self.examples: dict[str, list[Example]] = {}

    def make_model(self) -> BertForSequenceClassification:
        return BertForSequenceClassification(self.setup.config, self.task.num_labels)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Squared error of a score, cross-entropy of a class, [B]."""
        if self.task.regression:
            return (logits.float().squeeze(-1) - batch["labels"]).square()
        return F.cross_entropy(logits.float(), batch["labels"], reduction="none")

    def load(self) -> LabelledFeatures | None:
        for split in splits_to_read(self.args, self.task):
            self.examples[split] = read_examples(self.task, self.args.data_dir, split, self.report)
        return self.features("train") if self.args.do_train else None

    def features(self, split: str) -> LabelledFeatures:
        examples = self.examples[split]
        arrays = encode(
            examples,
            self.setup.tokenizer,
            self.args.max_seq_length,
            cache_dir(self.args),
            show_progress=self.world.is_main,
        )
        labels = None if split in self.task.submissions else labels_array(self.task, examples)
        return LabelledFeatures(arrays, labels)

    def finish(self, tuning: FineTuning) -> dict[str, float]:
        metrics = {}
        for split in self.task.dev_splits if self.args.do_eval else ():
            labels = labels_array(self.task, self.examples[split])
            metrics |= score(self.task, split, self.predictions(tuning, split), labels)
        for split, name in self.task.submissions.items() if self.args.do_predict else ():
            predictions = self.predictions(tuning, split)
            if self.world.is_main:
                write_predictions(self.task, tuning.directory / name, self.examples[split], predictions)
        return metrics

    def predictions(self, tuning: FineTuning, split: str) -> np.ndarray:
        logits = tuning.predict(self.features(split), self.args.eval_batch_size, self.task.num_labels, split)
        return decide(self.task, logits[:, 0])


if __name__ == "__main__":
    run_door(main)
