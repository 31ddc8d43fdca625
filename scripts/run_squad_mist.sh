#!/usr/bin/env bash
# Fine-tune on SQuAD on a SLURM cluster: its settings, then scripts/run_squad.sh, which runs on any machine.
#
#   cd slope-bert && INIT_CHECKPOINT=... VOCAB_FILE=... DATA_DIR=... OUTPUT_DIR=... sbatch scripts/run_squad_mist.sh
#
# Submitted again after a time limit, it goes on where it was.
#SBATCH --job-name=slope-squad
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
REPOSITORY="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}" # SLURM runs a copy from elsewhere
if [[ ! -f $REPOSITORY/run_squad.py ]]; then
    echo "error: $REPOSITORY is not the folder of the repository: run sbatch from there" >&2
    exit 2
fi
# shellcheck source=scripts/launch_arguments.sh
source "$REPOSITORY/scripts/launch_arguments.sh"
HELP_FILES+=("$REPOSITORY/scripts/run_squad.sh" "$REPOSITORY/scripts/launch_finetuning.sh")
take_no_arguments "$@"
check_sbatch

export NPROC_PER_NODE="${NPROC_PER_NODE:-gpu}" # one process a GPU
export PRECISION="${PRECISION:-fp16}"
export EXTRA_FLAGS="--disable_progress_bar ${EXTRA_FLAGS:-}"

exec bash "$REPOSITORY/scripts/run_squad.sh"
