"""What may be said on the command line: the commands, their options and their help.

Guarantees: parsing touches no file and imports neither torch nor transformers; what a command does
is not here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from embed_precompute import __version__
from embed_precompute.documents import nearest_of
from embed_precompute.encoders.peaks import SHARE_OF_PEAK
from embed_precompute.errors import EXIT_USAGE

SECTIONS = ("captions", "encoders", "output", "runtime")
"""Of a CONFIG. Named here, for help must not wait until the configuration's classes are made."""

EXIT_HELP = """exit codes:
  0 complete   1 bug   2 usage or bad input   3 conflict of fingerprint, plan or inputs
  4 verification failed   5 incomplete: run again   6 finished, but samples failed
  74 I/O (space, quota)   75 interrupted: run again
torchrun flattens exit codes: ask `embed-precompute status DIR` in scripts."""


GO_ON = "a run that was stopped goes on when the same command is run again"
EXTEND_HELP = "append the caption files that were added, as further shards"


class _HelpConfig(argparse.Action):
    """Prints every key of a CONFIG and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from embed_precompute.config.keys import describe_keys

        print("Keys of a CONFIG. Each may be given on the command line too: --section.key VALUE.\n")
        print(describe_keys(), end="")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would put ten lines of usage before it."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else "."
        self.exit(EXIT_USAGE, f"embed-precompute: error: {message}{end} See {self.prog} --help.\n")


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The parsed arguments, and words that override keys of a CONFIG. A wrong word ends the
    process with one line that names what it was probably meant to be."""
    parser = command_parser()
    (commands,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
    if words and not words[0].startswith("-") and words[0] not in commands:
        meant = GO_ON if words[0] == "resume" else nearest_of(words[0], commands).removesuffix(".")
        parser.error(f"there is no command {words[0]!r}: {meant}")
    own = commands.get(words[0], parser) if words else parser
    options = [name for name in own._option_string_actions if name.startswith("--")]
    hyphens = {word: word.replace("_", "-") for word in words if word.startswith("--")}
    words = [hyphens[word] if hyphens.get(word) in options else word for word in words]
    arguments, overrides = parser.parse_known_args(words)
    for option in (word.partition("=")[0] for word in overrides):
        if hasattr(arguments, "config"):
            is_key = "." in option or option[2:].replace("-", "_") in SECTIONS
            if is_key or not option.startswith("--"):  # a key of the configuration, or its value
                continue
        elif not option.startswith("-"):
            hint = f": for one sample give --id {option}" if arguments.command == "info" else ""
            own.error(f"unexpected argument {option!r}{hint}")
        meant = GO_ON if option == "--resume" else nearest_of(option, options).removesuffix(".")
        if hasattr(arguments, "config") and (keys := _keys_named(option[2:])):
            meant = f"it is a key of the CONFIG, {' or '.join(keys)}; --help-config lists all"
        own.error(f"there is no option {option}: {meant}")
    return arguments, overrides


def _keys_named(name: str) -> list[str]:
    """The options of the configuration's keys that end in `name`."""
    from embed_precompute.config.keys import key_groups

    keys = dict.fromkeys(key.name for group in key_groups() for key in group.keys)
    return [f"--{key}" for key in keys if key.endswith(f".{name.replace('-', '_')}")]


def command_parser() -> argparse.ArgumentParser:
    """All commands; the parsed `command` is the name of the chosen one."""
    parser = _Parser(
        prog="embed-precompute",
        description="Precompute the text embeddings of a caption table as verified shards.",
        epilog=EXIT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = _config_command(commands, "run", "make the dataset, or go on with it")
    run.add_argument("--limit", type=_positive, metavar="N", help="only the first N samples")
    run.add_argument("--extend", action="store_true", help=EXTEND_HELP)
    _add_reuse(
        run, "copy from this finished dataset what has the same text and encoder; may be repeated"
    )

    plan = _config_command(commands, "plan", "show what a run would make; no model, no GPU")
    plan.add_argument("--limit", type=_positive, metavar="N", help="only the first N samples")
    plan.add_argument("--extend", action="store_true", help=EXTEND_HELP)
    _add_reuse(plan, "count the captions that this finished dataset has; may be repeated")
    ahead = plan.add_mutually_exclusive_group()
    ahead.add_argument("--write", action="store_true", help="write the plan ahead of the run")
    ahead.add_argument(
        "--no-weights",
        action="store_true",
        help="from config.json and tokenizer alone: all but the fingerprint",
    )
    plan.add_argument(
        "--sample",
        type=_count,
        default=10_000,
        metavar="N",
        help="input rows that are tokenised for the figures, from all over the table; 0 = all "
        "(default: %(default)s)",
    )

    _add_price(plan)

    fetch = _config_command(commands, "fetch", "convert the checkpoints to safetensors, once")
    fetch.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write each to FOLDER/NAME (default: the cache folder, where run finds them)",
    )

    text = "the models whose configuration ships with this program"
    presets = commands.add_parser("presets", help=text, description=f"{text.capitalize()}.")
    presets.add_argument(
        "name", nargs="?", metavar="NAME", help="one of them: its facts, its source and its file"
    )

    _add_init_and_doctor(commands)
    status = _folder_command(commands, "status", "what is done, left and failed")
    status.add_argument("--json", action="store_true", help="as one line of JSON")

    _add_bench(commands)
    _add_verify_and_repair(commands)
    _folder_command(commands, "finalize", "manifest and index from the unit records")

    info = _folder_command(commands, "info", "what a dataset holds")
    one = info.add_mutually_exclusive_group()
    one.add_argument("--id", metavar="SAMPLE_ID", help="one sample: text, tokens, place, norms")
    one.add_argument("--all", action="store_true", help="the whole specification too")
    one.add_argument("--similar", metavar="SAMPLE_ID", help="the captions nearest to a sample's")
    info.add_argument(
        "--top",
        type=_positive,
        default=10,
        metavar="N",
        help="captions per encoder that --similar lists (default: %(default)s)",
    )
    report = _folder_command(commands, "report", "a page about a dataset, and its card README.md")
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the page there, and nothing in DIR (default: DIR/report.html and "
        "DIR/README.md)",
    )
    _add_export(commands)
    return parser


def _add_price(plan: Any) -> None:
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument(
        "--rate",
        type=_amount,
        metavar="N",
        help="captions/s of one GPU (runtime.device cpu: of one process), as `bench` or an earlier "
        "run says",
    )
    speed.add_argument(
        "--calibrate",
        action="store_true",
        help="load the encoders, and measure for seconds how fast this device encodes",
    )
    speed.add_argument(
        "--gpu",
        metavar="NAME",
        help="where neither is given, the GPU whose peak is taken (default: H100; with "
        "runtime.device cpu none)",
    )
    plan.add_argument(
        "--share",
        type=_share,
        default=SHARE_OF_PEAK,
        metavar="X",
        help="of that peak which the encoders reach (default: %(default)s)",
    )
    plan.add_argument(
        "--ranks",
        type=_positive,
        default=8,
        metavar="N",
        help="processes, each with a GPU or on CPUs, that write at a time (default: %(default)s)",
    )
    plan.add_argument(
        "--training-flops",
        type=_amount,
        metavar="N",
        help="operations of a training step per sample, forward and backward: storing is compared "
        "with encoding in the loop",
    )
    plan.add_argument(
        "--epochs", type=_amount, metavar="N", help="of that training; with --training-flops"
    )


def _add_init_and_doctor(commands: Any) -> None:
    text = "write a preset's configuration for a caption table"
    init = commands.add_parser("init", help=text, description=f"{text.capitalize()}.")
    init.add_argument("preset", metavar="PRESET", help="its name; `presets` lists them")
    init.add_argument(
        "captions", metavar="CAPTIONS", help="a file, a folder, a glob or a URI, as captions.path"
    )
    init.add_argument(
        "--output", type=Path, metavar="FILE", help="a new file (default: PRESET.yaml)"
    )

    text = "whether this machine and an output folder can do what a run asks"
    doctor = commands.add_parser(
        "doctor",
        help=text,
        description=f"{text.capitalize()}. Each line is ok, warn or fail; a fail ends with exit 2.",
    )
    doctor.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where the dataset is to be; small files are written there and removed (default: the "
        "current folder)",
    )
    form = doctor.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="as one line of JSON, with what --all adds"
    )
    form.add_argument("--all", action="store_true", help="torch's own report on the system too")


