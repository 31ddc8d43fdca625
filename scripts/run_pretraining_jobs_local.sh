#!/usr/bin/env bash
# Pretrain BERT-Large by the SLoPe recipe on one machine: all its GPUs or, without one, CPU processes.
#
#   DATA_DIR=/data/bert OUTPUT_DIR=/runs/slope bash scripts/run_pretraining_jobs_local.sh
#
# Every setting below may be given in the environment or changed here. Phase 1 is followed by phase 2; a phase that was
# cut short goes on from its newest checkpoint, and one that failed stops the script. TERM, INT (Ctrl-C) and USR1 save a
# checkpoint and end the script with 0: start it again to go on.
set -euo pipefail
REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

set -a # the settings are exported
# ---- the recipe
PHASES="${PHASES-1 2}"                                      # in this order
CONFIG_DIR="${CONFIG_DIR:-$REPOSITORY/config}"              # the phases' steps, batches and learning rates
DATA_DIR="${DATA_DIR:-$REPOSITORY/datasets}"                # from scripts/create_datasets.sh; or s3://BUCKET/PREFIX
OUTPUT_DIR="${OUTPUT_DIR:-$REPOSITORY/results/bert_large}"  # checkpoints and logs
OPTIMIZER="${OPTIMIZER:-fused-lamb}"
WEIGHT_DECAY="${WEIGHT_DECAY:-0.01}"
PRUNED_MATRIX="${PRUNED_MATRIX:-static-weight}"             # SLoPe; none for a dense model
SKIP_FIRST_BLOCK="${SKIP_FIRST_BLOCK:-False}"
SKIP_LAST_BLOCK="${SKIP_LAST_BLOCK:-False}"
SKIP_ATTENTION="${SKIP_ATTENTION:-False}"
REDUCTION_DIM="${REDUCTION_DIM:-True}"
UNSTRUCTURED_MASKING="${UNSTRUCTURED_MASKING:-False}"
UNSTRUCTURED_MASK_SPARSITY="${UNSTRUCTURED_MASK_SPARSITY:-60}"
SPARSITY_INCREMENT="${SPARSITY_INCREMENT:--1}"              # -1: 2:4 in every block
ADD_LORA="${ADD_LORA:-lazy}"                                # for the last phase's last steps; False for a dense model
LORA_RANK="${LORA_RANK:-4}"                                 # 4, 16 and 64 in the paper
NUM_STEPS_PER_CHECKPOINT="${NUM_STEPS_PER_CHECKPOINT:-100}"
EVAL_INTERVAL="${EVAL_INTERVAL:-100}"                       # steps between held-out evaluations; 0: none
EXTRA_FLAGS="${EXTRA_FLAGS:-}"                              # of run_pretraining.py, such as --local_batch_size 32
STOP_GRACE="${STOP_GRACE:-240}"                             # seconds that saving may take after a signal
# ---- the machine
NPROC_PER_NODE="${NPROC_PER_NODE:-auto}"                    # auto: one process a GPU; without one, one a core
MAX_RESTARTS="${MAX_RESTARTS:-3}"                           # of a phase when a process crashes; 0: none
set +a

# shellcheck source=scripts/launch_pretraining.sh
source "$REPOSITORY/scripts/launch_pretraining.sh"
take_no_arguments "$@"

start_phase() { exec bash "$LAUNCHER" run "$1"; }

code=0
run_phases || code=$?
if ((code == STOPPED)); then
    say "stopped by $STOP_SIGNAL: start it again to go on"
    code=0
fi
exit "$code"
