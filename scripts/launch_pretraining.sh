#!/usr/bin/env bash
# What the three job scripts share: the phases in order, and one node's part of one phase.
#
# Sourced by scripts/run_pretraining_jobs_{local,slurm,ssh}.sh, it gives them `run_phases`.
# Run as a command, it is one node's part of a phase, with the job script's settings in its environment:
#
#   bash scripts/launch_pretraining.sh run PHASE
#
# TERM, USR1, INT and HUP then mean: finish the step, save, stop with exit code 0. They go to the training processes and
# not to torchrun, which would answer TERM by killing them after 30 seconds and exiting with 1, and die of USR1.

LAUNCHER="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/launch_pretraining.sh"
REPOSITORY="$(dirname "$(dirname "$LAUNCHER")")"
# shellcheck source=scripts/launch_arguments.sh
source "$REPOSITORY/scripts/launch_arguments.sh"

# Sequences of 128 tokens in phase 1, of 512 after it.
DATA_FOLDER=([1]=phase1 [2]=phase2 [3]=phase2)
STOPPED=75      # exit code of run_phases: a signal ended it before the last phase was done
USR1_DEATH=138  # exit code of a run that USR1 met before it listened, so before any training

# ----------------------------------------------------------------------------------------------- phases and checkpoints

config_of() { echo "$CONFIG_DIR/bert_pretraining_phase$1_config.json"; }

config_number() { # FILE KEY
    local number
    number="$(sed -n "s/.*\"$2\": *\([0-9][0-9]*\).*/\1/p" "$1")"
    [[ -n $number ]] || refuse "$1: must hold $2, a whole number"
    echo "$number"
}

final_step() { # PHASE: its last step, counted over all phases
    local config before steps
    config="$(config_of "$1")"
    before="$(config_number "$config" previous_phase_end_step)" || exit
    steps="$(config_number "$config" max_steps)" || exit
    echo $((before + steps))
}

finished() { # PHASE
    local step
    step="$(final_step "$1")" || exit
    [[ -e $OUTPUT_DIR/pretrain_ckpts/ckpt_$step.pt ]]
}

next_phase() { # the first of PHASES without its last checkpoint, or nothing
    local phase
    for phase in $PHASES; do
        finished "$phase" || { echo "$phase" && return; }
    done
}

newest_step() { # of any checkpoint, 0 without one
    local path step newest=0
    for path in "$OUTPUT_DIR"/pretrain_ckpts/ckpt_*.pt; do
        step="${path##*/ckpt_}"
        step="${step%.pt}"
        if [[ $step =~ ^[0-9]+$ ]] && ((step > newest)); then newest=$step; fi
    done
    echo "$newest"
}

check_phases() {
    local phase before=0
    local -a phases
    read -ra phases <<< "$PHASES"
    PHASES="${phases[*]}"
    [[ -n $PHASES ]] || refuse "PHASES: must name at least one phase"
    for phase in "${phases[@]}"; do
        [[ $phase == [1-9] && -n ${DATA_FOLDER[$phase]:-} && $phase -gt $before ]] ||
            refuse "PHASES=$PHASES: must be phases out of ${!DATA_FOLDER[*]}, in this order"
        before="$phase"
    done
}

check_settings() {
    local phase config
    check_phases
    check_whole EVAL_INTERVAL 0
    check_whole STOP_GRACE 0
    check_whole MAX_RESTARTS 0
    check_processes
    check_output_dir
    for phase in $PHASES; do
        config="$(config_of "$phase")"
        [[ -r $config ]] || refuse "CONFIG_DIR=$CONFIG_DIR: must hold $(basename "$config")"
        final_step "$phase" > /dev/null || exit
    done
    [[ $EXTRA_FLAGS != *--max_steps* && $EXTRA_FLAGS != *--previous_phase_end_step* ]] ||
        refuse "EXTRA_FLAGS=$EXTRA_FLAGS: a phase's steps belong in its config file, where this script reads them too"
}

