"""The language model of a run, built from its config: transformers' model, its patch, and what it learns."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_tucker.attention.options import MethodConfig
from vit_tucker.checkpoint.host_model import count_parameters
from vit_tucker.checkpoint.language_host import load_language_model, positions_of, vocabulary_of
from vit_tucker.config.schema import DataConfig, RunConfig, TrainConfig
from vit_tucker.data.token_batches import calibration_windows
from vit_tucker.data.token_files import open_tokens
from vit_tucker.errors import ConfigError, DataError
from vit_tucker.hosts.structure import structure_copy
from vit_tucker.patching.patch import patch
from vit_tucker.patching.report import PatchReport
from vit_tucker.run.built import BuiltModel, all_parameters, patch_all, patched_entries
from vit_tucker.storage.checkpoints import list_checkpoints
from vit_tucker.storage.json_files import read_object
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.training.task import TokenTask

OF_TOKENS = ("dataset", "root", "train_split", "val_split", "block_size", "num_workers", "check")
"""Keys of the data section that a text has."""
OF_IMAGES = ("mixup", "cutmix", "distill", "latency_batch_size", "layer_decay")
"""Keys of the recipe that only runs on images have."""


def refuse_keys_of_images(config: RunConfig) -> None:
    """Raises ConfigError if a run on text has keys that mean nothing there."""
    defaults = DataConfig(), TrainConfig()
    for name in DataConfig.model_fields:
        if name not in OF_TOKENS and getattr(config.data, name) != getattr(defaults[0], name):
            raise ConfigError(f"data.{name}: is for images; data.dataset=tokens has {', '.join(OF_TOKENS)}")
    for name in OF_IMAGES:
        if getattr(config.train, name) != getattr(defaults[1], name):
            raise ConfigError(f"train.{name}: is for images, not for data.dataset=tokens; leave it out")


def build_language_model(config: RunConfig, run_dir: RunDir, device: torch.device, training: bool = True) -> BuiltModel:
    """Makes the language model of a run, starts it from its weights and patches it.

    Args:
        config: validated.
        run_dir: its folder, which may hold the same run.
        device: where the model is patched and trained.
        training: False: it is evaluated only.

    Raises:
        VitTuckerError: see ``load_language_model`` and ``patch``; or the tokens are missing or not those of the model.
    """
    evaluated = open_tokens(Path(config.data.root).expanduser(), config.data.val_split)
    facts = evaluated.facts
    started = bool(list_checkpoints(run_dir.checkpoints)) or (run_dir.best.is_file() and not training)
    section = config.model.untrained() if started else config.model
    weights = run_dir.checkpoints / ("last" if training else "best") if started else None
    model = load_language_model(section, facts.vocabulary, weights)
    block, known = block_size(config, model), vocabulary_of(model)
    if facts.vocabulary > known:
        raise DataError(
            f"{evaluated.path}: tokens of a vocabulary of {facts.vocabulary}, and {config.model.name} knows {known}: they are of "
            "another tokenizer"
        )
    data: dict[str, Any] = {"tokenizer": facts.tokenizer, "vocabulary": facts.vocabulary, "block_size": block}
    data |= {"bytes_per_token": evaluated.bytes_per_token, "text": facts.sha256}
    if started:
        refuse_other_text(data, run_dir)
    sizes, structure = count_parameters(model), structure_copy(model)
    model.to(device)
    reports = patch_all(
        model, config, run_dir, started, training, lambda m: patch_language_model(model, m, config, block)
    )
    return BuiltModel(
        model,
        known,
        data,
        all_parameters(model, sizes),
        *patched_entries(model, config, run_dir, started, reports),
        host=structure,
        task=TokenTask(block, evaluated.bytes_per_token, config.model.name),
    )


def refuse_other_text(data: dict[str, Any], run_dir: RunDir) -> None:
    """Raises DataError if a run goes on with another text than it began with: ``data.root`` may change, the tokens may not.

    Args:
        data: as now, see ``BuiltModel``.
        run_dir: of the run.
    """
    if not run_dir.data_config.is_file():
        return
    before = read_object(run_dir.data_config)
    for name, what in (("tokenizer", "tokenizer"), ("text", "text of data.val_split, by its SHA-256,")):
        if before.get(name) != data[name]:
            raise DataError(
                f"{run_dir.path}: the {what} was {before.get(name)} when the run began, and is {data[name]}: name the files of "
                "then by data.root=, or choose another output_dir="
            )


def block_size(config: RunConfig, model: nn.Module) -> int:
    """Returns the tokens of a window: ``data.block_size``, else as many as the model was made for.

    Raises:
        ConfigError: more than that, or the model names no number.
    """
    block, positions = config.data.block_size, positions_of(model)
    if block is None and positions is None:
        raise ConfigError(f"data.block_size: needed, {config.model.name} does not name the length of its texts")
    if block is not None and positions is not None and block > positions:
        raise ConfigError(
            f"data.block_size={block}: {config.model.name} has {positions} positions; choose at most these"
        )
    return int(block or positions or 0)


def patch_language_model(model: nn.Module, method: MethodConfig, config: RunConfig, block: int) -> PatchReport:
    """Patches a language model in place, calibrated on windows of the training text if so configured.

    Args:
        model: dense, on its device.
        method: what to patch in.
        config: of the run, for its text.
        block: tokens of a window.

    Raises:
        PatchError: see ``patch``. DataError: the text is missing or too short.
    """
    windows = None
    if (options := method.fitted_to) is not None:
        windows = calibration_windows(config.data, block, options.images, options.batch_size, options.seed)
    return patch(model, method, calibration=windows, keep_originals=False)
