"""``predict``: what a model sees in image files."""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import MODEL_HELP, add_device, add_json, choose_device, emit, positive, to_json

if TYPE_CHECKING:
    from vit_tucker.inference.predict import Guess

MANY = 64
"""Images from which worker processes pay."""


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "predict",
        help="print the most likely classes of image files",
        description="The most likely classes of image files, with the transform that the model was evaluated with. Files that "
        "can't be read are named, the others done, and the exit status is 1.",
    )
    parser.add_argument("model", metavar="RUN", help=MODEL_HELP)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, and folders of them")
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes per image; 5 if left out")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per pass; 32 if left out")
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes that read images; 2 for many images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write: CSV, with --json JSON")
    add_device(parser)
    add_json(parser)
    parser.set_defaults(run=predict)


def predict(args: argparse.Namespace) -> int:
    """Prints or writes the likeliest classes of each image."""
    from vit_tucker.data.image_files import list_images
    from vit_tucker.inference.predict import open_classifier
    from vit_tucker.inference.predict import predict as predict_files
    from vit_tucker.show.progress_bars import progress_bar
    from vit_tucker.storage.paths import refuse_unwritable

    files = list_images(args.images)
    device = choose_device(args.device)
    if args.out is not None:
        refuse_unwritable("--out", args.out)
    model = open_classifier(args.model)
    workers = (2 if len(files) >= MANY else 0) if args.num_workers is None else max(0, args.num_workers)
    results = predict_files(model, files, args.top_k, args.batch_size, device, workers)
    rows: list[tuple[Path, list[Guess]]] = []
    failed = 0
    with progress_bar(results, total=len(files), unit="images") as bar:
        for file, guesses in bar:
            if isinstance(guesses, str):
                failed += 1
                bar.write(f"error: {guesses}", file=sys.stderr)
            else:
                rows.append((file, guesses))
    if args.json:
        found = [{"file": str(file), "top": [vars(guess) for guess in guesses]} for file, guesses in rows]
        emit(to_json(found), args.out)
    elif args.out is not None:
        emit(as_csv(rows), args.out)
    elif rows:
        emit(as_text(rows))
    return 1 if failed else 0


def as_text(rows: Sequence[tuple[Path, list["Guess"]]]) -> str:
    """Returns a line per image: its file, and classes with probabilities."""
    from vit_tucker.show.tables import plain

    lines = [(str(file), ", ".join(f"{guess.label} {guess.probability:.1%}" for guess in guesses))
             for file, guesses in rows]  # fmt: skip
    return plain(lines, left=(0, 1))


def as_csv(rows: Sequence[tuple[Path, list["Guess"]]]) -> str:
    """Returns CSV text with the columns file, index1, label1, probability1, index2, ..."""
    text = io.StringIO()
    count = max((len(guesses) for _, guesses in rows), default=0)
    writer = csv.writer(text, lineterminator="\n")
    header = [f"{name}{k}" for k in range(1, count + 1) for name in ("index", "label", "probability")]
    writer.writerow(["file", *header])
    for file, guesses in rows:
        writer.writerow([file, *(x for g in guesses for x in (g.index, g.label, f"{g.probability:.6f}"))])
    return text.getvalue()
