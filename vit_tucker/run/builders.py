"""Builds the parts of a run that depend on its task, images with labels or text; nothing else of a run asks which it is."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.checkpoint.language_host import is_language_model
from vit_tucker.config.data_section import TOKENS
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.loaders import Loaders
from vit_tucker.errors import ConfigError
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.image_builder import ImageBuilder
from vit_tucker.run.text_builder import TextBuilder
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.training.coordination import Coordinator


class Builder(Protocol):
    """Builds the parts of a run that depend on what it learns."""

    def check(self, config: RunConfig, run_dir: RunDir, coordinator: Coordinator, with_train: bool) -> list[str]:
        """Reads all data once, as ``data.check`` asks for, and returns lines about what can't be read.

        Args:
            config, run_dir, coordinator: of the run.
            with_train: check the training split too.
        """

    def model(self, config: RunConfig, run_dir: RunDir, device: torch.device, training: bool) -> BuiltModel:
        """Returns the model of the run, patched.

        Args:
            config, run_dir: of the run.
            device: where the model is patched and trained.
            training: False: it is evaluated only.
        """

    def loaders(
        self, config: RunConfig, run_dir: RunDir, accelerator: Accelerator, built: BuiltModel, with_train: bool
    ) -> Loaders:
        """Returns the loaders of this process.

        Args:
            config, run_dir, accelerator: of the run.
            built: its model.
            with_train: open the training split too.
        """

    def cost(self, built: BuiltModel, model: nn.Module) -> dict[str, Any]:
        """Returns the entry ``cost`` of results.json for a model, see ``vit_tucker.analysis.flops.count_cost``."""

    def host(self, config: RunConfig) -> tuple[str, Callable[[], nn.Module]]:
        """Returns what is the same for runs of one host, and a function that makes its structure, without weights."""

    def operations(
        self, config: RunConfig, host: nn.Module, method: AttentionConfig | None, dense: int | None
    ) -> int | None:
        """Returns the operations of a forward pass of one image or window; None where the host does not run without values.

        Args:
            config: of the run.
            host: its structure.
            method: what is patched in, without conversion; None for the host itself.
            dense: operations of the host itself, where they are known.

        Raises:
            PatchError: the method does not fit.
        """

    def samples(self, config: RunConfig) -> int | None:
        """Returns the images or windows of an epoch; None where they are not known before the data are read."""

    def described(self, built: BuiltModel, loaders: Loaders) -> dict[str, Any]:
        """Returns what config.json has of the data: options of the library's ``describe``, see ``ModelLibrary``."""

    def expect(self, config: RunConfig, built: BuiltModel, steps: int) -> list[str]:
        """Returns lines for --dry-run about what the training will cost.

        Args:
            config, built: of the run.
            steps: of an epoch.
        """

    def describe(self, config: RunConfig, built: BuiltModel, results: dict[str, Any]) -> tuple[str, str]:
        """Returns two lines for the log about the data: how they are prepared, and how many there are.

        Args:
            config, built: of the run.
            results: see ``vit_tucker.run.describe.describe_run``.
        """


def builder_of(config: RunConfig) -> Builder:
    """Returns what builds a run: its data set decides.

    Raises:
        ConfigError: a language model without text, or a model of timm's with it.
    """
    text, language_model = config.data.dataset == TOKENS, is_language_model(config.model)
    if text != language_model:
        raise ConfigError(
            f"model.name: {config.model.name} with data.dataset={config.data.dataset}: "
            + ("tokens are for a language model of transformers, 'hf:llama'" if text else
               f"a language model learns from text, data.dataset={TOKENS}, which vit-tucker tokenize makes")
        )  # fmt: skip
    return TextBuilder() if text else ImageBuilder()
