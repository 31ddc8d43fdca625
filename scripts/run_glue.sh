#!/usr/bin/env bash
# Fine-tune on GLUE's tasks, one after another, by the SLoPe recipe; then the table and the 8-task mean.
#
#   INIT_CHECKPOINT=ckpt_8601.pt VOCAB_FILE=vocab.txt DATA_DIR=glue OUTPUT_DIR=results/glue bash scripts/run_glue.sh
#
# Every setting here and in launch_finetuning.sh may be given in the environment. A task that was cut short goes on from
# its newest checkpoint. One that fails does not keep the others from running, but the script then ends with 1.
set -euo pipefail
# shellcheck source=scripts/launch_finetuning.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_finetuning.sh"
take_no_arguments "$@"

TASKS="${TASKS-CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE}"
DATA_DIR="${DATA_DIR:-$REPOSITORY/data/glue}"            # holds a folder of TSV files for each task
OUTPUT_DIR="${OUTPUT_DIR:-$REPOSITORY/results/glue}"     # a folder for each task
TRAIN_BATCH_SIZE="${TRAIN_BATCH_SIZE:-4}"                # over all processes
LEARNING_RATE="${LEARNING_RATE:-2.4e-6}"
MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-128}"
WARMUP_PROPORTION="${WARMUP_PROPORTION:-0.1}"
EPOCHS="${EPOCHS:-3}"
COLA_EPOCHS="${COLA_EPOCHS:-5}"

epochs_of() { if [[ $1 == CoLA ]]; then echo "$COLA_EPOCHS"; else echo "$EPOCHS"; fi; } # TASK

for_task() { # COMMAND TASK: finetune or check_finetuning
    "$1" run_glue.py --task_name "$2" --data_dir "$DATA_DIR/$2" --output_dir "$OUTPUT_DIR/$2" \
        --do_train --do_eval --do_predict --max_seq_length "$MAX_SEQ_LENGTH" --train_batch_size "$TRAIN_BATCH_SIZE" \
        --learning_rate "$LEARNING_RATE" --num_train_epochs "$(epochs_of "$2")" \
        --warmup_proportion "$WARMUP_PROPORTION"
}

check_settings
read -ra tasks <<< "$TASKS"
((${#tasks[@]} > 0)) || refuse "TASKS: must name at least one task"
for task in "${tasks[@]}"; do
    [[ -d $DATA_DIR/$task ]] || refuse "DATA_DIR=$DATA_DIR: holds no folder $task"
done
declare -A checked=() # by epochs: for the rest, the tasks' flags differ in names alone
for task in "${tasks[@]}"; do
    epochs="=$(epochs_of "$task")"
    [[ -n ${checked[$epochs]:-} ]] || for_task check_finetuning "$task"
    checked[$epochs]=1
done

failed=()
for task in "${tasks[@]}"; do
    echo "== $task: $OUTPUT_DIR/$task"
    for_task finetune "$task" || failed+=("$task")
done
if ((${#failed[@]} < ${#tasks[@]})); then
    "$(find_python)" "$REPOSITORY/scripts/summarize_glue.py" "$OUTPUT_DIR"
fi
if ((${#failed[@]} > 0)); then
    echo "run_glue.sh: error: these tasks failed: ${failed[*]}" >&2
    exit 1
fi
