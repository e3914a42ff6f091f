"""Builds the parts of a run that depend on its task, images with labels or text; nothing else of a run asks which it is."""

from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from vit_tucker.analysis.flops import count_cost
from vit_tucker.analysis.training_hours import TrainingHours, count_multiplied
from vit_tucker.checkpoint.language_host import PREFIX, is_language_model
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.classes import padded, stored_classes
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.loaders import Loaders, build_loaders
from vit_tucker.data.token_batches import build_token_loaders
from vit_tucker.data.token_files import open_tokens, verify_tokens
from vit_tucker.data.transforms import describe_data
from vit_tucker.errors import ConfigError
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.check_images import check_images
from vit_tucker.run.language_model import build_language_model, refuse_keys_of_images
from vit_tucker.run.model import build_model
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.training.coordination import Coordinator

TOKENS = "tokens"
"""The data set that is text."""


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

    def cost(self, built: BuiltModel, model: torch.nn.Module) -> dict[str, Any]:
        """Returns the entry ``cost`` of results.json for a model, see ``vit_tucker.analysis.flops.count_cost``."""

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


class ImageBuilder:
    """Builds runs of timm's models on images with labels; methods as of ``Builder``."""

    def check(self, config: RunConfig, run_dir: RunDir, coordinator: Coordinator, with_train: bool) -> list[str]:
        """Opens every image once, see ``check_images``.

        Args:
            config, run_dir, coordinator, with_train: see ``Builder.check``.
        """
        return check_images(config, run_dir, coordinator, with_train)

    def model(self, config: RunConfig, run_dir: RunDir, device: torch.device, training: bool) -> BuiltModel:
        """Returns timm's model of the run, patched.

        Args:
            config, run_dir, device, training: see ``Builder.model``.

        Raises:
            ConfigError: the recipe has steps of an epoch. Others: see ``build_model``.
        """
        if config.train.steps_per_epoch is not None:
            raise ConfigError(
                "train.steps_per_epoch: is for data.dataset=tokens; an epoch of images is a pass over them"
            )
        return build_model(config, run_dir, device, training)

    def loaders(
        self, config: RunConfig, run_dir: RunDir, accelerator: Accelerator, built: BuiltModel, with_train: bool
    ) -> Loaders:
        """Returns the loaders of images, see ``build_loaders``.

        Args:
            config, run_dir, accelerator, built, with_train: see ``Builder.loaders``.
        """
        return build_loaders(
            config.data,
            config.train,
            built.data,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
            with_train=with_train,
            device=accelerator.device,
            classes=stored_classes(run_dir.path_if_begun),
            num_classes=built.num_classes,
        )

    def cost(self, built: BuiltModel, model: torch.nn.Module) -> dict[str, Any]:
        """Returns the operations per image of a ``model`` that was ``built``."""
        return count_cost(model, built.host, built.data["input_size"])

    def described(self, built: BuiltModel, loaders: Loaders) -> dict[str, Any]:
        """Returns names of the classes that ``loaders`` have, and how images are prepared for what was ``built``."""
        names = loaders.label_names and padded(loaders.label_names, built.num_classes)
        return {"label_names": names if names and len(names) == built.num_classes else None, "data": built.data}

    def expect(self, config: RunConfig, built: BuiltModel, steps: int) -> list[str]:
        """Returns no lines: hours depend on the images.

        Args:
            config, built, steps: see ``Builder.expect``.
        """
        return []

    def describe(self, config: RunConfig, built: BuiltModel, results: dict[str, Any]) -> tuple[str, str]:
        """Returns size and normalisation of the images, and their numbers.

        Args:
            config, built, results: see ``Builder.describe``.
        """
        info, weights = dataset_info(config.data.dataset), built.loads[0].normalisation if built.loads else None
        images = f"{results['num_train']} training and {results['data']['num_eval'] or 'streamed'} evaluation images"
        return (
            describe_data(config.data, info, built.data, weights),
            f"{config.data.dataset}: {images}; {config.train.epochs} epochs, global batch {config.train.global_batch_size}",
        )


