"""Descriptions of a run before it trains: in results.json, on the console, and by --dry-run."""

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vit_tucker.analysis.interleaved import PRECISIONS
from vit_tucker.analysis.latency import describe_device, latency_to_dense
from vit_tucker.analysis.training_memory import estimate_memory
from vit_tucker.attention.base import AttentionConfig
from vit_tucker.checkpoint.host_model import create_host
from vit_tucker.config.load import plain_config
from vit_tucker.config.schema import ModelConfig, RunConfig, TrainConfig
from vit_tucker.data.loaders import Loaders
from vit_tucker.hosts.slot import LINEAR
from vit_tucker.run.builders import builder_of
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.openmp import describe_waiting
from vit_tucker.show.methods import SHIPPED, MethodDisplay
from vit_tucker.storage.run_dir import LOGGER, environment
from vit_tucker.storage.run_files import IGNORED_KEYS
from vit_tucker.storage.weights import is_sharded
from vit_tucker.training.optim import group_table
from vit_tucker.training.trackers import flat_config
from vit_tucker.training.trainer import Trainer

SHOWN_KEYS = (
    "seed",
    "model.name",
    "data.dataset",
    "train.epochs",
    "train.global_batch_size",
    "train.lr",
    "train.weight_decay",
)
NO_HYPERPARAMETERS = ("name", "output_dir", "plugins", "attention")
"""Sections that don't decide how good a run is, and attention, of which only the given options are shown."""


def describe_run(config: RunConfig, accelerator: Accelerator, built: BuiltModel, loaders: Loaders) -> dict[str, Any]:
    """Returns the entries of results.json that are known before a run is trained; arguments as of ``build_trainer``."""
    return {
        "name": config.name,
        **stored_display(built.attention),
        "config": plain_config(config),
        "environment": {**environment(), "device": describe_device(accelerator.device)},
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "params": built.params,
        **report_entries(built.patch),
        "data": {**built.data, "num_eval": loaders.num_eval},
        "cost": builder_of(config).cost(built, built.model),
        "num_train": loaders.train.num_samples if loaders.train is not None else None,
    }


def stored_display(attention: AttentionConfig | None) -> dict[str, Any]:
    """Returns how tables show a method that is not the package's own, for results.json; tables know the others."""
    if attention is None or attention.display == SHIPPED.get(attention.method, MethodDisplay()):
        return {}
    return {"display": attention.display.model_dump(exclude_defaults=True)}


