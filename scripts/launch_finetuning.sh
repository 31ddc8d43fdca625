# Sourced by run_glue.sh and run_squad.sh: the settings that they share, and one run of a fine-tuning script.
# shellcheck shell=bash

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

INIT_CHECKPOINT="${INIT_CHECKPOINT:-}" # a checkpoint of run_pretraining.py, or a Hugging Face folder
VOCAB_FILE="${VOCAB_FILE:-}"           # of the checkpoint's training data; a Hugging Face folder has its own
PRUNED_MATRIX="${PRUNED_MATRIX:-}"     # static-weight prunes a dense checkpoint; empty: as the checkpoint is
LORA_RANK="${LORA_RANK:-}"             # adapters of this rank join the pruned layers; empty: as the checkpoint is
SEEDS="${SEEDS:-42}"                   # several with commas: mean and spread
PRECISION="${PRECISION:-fp32}"         # bf16 on GPUs that have it
NPROC_PER_NODE="${NPROC_PER_NODE:-1}"  # processes; gpu: one a GPU
EXTRA_FLAGS="${EXTRA_FLAGS:-}"         # of the fine-tuning script, such as --disable_progress_bar

refuse() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

check_settings() {
    [[ -n $INIT_CHECKPOINT ]] || refuse "INIT_CHECKPOINT: must name a checkpoint or a Hugging Face folder"
    [[ -e $INIT_CHECKPOINT || $INIT_CHECKPOINT == s3://* ]] || refuse "INIT_CHECKPOINT=$INIT_CHECKPOINT: no such file"
    [[ -d $DATA_DIR ]] || refuse "DATA_DIR=$DATA_DIR: no such folder (docs/finetuning.md says how to get the data)"
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" "$REPOSITORY/.venv/bin/python" python3; do
        if [[ -n $candidate ]] && command -v "$candidate"; then return; fi
    done
    refuse "PYTHON: no Python found; scripts/environment.sh makes the environment"
}

finetune() { # SCRIPT FLAGS...
    local script="$1" python
    shift
    python="$(find_python)" || exit
    local -a launcher=("$python") flags=(--init_checkpoint "$INIT_CHECKPOINT" --seeds "$SEEDS" --precision "$PRECISION")
    if [[ $NPROC_PER_NODE != 1 ]]; then
        launcher+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC_PER_NODE")
    fi
    if [[ -n $VOCAB_FILE ]]; then flags+=(--vocab_file "$VOCAB_FILE"); fi
    if [[ -n $PRUNED_MATRIX ]]; then flags+=(--pruned_matrix "$PRUNED_MATRIX"); fi
    if [[ -n $LORA_RANK ]]; then flags+=(--add_lora True --lora_rank "$LORA_RANK"); fi
    local -a extra
    read -ra extra <<< "$EXTRA_FLAGS"
    "${launcher[@]}" "$REPOSITORY/$script" "${flags[@]}" "$@" "${extra[@]}"
}
