"""The command lines' own parsers, for the reference of commands and for the tests of code blocks."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

from docs_hooks import ROOT
from docs_hooks.tables import markdown_table, plain

MODULE = "python -m vit_tucker"
ANCHOR = "python-m-vit_tucker-"
"""Of a command's heading, before its name."""
SCRIPTS = ("train_vit.py", "sweep.py", "tables.py", "report.py")


class _Captured(BaseException):
    """Carries a parser out of the function that made it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def captured_parser(main: Callable[[], object]) -> argparse.ArgumentParser:
    """The parser that a command's main function makes; nothing of the command itself runs."""

    def capture(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise _Captured(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", capture):
        try:
            main()
        except _Captured as captured:
            return captured.parser
    raise RuntimeError(f"{main} parses no arguments")


def load_script(name: str) -> ModuleType:
    """A script of ``experiments/``, as a module."""
    spec = importlib.util.spec_from_file_location(f"documented_{name.partition('.')[0]}", ROOT / "experiments" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script_parser(name: str) -> argparse.ArgumentParser:
    """Parser of a script of ``experiments/``."""
    script = load_script(name)
    main = getattr(script, "main", None) or getattr(script, "sweep_main", None) or script.train_main
    with mock.patch.object(sys, "argv", [name]):
        return captured_parser(main)


def module_parsers() -> dict[str, argparse.ArgumentParser]:
    """Parsers of ``python -m vit_tucker`` by sub-command."""
    from vit_tucker.cli import main

    return subparsers(captured_parser(lambda: main([])))


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Parsers of a parser's sub-commands, by name; empty if it has none."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: sub for group in groups for name, sub in group.choices.items()}


def summaries(parser: argparse.ArgumentParser) -> dict[str, str]:
    """What the sub-commands do, in a line each."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {choice.dest: choice.help or "" for group in groups for choice in group._choices_actions}


def arguments_table(parser: argparse.ArgumentParser) -> str:
    """Arguments of a command as a Markdown table."""
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        value = _value(action)
        flags = ", ".join(action.option_strings) or value
        shown = f"{flags} {value}" if action.option_strings and value else flags
        text = plain((action.help or "").replace("%%", "%"))
        rows.append((f"`{shown}`" + (" (required)" if action.required and action.option_strings else ""), text))
    return markdown_table(("argument", "meaning"), rows) if rows else "No arguments.\n"


def _value(action: argparse.Action) -> str:
    """'FILE', '{a,b}', 'X ...'"""
    if action.nargs == 0:
        return ""
    name = action.metavar if isinstance(action.metavar, str) else None
    if name is None and action.choices is not None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    name = name or (action.dest.upper() if action.option_strings else action.dest)
    return {"*": f"[{name} ...]", "+": f"{name} [...]", "?": f"[{name}]"}.get(str(action.nargs), name)


def usage(parser: argparse.ArgumentParser, prog: str) -> str:
    """The usage of a command, in lines that fit a page."""
    formatter = argparse.HelpFormatter(prog, width=96)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    return formatter.format_help().strip()


def command_section(prog: str, parser: argparse.ArgumentParser, level: int = 3) -> Iterator[str]:
    """Reference of one command, as Markdown paragraphs; sub-commands of its own below it."""
    heading = "#" * level
    yield f"{heading} `{prog}`\n"
    if parser.description:
        yield f"{parser.description}\n"
    below = subparsers(parser)
    if not below:
        yield f"```text\n{usage(parser, prog)}\n```\n"
        yield arguments_table(parser)
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```\n"
    for name, sub in below.items():
        yield from command_section(f"{prog} {name}", sub, level + 1)


def command_reference() -> str:
    """Reference of all commands, as Markdown."""
    from vit_tucker.cli import main

    top = captured_parser(lambda: main([]))
    rows = [(f"[`{name}`](#{ANCHOR}{name})", text) for name, text in summaries(top).items()]
    parts = [f"## `{MODULE}`\n", markdown_table(("command", "what it does"), rows)]
    for name, parser in subparsers(top).items():
        parts += command_section(f"{MODULE} {name}", parser)
    parts.append("## Scripts\n")
    for name in SCRIPTS:
        parts += command_section(f"python experiments/{name}", script_parser(name))
    return "\n".join(parts)
