#!/usr/bin/env bash
# From nothing to a small BERT pretrained by the SLoPe recipe: environment, data, pretraining, one table, one picture.
# Usage: bash scripts/quickstart.sh [--dense] [--output DIR]
#   --dense       also train a dense model of the same size and budget, for the table
#   --output DIR  where data and runs go (default: demo)
# A second run reuses what is there. DEMO_STEPS (default 2231) sets the length of the training.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

output=demo
dense=false
while [ $# -gt 0 ]; do
    case $1 in
        --dense) dense=true; shift ;;
        --output) output=${2:?--output needs a folder}; shift 2 ;;
        *) echo "quickstart.sh: error: unknown argument $1 (known: --dense, --output DIR)" >&2; exit 2 ;;
    esac
done
case $output in /*) ;; *) output=$PWD/$output ;; esac

prepare_environment requirements.txt
cd "$REPOSITORY"
export PYTHON=$VENV_PYTHON
steps=${DEMO_STEPS:-2231}

echo "== data: $output/data"
bash scripts/create_datasets.sh --output "$output/data" --corpus demo --vocab_size 2048 --sequence_lengths 64 \
    --download --format --encode --nproc "$(nproc)"

# pretrain NAME FLAGS...: one run into $output/NAME
pretrain() {
    local name=$1
    shift
    echo "== pretraining: $output/$name"
    "$PYTHON" run_pretraining.py --config_file config/bert_pretraining_demo_config.json \
        --input_dir "$output/data/phase1/train" --eval_dir "$output/data/phase1/heldout" \
        --output_dir "$output/$name" --max_steps "$steps" "$@"
}

pretrain slope --pruned_matrix static-weight --add_lora lazy
runs=("SLoPe=$output/slope")
if $dense; then
    pretrain dense --pruned_matrix none --add_lora False
    runs+=("dense=$output/dense")
fi

echo
"$PYTHON" scripts/quickstart_report.py --runs "${runs[@]}" --heldout "$output/data/phase1/heldout"
echo "  wall time of this script: $SECONDS s"
"$PYTHON" scripts/plot_curves.py --runs "${runs[@]#*=}" --labels "${runs[@]%%=*}" --output "$output/loss_curve.png" --heldout