# Where the data is read: on this machine, unless the job script says by DATA_ON_NODES that it starts others.
check_data() { # PHASE
    local part
    local -a parts=(train)
    [[ $DATA_DIR != s3://* ]] || return 0
    if ((EVAL_INTERVAL > 0)); then parts+=(heldout); fi
    for part in "${parts[@]}"; do
        [[ -d $DATA_DIR/${DATA_FOLDER[$1]}/$part ]] ||
            refuse "DATA_DIR=$DATA_DIR: must hold the folder ${DATA_FOLDER[$1]}/$part (scripts/create_datasets.sh makes it)"
    done
}

check_phase_flags() { # of every phase that is still to run, where torchrun has its Python beside it
    local phase torchrun python
    torchrun="$(find_torchrun 2> /dev/null)" || return 0
    python="$(dirname "$(readlink -f "$torchrun")")/python"
    [[ -x $python ]] || return 0
    for phase in $PHASES; do
        if ! finished "$phase"; then
            pretraining_flags "$phase"
            check_flags "$python" run_pretraining.py "${FLAGS[@]}"
        fi
    done
}

# ------------------------------------------------------------------------------------------------------- the job's loop

absolute_path() { # of a folder; an s3:// address stays as it is
    if [[ $1 == /* || $1 == s3://* ]]; then echo "$1"; else echo "$PWD/$1"; fi
}

wait_for() { # PID: its exit code, also when signals interrupt the waiting
    local code
    while true; do
        INTERRUPTED=""
        code=0
        wait "$1" || code=$?
        if [[ -n $INTERRUPTED ]]; then continue; fi
        # Two signals at once, as Ctrl-C sends: the trap of the second may have run before this wait, which it yet ends.
        if ((code > 128)) && kill -0 "$1" 2> /dev/null; then continue; fi
        return "$code"
    done
}

stop_run() { # SIGNAL
    INTERRUPTED=1
    STOP_SIGNAL="$1"
    [[ -z $RUN_PID ]] || kill -USR1 "$RUN_PID" 2> /dev/null || true
}

# Run the phases that are not finished, one after the other, each until its last checkpoint is there. The job script's
# function `start_phase PHASE` is one run on all nodes; USR1 stops it. Returns 0 when all phases are done, STOPPED after
# a signal to this script, and otherwise the exit code of the run that failed: what torchrun's own restarts
# (MAX_RESTARTS) did not get over is not tried again.
run_phases() {
    local phase before code
    DATA_DIR="$(absolute_path "$DATA_DIR")"
    OUTPUT_DIR="$(absolute_path "$OUTPUT_DIR")"
    CONFIG_DIR="$(absolute_path "$CONFIG_DIR")"
    check_settings
    STOP_SIGNAL="" RUN_PID=""
    trap 'stop_run USR1' USR1
    trap 'stop_run TERM' TERM INT HUP
    check_phase_flags
    while true; do
        phase="$(next_phase)" || return
        [[ -n $phase ]] || break
        [[ -z $STOP_SIGNAL ]] || return "$STOPPED"
        [[ -n ${DATA_ON_NODES:-} ]] || check_data "$phase"
        before="$(newest_step)"
        say "phase $phase goes on after step $before, to step $(final_step "$phase")"
        start_phase "$phase" &
        RUN_PID=$!
        [[ -z $STOP_SIGNAL ]] || stop_run "$STOP_SIGNAL"
        code=0
        wait_for "$RUN_PID" || code=$?
        RUN_PID=""
        [[ -z $STOP_SIGNAL ]] || ((code != USR1_DEATH)) || code=0
        if ((code != 0)); then
            say "error: phase $phase failed with exit code $code and is not started again"
            return "$code"
        elif [[ -z $STOP_SIGNAL ]] && ! finished "$phase" && (($(newest_step) <= before)); then
            say "error: phase $phase ended without a checkpoint newer than step $before and is not started again"
            return 1
        fi
    done
    say "phases $PHASES are finished"
}

# ----------------------------------------------------------------------------------------- one node's part of one phase

pretraining_flags() { # PHASE: sets FLAGS
    local data="$DATA_DIR/${DATA_FOLDER[$1]}" adapters="$ADD_LORA"
    if [[ $adapters == lazy && $1 != "${PHASES##* }" ]]; then adapters=False; fi # they belong to the recipe's end
    FLAGS=(
        --input_dir "$data/train"
        --output_dir "$OUTPUT_DIR"
        --config_file "$(config_of "$1")"
        --optimizer "$OPTIMIZER"
        --weight_decay "$WEIGHT_DECAY"
        --num_steps_per_checkpoint "$NUM_STEPS_PER_CHECKPOINT"
        --pruned_matrix "$PRUNED_MATRIX"
        --skip_first_block "$SKIP_FIRST_BLOCK"
        --skip_last_block "$SKIP_LAST_BLOCK"
        --skip_attention "$SKIP_ATTENTION"
        --reduction_dim "$REDUCTION_DIM"
        --unstructured_masking "$UNSTRUCTURED_MASKING"
        --unstructured_mask_sparsity "$UNSTRUCTURED_MASK_SPARSITY"
        --sparsity_increment "$SPARSITY_INCREMENT"
        --add_lora "$adapters"
        --lora_rank "$LORA_RANK"
    )
    if ((EVAL_INTERVAL > 0)); then FLAGS+=(--eval_dir "$data/heldout" --eval_interval "$EVAL_INTERVAL"); fi
    local -a extra
    read -ra extra <<< "$EXTRA_FLAGS"
    FLAGS+=("${extra[@]}")
}

find_torchrun() {
    command -v torchrun || command -v "$REPOSITORY/.venv/bin/torchrun" ||
        refuse "torchrun is neither on PATH nor in $REPOSITORY/.venv/bin: make the environment (SETUP.md)"
}

listens() { # PID: whether it has a handler for USR1
    local caught
    caught="$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2> /dev/null)"
    [[ -n $caught ]] && ((0x$caught & 1 << (10 - 1))) # USR1 is signal 10
}

# Tell each training process once, as soon as it listens: while it starts it ignores the signal, and once its Python is
# shutting down it would die of it. After STOP_GRACE seconds torchrun is killed, and its processes end with it.
stop_workers() { # PID of torchrun
    local waited worker
    local -A told=()
    trap '' TERM INT HUP
    for ((waited = 0; waited < STOP_GRACE; waited++)); do
        kill -0 "$1" 2> /dev/null || return 0
        for worker in $(pgrep -P "$1"); do
            if [[ -z ${told[$worker]:-} ]] && listens "$worker"; then
                told[$worker]=1
                kill -USR1 "$worker" || true
            fi
        done
        sleep 1
    done
    kill -KILL "$1"
}

# An ssh session's input ends when the job script stops the run, or is gone itself; the word kill before its end means
# that another node has failed, so that there is nobody left to agree with on a last step.
obey_input() { # PID of this script
    local word=""
    read -r word || true
    if [[ $word == kill ]]; then kill -USR2 "$1"; else kill -USR1 "$1"; fi
}

save_and_stop() {
    INTERRUPTED=1
    [[ -n $RUN_PID ]] || return 0
    ((STOPPING++ == 0)) || return 0 # asked and set in one command: a second signal may interrupt this function
    stop_workers "$RUN_PID" > /dev/null 2>&1 &
    HELPERS+=($!)
    disown "$!" || true # its end is no news
}

run_phase() { # PHASE
    local torchrun helper code=0
    local -a rendezvous=(--standalone)
    if [[ -n ${RDZV_ENDPOINT:-} ]]; then
        rendezvous=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "$RDZV_ID")
    fi
    torchrun="$(find_torchrun)" || exit
    check_data "$1"
    command -v pgrep setsid > /dev/null || refuse "pgrep and setsid must be installed (procps and util-linux)"
    pretraining_flags "$1"
    cd "$REPOSITORY" # the config files name the model's file from here

    RUN_PID="" INTERRUPTED="" STOPPING=0 HELPERS=()
    trap save_and_stop TERM USR1 INT HUP
    trap 'INTERRUPTED=1; kill -KILL "$RUN_PID"' USR2
    # In a session of its own and deaf to USR1: a signal to this script's group or SLURM step must not end torchrun.
    (trap '' USR1 && exec setsid "$torchrun" "${rendezvous[@]}" --nproc_per_node "$NPROC_PER_NODE" \
        --max_restarts "$MAX_RESTARTS" run_pretraining.py "${FLAGS[@]}" < /dev/null) &
    RUN_PID=$!
    [[ -z $INTERRUPTED ]] || save_and_stop
    if [[ -n ${STOP_ON_EOF:-} ]]; then
        exec 3<&0
        obey_input $$ <&3 > /dev/null 2>&1 &
        WATCHER=$!
        disown "$!" || true
    fi

    wait_for "$RUN_PID" || code=$?
    for helper in "${HELPERS[@]}" ${WATCHER:-}; do
        kill -KILL "$helper" 2> /dev/null || true
    done
    return "$code"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    [[ $# == 2 && $1 == run ]] || refuse "usage: launch_pretraining.sh run PHASE"
    run_phase "$2"
fi
