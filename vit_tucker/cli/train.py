"""``train`` and ``experiments/train_vit.py``: train, continue or evaluate one run."""

import argparse
from collections.abc import Sequence
from typing import Any

from vit_tucker.cli.common import (
    Parser,
    add_device,
    add_method,
    add_plugins,
    parse_with_overrides,
    run_command,
    split_model,
)
from vit_tucker.errors import ConfigError
from vit_tucker.run.status import guarded

DESCRIPTION = (
    "Train a timm ViT, dense or with another attention: of a config, or by its name with the recipe of the data set "
    "(<dataset>/base.yaml). The same command on the same folder continues the run."
)
EXAMPLES = """examples:
  train --cfg digits/tucker_r16 train.epochs=5 --quick-check
  train vit_tiny_patch16_224 --method "tucker ranks=[3,16,16]" data.dataset=cifar10 model.img_size=32 model.patch_size=4
  train vit_small_patch16_224 --method "gqa num_kv_heads=2" data.dataset=folder data.root=birds model.pretrained=true
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "train",
        help="train, continue or evaluate one run, from a config or a model's name",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=train)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``train``."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="MODEL | key=value",
        help="timm model name, unless --cfg names it; config keys, values in YAML, e.g. data.dataset=cifar10 train.epochs=5",
    )
    add_method(parser, several=False)
    parser.add_argument("--cfg", metavar="CONFIG", help="config file, name below experiments/configs, or a run folder")
    parser.add_argument(
        "--evaluate", action="store_true", help="only evaluate: the run's best weights, or the model as it starts"
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue the folder's run with this config even if it began with another",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan: model, patch, groups, steps, memory")
    parser.add_argument(
        "--quick-check",
        action="store_true",
        help="try everything: two steps, an evaluation batch and a checkpoint, in a folder that is removed again",
    )
    add_device(parser)


def train_parser() -> Parser:
    """Returns the parser of ``experiments/train_vit.py``."""
    parser = Parser(
        prog="train_vit.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    add_plugins(parser)
    parser.set_defaults(command="train")
    return parser


def train_main(argv: Sequence[str] | None = None) -> int:
    """Runs ``train`` as ``experiments/train_vit.py`` and ``./run.sh train`` do; returns the exit status."""
    args = parse_with_overrides(train_parser(), argv)
    return guarded(lambda: run_command(args, train))


def train(args: argparse.Namespace) -> int:
    """Trains, continues or evaluates the run that the arguments name."""
    from vit_tucker.run import main

    model, overrides = split_model(args, "MODEL and --cfg")
    if args.quick_check and (args.evaluate or args.dry_run):
        raise ConfigError(f"--quick-check goes without {'--evaluate' if args.evaluate else '--dry-run'}: choose one")
    options = {"evaluate": args.evaluate, "allow_changes": args.allow_changes, "dry_run": args.dry_run}
    overrides += main.device_overrides(args.device)
    return main.train(args.cfg, overrides, model=model, method=args.method, quick_check=args.quick_check, **options)
