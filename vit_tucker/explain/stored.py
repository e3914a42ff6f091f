"""Attention maps and rollout of a stored model over images, beside its dense host's, as picture files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vit_tucker.data.image_files import image_mode
from vit_tucker.errors import ConfigError
from vit_tucker.explain.images import NamedImage, data_images, images_in_files, named_apart
from vit_tucker.explain.report import Finding, explain_images
from vit_tucker.explain.sources import Subject, open_dense, open_subject, refuse_different, refuse_target
from vit_tucker.hosts.find import find_attention
from vit_tucker.inference.predict import classes_for, image_options, run_config
from vit_tucker.patching.selection import select
from vit_tucker.show.progress_bars import progress_bar
from vit_tucker.storage.paths import refuse_unwritable

Tell = Callable[[Sequence[str]], None]


class Explaining(NamedTuple):
    """Images that are explained as ``findings`` is read.

    Attributes:
        folder: where pictures go, and agreement.csv at the end.
        compared: there is a dense model beside the stored one.
        findings: one per image.
    """

    folder: Path
    compared: bool
    findings: Iterator[Finding]


def explain_stored(
    where: str,
    images: Sequence[Path] = (),
    *,
    data: int | None = None,
    dense: str = "host",
    out: Path | None = None,
    tensorboard: bool = False,
    device: torch.device | str = "cpu",
    layers: list[int | str] | None = None,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    queries: str = "auto",
    relevance: bool = False,
    target: int | None = None,
    tell: Tell | None = None,
) -> Explaining:
    """Draws attention maps of all heads and attention rollout of a stored model; what can be refused is refused at once.

    Args:
        where: run folder, checkpoint, saved folder or OWNER/NAME of the hub, see ``open_model``.
        images: image files, and folders of them.
        data: the first so many evaluation images of the run's data set.
        dense: model beside it: "host", "pretrained", "none", or a run, saved folder or weights file.
        out: folder to write; ``attention`` in the run's if None.
        tensorboard: also as TensorBoard images.
        device: where the models run.
        layers: whose heads are shown, as for ``patch``.
        head_fusion, discard_ratio, queries, target: see ``vit_tucker.explain.explain_image``.
        relevance: relevance for a class in place of rollout.
        tell: called with notes about data and weights.

    Raises:
        VitTuckerError: options that don't go together; models or images that are missing or don't fit.
    """
    run = Path(where).expanduser()
    if out is None and not run.is_dir():
        raise ConfigError(f"{where}: no folder here; name one for the pictures with --out")
    folder, log_folder = out or run / "attention", (out or run) if tensorboard else None
    refuse_unwritable("--out", folder, folder=True)
    if log_folder is not None:
        refuse_unwritable("--tensorboard", log_folder, folder=True)
    if not images and data is None:
        raise ConfigError("explain needs images: files, folders, or --data N")
    refuse_clashes(head_fusion, discard_ratio, relevance, target)
    subjects, found = open_subjects(where, images, data, dense, layers, tell)
    if relevance:
        refuse_target(subjects, target)
    for subject in subjects:
        subject.model.to(device)
    if tell is not None:
        tell([subject.weights for subject in subjects if subject.weights])
    options = {"layers": layers, "head_fusion": head_fusion, "discard_ratio": discard_ratio}
    options |= {"queries": queries, "weighted": relevance, "target": target}
    bar = progress_bar(found, unit="images")
    return Explaining(folder, len(subjects) > 1, explain_images(subjects, bar, folder, options, log_folder))


def open_subjects(
    where: str,
    files: Sequence[Path],
    data: int | None,
    dense: str,
    layers: list[int | str] | None,
    tell: Tell | None,
) -> tuple[list[Subject], list[NamedImage]]:
    """Returns models, dense first, and images, of ``files`` and the data set; other arguments as of ``explain_stored``.

    Raises:
        ConfigError: the data set is asked for, but not known.
    """
    config = run_config(where)
    if data is not None and config is None:
        raise ConfigError(f"--data: {where} is no run, so that its data set is not known; name image files")
    run = open_subject(where)
    select(layers, list(find_attention(run.model)))
    mode = image_mode(run.data["input_size"][0])
    images = images_in_files(files, mode, image_options(run.model))
    if data is not None and config is not None:
        classes, notes = classes_for(run.model, where, config.data)
        if tell is not None:
            tell(notes)
        images = named_apart([*images, *data_images(config.data, data, mode, classes)])
    host = open_dense(dense, run, config, where)
    subjects = [run] if host is None else [host, run]
    refuse_different(subjects)
    return subjects, images


def refuse_clashes(head_fusion: str, discard_ratio: float, relevance: bool, target: int | None) -> None:
    """Raises ConfigError for options that exclude each other, or values out of range; arguments as of ``explain_stored``."""
    if not 0 <= discard_ratio < 1:
        raise ConfigError(f"--discard-ratio {discard_ratio:g}: must be at least 0 and below 1")
    if relevance and (discard_ratio or head_fusion != "mean"):
        raise ConfigError("--relevance: weighs heads by gradients: it takes no --head-fusion and no --discard-ratio")
    if target is not None and not relevance:
        raise ConfigError("--target: is the class of --relevance; rollout is of no class")
