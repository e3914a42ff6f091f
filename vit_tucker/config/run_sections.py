"""The keys of a run's config but for the options of methods, which need torch; a mistake in them is found without it."""

from typing import Any

from pydantic import Field, model_validator

from vit_tucker.config.data_section import DataConfig, FolderName, PathText
from vit_tucker.config.model_section import ModelConfig
from vit_tucker.config.train_section import TrainConfig
from vit_tucker.validation.checked import MAX_INTEGER, Checked


class RunSections(Checked):
    """All keys of a run, with its sections of methods as they are written: they are checked where methods are known."""

    name: FolderName | None = Field(
        default=None,
        description="Name in tables and in the default output_dir, without '..'; the file's name if null.",
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_INTEGER, description="Of initialisation, data order, augmentation and dropout."
    )
    output_dir: PathText | None = Field(default=None, description="Run folder; runs/<name>-<seed> if null.")
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Python modules or .py files to import first, for attention methods and timm models of yours. Those that a "
        "config in a run folder names run only with -p FILE or --trust-plugins.",
    )
    model: ModelConfig = Field(description="The timm model.")
    attention: Any = Field(default=None, description="Attention to patch in; null keeps the dense host.")
    linear: Any = Field(
        default=None, description="The method that replaces linear layers outside of attention; null keeps them."
    )
    data: DataConfig = Field(default=DataConfig(), description="Data set and transforms.")
    train: TrainConfig = Field(default=TrainConfig(), description="The recipe.")

    @model_validator(mode="after")
    def _mixup_needs_even_batches(self) -> "RunSections":
        if (self.train.mixup or self.train.cutmix) and self.train.global_batch_size % (2 * self.train.grad_accum_steps):
            raise ValueError("train.mixup and train.cutmix pair images: the micro-batch must be even")
        return self
