"""``completion``: a script that lets a shell complete commands, flags and files."""

import argparse
import re
from typing import Any

from vit_tucker.config.find import config_names

SHELLS = ("bash", "zsh", "tcsh")
COMPLETERS = ("_vit_tucker_runs", "_vit_tucker_sweeps")


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
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

    functions = "".join(config_completer(args.shell, sweeps) for sweeps in (False, True))
    print(shtab.complete(with_files(args.build()), args.shell, preamble=functions))
    return 0


def config_completer(shell: str, sweeps: bool) -> str:
    """Returns a function of the shell that offers files, and the names of runs or of sweeps; tcsh has no functions."""
    names = " ".join(
        name for name in config_names(sweeps) if re.fullmatch(r"[\w./+=-]+", name)
    )  # no word of the shell's
    offer = {"bash": f'compgen -f -W "{names}" -- "$1"', "zsh": f"_files; compadd -- {names}"}.get(shell)
    return f"{COMPLETERS[sweeps]}() {{ {offer}; }}\n" if offer else ""


def with_files(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Returns the parser, changed so that completion offers file names for paths, and names of configs for ``--cfg``."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in set(action.choices.values()):
                with_files(command)
        elif "--cfg" in action.option_strings:
            function = COMPLETERS[parser.prog.endswith(" sweep")]
            action.complete = {"bash": function, "zsh": function, "tcsh": "f"}  # type: ignore[attr-defined]
        elif action.metavar in ("FILE", "FOLDER", "RUN", "RUNS", "IMAGE", "CONFIG", "PATH"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser
