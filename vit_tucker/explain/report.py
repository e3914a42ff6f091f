"""Explains images with one or two models and writes what it finds: pictures, a table of agreement, TensorBoard images."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_tucker.data.batches import Normalise
from vit_tucker.data.transforms import eval_transform
from vit_tucker.explain.agreement import HeadAgreement, compare_attention
from vit_tucker.explain.explanation import Explanation, explain_image
from vit_tucker.explain.images import NamedImage, to_picture, to_pixels
from vit_tucker.explain.sources import Subject, subject_names
from vit_tucker.show.tables import csv_text

AGREEMENT = "agreement.csv"
COLUMNS = ("image", "layer", "head", "total_variation", "cosine")
LABEL_LENGTH = 22
"""Characters of a class's name that fit above a picture."""
KINDS = {False: "rollout", True: "relevance"}
"""What is drawn over the image, by ``weighted``; stands in the column of layers for the agreement of both pictures."""


@dataclass
class Finding:
    """The results for one image.

    Attributes:
        image: its name.
        source: where it comes from.
        predictions: by model, class, label and probability.
        kind: what is drawn over the image, rollout or relevance.
        agreement: by layer, mean total variation distance of the two models' maps.
        picture_agreement: total variation distance of their rollout (or relevance); None where one has none.
        files: names of the pictures.
        notes: what could not be shown, and why.
        rows: lines of the table of agreement.
    """

    image: str
    source: str
    predictions: dict[str, dict[str, Any]]
    kind: str = "rollout"
    agreement: dict[str, float] = field(default_factory=dict)
    picture_agreement: float | None = None
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {key: value for key, value in vars(self).items() if key != "rows"}

    def __str__(self) -> str:
        said = [f"{model} {p['label']} ({p['probability']:.1%})" for model, p in self.predictions.items()]
        if values := self.agreement:
            mean, worst = sum(values.values()) / len(values), max(values, key=lambda name: values[name])
            said.append(f"maps differ by {mean:.3f} (most in {worst}: {values[worst]:.3f})")
        if self.picture_agreement is not None:
            said.append(f"{self.kind} by {self.picture_agreement:.3f}")
        lines = [f"{self.image}: {'; '.join(said)}" if said else self.image]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def explain_images(
    subjects: Sequence[Subject],
    images: Iterable[NamedImage],
    folder: Path,
    options: Mapping[str, Any],
    log_folder: Path | None = None,
) -> Iterator[Finding]:
    """Explains images one by one, and writes pictures as soon as they are drawn; the table at the end.

    Args:
        subjects: one model, or the dense and the patched one.
        images: each becomes ``<name>_rollout.png`` (or ``_relevance``) and ``<name>_heads.png``.
        folder: where to.
        options: of ``explain_image``.
        log_folder: also write TensorBoard images there.

    Yields:
        What was found of each image.
    """
    from vit_tucker.explain.figures import pixels, save_png

    transform = eval_transform(subjects[-1].data, normalize=False)
    rows: list[tuple[Any, ...]] = []
    log: Any = None
    with ExitStack() as stack:
        for image in images:
            finding, figures = explain_one(subjects, image, to_pixels(image.read(), transform), options)
            folder.mkdir(parents=True, exist_ok=True)  # not before there is something to write
            if log is None and log_folder is not None:
                from torch.utils.tensorboard import SummaryWriter

                log = stack.enter_context(SummaryWriter(str(log_folder)))
            for kind, figure in figures.items():
                finding.files.append(f"{image.name}_{kind}.png")
                save_png(figure, folder / finding.files[-1])
                if log is not None:
                    log.add_image(f"attention/{image.name}/{kind}", pixels(figure), dataformats="HWC")
            rows += finding.rows
            yield finding
    if rows:
        cells = ([*row[:3], f"{row[3]:.6f}", f"{row[4]:.6f}"] for row in rows)
        (folder / AGREEMENT).write_text(csv_text(COLUMNS, cells))


