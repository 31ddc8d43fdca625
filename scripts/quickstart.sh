#!/usr/bin/env bash
# From nothing to a small BERT pretrained by the SLoPe recipe: environment, data, pretraining, fine-tuning on STS-B and
# a set of SST-2's shape, one table, one picture.
# Usage: bash scripts/quickstart.sh [--dense] [--output DIR]
#   --dense       also train and fine-tune a dense model of the same size and budget, at the same time, for the table
#   --output DIR  where data and runs go (default: demo)
# A second run reuses what is there. DEMO_STEPS (default 2231) sets the steps of pretraining, DEMO_FINETUNE_STEPS those
# of each fine-tuning (default: 3 epochs of STS-B, 2 of the other).
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=scripts/launch_arguments.sh
source "$REPOSITORY/scripts/launch_arguments.sh"

output=demo
dense=false
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) show_help && exit ;;
        --dense) dense=true; shift ;;
        --output)
            [[ -n ${2:-} ]] || refuse "--output needs a folder"
            output=$2
            shift 2
            ;;
        *) refuse "unknown argument $1 (known: --dense, --output DIR)" ;;
    esac
done
steps=${DEMO_STEPS:-2231}
finetune_steps=${DEMO_FINETUNE_STEPS:-}
for setting in "DEMO_STEPS=$steps" ${finetune_steps:+"DEMO_FINETUNE_STEPS=$finetune_steps"}; do
    [[ $setting =~ ^[A-Z_]+=[1-9][0-9]*$ ]] || refuse "$setting: must be a whole number of at least 1"
done
mkdir -p -- "$output" 2>/dev/null || refuse "--output $output: must be a folder, or a path where one can be made"
output=$(CDPATH='' cd -- "$output" && pwd -P) # one spelling: runs remember the paths that they began from

prepare_environment requirements.txt
cd "$REPOSITORY"
export PYTHON=$VENV_PYTHON

echo "== data: $output/data"
bash scripts/create_datasets.sh --output "$output/data" --corpus demo --vocab_size 2048 --sequence_lengths 64 \
    --download --format --encode --nproc "$(nproc)"
tasks=(STS-B SST-2-shaped)
"$PYTHON" -m data.prepare_glue --output "$output/glue" --download_dir "$output/data/download" "${tasks[@]}"

# find_start NAME: sets `checkpoint` to the newest one of $output/NAME, and `finetuned` to a folder for what starts there:
# one for each checkpoint and length, so that other DEMO_STEPS or DEMO_FINETUNE_STEPS do not meet what these left.
find_start() {
    checkpoint=$(printf '%s\n' "$output/$1"/pretrain_ckpts/ckpt_*.pt | sort -V | tail -n 1)
    finetuned=$output/$1/glue_$(basename "${checkpoint##*ckpt_}" .pt)${finetune_steps:+_$finetune_steps}
}

# finetune NAME TASK EPOCHS: from the model in $output/NAME
finetune() {
    local name=$1 task=$2 started=$SECONDS
    local -a length=(--num_train_epochs "$3")
    if [[ -n $finetune_steps ]]; then length=(--max_steps "$finetune_steps"); fi
    find_start "$name"
    echo "== fine-tuning: $finetuned/$task"
    "$PYTHON" run_glue.py --task_name "$task" --data_dir "$output/glue/$task" --init_checkpoint "$checkpoint" \
        --vocab_file "$output/data/vocab.txt" --output_dir "$finetuned/$task" --do_train --do_eval \
        --max_seq_length 64 --train_batch_size 32 --learning_rate 1e-3 "${length[@]}"
    echo "$task from $name: $((SECONDS - started)) s"
}

# train NAME FLAGS...: pretrain a model into $output/NAME and fine-tune it
train() {
    local name=$1
    shift
    echo "== pretraining: $output/$name"
    "$PYTHON" run_pretraining.py --config_file config/bert_pretraining_demo_config.json \
        --input_dir "$output/data/phase1/train" --eval_dir "$output/data/phase1/heldout" \
        --output_dir "$output/$name" --max_steps "$steps" "$@"
    finetune "$name" STS-B 3
    finetune "$name" SST-2-shaped 2
}

# One thread each: the matrices are small, and threads that share them wait for one another, for very long where the
# cores have other work too.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
names=(slope)
runs=("SLoPe=$output/slope")
if $dense; then
    names+=(dense)
    runs+=("dense=$output/dense")
    echo "== in the background: the dense model (log: $output/dense.log)"
    set -m # a process group of its own, so that ending it ends what it runs
    train dense --pruned_matrix none --add_lora False > "$output/dense.log" 2>&1 &
    set +m
    dense_job=$!
    trap 'kill -- "-$dense_job" 2>/dev/null || true' EXIT
fi
train slope --pruned_matrix static-weight --add_lora lazy
if $dense; then
    echo "== waiting for the dense model"
    wait "$dense_job" || {
        code=$?
        tail -n 1 "$output/dense.log" >&2
        exit "$code"
    }
    trap - EXIT
    grep ' from dense: ' "$output/dense.log"
fi
scores=()
for name in "${names[@]}"; do
    find_start "$name"
    scores+=("$finetuned")
done

echo
"$PYTHON" scripts/quickstart_report.py --runs "${runs[@]}" --heldout "$output/data/phase1/heldout" \
    --finetuned "${scores[@]}" --glue_dir "$output/glue" --tasks "${tasks[@]}"
echo "  wall time of this script: $SECONDS s"
"$PYTHON" scripts/plot_curves.py --runs "${runs[@]#*=}" --labels "${runs[@]%%=*}" \
    --output "$output/loss_curve.png" --heldout
