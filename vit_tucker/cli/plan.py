"""``plan``: what a patch would do to a model, without doing it."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import (
    add_device,
    add_json,
    add_method,
    choose_device,
    emit,
    model_and_overrides,
    print_notes,
    to_json,
)

if TYPE_CHECKING:
    from vit_tucker.patching.report import PatchReport

EXAMPLES = """examples:
  plan vit_base_patch16_224 --method "tucker ranks=[8,16,16]"
  plan vit_base_patch16_224 --method "tucker ranks={budget: 0.15}" model.pretrained=true
  plan --cfg imagenet/tucker_r16 attention.layers=2-11
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "plan",
        help="report what a patch would do: parameters, weight errors and FLOPs per layer",
        description="What a patch would do to a timm model, layer by layer; nothing is trained or written.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_target(parser)
    add_json(parser)
    parser.set_defaults(run=plan)


def add_target(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that name a model and a method, or a config that names both."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="MODEL | key=value",
        help="timm model name; config keys, e.g. model.pretrained=true",
    )
    add_method(parser, several=False)
    parser.add_argument("--cfg", metavar="CONFIG", help="model and method of a config, or of a run folder")
    parser.add_argument("--each-layer", action="store_true", help="one row per layer, also where several are alike")
    add_device(parser)


def plan(args: argparse.Namespace) -> int:
    """Plans the patch and prints its report."""
    name, overrides = model_and_overrides(args, "MODEL and --cfg")
    from vit_tucker.run.built import plain_reports
    from vit_tucker.run.convert import plan as plan_model  # after it: a mistake is reported before torch is imported

    planned = plan_model(name, args.method, args.cfg, overrides, device=choose_device(args.device, double=True))
    print_notes(planned.notes)
    emit(to_json(plain_reports(planned.reports)) if args.json else report_tables(args, planned.reports))
    return 0


def report_tables(args: argparse.Namespace, reports: Sequence["PatchReport"]) -> str:
    """Returns reports as tables, with a row per layer where ``--each-layer`` asks for it."""
    return "\n\n".join(report.table(folded=not args.each_layer) for report in reports)
