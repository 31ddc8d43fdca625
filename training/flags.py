"""Flags: one-line errors, True/False words, and JSON files of defaults that the command line overrides."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from training.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, knows no abbreviations and reports a mistake in one line."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UsageError(message.removeprefix("argument ").replace("\n", " "))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=118)

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return "N"


def parse_seeds(text: str, flag: str) -> list[int]:
    """Different whole numbers with commas.

    Raises:
        UsageError: it is something else.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise UsageError(f"{flag} {text}: must be different whole numbers with commas, such as 0,1,2")
    return [int(word) for word in words]


def run_door(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UsageError` becomes one line on stderr and exit code 2.

    With several processes a node, only the first of them speaks, so a mistake is one line and not one a rank.
    """
    try:
        main()
    except UsageError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            line = str(error).replace("\n", " ")
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_RESTART_COUNT" in os.environ:  # under torchrun
            from training.distributed import (
                leave_together,
            )  # here, since it takes torch, which the data tools do without

            leave_together()
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------ types of values
def boolean(word: str | bool) -> bool:
    """The words True and False."""
    if str(word) not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {word}")
    return str(word) == "True"


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`; `7038.0` is one too, as published configs write it."""

    def parse(word: str) -> int:
        number = _number(word)
        if number != int(number) or number < low or (high is not None and number > high):
            limit = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be a whole number {limit}, not {word}")
        return int(number)

    return parse


def real(low: float = float("-inf"), high: float = float("inf")) -> Callable[[str], float]:
    """A number from `low` to `high`."""

    def parse(word: str) -> float:
        number = _number(word)
        if not low <= number <= high:
            limit = f"of at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be a number {limit}, not {word}")
        return number

    return parse


def _number(word: str) -> float:
    try:
        number = float("nan") if isinstance(word, bool) else float(word)
    except (ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number, not {word}")
    return number


def _switch_word(word: str | bool) -> bool:
    """`boolean` for a switch, which takes any word behind it for its own, also one that stands there by mistake."""
    try:
        return boolean(word)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"takes True or False or no word at all, not {word}") from error


def add_switch(group, name: str, help: str, aliases: tuple[str, ...] = (), default: bool | None = False) -> None:
    """A flag that may stand alone (`--fp16`) or with a word (`--fp16 False`)."""
    group.add_argument(
        name, *aliases, nargs="?", const=True, default=default, type=_switch_word, metavar="True|False", help=help
    )


def add_precision_flags(group) -> None:
    add_switch(group, "--fp16", "fp16 with dynamic loss scaling; the same as --precision fp16")
    group.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="what the matrix products run in"
    )


def add_graph_flag(group) -> None:
    group.add_argument(
        "--cuda_graphs",
        default="auto",
        choices=("auto", "True", "False"),
        help="run each micro-step as a CUDA graph; auto: on a GPU, where no other flag forbids it",
    )


def add_padding_flags(group) -> None:
    group.add_argument(
        "--unpad",
        default="auto",
        choices=("auto", "True", "False"),
        help="compute no padding: sequences lie end to end; auto: on a GPU whose flash attention can run it",
    )
    add_attention_flag(group)


def add_attention_flag(group) -> None:
    group.add_argument(
        "--attention",
        default="auto",
        choices=("auto", "flash", "short"),
        help="what runs it where no padding is computed: torch's flash attention, or kernels of ours for sequences of "
        "up to 512 tokens; auto: ours where they can, of more than 128 tokens on Hopper GPUs",
    )


def add_dense_kernels_flag(group) -> None:
    group.add_argument(
        "--dense_kernels",
        nargs="?",
        const="True",
        default="auto",
        choices=("auto", "True", "False"),
        help="the embeddings, GELU, and the backward passes of dropout and LayerNorm, by kernels of ours; auto: with a "
        "GPU's compiled blocks",
    )


# ------------------------------------------------------------------------------------------------------------- parsing
def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None, file_flag: str | None = None):
    """Parse `argv`; a JSON file named by `--<file_flag>`, if there is one, sets defaults, and the command line wins.

    Returns:
        The namespace, with two sets beside the flags: `given_on_command_line` and `given` (there or in the file).

    Raises:
        UsageError: for a flag or a key of the file that does not exist, or a value that its flag would not take.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    parser.parse_args(argv)  # for --help and mistakes, while the parser still has its defaults
    defaults = {dest: action.default for dest, action in actions.items()}
    for action in actions.values():  # with no defaults, what the namespace holds is what was given
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    for dest, action in actions.items():
        action.default = defaults[dest]
    from_file = {}
    if file_flag is not None and given.get(file_flag) is not None:
        from_file = _read_defaults_file(given[file_flag], actions, f"--{file_flag}")
    args = argparse.Namespace(**(defaults | from_file | given))
    args.given_on_command_line, args.given = set(given), set(given) | set(from_file)
    return args


def read_json(path: str | Path, flag: str | None = None) -> dict:
    """The object in a JSON file.

    Raises:
        UsageError: it cannot be read, or holds anything else; the line begins with `flag`, if there is one, and `path`.
    """
    named = f"{path}" if flag is None else f"{flag} {path}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{named}: cannot be read ({error.strerror}); it must be a JSON file") from error
    except ValueError as error:
        raise UsageError(f"{named}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{named}: must hold one JSON object, of keys and values")
    return content


def _read_defaults_file(path: str, actions: dict[str, argparse.Action], flag: str) -> dict:
    values = {}
    for key, value in read_json(path, flag).items():
        if key in _KFAC_KEYS:
            _refuse_kfac(key, value, f"{flag} {path}")
        elif key not in actions or f"--{key}" == flag:
            raise UsageError(f"{flag} {path}: key {key} is no flag of this script (see --help)")
        else:
            values[key] = _checked(actions[key], value, f"{flag} {path}: key {key}")
    return values


_KFAC_KEYS = ("kfac", "kfac_inv_interval", "kfac_factor_interval")  # published phase configs hold them


def _refuse_kfac(key: str, value, where: str) -> None:
    if key == "kfac" and value is not False:
        raise UsageError(f"{where}: kfac is not part of this suite; set it to false")


def _checked(action: argparse.Action, value, where: str):
    if value is None:
        return action.default
    if not isinstance(value, str | int | float):
        raise UsageError(f"{where}: must be one word, number, true or false, not {json.dumps(value)}")
    try:
        parsed = action.type(value) if action.type else str(value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{where}: {error}") from error
    if action.choices is not None and parsed not in action.choices:
        raise UsageError(f"{where}: must be one of {', '.join(map(str, action.choices))}, not {value}")
    return parsed


def settle_precision(args) -> None:
    """One word for the precision from `--fp16` and `--precision`, in `args.precision`.

    The command line overrides the config file also between the two; from one source they may not contradict.
    """
    names = {"fp16", "precision"}
    decisive = names & args.given_on_command_line or names & args.given
    if args.fp16 and decisive == names and args.precision != "fp16":
        raise UsageError(f"--fp16 and --precision {args.precision} contradict each other: give one of them")
    if "fp16" in decisive and args.fp16:
        args.precision = "fp16"
    elif decisive == {"fp16"} and args.precision == "fp16":
        args.precision = "fp32"
    args.fp16 = args.precision == "fp16"
