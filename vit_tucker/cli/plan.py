"""``plan``: what a patch would do to a model, without doing it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import add_json, add_method, emit, print_notes, to_json
from vit_tucker.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from vit_tucker.attention.base import AttentionConfig
    from vit_tucker.config.schema import RunConfig

EXAMPLES = """examples:
  plan vit_base_patch16_224 --method "tucker ranks=[8,16,16]"
  plan vit_base_patch16_224 --method "tucker ranks={budget: 0.15}" model.pretrained=true
  plan --cfg imagenet/tucker_r16 attention.layers=2-11
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "plan",
        help="what a patch would do: parameters, weight errors and FLOPs per layer",
        description="What a patch would do to a timm model, layer by layer; nothing is trained or written.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target(parser)
    add_json(parser)
    parser.set_defaults(run=plan)


def add_target(parser: argparse.ArgumentParser) -> None:
    """A model and a method, or a config that names both."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="MODEL | key=value",
        help="timm model name; config keys, e.g. model.pretrained=true",
    )
    add_method(parser, several=False)
    parser.add_argument("--cfg", metavar="CONFIG", help="model and method of a config, or of a run folder")


def plan(args: argparse.Namespace) -> int:
    """The command itself."""
    from vit_tucker.patching.patch import plan as plan_patch
    from vit_tucker.run.model import plain_reports

    config, attention = read_target(args)
    model, weights = create(config)
    methods = [method for method in (attention, config.linear) if method is not None]
    reports = [plan_patch(model, method, img_size=config.model.img_size) for method in methods]
    print_notes(weights)
    emit(to_json(plain_reports(reports)) if args.json else "\n\n".join(map(str, reports)))
    return 0


def read_target(args: argparse.Namespace) -> tuple["RunConfig", "AttentionConfig | None"]:
    """Config and method that ``add_target``'s arguments name.

    Raises:
        ConfigError: not exactly one model, or no method.
    """
    from vit_tucker.cli.cost import read_method
    from vit_tucker.config.load import config_from, load_config

    names = [text for text in args.overrides if "=" not in text]
    overrides = [text for text in args.overrides if "=" in text]
    if len(names) + (args.cfg is not None) != 1:
        raise ConfigError(f"{args.command} needs one of MODEL and --cfg{f', not {len(names)} models' if names else ''}")
    if args.cfg is not None:
        config = load_config(args.cfg, overrides)
        attention = config.attention if args.method is None else read_method(args.method, config.model)
        if attention is None and config.linear is None:
            raise ConfigError(f"{args.cfg}: attention: the config patches nothing; name a method by --method")
        return config, attention
    config = config_from({"model": {"name": names[0]}}, overrides)
    if args.method is None:
        raise ConfigError(f'{args.command} {names[0]}: name a method, e.g. --method "tucker ranks=[8,16,16]"')
    return config, read_method(args.method, config.model)


def create(config: "RunConfig") -> tuple["nn.Module", list[str]]:
    """Makes the dense model of a config.

    Returns:
        The model, with the classes of its data set where it has a config file, else those of its weights, or timm's; and lines
        for the user about its weights.
    """
    from vit_tucker.checkpoint.host_model import load_host
    from vit_tucker.run.model import classes_and_channels

    sizes = () if config.name is None else classes_and_channels(config)
    start = config.model.checkpoint
    if start is not None and not Path(start).expanduser().exists():
        raise CheckpointError(
            f"model.checkpoint: {start}: no such file or run folder; name where it is now by model.checkpoint=PATH, or go "
            "without its weights by model.checkpoint=null"
        )
    model, report = load_host(config.model, *sizes)
    return model, [] if report is None else [str(report)]
