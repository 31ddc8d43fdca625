# Sourced by the launchers, the job scripts and quickstart.sh: what they say, --help, and the checks of settings that
# more than one of them needs. A wrong setting is one line and exit code 2, before anything is started or written.
# shellcheck shell=bash

say() { echo "$(basename "$0"): $*" >&2; }

refuse() {
    say "error: $*"
    exit 2
}

# ----------------------------------------------------------------------------------------------------------- arguments

HELP_FILES=("$0") # the script itself, then those that it takes settings from

show_settings() { # FILE...: default and comment of each NAME="${NAME:-DEFAULT}" # COMMENT; of two, the first
    local line name default pattern='^(export )?([A-Z_]+)="\$\{([A-Z_]+):?-(.*)\}"( +# (.*))?$'
    local -A shown=()
    while read -r line; do
        [[ $line =~ $pattern && ${BASH_REMATCH[2]} == "${BASH_REMATCH[3]}" ]] || continue
        name="${BASH_REMATCH[2]}" default="${BASH_REMATCH[4]//\$REPOSITORY\//}"
        [[ -n ${shown[$name]:-} ]] || printf '  %-32s  %s\n' "$name=$default" "${BASH_REMATCH[6]}"
        shown[$name]=1
    done < <(cat "$@") | sed 's/ *$//'
}

show_help() { # the head comment of the script, and its settings
    local settings
    sed -n '2,/^[^#]/ { /^#SBATCH/d; s/^# \{0,1\}//p; }' "$0"
    settings="$(show_settings "${HELP_FILES[@]}")"
    [[ -z $settings ]] || printf '\nSettings, variables of the environment, and their defaults (paths in the repository):\n%s\n' "$settings"
}

take_no_arguments() { # ARGUMENTS...: --help is answered; a script whose settings are variables has no other
    case ${1:-} in
        -h | --help) show_help && exit ;;
    esac
    (($# == 0)) || refuse "unknown argument $1: settings are variables, given before the command (--help lists them)"
}

# -------------------------------------------------------------------------------------------------------------- checks

is_whole() { # VALUE LOW HIGH; bash would take 08 for octal, a word for a variable's name, and overflow silently
    [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]] && (($1 >= $2 && $1 <= $3))
}

check_whole() { # NAME LOW [HIGH]: the setting NAME is a whole number
    local range="of at least $2"
    if [[ -n ${3:-} ]]; then range="from $2 to $3"; fi
    is_whole "${!1}" "$2" "${3:-999999999}" || refuse "$1=${!1}: must be a whole number $range"
}

check_processes() {
    [[ $NPROC_PER_NODE =~ ^(auto|cpu|gpu|xpu)$ ]] || is_whole "$NPROC_PER_NODE" 1 999999999 ||
        refuse "NPROC_PER_NODE=$NPROC_PER_NODE: must be a whole number of at least 1, or auto, cpu or gpu"
}

check_output_dir() { # nothing is made yet: what has to be there is the last part of the path that exists
    local path="$OUTPUT_DIR"
    [[ $path != s3://* ]] || refuse "OUTPUT_DIR=$path: must be a folder, not an s3:// address"
    until [[ -e $path || -L $path ]]; do path="$(dirname -- "$path")"; done
    [[ -d $path && -w $path ]] ||
        refuse "OUTPUT_DIR=$OUTPUT_DIR: must be a folder that can be written to, or a path where one can be made"
}

check_sbatch() {
    [[ -n ${SLURM_SUBMIT_DIR:-} ]] ||
        refuse "SLURM_SUBMIT_DIR is not set: submit this script with sbatch, from the folder of the repository"
}

ASK_SCRIPT='
import sys
from importlib import import_module

sys.path.insert(0, sys.argv[1])
del sys.argv[:2]
from training.flags import run_door
from training.sparsity import check_adapter_flags, sparsity_from_flags


def ask():
    args = import_module(sys.argv[0].removesuffix(".py")).parse_arguments()
    asked = sparsity_from_flags(args)
    if "pruned_matrix" in args.given:  # else the checkpoint says whether there are pruned layers
        check_adapter_flags(args, asked)


run_door(ask)
'

# What the Python script itself says of its flags, once, in place of once a process under torchrun's report. An
# environment that cannot ask (exit code 1) is the run's to tell. -P: no module of the current folder is meant.
check_flags() { # PYTHON SCRIPT FLAGS...
    local said code=0
    said="$("$1" -P -c "$ASK_SCRIPT" "$REPOSITORY" "${@:2}" 2>&1 > /dev/null)" || code=$?
    if ((code == 2)); then
        echo "${said##*$'\n'}" >&2
        exit 2
    fi
}
