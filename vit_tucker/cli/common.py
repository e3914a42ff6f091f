"""Shared parts of all commands: their parser, the flags that several have, and how results are printed."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vit_tucker.errors import ConfigError, nearest, shorten

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda", "mps", "xpu")
PRECISIONS = ("no", "bf16", "fp16")
MODEL_HELP = (
    "run folder (its best weights), one of its checkpoints, a folder of vit_tucker.save, or owner/name on the hub"
)
OVERRIDES_HELP = "config keys to override, values in YAML"


class Parser(argparse.ArgumentParser):
    """Parses arguments like argparse, and reports a mistake in one line with the nearest valid name."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with status 2."""
        valid: list[str] = []
        word = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: (\S+)", message)
        for action in self._actions:
            wanted = action.option_strings if word and word[2] else (action.choices or ())
            valid += map(str, wanted)
        hint = nearest(word[1] or word[2].partition("=")[0], valid) if word else ""
        self.exit(2, f"error: {message}{hint} (see {self.prog} --help)\n")


def parse_with_overrides(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, with every ``key=value`` in ``overrides``: argparse puts only those there that it meets first.

    Args:
        parser: with an argument ``overrides``, unless the command has none.
        argv: as for ``parse_args``.
    """
    args, extra = parser.parse_known_args(argv)
    if extra and (not hasattr(args, "overrides") or any(text.startswith("-") for text in extra)):
        unknown = [text for text in extra if text.startswith("-")] or extra
        command_parser(parser, args).error(f"unrecognized arguments: {' '.join(unknown)}")
    if extra:
        args.overrides += extra
    return args


def command_parser(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.ArgumentParser:
    """Returns the parser of the given command; the parser itself if it has no commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[args.command]
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``, which prints results as JSON on standard output."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``, which ``choose_device`` reads."""
    parser.add_argument("--device", metavar="DEVICE", help="device: cpu, cuda, cuda:1, ...; a GPU if there is one")


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Adds ``-p`` and ``--trust-plugins``, which ``run_command`` applies."""
    group = parser.add_argument_group("plug-ins")
    group.add_argument(
        "-p",
        "--plugin",
        dest="plugins",
        action="append",
        default=[],
        metavar="FILE",
        help="a .py file or module of yours, with methods or models, to import first; may be given several times",
    )
    group.add_argument(
        "--trust-plugins",
        action="store_true",
        help="run the plug-ins that the config of a run folder or saved folder names; refused without it",
    )


def run_command(args: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """Imports the plug-ins that the user names, runs a command, without progress bars for --json, and returns its exit status.

    Raises:
        ConfigError: a plug-in can't be imported. Whatever the command raises.
    """
    from vit_tucker.config.plugins import command_plugins
    from vit_tucker.run.openmp import choose_waiting
    from vit_tucker.show.progress_bars import showing_progress

    choose_waiting()
    with command_plugins(args.plugins, args.trust_plugins), showing_progress(False if vars(args).get("json") else None):
        return command(args)


def add_method(parser: argparse.ArgumentParser, several: bool = True) -> None:
    """Adds ``--method``, which ``vit_tucker.config.method_string.read_method`` reads."""
    how = "; may be given several times" if several else ""
    parser.add_argument(
        "--method",
        action="append" if several else "store",
        default=[] if several else None,
        metavar="'NAME key=value ...'",
        help=f"a method and its options, values in YAML as in a config's attention section{how}",
    )


def model_and_overrides(args: argparse.Namespace, sources: str) -> tuple[str | None, list[str]]:
    """Returns what ``split_model`` does, and refuses the mistakes in the config that are found without torch.

    Args:
        args: with ``overrides`` and ``cfg``.
        sources: what may name the model, for the message.

    Raises:
        ConfigError: not exactly one model is named; or a mistake in the config.
    """
    from vit_tucker.config.early import refuse_early
    from vit_tucker.config.load import read_files
    from vit_tucker.config.source import Source, merge_values, read_overrides

    name, overrides = split_model(args, sources)
    source = Source({"model": {"name": name}}) if args.cfg is None else read_files(args.cfg)[1]
    refuse_early(merge_values(source, read_overrides(overrides)))
    return name, overrides


def split_model(args: argparse.Namespace, sources: str) -> tuple[str | None, list[str]]:
    """Returns the model's name, None where ``--cfg`` names it, and the ``key=value`` strings of ``args.overrides``.

    Args:
        args: with ``overrides`` and ``cfg``.
        sources: what may name the model, for the message.

    Raises:
        ConfigError: not exactly one model is named.
    """
    names = [text for text in args.overrides if "=" not in text]
    if len(names) + (args.cfg is not None) != 1:
        found = f", not {len(names)} models" if len(names) > 1 else ""
        if names and args.cfg is not None:
            found = f", not both: '{shorten(names[0])}' beside --cfg {args.cfg}; overrides are written key.sub=value"
        raise ConfigError(f"{args.command} needs one of {sources}{found}")
    return next(iter(names), None), [text for text in args.overrides if "=" in text]


def positive(text: str) -> int:
    """Reads an integer of one or more, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def choose_device(name: str | None, double: bool = False) -> "torch.device":
    """Returns the device of that name; for None a GPU if there is one, else the CPU.

    Args:
        name: as of ``--device``.
        double: it must have float64, as conversions need.

    Raises:
        ConfigError: there is no such device, or it has no float64.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in DEVICES:
        raise ConfigError(f"--device {name}: one of {', '.join(DEVICES)}{nearest(name, DEVICES)}")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if double:
            torch.empty(1, device=device, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def emit(text: str, out: Path | None = None) -> None:
    """Prints a result, or writes it to a file and prints the file's name."""
    text = text if text.endswith("\n") else f"{text}\n"
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"{out}: written")


def print_notes(notes: Sequence[str]) -> None:
    """Prints notes about weights and data to standard error, so that the output of --json stays clean."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def to_json(values: Any) -> str:
    """Returns values as indented JSON, with paths as text."""
    return json.dumps(values, indent=2, default=str)
