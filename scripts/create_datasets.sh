#!/usr/bin/env bash
# From raw text to HDF5 shards: download, format, encode.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: create_datasets.sh --output DIR [--corpus demo|large|FOLDER|s3://...] [--vocab_file F]
                          [--download] [--format] [--encode] [--nproc N] [flags of the stages]

With no stage named, all three run. Each goes on where it was stopped, and does nothing where it is done. A mistake in
the flags of any that is to run is found before the first one begins.
  --download   the sources of a named corpus, verified, to DIR/download       (python -m data.fetch --help)
  --format     one sentence a line, train and held out apart, to DIR/text     (python -m data.format --help)
  --encode     DIR/vocab.txt and DIR/phase<i>/{train,heldout}/shard_*.hdf5    (python -m data.encode --help)

Flags of the stages:
  --format     --heldout_fraction F  --one_sentence_per_line
  --encode     --vocab_size N (of a vocabulary that is built: no --vocab_file)  --tokenizer wordpiece|bpe  --cased
               --sequence_lengths 128,512  --dupe_factor N  --short_seq_prob F  --no_next_sentence
               --premask [--masked_token_fraction F]  --shard_megabytes F  --seed N
  both         --overwrite
The Python is $PYTHON, else .venv/bin/python of this repository, else python3.
TEXT
}

fail() {
    echo "create_datasets.sh: error: $1" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]]; then
    PYTHON=$root/.venv/bin/python
fi
python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

output=
corpus=demo
nproc=1
stages=()
format_flags=()
encode_flags=()
while (($#)); do
    case $1 in
        --output | --corpus | --vocab_file | --nproc | --heldout_fraction | --vocab_size | --tokenizer | \
            --sequence_lengths | --dupe_factor | --short_seq_prob | --masked_token_fraction | --shard_megabytes | --seed)
            (($# > 1)) || fail "$1 needs a value"
            ;;&
        --output) output=$2 && shift ;;
        --corpus) corpus=$2 && shift ;;
        --nproc) nproc=$2 && shift ;;
        --download | --format | --encode) stages+=("${1#--}") ;;
        --heldout_fraction) format_flags+=("$1" "$2") && shift ;;
        --one_sentence_per_line) format_flags+=("$1") ;;
        --vocab_file | --vocab_size | --tokenizer | --sequence_lengths | --dupe_factor | --short_seq_prob | \
            --masked_token_fraction | --shard_megabytes | --seed)
            encode_flags+=("$1" "$2") && shift
            ;;
        --cased | --no_next_sentence | --premask) encode_flags+=("$1") ;;
        --overwrite) format_flags+=("$1") && encode_flags+=("$1") ;;
        -h | --help) usage && exit ;;
        *) fail "unknown flag $1 (--help lists them)" ;;
    esac
    shift
done
[[ -n $output ]] || fail "--output is needed: a folder for the data"
((${#stages[@]})) || stages=(download format encode)

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "PYTHON $python: is no Python of 3.11 or later: set PYTHON to one"

# run_stage STAGE [--check]
# -P: a folder named data where the command is given must not hide this repository's.
run_stage() {
    local stage=$1
    shift
    [[ " ${stages[*]} " == *" $stage "* ]] || return 0
    case $stage in
        download) "$python" -P -m data.fetch --output "$output/download" --corpus "$corpus" ;;
        format)
            "$python" -P -m data.format --corpus "$corpus" --download_dir "$output/download" --output "$output/text" \
                --nproc "$nproc" "${format_flags[@]}" "$@"
            ;;
        encode)
            "$python" -P -m data.encode --input "$output/text" --output "$output" --nproc "$nproc" \
                "${encode_flags[@]}" "$@"
            ;;
    esac
}

# A later stage's mistake shows before the hours that an earlier one may take.
for stage in format encode; do
    run_stage "$stage" --check
done
for stage in download format encode; do
    run_stage "$stage"
done
