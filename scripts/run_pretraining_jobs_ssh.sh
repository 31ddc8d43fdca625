#!/usr/bin/env bash
# Pretrain BERT-Large by the SLoPe recipe on machines that are reached by ssh, without a scheduler.
#
#   NODES_FILE=nodes.txt DATA_DIR=/data/bert OUTPUT_DIR=/runs/slope bash scripts/run_pretraining_jobs_ssh.sh
#
# NODES_FILE has one machine a line, as ssh takes it; # starts a comment. The repository, its environment and DATA_DIR
# have the same paths on all of them, OUTPUT_DIR is a folder that all of them share, and ssh asks for no password. Every
# setting below may be given in the environment or changed here. TERM, INT (Ctrl-C) and USR1 save a checkpoint and end
# the script with 0; when one machine fails, or this script is killed, the others end too.
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
# ---- the machines
NODES_FILE="${NODES_FILE:-$REPOSITORY/nodes.txt}"
RDZV_PORT="${RDZV_PORT:-29400}"                             # a free port of the first machine, open to the others
SSH_FLAGS="${SSH_FLAGS:-}"                                  # such as -i KEY
REMOTE_ENV="${REMOTE_ENV:-}"                                # such as NCCL_SOCKET_IFNAME=eth0 SLOPE_CACHE=/scratch
NPROC_PER_NODE="${NPROC_PER_NODE:-gpu}"                     # gpu: one process a GPU
MAX_RESTARTS="${MAX_RESTARTS:-3}"                           # of a phase when a process crashes; 0: none
set +a

# shellcheck source=scripts/launch_pretraining.sh
source "$REPOSITORY/scripts/launch_pretraining.sh"
take_no_arguments "$@"

[[ -r $NODES_FILE && ! -d $NODES_FILE ]] || refuse "NODES_FILE=$NODES_FILE: must be a file with one machine a line"
mapfile -t hosts < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$NODES_FILE")
((${#hosts[@]} > 0)) || refuse "NODES_FILE=$NODES_FILE: names no machine"
check_whole RDZV_PORT 1 65535
export NNODES="${#hosts[@]}" RDZV_ENDPOINT="${hosts[0]##*@}:$RDZV_PORT" RDZV_ID="slope-$$"

# What every machine needs of the settings above.
FORWARDED=(
    PHASES CONFIG_DIR DATA_DIR OUTPUT_DIR OPTIMIZER WEIGHT_DECAY PRUNED_MATRIX SKIP_FIRST_BLOCK SKIP_LAST_BLOCK
    SKIP_ATTENTION REDUCTION_DIM UNSTRUCTURED_MASKING UNSTRUCTURED_MASK_SPARSITY SPARSITY_INCREMENT ADD_LORA LORA_RANK
    NUM_STEPS_PER_CHECKPOINT EVAL_INTERVAL EXTRA_FLAGS STOP_GRACE NPROC_PER_NODE MAX_RESTARTS NNODES RDZV_ENDPOINT
    RDZV_ID
)

remote_command() { # PHASE
    local name
    local -a remote_env
    read -ra remote_env <<< "$REMOTE_ENV"
    printf 'cd %q && exec env STOP_ON_EOF=1' "$REPOSITORY"
    if ((${#remote_env[@]} > 0)); then printf ' %q' "${remote_env[@]}"; fi
    for name in "${FORWARDED[@]}"; do printf ' %s=%q' "$name" "${!name}"; done
    printf ' bash scripts/launch_pretraining.sh run %q\n' "$1"
}

# The input of each ssh session. It ends when the run is to stop or when this script is gone, which the launcher on the
# other side takes as USR1; the word kill before its end means at once.
hold_input() { # FOLDER
    while [[ -d $1 && ! -e $1/stop ]] && kill -0 $$ 2> /dev/null; do sleep 1; done
    if [[ -e $1/kill ]]; then echo kill; fi
}

start_phase() { # PHASE
    local flags host pid status code=0 signals
    local -A running=()
    signals="$(mktemp -d)"
    trap 'touch "$signals/stop"' USR1
    trap '' TERM INT HUP # of the whole group: the script above has them too, and says USR1
    read -ra flags <<< "$SSH_FLAGS"
    for host in "${hosts[@]}"; do
        ssh -o BatchMode=yes -o ServerAliveInterval=30 "${flags[@]}" "$host" "$(remote_command "$1")" \
            < <(hold_input "$signals") &
        running[$!]="$host"
    done
    while ((${#running[@]} > 0)); do
        sleep 1
        for pid in "${!running[@]}"; do
            kill -0 "$pid" 2> /dev/null && continue
            status=0
            wait "$pid" || status=$?
            if ((status != 0)); then
                say "error: ${running[$pid]} ended with exit code $status"
                ((code != 0)) || code=$status
                touch "$signals/kill" "$signals/stop"
            fi
            unset "running[$pid]"
        done
    done
    rm -r "$signals"
    return "$code"
}

DATA_ON_NODES=1 # this machine may be none of them
code=0
run_phases || code=$?
if ((code == STOPPED)); then
    say "stopped by $STOP_SIGNAL: start it again to go on"
    code=0
fi
exit "$code"
