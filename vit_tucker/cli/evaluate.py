"""``evaluate``: accuracy of a stored model on a data set."""

import argparse
from typing import Any

from vit_tucker.cli.common import (
    MODEL_HELP,
    OVERRIDES_HELP,
    PRECISIONS,
    add_device,
    add_json,
    choose_device,
    emit,
    positive,
    print_notes,
    to_json,
)


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the accuracy of a stored model",
        description="Top-1, top-5 and loss of a stored model, each image counted once; with accelerate launch on several "
        "processes too. A run brings its data set, else name one.",
    )
    parser.add_argument("model", metavar="RUN", help=MODEL_HELP)
    parser.add_argument(
        "--data", metavar="DATASET", help="data set, as data.dataset of a config; the run's own if left out"
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images per pass; the run's own, or 128")
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="precision of autocast")
    add_device(parser)
    add_json(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help=f"{OVERRIDES_HELP}, e.g. data.root=/data"
    )
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates the model and prints its scores, on the first process."""
    import logging

    from accelerate.state import PartialState

    from vit_tucker.inference.evaluate import evaluate as evaluate_model

    logging.getLogger("vit_tucker").setLevel(logging.WARNING)
    device = None if args.device is None else choose_device(args.device)  # a launcher has chosen it
    options = {"batch_size": args.batch_size, "precision": args.precision, "device": device, "tell": print_notes}
    found = evaluate_model(args.model, args.data, args.overrides, **options)
    if PartialState().is_main_process:
        scores = found.scores
        line = f"top-1 {scores.top1:.2f}%  top-5 {scores.top5:.2f}%  loss {scores.loss:.4f}  {scores.count} images"
        emit(to_json(found.to_dict()) if args.json else f"{args.model} on {found.dataset}: {line}")
    return 0
