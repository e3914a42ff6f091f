"""Command lines in pages: checked with the commands' own parsers and configs; nothing is run."""

import argparse
import configparser
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import timm

from docs.hooks import ROOT
from docs.hooks.commands import command_parsers
from vit_tucker.config.load import load_config
from vit_tucker.config.method_string import read_method
from vit_tucker.config.target import read_run
from vit_tucker.sweep.plan import load_sweep

ASSIGNMENT = re.compile(r"^[A-Z_]+=")
RUNS = ("runs/", "/")
"""Where run folders are, which a page's reader has and a test has not."""
SCRIPTS = {"train_vit.py": "train", "sweep.py": "sweep", "tables.py": "tables", "report.py": "report"}
"""Scripts of experiments/, and the commands that they are."""


def check_script(text: str, where: str) -> None:
    """Check each command of a shell block.

    Args:
        text: of the block.
        where: named in errors.

    Raises:
        AssertionError: an unknown command, flag, config, model or file.
    """
    for command in shell_commands(text):
        try:
            check_command(command)
        except (AssertionError, ValueError, argparse.ArgumentError) as error:
            raise AssertionError(f"{where}: {shlex.join(command)}: {error}") from error


def shell_commands(text: str) -> Iterator[list[str]]:
    """The commands as words: continued lines joined, comments and assignments left out."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(re.sub(r"\$\w+", "1", line), posix=True, punctuation_chars="|;&>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        words = iter([*lexer, ";"])
        for word in words:
            if word in (">", ">>"):
                next(words)  # a file of the reader's
            elif word in ("|", ";", "&&", "||"):
                if command:
                    yield command
                command = []
            elif command or not ASSIGNMENT.match(word):
                command.append(word)


def check_command(command: list[str]) -> None:
    """One command; see ``check_script``."""
    name, *arguments = command
    known: dict[str, Callable[[list[str]], None]] = {
        "./run.sh": check_front_door,
        "vit-tucker": lambda arguments: check_module(arguments[0], arguments[1:]),
        "python": check_python,
        "accelerate": check_accelerate,
        "sbatch": check_sbatch,
        "pip": check_pip,
        "mkdocs": lambda arguments: expect(arguments[:1] in (["build"], ["serve"]), "mkdocs build or serve"),
    }
    expect(name in known, f"unknown command, known: {', '.join(known)}")
    known[name](arguments)


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError with the message unless the condition holds."""
    assert condition, message


def check_front_door(arguments: list[str]) -> None:
    """./run.sh"""
    command, *rest = arguments or ["main"]
    text = (ROOT / "run.sh").read_text()
    own = {name for line in re.findall(r"^  ([a-z-][a-z_| -]*)\)", text, re.MULTILINE) for name in line.split(" | ")}
    if command not in own - {*command_parsers()}:
        check_module(command, rest)  # run.sh hands it on


def check_python(arguments: list[str]) -> None:
    """python -m vit_tucker, python FILE"""
    if arguments[:2] == ["-m", "vit_tucker"]:
        check_module(arguments[2], arguments[3:])
    elif arguments[:2] == ["-m", "pytest"]:
        paths = [word for word in arguments[2:] if word.startswith("tests")]
        expect(all((ROOT / path).exists() for path in paths), f"no such tests: {paths}")
    else:
        file = Path(arguments[0])
        expect((ROOT / file).is_file(), f"{file}: no such file")
        if file.parts[0] == "experiments":
            check_module(SCRIPTS[file.name], arguments[1:])


def check_accelerate(arguments: list[str]) -> None:
    """accelerate launch"""
    from accelerate.commands.launch import launch_command_parser

    expect(arguments[0] == "launch", "accelerate launch")
    if "-m" in arguments:
        place = arguments.index("-m")
        parse(launch_command_parser(), [*arguments[1:place], "script.py"])
        check_python(arguments[place:])
        return
    script = next((i for i, word in enumerate(arguments) if word.endswith(".py")), len(arguments))
    args = parse(launch_command_parser(), arguments[1 : script + 1])
    file = Path(args.training_script)
    expect((ROOT / file).is_file(), f"{file}: no such file")
    expect(args.config_file is None or (ROOT / args.config_file).is_file(), f"{args.config_file}: no such file")
    check_module(SCRIPTS[file.name], arguments[script + 1 :])


def check_sbatch(arguments: list[str]) -> None:
    """sbatch [options] experiments/slurm/train.sbatch --cfg ..."""
    place = next((i for i, word in enumerate(arguments) if word.endswith(".sbatch")), None)
    assert place is not None, "no batch script"
    expect((ROOT / arguments[place]).is_file(), f"{arguments[place]}: no such file")
    check_module("train", arguments[place + 1 :])


def check_pip(arguments: list[str]) -> None:
    """pip install, with extras that there are"""
    expect(arguments[:1] == ["install"], "pip install")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extras in re.findall(r"(?:^\.|vit_tucker)\[([\w,]+)\]", " ".join(arguments)):
        for extra in extras.split(","):
            expect(extra in setup["options.extras_require"], f"setup.cfg has no extra '{extra}'")


def check_module(command: str, arguments: list[str]) -> None:
    """vit-tucker COMMAND, python -m vit_tucker COMMAND"""
    parsers = command_parsers()
    if command in ("--help", "--version") and not arguments:
        return
    expect(command in parsers, f"no command '{command}', known: {', '.join(parsers)}")
    check_parsed(command, parse(parsers[command], arguments))


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The arguments, config keys in ``overrides``; where they have a "...", what is required may be left out."""

    def refuse(message: str) -> None:
        raise AssertionError(message)

    parser.error = refuse  # type: ignore[method-assign,assignment]
    if "..." in arguments:
        for action in parser._actions:
            action.required = False
    args, extra = parser.parse_known_args([word for word in arguments if word != "..."])
    left = [word for word in extra if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    expect(not left, f"unrecognized arguments: {' '.join(left)}")
    if extra:
        args.overrides += extra
    args.whole = "..." not in arguments
    return args


def check_parsed(command: str, args: argparse.Namespace) -> None:
    """What the arguments name must be there: configs with their overrides, models, methods."""
    config, overrides = getattr(args, "cfg", None), list(getattr(args, "overrides", []))
    if config is not None and not config.startswith(RUNS):
        if command == "sweep":
            for values in (args.only, args.seeds):  # argparse gives overrides to the option before them
                overrides += [word for word in values if "=" in word]
            load_sweep(config, overrides)
        else:
            load_config(config, overrides)
    targets = ("cost", "plan", "convert", "train")
    names = [word for word in overrides if "=" not in word] if command in targets else []
    if command == "train" and config is None and args.whole:
        read_run(None, next(iter(names), None), args.method, [word for word in overrides if "=" in word])
    names += [args.model] if command == "ranks" and "/" not in args.model else []
    names += [name for name in args.models if "/" not in name] if command == "bench" else []
    for name in names:
        expect(timm.is_model(name), f"timm has no model '{name}'")
    methods = getattr(args, "method", None) or []
    for method in [methods] if isinstance(methods, str) else methods:
        read_method(method)