def report_entries(patch: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the patch reports for results.json: ``patch``, that of attention, and ``linear`` where there is one."""
    attention = {key: value for key, value in (patch or {}).items() if key != LINEAR.name}
    linear = (patch or {}).get(LINEAR.name)
    return {"patch": attention or None, **({} if linear is None else {LINEAR.name: linear})}


def hyperparameters(config: RunConfig) -> dict[str, int | float | str | bool]:
    """Returns what sets a run apart, for TensorBoard's table of hyperparameters.

    Args:
        config: resolved; its method's options, some keys that are always shown, and those that differ from their defaults.
    """
    attention = config.attention
    given = {} if attention is None else json.loads(attention.model_dump_json(exclude_defaults=True))
    usual = flat_config(plain_config(RunConfig(model=ModelConfig(name=config.model.name))))
    values = flat_config({key: value for key, value in plain_config(config).items() if key not in NO_HYPERPARAMETERS})
    chosen = {key: value for key, value in values.items() if key in SHOWN_KEYS or value != usual.get(key)}
    chosen |= flat_config({key: value for key, value in given.items() if key != "method"}, "attention.")
    shown = {key: value for key, value in chosen.items() if key not in IGNORED_KEYS | {"model.checkpoint"}}
    return {"method": attention.method if attention is not None else "dense", **shown}


def latency_of_run(
    config: RunConfig, accelerator: Accelerator, built: BuiltModel, model: nn.Module
) -> dict[str, Any] | None:
    """Measures the latency that ``train.latency_batch_size`` asks for, see ``latency_to_dense``; None for a sharded model.

    Args:
        config, accelerator, built: as of ``build_trainer``.
        model: after training, without wrappers.
    """
    batch_size = config.train.latency_batch_size
    if batch_size is None or is_sharded(model):
        return None
    size = built.data["input_size"]
    host = create_host(config.model.untrained(), built.num_classes, size[0]).to(accelerator.device)
    precision = str(accelerator.mixed_precision)
    return latency_to_dense(
        model, host, size, batch_size, accelerator.device, precision if precision in PRECISIONS else "no"
    )


def describe_plan(config: RunConfig, accelerator: Accelerator, built: BuiltModel, steps: int, trainer: Trainer) -> str:
    """Returns what --dry-run prints beside ``log_run``: steps, checkpoints, memory.

    Args:
        config, accelerator, built: as of ``build_trainer``.
        steps: of an epoch.
        trainer: as built.
    """
    recipe = config.train
    micro_batch = recipe.global_batch_size // (accelerator.num_processes * recipe.grad_accum_steps)
    memory = estimate_memory(
        trainer.bare,
        recipe,
        built.task,
        micro_batch,
        str(accelerator.mixed_precision),
        built.teacher,
        accelerator.num_processes,
    )
    todo = recipe.epochs * steps - trainer.progress.global_step
    batch = f"{recipe.global_batch_size} {built.task.samples}"
    return "\n".join(
        [
            f"steps: {steps} per epoch, {recipe.epochs * steps:,} in all, {todo:,} to do; {batch} = "
            f"{accelerator.num_processes} process(es) x {recipe.grad_accum_steps} micro-batch(es) x {micro_batch}",
            f"checkpoints: {config.output_dir}, every {recipe.checkpoint_epochs} epoch(s)"
            + (f" and {recipe.checkpoint_steps} steps" if recipe.checkpoint_steps else "")
            + f", the last {recipe.checkpoint_hist} kept",
            f"memory: {memory}",
            *builder_of(config).expect(config, built, steps),
            "dry run: nothing was trained or written",
        ]
    )


def describe_schedule(recipe: TrainConfig) -> str:
    """Returns the learning rates of a run in one line: from the first step to the peak and to the end."""
    end = "" if recipe.sched in ("constant", "step") else f", {recipe.min_lr:g} at the end"
    warmup = f", warm-up from {recipe.warmup_lr:g} in {recipe.warmup_epochs:g} epoch(s)" if recipe.warmup_epochs else ""
    return f"schedule: {recipe.sched}, peak lr {recipe.lr:g}{end}{warmup}"


def log_run(
    config: RunConfig,
    results: dict[str, Any],
    accelerator: Accelerator,
    built: BuiltModel,
    loaders: Loaders,
    trainer: Trainer,
    notes: Sequence[str] = (),
) -> None:
    """Logs what is about to run: notes on the config, weights, patch, parameter groups, schedule, sizes.

    Args:
        config, accelerator, built, loaders: as of ``build_trainer``.
        results: from ``describe_run``.
        trainer: as built.
        notes: on the config.
    """
    for note in notes:
        LOGGER.info(note)
    for load in built.loads:
        LOGGER.info(str(load))
    prepared, counted = builder_of(config).describe(config, built, results)
    LOGGER.info(prepared)
    for report in built.reports:
        LOGGER.info(str(report))
    params = results["params"]
    LOGGER.info(f"{config.model.name}: {params['total']:,} parameters, {params['attention']:,} of them in attention")
    LOGGER.info(counted)
    LOGGER.info(loaders.describe())
    for note in loaders.notes:
        LOGGER.info(note)
    LOGGER.info(group_table(trainer.groups))
    LOGGER.info(describe_schedule(config.train))
    LOGGER.info(
        f"{accelerator.num_processes} process(es) on {results['environment']['device']}, precision "
        f"{accelerator.mixed_precision}, {torch.get_num_threads()} thread(s), {describe_waiting(os.environ)}; "
        f"folder {config.output_dir}"
    )
