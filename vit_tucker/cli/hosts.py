"""``hosts``: which models of timm and transformers can be patched, by which methods, and why not."""

import argparse
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import add_json, emit, to_json


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "hosts",
        help="list the models that can be patched, by which methods, and why others can't",
        description="The attention of timm's models, or of transformers' causal language models, read from their structure (on "
        "the meta device, about two minutes for all).",
    )
    parser.add_argument(
        "--library", choices=("timm", "transformers"), default="timm", help="whose models; timm if left out"
    )
    parser.add_argument("--filter", metavar="PATTERN", help="names of models with wildcards, e.g. 'vit_*'")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write the map to, as Markdown or with --json, instead of printing it",
    )
    add_json(parser)
    parser.set_defaults(run=hosts)


def hosts(args: argparse.Namespace) -> int:
    """Surveys the models and prints or writes the map."""
    from vit_tucker.analysis.host_surveys import open_survey
    from vit_tucker.errors import ConfigError
    from vit_tucker.report.host_map import document, summary, terminal_map
    from vit_tucker.show.progress_bars import each
    from vit_tucker.storage.paths import refuse_unwritable

    names, survey, version = open_survey(args.library, args.filter)
    if args.out is not None:
        refuse_unwritable("--out", args.out)
    entries = [entry.to_dict() for entry in survey(each(names, "reading", "models", str))]
    if not entries:
        raise ConfigError(f"none of the {len(names)} models that match '{args.filter}' has attention")
    if args.out is None:
        emit(to_json(entries) if args.json else terminal_map(entries))
        return 0
    text = document(entries, version, args.out.as_posix(), args.filter, args.library)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(to_json(entries) + "\n" if args.json else text)
    print(f"{args.out}: {summary(entries)}")
    return 0