def _add_bench(commands: Any) -> None:
    bench = _config_command(
        commands, "bench", "encoder implementations side by side on this device"
    )
    bench.add_argument(
        "--captions",
        type=_positive,
        metavar="N",
        help="captions to encode, evenly out of the first 10,000 (default: 192; one batch where "
        "all captions are padded to one length)",
    )
    bench.add_argument(
        "--rounds",
        type=_positive,
        default=5,
        metavar="N",
        help="times each variant has its turn (default: %(default)s)",
    )
    bench.add_argument(
        "--variants", nargs="+", metavar="NAME", help="only these; a wrong name lists all"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as JSON")


def _add_verify_and_repair(commands: Any) -> None:
    verify = _folder_command(commands, "verify", "check the stored bytes")
    verify.add_argument(
        "--level",
        choices=("quick", "full", "deep"),
        default="full",
        help="quick: sizes, headers, digests of small files; full: every byte; deep: full, and "
        "random samples are encoded again (default: %(default)s)",
    )
    verify.add_argument(
        "--sample",
        type=_count,
        default=32,
        metavar="N",
        help="deep: how many samples are encoded again (default: %(default)s)",
    )
    verify.add_argument(
        "--seed", type=_count, metavar="S", help="deep: which samples; it is printed (default: any)"
    )
    verify.add_argument("--device", default="auto", help="deep: as runtime.device")
    verify.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="processes that read the shards (default: one, whose threads use all cores; for large "
        "datasets one for each core); torchrun works too",
    )

    repair = _folder_command(
        commands, "repair", "quarantine what verify rejects, and open those units again"
    )
    repair.add_argument(
        "--failed", action="store_true", help="open units with failed samples again too"
    )


