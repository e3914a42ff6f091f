"""``methods``, ``configs`` and ``schema``: the names to choose from, and a config's JSON schema."""

import argparse
from typing import Any

from vit_tucker.cli.common import add_json, emit, to_json


def add_parser(commands: Any) -> None:
    """Adds the commands to the subparsers of ``vit-tucker``."""
    methods = commands.add_parser("methods", help="list the registered attention methods")
    add_json(methods)
    methods.set_defaults(run=list_methods)
    configs = commands.add_parser("configs", help="list the configs for --cfg and base:")
    configs.add_argument("--sweep", action="store_true", help="names of the sweep files instead")
    add_json(configs)
    configs.set_defaults(run=list_configs)
    schema = commands.add_parser("schema", help="print the JSON schema of a config file, for editors")
    schema.add_argument("--sweep", action="store_true", help="schema of a sweep file instead")
    schema.set_defaults(run=print_schema)


def list_methods(args: argparse.Namespace) -> int:
    """Prints the names of the registered methods."""
    from vit_tucker.attention.registry import list_methods

    names = list_methods()
    emit(to_json(names) if args.json else "\n".join(names))
    return 0


def list_configs(args: argparse.Namespace) -> int:
    """Prints the names of the runs' or the sweeps' configs."""
    from vit_tucker.config.find import config_names

    names = config_names(sweeps=args.sweep)
    emit(to_json(names) if args.json else "\n".join(names))
    return 0


def print_schema(args: argparse.Namespace) -> int:
    """Prints the JSON schema of a config or of a sweep."""
    from vit_tucker.config.schema import json_schema
    from vit_tucker.sweep.schema import SweepConfig

    emit(to_json(SweepConfig.model_json_schema() if args.sweep else json_schema()))
    return 0
