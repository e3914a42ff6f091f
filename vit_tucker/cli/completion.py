"""``completion``: a script that lets a shell complete commands, flags and files."""

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "completion",
        help="a script for the shell's completion",
        description="Print a completion script. bash: vit-tucker completion bash > "
        "~/.local/share/bash-completion/completions/vit-tucker; zsh: vit-tucker completion zsh > a folder of $fpath/_vit-tucker.",
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=completion)


def completion(args: argparse.Namespace) -> int:
    """Prints the script for the parser that ``args.build`` makes: of all commands, this one among them."""
    import shtab

    print(shtab.complete(with_files(args.build()), args.shell))
    return 0


def with_files(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, with file names offered wherever a path may stand."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in set(action.choices.values()):
                with_files(command)
        elif (
            action.metavar in ("FILE", "FOLDER", "RUN", "RUNS", "IMAGE", "CONFIG", "PATH")
            or "--cfg" in action.option_strings
        ):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser
