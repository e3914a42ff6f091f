"""Builds the parts of a run on text, see ``vit_tucker.run.builders``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vit_tucker.analysis.flops import count_cost, known_flops
from vit_tucker.analysis.training_hours import TrainingHours, count_multiplied
from vit_tucker.attention.base import AttentionConfig
from vit_tucker.checkpoint.language_host import load_language_model
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.loaders import Loaders
from vit_tucker.data.token_batches import WindowOrder, build_token_loaders
from vit_tucker.data.token_files import open_tokens, verify_tokens
from vit_tucker.hosts.structure import structure_copy, without_weights
from vit_tucker.patching.patch import patch
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.language_model import block_size, build_language_model, refuse_keys_of_images
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

    def cost(self, built: BuiltModel, model: nn.Module) -> dict[str, Any]:
        """Returns the operations per window of tokens of a ``model`` that was ``built``."""
        return count_cost(model, built.host, (built.data["block_size"],), torch.long)

    def host(self, config: RunConfig) -> tuple[str, Callable[[], nn.Module]]:
        """Returns what is the same for runs of one host, and a function that makes its structure, without weights."""
        refuse_keys_of_images(config)
        file = open_tokens(Path(config.data.root).expanduser(), config.data.val_split)
        model, vocabulary = config.model.untrained(), file.facts.vocabulary
        same = model.name, model.model_kwargs, config.data.block_size, vocabulary
        return repr(same), lambda: without_weights(lambda: load_language_model(model, vocabulary))

    def operations(
        self, config: RunConfig, host: nn.Module, method: AttentionConfig | None, dense: int | None
    ) -> int | None:
        """Returns the operations of a forward pass of one window of tokens.

        Args:
            config, host, method, dense: see ``Builder.operations``.
        """
        model = host
        if method is not None:
            model = structure_copy(host)
            patch(model, method, keep_originals=False)
        return known_flops(model, (block_size(config, model),), torch.long)

    def samples(self, config: RunConfig) -> int | None:
        """Returns the windows of an epoch."""
        recipe = config.train
        if recipe.steps_per_epoch is not None:
            return recipe.steps_per_epoch * recipe.global_batch_size
        file = open_tokens(Path(config.data.root).expanduser(), config.data.train_split)
        block = config.data.block_size
        return None if block is None else WindowOrder(len(file.tokens), block, config.seed).windows

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
