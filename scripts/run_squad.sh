#!/usr/bin/env bash
# Fine-tune on SQuAD by the SLoPe recipe, answer its dev questions and score the answers.
#
#   INIT_CHECKPOINT=ckpt_8601.pt VOCAB_FILE=vocab.txt DATA_DIR=squad OUTPUT_DIR=results/squad bash scripts/run_squad.sh
#
# Every setting here and in launch_finetuning.sh may be given in the environment. A run that was cut short goes on from
# its newest checkpoint.
set -euo pipefail
# shellcheck source=scripts/launch_finetuning.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_finetuning.sh"
take_no_arguments "$@"

SQUAD_VERSION="${SQUAD_VERSION:-v1.1}"                   # or v2.0
DATA_DIR="${DATA_DIR:-$REPOSITORY/data/squad}"           # holds train-v1.1.json and dev-v1.1.json
OUTPUT_DIR="${OUTPUT_DIR:-$REPOSITORY/results/squad}"
TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-32}"               # over all processes
LEARNING_RATE="${LEARNING_RATE:-3e-5}"
EPOCHS="${EPOCHS:-2}"
MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-384}"
DOC_STRIDE="${DOC_STRIDE:-128}"

check_settings
flags=()
case $SQUAD_VERSION in
    v1.1) ;;
    v2.0) flags+=(--version_2_with_negative) ;;
    *) refuse "SQUAD_VERSION=$SQUAD_VERSION: must be v1.1 or v2.0" ;;
esac
for split in train dev; do
    [[ -f $DATA_DIR/$split-$SQUAD_VERSION.json ]] || refuse "DATA_DIR=$DATA_DIR: holds no $split-$SQUAD_VERSION.json"
done

run=(
    run_squad.py
    --train_file "$DATA_DIR/train-$SQUAD_VERSION.json" --predict_file "$DATA_DIR/dev-$SQUAD_VERSION.json"
    --output_dir "$OUTPUT_DIR" --do_train --do_predict --do_eval --max_seq_length "$MAX_SEQ_LENGTH"
    --doc_stride "$DOC_STRIDE" --train_batch_size "$TRAIN_BATCH_SIZE" --learning_rate "$LEARNING_RATE"
    --num_train_epochs "$EPOCHS" "${flags[@]}"
)
check_finetuning "${run[@]}"
finetune "${run[@]}"
