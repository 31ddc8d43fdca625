#!/usr/bin/env bash
# Pretrain BERT-Large by the SLoPe recipe on a SLURM cluster, over as many jobs as it takes.
#
#   cd slope-bert && DATA_DIR=/data/bert OUTPUT_DIR=/runs/slope sbatch scripts/run_pretraining_jobs_slurm.sh
#
# Change the #SBATCH lines to the cluster's sizes; the settings below them may be given in the environment or changed
# here. Five minutes before the time limit the run saves a checkpoint, and the script submits itself again. It does so
# until phase 2 is finished, and not after a failure, a cancellation or a run that made no checkpoint.
#SBATCH --job-name=slope-bert
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log
set -euo pipefail
REPOSITORY="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}" # SLURM runs a copy from elsewhere
if [[ ! -f $REPOSITORY/run_pretraining.py ]]; then
    echo "error: $REPOSITORY is not the folder of the repository: run sbatch from there" >&2
    exit 2
fi

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
# ---- the cluster
NPROC_PER_NODE="${NPROC_PER_NODE:-gpu}"                     # gpu: one process a GPU
MAX_RESTARTS="${MAX_RESTARTS:-3}"                           # of a phase when a process crashes; 0: none
SBATCH_FLAGS="${SBATCH_FLAGS:-}"                            # of the first sbatch call that the next need too: --nodes 4
set +a

# shellcheck source=scripts/launch_pretraining.sh
source "$REPOSITORY/scripts/launch_pretraining.sh"
take_no_arguments "$@"
check_sbatch

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES="$SLURM_JOB_NUM_NODES" RDZV_ID="$SLURM_JOB_ID"
export RDZV_ENDPOINT="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))" # two jobs on one node need two ports

# srun passes USR1 on to every node. From SLURM 22.05 on it does not take --cpus-per-task from the job by itself.
start_phase() {
    exec srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
        bash "$LAUNCHER" run "$1"
}

code=0
run_phases || code=$?
if ((code == STOPPED)); then
    code=0
    if [[ $STOP_SIGNAL == USR1 ]]; then
        read -ra flags <<< "$SBATCH_FLAGS"
        cd "$REPOSITORY"
        sbatch --dependency="afterany:$SLURM_JOB_ID" "${flags[@]}" scripts/run_pretraining_jobs_slurm.sh
    else
        say "stopped by $STOP_SIGNAL: submit it again to go on"
    fi
fi
exit "$code"
