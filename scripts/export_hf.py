#!/usr/bin/env python3
"""Write a pretraining checkpoint as a Hugging Face folder.

    python scripts/export_hf.py --checkpoint OUT/pretrain_ckpts/ckpt_8601.pt --output_dir DIR

Then `AutoModelForPreTraining.from_pretrained(DIR)` gives the same logits, and `AutoTokenizer.from_pretrained(DIR)` the
tokens that it was trained on. Pruned weights are written as dense ones with zeros, adapters are merged into them, and
the vocabulary's padding is cut off.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configuration import BertConfig
from data.tokenization import KINDS
from sparse_ops import dense_state_dict
from training.assembly import build_pretraining_model
from training.checkpoint import load_checkpoint
from training.errors import UsageError
from training.flags import Parser, run_door
from training.hf_folders import save_hf_folder


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a ckpt_STEP.pt of run_pretraining.py")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write; made if it is not there")
    parser.add_argument(
        "--vocab_file",
        metavar="FILE",
        help="vocabulary of the training data; by default the model's vocab_file, else the one above its --input_dir",
    )
    return parser.parse_args()


def read_pretraining_checkpoint(path: str) -> dict:
    """Raise UsageError for anything that does not hold every weight of a model with the pretraining heads."""
    checkpoint = load_checkpoint(path, "--checkpoint")
    if "cls.predictions.bias" not in checkpoint.get("model", {}):
        raise UsageError(f"--checkpoint {path}: holds no masked-token head; it must be one of run_pretraining.py")
    return checkpoint


def find_vocabulary(given: str | None, config: BertConfig, input_dir: str) -> Path:
    """The vocabulary file: the given one, the model config's, or the one of the shards (DIR/phase1/train/...: in DIR).

    Raises UsageError where there is none.
    """
    named = given or config.vocab_file
    if named is not None:
        return Path(named)
    shards = Path(input_dir).resolve()
    for folder in (shards, *shards.parents[:3]):
        if (folder / KINDS[config.tokenizer]).is_file():
            return folder / KINDS[config.tokenizer]
    raise UsageError(f"--vocab_file: must be given, as no {KINDS[config.tokenizer]} lies in {input_dir} or above it")


def main() -> None:
    args = parse_arguments()
    checkpoint = read_pretraining_checkpoint(args.checkpoint)
    config = BertConfig.from_dict(checkpoint["model_config"], source=args.checkpoint)
    vocabulary = find_vocabulary(args.vocab_file, config, checkpoint["arguments"]["input_dir"])
    weights = dense_state_dict(build_pretraining_model(checkpoint))
    save_hf_folder(args.output_dir, config, weights, vocabulary)
    print(f"{args.output_dir}: step {checkpoint['step']} of {config.model_name}, vocabulary {vocabulary}")


if __name__ == "__main__":
    run_door(main)
