"""Checks the contents of config.json of a saved model: the parts of timm's layout that are used, and ours.

Entries that timm or a hub adds and nobody here reads are let through; ours are all known.
"""

from typing import Annotated, Any

from pydantic import Field, model_validator
from typing_extensions import Self

from vit_tucker.storage.digests import Stored
from vit_tucker.storage.json_files import Lenient, Strict
from vit_tucker.storage.run_files import DataEntries, Share, Size

Name = Annotated[str, Field(pattern=r"^[\w.\-]+$", max_length=200)]
Text = Annotated[str, Field(max_length=100_000)]
Count = Annotated[int, Field(ge=0, le=1 << 24)]
Sides = Annotated[list[Annotated[int, Field(ge=1, le=1 << 16)]], Field(min_length=1, max_length=3)]
Modules = (
    Annotated[str, Field(max_length=200)] | Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=9)]
)


class PretrainedEntries(DataEntries):
    """The entries of timm's pretrained_cfg that decide how weights are loaded, and how images are prepared."""

    test_input_size: Size | None = None
    min_input_size: Size | None = None
    fixed_input_size: bool | None = None
    test_crop_pct: Share | None = None
    num_classes: Count | None = None
    label_offset: Count | None = None
    label_names: list[Text] | None = None
    label_descriptions: dict[Text, Text] | list[Text] | None = None
    pool_size: Sides | None = None
    test_pool_size: Sides | None = None
    first_conv: Modules | None = None
    classifier: Modules | None = None


class OtherSlot(Strict):
    """A patch of another slot than attention."""

    method: Name
    layers: dict[str, dict[str, Any]]


class PatchedEntries(Strict):
    """Entries that vit_tucker adds to timm's config.json, under the key ``vit_tucker``."""

    version: Annotated[str, Field(max_length=50)] | None = None
    host: Name | None = None
    method: Name | None = None
    layers: dict[str, dict[str, Any]] | None = None
    linear: OtherSlot | None = None
    images: Any = None
    stored: Stored | None = None


class Layout(Lenient):
    """config.json of a model in timm's layout."""

    architecture: Name
    num_classes: Count | None = None
    num_features: Count | None = None
    label_names: list[Text] | None = None
    label_descriptions: dict[Text, Text] | list[Text] | None = None
    model_args: dict[str, Any] | None = None
    pretrained_cfg: PretrainedEntries | None = None
    vit_tucker: PatchedEntries | None = None

    @model_validator(mode="after")
    def _one_number_of_classes(self) -> Self:
        stated: dict[str, Any] = {
            "model_args.num_classes": (self.model_args or {}).get("num_classes"),
            "num_classes": self.num_classes,
            "pretrained_cfg.num_classes": self.pretrained_cfg and self.pretrained_cfg.num_classes,
        }
        counts = [count for count in stated.values() if count is not None]
        if self.vit_tucker is not None and any(type(c) is not int or c != counts[0] for c in counts):
            places = ", ".join(key for key, count in stated.items() if count is not None)
            raise ValueError(f"must be one number of classes in {places}")
        return self
