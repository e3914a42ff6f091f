"""Builds the parts of a run on text, see ``vit_tucker.run.builders``."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vit_tucker.analysis.flops import count_cost
from vit_tucker.analysis.training_hours import TrainingHours, count_multiplied
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.loaders import Loaders
from vit_tucker.data.token_batches import build_token_loaders
from vit_tucker.data.token_files import open_tokens, verify_tokens
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.language_model import build_language_model, refuse_keys_of_images
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.training.coordination import Coordinator


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
