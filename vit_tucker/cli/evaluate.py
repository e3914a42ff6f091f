"""``evaluate``: accuracy of a stored model on a data set."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vit_tucker.cli.common import MODEL_HELP, OVERRIDES_HELP, PRECISIONS, add_json, emit, positive, print_notes, to_json
from vit_tucker.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from vit_tucker.config.schema import DataConfig, RunConfig


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``vit-tucker``."""
    parser = commands.add_parser(
        "evaluate",
        help="accuracy of a stored model",
        description="Top-1, top-5 and loss of a stored model, each image counted once; with accelerate launch on several "
        "processes too. A run brings its data set, else name one.",
    )
    parser.add_argument("model", metavar="RUN", help=MODEL_HELP)
    parser.add_argument(
        "--data", metavar="DATASET", help="data set, as data.dataset of a config; the run's own if left out"
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images per pass; the run's own, or 128")
    parser.add_argument("--precision", choices=PRECISIONS, default="no", help="autocast")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU even if there is a GPU")
    add_json(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help=f"{OVERRIDES_HELP}, e.g. data.root=/data"
    )
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """The command itself."""
    import logging

    from tqdm import tqdm

    from vit_tucker.checkpoint.load import find
    from vit_tucker.data.datasets import dataset_info
    from vit_tucker.data.loaders import build_loaders
    from vit_tucker.data.transforms import resolve_data
    from vit_tucker.hosts.images import input_shape
    from vit_tucker.inference.predict import classes_for, open_classifier
    from vit_tucker.run.accelerator import create_accelerator
    from vit_tucker.training.coordination import Coordinator
    from vit_tucker.training.engine import evaluate as score

    find(args.model)
    config = data_config(args)
    model = open_classifier(args.model)
    info = dataset_info(config.data.dataset)
    chosen = with_image_options(config.data, model, args)
    refuse_other_classes(args.model, model, config.data.dataset)
    logging.getLogger("vit_tucker").setLevel(logging.WARNING)
    accelerator = create_accelerator(config.train)
    peers = Coordinator(accelerator.process_index, accelerator.num_processes, config.train.timeout_minutes)
    model.to(accelerator.device)
    data = resolve_data(config.data, info, model, True, input_shape(model))
    rank, world = accelerator.process_index, accelerator.num_processes
    pin = accelerator.device.type == "cuda"
    classes, notes = peers.main_first(lambda: classes_for(model, args.model, chosen))
    loaders = peers.main_first(
        lambda: build_loaders(
            chosen,
            config.train,
            data,
            0,
            rank,
            world,
            pin,
            with_train=False,
            device=accelerator.device,
            classes=classes,
            num_classes=int(model.num_classes),  # type: ignore[arg-type]
        )
    )
    if accelerator.is_main_process:
        print_notes([*notes, *loaders.notes])
    batches = None if loaders.num_eval is None else len(loaders.eval.loader)
    try:
        with tqdm(
            total=batches, unit="batches", disable=None if accelerator.is_main_process else True, leave=False
        ) as bar:
            scores = score(model, loaders, accelerator, peers, after_batch=lambda: bar.update() and None)
    finally:
        loaders.close()
    if accelerator.is_main_process:
        values = {"model": args.model, "dataset": config.data.dataset, "split": config.data.val_split, **asdict(scores)}
        line = f"top-1 {scores.top1:.2f}%  top-5 {scores.top5:.2f}%  loss {scores.loss:.4f}  {scores.count} images"
        emit(to_json(values) if args.json else f"{args.model} on {config.data.dataset}: {line}")
    return 0


def refuse_other_classes(where: str, model: "nn.Module", dataset: str) -> None:
    """Raises ConfigError if a data set has another number of classes than a model; of folders the class map says more."""
    from vit_tucker.data.datasets import dataset_info
    from vit_tucker.data.folders import is_folder_set

    theirs = dataset_info(dataset).num_classes
    if not is_folder_set(dataset) and theirs not in (None, model.num_classes):
        raise ConfigError(f"{where} has {model.num_classes} classes, the data set {dataset} has {theirs}")


def with_image_options(data: "DataConfig", model: "nn.Module", args: argparse.Namespace) -> "DataConfig":
    """Returns the data section with the stored model's way to read images, where the command line names no other."""
    from vit_tucker.inference.predict import image_options

    given = {text.partition("=")[0] for text in args.overrides}
    stored = {f"data.{name}": value for name, value in image_options(model).plain().items()}
    own = {name.removeprefix("data."): value for name, value in stored.items() if name not in given}
    return data.model_copy(update=own)


def data_config(args: argparse.Namespace) -> "RunConfig":
    """Data and evaluation options: the run's own, with those of the command line on top.

    Raises:
        ConfigError: no data set is named, or a key is unknown.
    """
    from vit_tucker.config.load import validate
    from vit_tucker.config.source import Source, merge_values, read_overrides
    from vit_tucker.inference.predict import run_config

    for text in args.overrides:
        if not text.startswith("data.") or "=" not in text:
            raise ConfigError(f"{text}: only keys of the data section, data.key=value, mean something here")
    run = run_config(args.model)
    if run is None and args.data is None:
        raise ConfigError(f"{args.model} is no run, which would bring its data set: name one by --data")
    same = run is not None and args.data in (None, run.data.dataset)
    given: dict[str, Any] = {"model": {"name": "vit_tiny_patch16_224"}}  # not made: the config needs a name
    if run is not None:
        kept = run.data.model_dump(mode="json")
        given["data"] = kept if same else {"root": kept["root"]}
        given["train"] = {
            "eval_batch_size": run.train.eval_batch_size,
            "global_batch_size": run.train.global_batch_size,
        }
    if args.data is not None:
        given.setdefault("data", {})["dataset"] = args.data
    if args.batch_size is not None:
        given.setdefault("train", {})["eval_batch_size"] = args.batch_size
    given.setdefault("train", {}).update(mixed_precision=args.precision, cpu=args.cpu)
    for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
        given.get("data", {}).pop(name, None)  # the model's own, which its config.json tells
    return validate(merge_values(Source(given), read_overrides(args.overrides)))
