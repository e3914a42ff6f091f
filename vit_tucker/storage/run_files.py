"""Checks the small files of a run folder where they are read again: by a run that goes on, tables, sweeps."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from vit_tucker.show.methods import MethodDisplay
from vit_tucker.storage.json_files import Lenient
from vit_tucker.validation.mistakes import shown

IGNORED_KEYS = frozenset(
    {
        *("data.root", "data.download", "data.num_workers", "data.check"),
        *("train.eval_batch_size", "train.grad_accum_steps"),
        *("train.checkpoint_epochs", "train.checkpoint_steps", "train.checkpoint_hist", "train.log_interval"),
        *("train.log_ranks", "train.trackers", "train.timeout_minutes", "train.latency_batch_size"),
    }
)
"""Keys of a run's config that may change while it stays the same run: they change nothing that it computes beyond rounding."""

CLASSES_FILE = "classes.json"
"""The class map in a run folder: a JSON object of names and numbers."""

Size = Annotated[list[Annotated[int, Field(ge=1, le=1 << 16)]], Field(min_length=3, max_length=3)]
Share = Annotated[float, Field(gt=0, le=2)]
"""crop_pct: above 1 timm pads; some of its models have 1.15."""
Means = Annotated[list[float], Field(min_length=1, max_length=1 << 12)]
Deviations = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=1 << 12)]
Score = Annotated[float, Field(allow_inf_nan=True)]
INTERPOLATIONS = ("", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
CROP_MODES = ("center", "squash", "border")


def classes_text(names: Sequence[str]) -> str:
    """Returns the text of classes.json for names in the order of their numbers."""
    return json.dumps({name: number for number, name in enumerate(names)}, indent=2, ensure_ascii=False) + "\n"


class DataEntries(Lenient):
    """Entries that say how images are prepared, in timm's terms."""

    input_size: Size | None = None
    mean: Means | None = None
    std: Deviations | None = None
    interpolation: str | None = None
    crop_pct: Share | None = None
    crop_mode: str | None = None

    @field_validator("interpolation", "crop_mode")
    @classmethod
    def _known_word(cls, value: str | None, info: Any) -> str | None:
        known = INTERPOLATIONS if info.field_name == "interpolation" else CROP_MODES
        if value is not None and value not in known:
            raise ValueError(f"must be one of {', '.join(filter(None, known))}, not {shown(value)}")
        return value


class RunData(DataEntries):
    """data_config.json: all of it, since what is missing would be the model's own instead."""

    input_size: Size
    mean: Means
    std: Deviations
    interpolation: str
    crop_pct: Share
    crop_mode: str


class PatchLayer(Lenient):
    """A layer of patch.json, as far as tables name it."""

    method: str
    options: str


class Patch(Lenient):
    """patch.json: the patch report of a run's start."""

    layers: Annotated[list[PatchLayer], Field(min_length=1)]


class Patches(Lenient):
    """patch.json of a run that patches linear layers: their report is beside that of attention, if there is one."""

    layers: Annotated[list[PatchLayer], Field(min_length=1)] | None = None
    linear: Patch


class Named(Lenient):
    """A section of a config that has a name."""

    name: str


class Evaluated(Lenient):
    """The data section of a config."""

    dataset: str


class RunEntries(Lenient):
    """The config in results.json, as far as tables need it."""

    seed: int
    model: Named
    data: Evaluated
    attention: dict[str, Any] | None = None


class ParameterCounts(Lenient):
    """Parameters of a run's model and of its host."""

    total: Annotated[int, Field(ge=0)]
    attention: Annotated[int, Field(ge=0)]
    dense_attention: Annotated[int, Field(ge=1)]


class RunResults(Lenient):
    """results.json of a finished run, as far as it is read again."""

    name: str
    display: MethodDisplay | None = None
    config: RunEntries
    environment: dict[str, Any]
    params: ParameterCounts
    patch: Patch | None
    data: dict[str, Any]
    epochs: Annotated[int, Field(ge=0)]
    best: dict[str, Score | None] | None
    last: dict[str, Score | None]
    finished: str
    curve: list[dict[str, Score | None]] | None = None
    train_seconds: Annotated[float, Field(ge=0)] | None = None
    cost: dict[str, Any] | None = None
