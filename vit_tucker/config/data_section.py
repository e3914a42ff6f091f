"""The data section of a run's config."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from vit_tucker.storage.paths import checked_name, checked_path
from vit_tucker.validation.checked import Checked

TOKENS = "tokens"
"""Name of the data set that is text."""
MAX_IMAGES = 2**40
Number = Annotated[int, Field(ge=0, lt=10_000_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(gt=0, le=100)]
Strength = Annotated[float, Field(ge=0, le=100)]
StoredValue = Annotated[float, Field(ge=-1e12, le=1e12)]
PathText = Annotated[str, AfterValidator(checked_path)]
"""A path without control characters."""
FolderName = Annotated[str, AfterValidator(checked_name)]
"""What names a folder inside another: no '..', nothing absolute."""


class DataConfig(Checked):
    """Data set and transforms (timm.data)."""

    dataset: str = Field(
        default="digits",
        description="digits, fashion_mnist, cifar10, cifar100, imagenet (folder layout), or any name of timm.data's factory: "
        "'' or folder for an image folder, wds/..., hfds/..., hfids/..., tfds/..., torch/...; tokens for a language model: "
        "files of vit-tucker tokenize in the folder root.",
    )
    root: PathText = Field(default="data", description="Folder of the data sets.")
    block_size: int | None = Field(
        default=None,
        ge=2,
        le=2**24,
        description="Tokens of a window (dataset tokens); as many as the model was made for if null.",
    )
    train_split: str = Field(default="train", description="Split to train on, by the data set's own name.")
    val_split: str = Field(default="validation", description="Split to evaluate on.")
    download: bool = Field(default=False, description="Let torchvision or the hub download what is missing.")
    dataset_kwargs: dict[str, Any] = Field(
        default={},
        description="How columns or keys are read: input_key, target_key (hfds/, hfids/, wds/), num_samples (streams); "
        "other arguments of timm.data.create_dataset (torch/, tfds/).",
    )
    num_samples: int | None = Field(
        default=None,
        ge=1,
        le=MAX_IMAGES,
        description="Train on the first n samples only: of a fixed shuffle; of a stream, in the order of its files.",
    )
    class_map: dict[str, Number] | PathText | None = Field(
        default=None,
        description="Number of each class: a dict, or a .txt file (a name, or name and number, in each line) or .json file; "
        "by the training split's names in natural order if null.",
    )
    class_level: Literal["first", "leaf"] | None = Field(
        default=None, description="Image folders inside folders: the first or the last one names the class."
    )
    labels: dict[str, PathText] | PathText | None = Field(
        default=None,
        description="Image folders: a CSV file with the class of each image, relative to the split or root; or one for each "
        "split by its name, and those not named by their folders.",
    )
    label_columns: tuple[str, str] = Field(
        default=("filename", "label"), description="Columns of data.labels: the file's name or path, its class."
    )
    exif_orientation: bool = Field(
        default=False, description="Rotate images by their EXIF data, in training and wherever the model is used."
    )
    value_range: tuple[StoredValue, StoredValue] | None = Field(
        default=None,
        description="Stored values that become black and white, of images with more than 8 bits; 0 to 65535 for 16 bits if null.",
    )
    num_workers: int = Field(default=2, ge=0, le=1024, description="Loader processes per training process.")
    mean: tuple[Share, ...] | None = Field(
        default=None,
        min_length=1,
        description="Channel means, of values from 0 to 1; from pretrained_cfg or the data set if null.",
    )
    std: tuple[Spread, ...] | None = Field(
        default=None, min_length=1, description="Channel standard deviations; as for mean."
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"] | None = Field(
        default=None, description="How images are resampled; random: bilinear or bicubic by chance (training only)."
    )
    crop_pct: float | None = Field(default=None, gt=0, le=1, description="Centre crop share at evaluation.")
    crop_mode: Literal["center", "squash", "border"] | None = Field(
        default=None, description="Images that are not square, at evaluation: cut, squeezed or framed."
    )
    no_aug: bool = Field(default=False, description="Evaluation-like transform for training too.")
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] | None = Field(
        default=None, description="Random resized crop, or keep ratio."
    )
    scale: tuple[Factor, Factor] | None = Field(default=None, description="Random resized crop: area range.")
    ratio: tuple[Factor, Factor] | None = Field(default=None, description="Random resized crop: aspect range.")
    hflip: float = Field(default=0.5, ge=0, le=1, description="Probability of a flip from left to right.")
    vflip: float = Field(default=0.0, ge=0, le=1, description="Probability of a flip upside down.")
    color_jitter: Strength | Annotated[tuple[Strength, ...], Field(min_length=3, max_length=4)] | None = Field(
        default=None, description="Strength of colour changes, or brightness, contrast, saturation and hue."
    )
    aa: str | None = Field(default=None, description="AutoAugment policy, 'rand-m9-mstd0.5-inc1', '3a'.")
    reprob: float = Field(default=0.0, ge=0, le=1, description="Random erasing probability.")
    remode: Literal["const", "rand", "pixel"] = Field(
        default="pixel", description="What erased pixels become: zero, one random colour, or noise."
    )
    recount: int = Field(default=1, ge=1, le=1000, description="Erased rectangles per image.")
    aug_repeats: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Repeated augmentation: each drawn image comes n times, augmented anew; 0 or 1: once.",
    )
    in_memory: Literal["auto"] | bool = Field(
        default="auto",
        description="Hold the images in memory, transformed once where nothing is random; auto: sets that are arrays anyway.",
    )
    max_bad_images: int = Field(
        default=0,
        ge=0,
        le=MAX_IMAGES,
        description="Bad images before the run stops: replaced in training, left out at evaluation.",
    )
    check: bool = Field(default=False, description="Open all images once at the start and list every bad one.")

    @field_validator("value_range", "scale", "ratio")
    @classmethod
    def _a_range(cls, value: tuple[float, float] | None, info: ValidationInfo) -> tuple[float, float] | None:
        strict = info.field_name == "value_range"
        if value is not None and (value[0] > value[1] or (strict and value[0] == value[1])):
            raise ValueError(f"must be [low, high] with low {'below' if strict else 'not above'} high")
        return value

    @field_validator("color_jitter")
    @classmethod
    def _a_hue(cls, value: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
        if isinstance(value, tuple) and len(value) == 4 and value[3] > 0.5:
            raise ValueError(f"the hue, its fourth entry, turns by at most 0.5, not {value[3]:g}")
        return value
