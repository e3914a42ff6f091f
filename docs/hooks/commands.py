"""The reference of the command line, from the commands' own parsers."""

import argparse
from collections.abc import Iterator

from docs.hooks.tables import markdown_table, plain

PROG = "vit-tucker"


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Parsers of all commands, by name, in the order of the help."""
    from vit_tucker.cli import build_parser

    return subparsers(build_parser(PROG))


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
    """Returns the usage of an argument: 'FILE', '{a,b}', 'X [...]'."""
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


def command_section(prog: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Reference of one command, as Markdown paragraphs."""
    yield f"## `{prog}`\n"
    if parser.description:
        yield f"{plain(parser.description)}\n"
    yield f"```text\n{usage(parser, prog)}\n```\n"
    yield arguments_table(parser)
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```\n"


def command_reference() -> str:
    """Reference of all commands, as Markdown."""
    from vit_tucker.cli import build_parser

    told = summaries(build_parser(PROG))
    rows = [(f"[`{name}`](#{PROG}-{name})", plain(text)) for name, text in told.items()]
    parts = [markdown_table(("command", "what it does"), rows)]
    for name, parser in command_parsers().items():
        parts += command_section(f"{PROG} {name}", parser)
    return "\n".join(parts)