def _add_reuse(parser: Any, words: str) -> None:
    parser.add_argument(
        "--reuse", action="append", type=Path, default=[], metavar="DIR", help=words
    )


def _add_export(commands: Any) -> None:
    parser = _folder_command(commands, "export", "write a dataset for another program")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, or one to go on with")
    parser.add_argument(
        "--format",
        type=str.lower,
        choices=("opensora",),
        default="opensora",
        help="Open-Sora v2's cached text (default: %(default)s)",
    )
    parser.add_argument("--captions", metavar="PATH", help="the caption table, if it has moved")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N samples")
    parser.add_argument(
        "--workers",
        type=_positive,
        default=1,
        metavar="N",
        help="processes that write the files (default: one, with threads)",
    )
    parser.add_argument(
        "--pad-masked",
        choices=("refuse", "zeros", "repeat_last"),
        default="refuse",
        help="what follows the tokens where only real positions are stored (default: refuse)",
    )
    parser.add_argument(
        "--trainer-dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="dtype of the null embeddings (default: bfloat16)",
    )
    parser.add_argument("--table-only", action="store_true", help="for the drop-in class: no .pt")
    parser.add_argument(
        "--t5", default="t5", metavar="NAME", help="stored tensor that gives text_t5"
    )
    parser.add_argument(
        "--clip", default="clip", metavar="NAME", help="stored tensor that gives text_clip"
    )


def _config_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        usage=f"embed-precompute {name} CONFIG [--section.key VALUE ...] [options]",
        epilog="Any key of the CONFIG may be given too, such as --output.path out; --help-config "
        "lists them.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a preset")
    parser.add_argument(
        "--print_config", "--print-config", action="store_true", help="print the config and exit"
    )
    parser.add_argument(
        "--help-config", action=_HelpConfig, nargs=0, help="list every key of a CONFIG and exit"
    )
    return parser


def _folder_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the dataset's folder")
    return parser


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return value


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, such as 40 or 3e14")
    return value


def _share(text: str) -> float:
    if (value := _amount(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: expected above 0, at most 1")
    return value
