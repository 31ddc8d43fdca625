# Sourced by run_glue.sh and run_squad.sh: the settings that they share, and one run of a fine-tuning script.
# shellcheck shell=bash

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/launch_arguments.sh
source "$REPOSITORY/scripts/launch_arguments.sh"
HELP_FILES+=("${BASH_SOURCE[0]}")

INIT_CHECKPOINT="${INIT_CHECKPOINT:-}" # a checkpoint of run_pretraining.py, or a Hugging Face folder
VOCAB_FILE="${VOCAB_FILE:-}"           # of the checkpoint's training data; a Hugging Face folder has its own
PRUNED_MATRIX="${PRUNED_MATRIX:-}"     # static-weight prunes a dense checkpoint; empty: as the checkpoint is
LORA_RANK="${LORA_RANK:-}"             # adapters of this rank join the pruned layers; empty: as the checkpoint is
SEEDS="${SEEDS:-42}"                   # several with commas: mean and spread
PRECISION="${PRECISION:-fp32}"         # bf16 on GPUs that have it
NPROC_PER_NODE="${NPROC_PER_NODE:-1}"  # processes; gpu: one a GPU
EXTRA_FLAGS="${EXTRA_FLAGS:-}"         # of the fine-tuning script, such as --disable_progress_bar

check_settings() {
    [[ -n $INIT_CHECKPOINT ]] || refuse "INIT_CHECKPOINT: must name a checkpoint or a Hugging Face folder"
    [[ -e $INIT_CHECKPOINT || $INIT_CHECKPOINT == s3://* ]] || refuse "INIT_CHECKPOINT=$INIT_CHECKPOINT: no such file"
    [[ -d $DATA_DIR ]] || refuse "DATA_DIR=$DATA_DIR: no such folder (docs/finetuning.md says how to get the data)"
    [[ -z $VOCAB_FILE || -f $VOCAB_FILE ]] || refuse "VOCAB_FILE=$VOCAB_FILE: no such file"
    check_processes
    check_output_dir
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" "$REPOSITORY/.venv/bin/python" python3; do
        if [[ -n $candidate ]] && command -v "$candidate"; then return; fi
    done
    refuse "PYTHON: no Python found; scripts/environment.sh makes the environment"
}

finetuning_flags() { # FLAGS...: sets FLAGS, the shared settings and those of one run
    local -a extra
    FLAGS=(--init_checkpoint "$INIT_CHECKPOINT" --seeds "$SEEDS" --precision "$PRECISION")
    if [[ -n $VOCAB_FILE ]]; then FLAGS+=(--vocab_file "$VOCAB_FILE"); fi
    if [[ -n $PRUNED_MATRIX ]]; then FLAGS+=(--pruned_matrix "$PRUNED_MATRIX"); fi
    if [[ -n $LORA_RANK ]]; then FLAGS+=(--add_lora True --lora_rank "$LORA_RANK"); fi
    read -ra extra <<< "$EXTRA_FLAGS"
    FLAGS+=("$@" "${extra[@]}")
}

check_finetuning() { # SCRIPT FLAGS...: of the run that `finetune` with the same arguments would be
    local python
    python="$(find_python)" || exit
    finetuning_flags "${@:2}"
    check_flags "$python" "$1" "${FLAGS[@]}"
}

finetune() { # SCRIPT FLAGS...
    local python
    python="$(find_python)" || exit
    finetuning_flags "${@:2}"
    local -a launcher=("$python")
    if [[ $NPROC_PER_NODE != 1 ]]; then
        launcher+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC_PER_NODE")
    fi
    "${launcher[@]}" "$REPOSITORY/$1" "${FLAGS[@]}"
}
