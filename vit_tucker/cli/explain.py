"""``explain``: what the attention of a run's model looks at, beside its dense host's."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import MODEL_HELP, add_device, add_json, choose_device, emit, positive, print_notes, to_json
from vit_tucker.errors import ConfigError

if TYPE_CHECKING:
    from vit_tucker.explain.images import NamedImage
    from vit_tucker.explain.report import Finding
    from vit_tucker.explain.sources import Subject

EXAMPLES = """examples:
  explain runs/digits-tucker_r16_finetune-0 --data 4
  explain runs/my_run photo.jpg folder_of_images --layers 0,6,-1 --out attention
  explain saved_model photo.jpg --dense runs/dense_run --queries class --head-fusion max --discard-ratio 0.9
"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vit-tucker``."""
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
        "--data", type=positive, metavar="N", help="the first N evaluation images of the run's data set"
    )
    parser.add_argument(
        "--dense",
        default="host",
        metavar="RUN | host | pretrained | none",
        help="the dense model beside it: host, what the run started from (if left out); pretrained, timm's weights; a run, "
        "checkpoint or saved folder, or a weights file; none",
    )
    parser.add_argument(
        "--layers",
        metavar="LAYERS",
        help="whose heads are shown: indices, ranges and name patterns with commas, e.g. 0,3-5,-1 or 'blocks.*.attn'",
    )
    parser.add_argument(
        "--head-fusion", choices=("mean", "max", "min"), default="mean", help="of rollout; mean if left out"
    )
    parser.add_argument(
        "--discard-ratio", type=float, default=0.0, metavar="SHARE", help="of rollout: the smallest entries set to 0; 0"
    )
    parser.add_argument(
        "--queries",
        choices=("auto", "class", "patches"),
        default="auto",
        help="whose attention is shown: auto, the tokens that the model reads out; the class token; the mean over patches",
    )
    parser.add_argument(
        "--relevance",
        action="store_true",
        help="in place of rollout: relevance for one class, maps weighted by its gradients (Chefer et al. 2021)",
    )
    parser.add_argument(
        "--target",
        type=int,
        metavar="CLASS",
        help="of --relevance: the class's number; what each model predicts if left out",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to; RUN/attention if left out")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also as TensorBoard images, in the run folder or --out"
    )
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=explain)


def explain(args: argparse.Namespace) -> int:
    """The command itself."""
    from tqdm import tqdm

    from vit_tucker.explain.report import explain_images
    from vit_tucker.storage.paths import refuse_unwritable

    folder, log_folder = places(args)
    refuse_unwritable("--out", folder, folder=True)
    if log_folder is not None:
        refuse_unwritable("--tensorboard", log_folder, folder=True)
    subjects, images = prepare(args)
    print_notes([subject.weights for subject in subjects if subject.weights])
    options = {
        "layers": read_layers(args.layers),
        "head_fusion": args.head_fusion,
        "discard_ratio": args.discard_ratio,
        "queries": args.queries,
        "weighted": args.relevance,
        "target": args.target,
    }
    findings = []
    bar = tqdm(images, unit="images", disable=True if len(images) == 1 else None, leave=False)
    for finding in explain_images(subjects, bar, folder, options, log_folder):
        findings.append(finding)
        if not args.json:
            tqdm.write(describe_finding(finding))
    if args.json:
        emit(to_json({"folder": folder, "images": [finding.to_dict() for finding in findings]}))
    else:
        print(
            f"{folder}: {sum(len(f.files) for f in findings)} pictures{', agreement.csv' if len(subjects) > 1 else ''}"
        )
    return 0


def places(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Where pictures and TensorBoard events go.

    Raises:
        ConfigError: the model is no folder, and --out is missing.
    """
    run = Path(args.where).expanduser()
    if args.out is None and not run.is_dir():
        raise ConfigError(f"{args.where}: no folder here; name one for the pictures with --out")
    folder = args.out or run / "attention"
    return folder, (args.out or run) if args.tensorboard else None


def prepare(args: argparse.Namespace) -> tuple[list["Subject"], list["NamedImage"]]:
    """Models, dense first, and images; everything that can be refused is refused here.

    Raises:
        VitTuckerError: see ``open_subject``, ``open_dense``, ``images_in_files`` and ``data_images``.
    """
    from vit_tucker.data.image_files import image_mode
    from vit_tucker.explain.images import data_images, images_in_files, named_apart
    from vit_tucker.explain.sources import open_dense, open_subject, refuse_different, refuse_target
    from vit_tucker.hosts.find import find_attention
    from vit_tucker.inference.predict import classes_for, image_options, run_config
    from vit_tucker.patching.selection import select

    if not args.images and args.data is None:
        raise ConfigError("explain needs images: files, folders, or --data N")
    refuse_clashes(args)
    device = choose_device(args.device)
    config = run_config(args.where)
    if args.data is not None and config is None:
        raise ConfigError(f"--data: {args.where} is no run, so that its data set is not known; name image files")
    run = open_subject(args.where)
    select(read_layers(args.layers), list(find_attention(run.model)))
    mode = image_mode(run.data["input_size"][0])
    images = images_in_files(args.images, mode, image_options(run.model))
    if args.data is not None and config is not None:
        classes, notes = classes_for(run.model, args.where, config.data)
        print_notes(notes)
        images = named_apart([*images, *data_images(config.data, args.data, mode, classes)])
    dense = open_dense(args.dense, run, config, args.where)
    subjects = [run] if dense is None else [dense, run]
    refuse_different(subjects)
    if args.relevance:
        refuse_target(subjects, args.target)
    for subject in subjects:
        subject.model.to(device)
    return subjects, images


def refuse_clashes(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that don't go together, or values out of range."""
    if not 0 <= args.discard_ratio < 1:
        raise ConfigError(f"--discard-ratio {args.discard_ratio:g}: must be at least 0 and below 1")
    if args.relevance and (args.discard_ratio or args.head_fusion != "mean"):
        raise ConfigError("--relevance: weighs heads by gradients: it takes no --head-fusion and no --discard-ratio")
    if args.target is not None and not args.relevance:
        raise ConfigError("--target: is the class of --relevance; rollout is of no class")


def read_layers(text: str | None) -> list[int | str] | None:
    """'0,3-5,-1' as ``patch`` takes it."""
    if text is None:
        return None
    return [int(part) if part.lstrip("-").isdigit() else part for part in text.split(",")]


def describe_finding(finding: "Finding") -> str:
    """Lines for people."""
    said = [f"{model} {p['label']} ({p['probability']:.1%})" for model, p in finding.predictions.items()]
    if values := finding.agreement:
        mean, worst = sum(values.values()) / len(values), max(values, key=lambda name: values[name])
        said.append(f"maps differ by {mean:.3f} (most in {worst}: {values[worst]:.3f})")
    if finding.picture_agreement is not None:
        said.append(f"{finding.kind} by {finding.picture_agreement:.3f}")
    lines = [f"{finding.image}: {'; '.join(said)}" if said else finding.image]
    return "\n".join([*lines, *(f"  {note}" for note in finding.notes)])
