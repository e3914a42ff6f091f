"""``explain``: what the attention of a run's model looks at, beside its dense host's."""

import argparse
from pathlib import Path
from typing import Any

from vit_tucker.cli.common import MODEL_HELP, add_device, add_json, choose_device, emit, positive, print_notes, to_json

OPTIONS = ("data", "dense", "out", "tensorboard", "head_fusion", "discard_ratio", "queries", "relevance", "target")
"""Arguments that ``vit_tucker.explain.stored.explain_stored`` has under the same names."""

EXAMPLES = """examples:
  explain runs/digits-tucker_r16_finetune-0 --data 4
  explain runs/my_run photo.jpg folder_of_images --layers 0,6,-1 --out attention
  explain saved_model photo.jpg --dense runs/dense_run --queries class --head-fusion max --discard-ratio 0.9
"""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "explain",
        help="attention maps of all heads and attention rollout, as pictures, beside the dense model's",
        description="Attention maps of all heads and attention rollout of a run's model over images, side by side with the dense "
        "model that it started from: PNG files, and how far both agree, per layer and head, as CSV.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("where", metavar="RUN", help=MODEL_HELP)
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="image files, and folders of them")
    parser.add_argument(
        "--data", type=positive, metavar="N", help="explain the first N evaluation images of the run's data set"
    )
    parser.add_argument(
        "--dense",
        default="host",
        metavar="RUN | host | pretrained | none",
        help="dense model to compare with: host, the weights that the run started from (if left out); pretrained, timm's "
        "weights; a run, checkpoint or saved folder, or a weights file; or none",
    )
    parser.add_argument(
        "--layers",
        metavar="LAYERS",
        help="layers whose heads are shown: indices, ranges and name patterns with commas, e.g. 0,3-5,-1 or 'blocks.*.attn'",
    )
    parser.add_argument(
        "--head-fusion",
        choices=("mean", "max", "min"),
        default="mean",
        help="how rollout combines the heads; mean if left out",
    )
    parser.add_argument(
        "--discard-ratio",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the smallest entries that rollout sets to 0; 0 if left out",
    )
    parser.add_argument(
        "--queries",
        choices=("auto", "class", "patches"),
        default="auto",
        help="tokens whose attention is shown: those that the model classifies by (auto), the class token, or all patches",
    )
    parser.add_argument(
        "--relevance",
        action="store_true",
        help="show relevance for one class instead of rollout: maps weighted by its gradients (Chefer et al. 2021)",
    )
    parser.add_argument(
        "--target",
        type=int,
        metavar="CLASS",
        help="number of the class for --relevance; each model's prediction if left out",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write; RUN/attention if left out")
    parser.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard images too, in the run folder or --out"
    )
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=explain)


def explain(args: argparse.Namespace) -> int:
    """Explains the images and prints what is found of each."""
    from tqdm import tqdm

    from vit_tucker.explain.stored import explain_stored

    options = {key: value for key, value in vars(args).items() if key in OPTIONS}
    options |= {"layers": read_layers(args.layers), "device": choose_device(args.device)}
    work = explain_stored(args.where, args.images, tell=print_notes, **options)
    findings = []
    for finding in work.findings:
        findings.append(finding)
        if not args.json:
            tqdm.write(str(finding))
    if args.json:
        emit(to_json({"folder": work.folder, "images": [finding.to_dict() for finding in findings]}))
    else:
        count, table = sum(len(finding.files) for finding in findings), ", agreement.csv" if work.compared else ""
        print(f"{work.folder}: {count} pictures{table}")
    return 0


def read_layers(text: str | None) -> list[int | str] | None:
    """Reads '0,3-5,-1' as the layers that ``patch`` accepts."""
    if text is None:
        return None
    return [int(part) if part.lstrip("-").isdigit() else part for part in text.split(",")]