class TextBuilder:
    """Builds runs of transformers' causal language models on files of tokens; methods as of ``Builder``."""

    def check(self, config: RunConfig, run_dir: RunDir, coordinator: Coordinator, with_train: bool) -> list[str]:
        """Reads the files of tokens once; raises DataError if one is not what was written.

        Args:
            config, run_dir, coordinator, with_train: see ``Builder.check``.
        """
        splits = [config.data.val_split, *([config.data.train_split] if with_train else [])]

        def verify() -> None:
            for split in splits:
                verify_tokens(open_tokens(Path(config.data.root).expanduser(), split))

        coordinator.on_main(verify)
        return []

    def model(self, config: RunConfig, run_dir: RunDir, device: torch.device, training: bool) -> BuiltModel:
        """Returns transformers' model of the run, patched.

        Args:
            config, run_dir, device, training: see ``Builder.model``.
        """
        refuse_keys_of_images(config)
        return build_language_model(config, run_dir, device, training)

    def loaders(
        self, config: RunConfig, run_dir: RunDir, accelerator: Accelerator, built: BuiltModel, with_train: bool
    ) -> Loaders:
        """Returns the loaders of windows, see ``build_token_loaders``.

        Args:
            config, run_dir, accelerator, built, with_train: see ``Builder.loaders``.
        """
        place = accelerator.process_index, accelerator.num_processes, accelerator.device.type == "cuda"
        return build_token_loaders(config.data, config.train, built.data["block_size"], config.seed, *place, with_train)

    def cost(self, built: BuiltModel, model: torch.nn.Module) -> dict[str, Any]:
        """Returns the operations per window of tokens of a ``model`` that was ``built``."""
        return count_cost(model, built.host, (built.data["block_size"],), torch.long)

    def described(self, built: BuiltModel, loaders: Loaders) -> dict[str, Any]:
        """Returns nothing: a language model's config.json has nothing of its text."""
        return {}

    def expect(self, config: RunConfig, built: BuiltModel, steps: int) -> list[str]:
        """Returns the hours of a GPU that the training is expected to take.

        Args:
            config, built, steps: see ``Builder.expect``.
        """
        return [str(training_hours(config, built, steps))]

    def describe(self, config: RunConfig, built: BuiltModel, results: dict[str, Any]) -> tuple[str, str]:
        """Returns tokenizer, windows, and numbers of tokens.

        Args:
            config, built, results: see ``Builder.describe``.
        """
        data, recipe = built.data, config.train
        per_token = "" if data["bytes_per_token"] is None else f", {data['bytes_per_token']:.2f} bytes each"
        step = recipe.global_batch_size * data["block_size"]
        return (
            f"tokenizer {data['tokenizer'] or 'unknown'}: {data['vocabulary']:,} tokens{per_token}; windows of "
            f"{data['block_size']}",
            f"{config.data.root}: {results['num_train'] or 0:,} training and {results['data']['num_eval']:,} evaluation tokens; "
            f"{recipe.epochs} epochs, {step:,} tokens in a step",
        )


def training_hours(config: RunConfig, built: BuiltModel, steps: int) -> TrainingHours:
    """Returns what the training of a language model is expected to cost.

    Args:
        config, built, steps: see ``Builder.expect``.
    """
    tokens = config.train.epochs * steps * config.train.global_batch_size * built.task.units
    return TrainingHours(count_multiplied(built.model), tokens)


def builder_of(config: RunConfig) -> Builder:
    """Returns what builds a run: its data set decides.

    Raises:
        ConfigError: a language model without text, or a model of timm's with it.
    """
    text, language_model = config.data.dataset == TOKENS, is_language_model(config.model)
    if text != language_model:
        raise ConfigError(
            f"model.name: {config.model.name} with data.dataset={config.data.dataset}: "
            + (f"tokens are for a language model of transformers, '{PREFIX}llama'" if text else
               f"a language model learns from text, data.dataset={TOKENS}, which vit-tucker tokenize makes")
        )  # fmt: skip
    return TextBuilder() if text else ImageBuilder()