def explain_one(
    subjects: Sequence[Subject], image: NamedImage, seen: Tensor, options: Mapping[str, Any]
) -> tuple[Finding, dict[str, Any]]:
    """Explains one image by all models; returns the finding, and its figures by name, rollout and heads.

    Args:
        subjects: one model, or the dense and the patched one.
        image: its name, source and label.
        seen: (1, channels, height, width) in [0, 1].
        options: of ``explain_image``.
    """
    from vit_tucker.explain.figures import Panel, draw_heads, draw_rollout

    inputs = [Normalise(one.data["mean"], one.data["std"], one.device)(seen) for one in subjects]
    found = [explain_image(one.model, x, **options) for one, x in zip(subjects, inputs, strict=True)]
    names, kind = subject_names(subjects), KINDS[bool(options.get("weighted"))]
    predictions = [prediction(one, explanation) for one, explanation in zip(subjects, found, strict=True)]
    finding = Finding(image.name, image.source, {n: p for n, p in zip(names, predictions, strict=True) if p}, kind)
    if len(subjects) == 2:
        layers = [*found[0].heads, *found[0].unplaced]
        pairs = [(one.model, x) for one, x in zip(subjects, inputs, strict=True)]
        add_agreement(finding, compare_attention(pairs[0], pairs[1], layers, found[0].map_bytes), found)
    finding.notes = notes(names, found, kind)
    titles = [model_title(name, said) for name, said in zip(names, predictions, strict=True)]
    panels = [Panel(title, one.rollout, f"no {kind}: {one.obstacle}", one.heads)
              for title, one in zip(titles, found, strict=True)]  # fmt: skip
    true = "" if image.label is None else f" (true: {class_label(subjects[-1], image.label)})"
    figures = {}
    picture = to_picture(seen)
    if any(panel.rollout is not None for panel in panels):
        figures[kind] = draw_rollout(picture, panels, f"{image.name}{true}", kind)
    if any(panel.heads for panel in panels):
        heading = f"{image.name}{true}: attention of the heads, {found[-1].queries}"
        figures["heads"] = draw_heads(picture, panels, heading, finding.agreement or None)
    return finding, figures


def add_agreement(finding: Finding, heads: Sequence[HeadAgreement], found: Sequence[Explanation]) -> None:
    """Adds rows of the table, and means per layer, of two models; with their rollout (or relevance) where both have one.

    Args:
        finding: of the image, changed in place.
        heads: rows of the table.
        found: explanations of both models.
    """
    by_layer: dict[str, list[float]] = defaultdict(list)
    for row in heads:
        by_layer[row.layer].append(row.total_variation)
        finding.rows.append((finding.image, *row))
    finding.agreement = {name: round(sum(values) / len(values), 6) for name, values in by_layer.items()}
    one, other = (explanation.rollout for explanation in found)
    if one is not None and other is not None and one.shape == other.shape:
        distance = ((one - other).abs().sum() / 2 / one.numel()).item()
        cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()
        finding.picture_agreement = round(distance, 6)
        finding.rows.append((finding.image, finding.kind, "", distance, cosine))


def prediction(one: Subject, explanation: Explanation) -> dict[str, Any]:
    """Returns class, label and probability that a model gives an image; empty if it doesn't classify."""
    if not one.classifies or explanation.output.ndim != 1:
        return {}
    probability, number = explanation.output.float().softmax(-1).max(-1)
    label = class_label(one, int(number))
    return {"class": int(number), "label": label, "probability": round(float(probability), 6)}


def class_label(one: Subject, number: int) -> str:
    """Returns the name of a class, its number where it has none."""
    names = one.label_names
    return str(number) if names is None or number >= len(names) else names[number].split(",")[0]


def model_title(name: str, said: Mapping[str, Any]) -> str:
    """Returns 'tucker: tabby cat (87%)'."""
    if not said:
        return name
    label, probability = said["label"], said["probability"]
    short = label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "\u2026"
    return f"{name}: {short} ({probability:{'.0%' if probability >= 0.1 else '.1%'}})"


def notes(names: Sequence[str], found: Sequence[Explanation], kind: str) -> list[str]:
    """Returns what could not be shown, once for all models that it is true of.

    Args:
        names: of the models.
        found: their explanations.
        kind: "rollout" or "relevance".
    """
    said: dict[str, list[str]] = defaultdict(list)
    for name, explanation in zip(names, found, strict=True):
        if explanation.obstacle:
            said[f"no {kind}: {explanation.obstacle}"].append(name)
        if explanation.unplaced:
            layers = ", ".join(explanation.unplaced)
            said[f"no pictures of heads: where the tokens lie can't be known: {layers}"].append(name)
    return [text if len(who) == len(names) else f"{', '.join(who)}: {text}" for text, who in said.items()]
