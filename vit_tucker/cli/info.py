"""``info``: what a bug report needs: versions, devices, attention backends."""

import argparse
from typing import Any

from vit_tucker.cli.common import add_json, emit, to_json

GIB = 2**30


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "info",
        help="versions, devices and attention backends of this machine, for bug reports",
        description="Prints versions, installed extras, devices, and which attention backends run here and why others do not. "
        "A part that can't be found out is listed under 'problems'; the command itself does not fail.",
    )
    add_json(parser)
    parser.set_defaults(run=info)


def info(args: argparse.Namespace) -> int:
    """Prints what is known of this machine."""
    from vit_tucker.run.environment import machine_info

    found = machine_info()
    emit(to_json(found) if args.json else as_text(found))
    return 0


def as_text(found: dict[str, Any]) -> str:
    """Returns ``machine_info`` as tables of plain text, one for each part that is known."""
    sections = {
        "versions": [[name, version or "not installed"] for name, version in (found["versions"] or {}).items()],
        "extras": [[name, extra_text(name, packages)] for name, packages in (found["extras"] or {}).items()],
        "platform": platform_rows(found["platform"] or {}),
        "devices": [[entry["device"], device_text(entry)] for entry in found["devices"] or ()],
        "attention backends": [
            [entry["device"], entry["backend"], backend_text(entry)] for entry in found["backends"] or ()
        ],
        'backend "auto" chooses': [
            [entry["device"], entry["dtype"], f"{entry['backend']}: {entry['reason']}"] for entry in found["auto"] or ()
        ],
        "problems": [list(entry) for entry in found["problems"].items()],
    }
    return "\n\n".join(section(title, rows) for title, rows in sections.items() if rows)


def section(title: str, rows: list[list[str]]) -> str:
    """Returns a title and its indented table."""
    from vit_tucker.show.tables import plain

    table = plain(rows, range(len(rows[0])))
    return "\n".join([f"{title}:", *(f"  {line}" for line in table.splitlines())])


def extra_text(name: str, packages: dict[str, str | None]) -> str:
    """Returns 'installed', or what is missing and the command that installs it."""
    missing = [package for package, version in packages.items() if version is None]
    if not missing:
        return "installed"
    return f"missing {', '.join(missing)}: pip install 'vit_tucker[{name}]'"


def platform_rows(found: dict[str, Any]) -> list[list[str]]:
    """Returns the operating system and the environment variables that are set, a row each."""
    variables = found.get("environment", {})
    rows = [[name, value] for name, value in found.items() if name != "environment"]
    return rows + [[name, value] for name, value in variables.items()]


def device_text(entry: dict[str, Any]) -> str:
    """Returns 'NVIDIA H200, 139.7 GiB, CUDA 12.6, compute 9.0', or why there is no such device."""
    if "missing" in entry:
        return f"none: {entry['missing']}"
    sizes = [f"{entry['memory_bytes'] / GIB:.1f} GiB"] if entry.get("memory_bytes") else []
    counts = [f"{entry['cores']} cores, torch uses {entry['threads']} thread(s)"] if "cores" in entry else []
    return ", ".join([entry["name"], *counts, *sizes, *entry.get("capabilities", ())])


def backend_text(entry: dict[str, Any]) -> str:
    """Returns 'available', with what it is for, or why the backend does not run."""
    if not entry["available"]:
        return f"not available: {entry['reason']}"
    return "available, for Tucker Attention" if entry["tucker_only"] else "available"
