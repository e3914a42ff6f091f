"""A run from its config to its results, read from top to bottom."""

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from torch import nn

from vit_tucker.build import BuiltModel, build_model, build_trainer, create_accelerator
from vit_tucker.config.load import config_difference, dump_config, load_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.loaders import Loaders, build_loaders
from vit_tucker.data.seeding import derive_seed, seed_everything
from vit_tucker.errors import ConfigError
from vit_tucker.models import describe_device
from vit_tucker.paths import refuse_unwritable
from vit_tucker.training.engine import Trainer, evaluate, fit
from vit_tucker.training.run_dir import LOGGER, RunDir, environment, setup_console
from vit_tucker.training.state import load_weights


def run(config: RunConfig, evaluate_only: bool = False) -> dict[str, Any]:
    """Train (or continue, or evaluate) one run.

    Args:
        config: resolved, see ``load_config``. A folder that holds a finished run of the same config is evaluated; an
            unfinished one is continued from its last checkpoint.
        evaluate_only: evaluate the best weights even if the run is not finished.

    Returns:
        The contents of results.json; for an evaluation also ``evaluation``.

    Raises:
        VitTuckerError: bad config, data, checkpoint or patch, before any training.
    """
    run_dir = RunDir(Path(str(config.output_dir)))
    accelerator = create_accelerator(config.train)
    setup_console(accelerator.is_main_process)
    config = check_folder(run_dir, config)
    seed_everything(derive_seed(config.seed))
    finished = run_dir.results.is_file()
    if finished:
        LOGGER.info(f"{run_dir.path}: finished, so only evaluated; remove the folder to train anew")
    with accelerator.main_process_first():  # what has to be downloaded is downloaded once
        built = build_model(config, run_dir, accelerator.device)
        config = config.model_copy(update={"attention": built.attention})
        loaders = build_loaders(
            config.data,
            config.train,
            built.data,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
            with_train=not (finished or evaluate_only),
        )
    results = describe_run(config, accelerator, built, loaders)
    if loaders.train is None:
        return evaluate_run(run_dir, built.model, loaders.eval, accelerator, results)
    trainer = build_trainer(config, accelerator, run_dir, built, loaders.train.steps_per_epoch)
    if accelerator.is_main_process:
        run_dir.start(dump_config(config), built.patch)
    if built.report is not None:
        LOGGER.info(str(built.report))
    announce(config, results, accelerator)
    fit(trainer, loaders)
    results |= summarise(trainer)
    if accelerator.is_main_process:
        run_dir.write_results(results)
    best, params = results["best"], built.params
    LOGGER.info(
        f"done: best top-1 {best['top1']:.2f}% (epoch {best['epoch']}), {params['attention']:,} attention parameters of "
        f"{params['total']:,}, {results['train_seconds']:.0f} s; results in {run_dir.path}"
    )
    return results


def check_folder(run_dir: RunDir, config: RunConfig) -> RunConfig:
    """Refuse a folder that holds a run of another config, or that can't be made.

    Returns:
        The config, with the ranks that a rank rule chose when the run began.

    Raises:
        ConfigError: with the differences, or what is in the way.
    """
    if not run_dir.config.is_file():
        refuse_unwritable("output_dir", run_dir.path, folder=True)
        return config
    stored = load_config(run_dir.config)
    written, chosen, given = stored, stored.attention, config.attention
    if chosen is not None and (given is None or given == given.without_choices()):  # it names no chosen ranks
        written = stored.model_copy(update={"attention": chosen.without_choices()})
    differences = config_difference(written, config)
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ConfigError(
            f"{run_dir.path} holds a run with another config: {'; '.join(differences[:3])}{more}; choose another output_dir=, "
            "or remove that folder"
        )
    return config.model_copy(update={"attention": chosen})


def describe_run(config: RunConfig, accelerator: Accelerator, built: BuiltModel, loaders: Loaders) -> dict[str, Any]:
    """What results.json says of a run before it is trained."""
    return {
        "name": config.name,
        "config": yaml.safe_load(dump_config(config)),
        "environment": {**environment(), "device": describe_device(accelerator.device)},
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "params": built.params,
        "patch": built.patch,
        "data": {**built.data, "num_eval": loaders.num_eval},
        "num_train": loaders.train.num_samples if loaders.train is not None else None,
    }


def summarise(trainer: Trainer) -> dict[str, Any]:
    """What results.json says of the training itself."""
    progress = trainer.progress
    return {
        "epochs": progress.epoch,
        "best": progress.best,
        "last": progress.rows[-1],
        "train_seconds": progress.seconds,
        "images_per_second": progress.global_step * trainer.config.global_batch_size / progress.seconds,
        "finished": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def evaluate_run(
    run_dir: RunDir, model: nn.Module, loader: Any, accelerator: Accelerator, results: dict[str, Any]
) -> dict[str, Any]:
    """Scores of a run's best weights; of the model as created (dense weights, converted) if nothing was trained."""
    which = "the model as created"
    if run_dir.best.is_file():
        load_weights(run_dir.best, model)
        which = str(run_dir.best)
    scores = evaluate(model, loader, accelerator)
    LOGGER.info(
        f"{which}: top-1 {scores.top1:.2f}%  top-5 {scores.top5:.2f}%  loss {scores.loss:.4f}  {scores.count} images"
    )
    return {**results, "evaluation": asdict(scores)}


def announce(config: RunConfig, results: dict[str, Any], accelerator: Accelerator) -> None:
    """What is about to run, in a few lines."""
    params = results["params"]
    LOGGER.info(f"{config.model.name}: {params['total']:,} parameters, {params['attention']:,} of them in attention")
    images = f"{results['num_train']} training and {results['data']['num_eval'] or 'streamed'} evaluation images"
    LOGGER.info(
        f"{config.data.dataset}: {images}; {config.train.epochs} epochs, global batch {config.train.global_batch_size}"
    )
    LOGGER.info(
        f"{accelerator.num_processes} process(es) on {results['environment']['device']}, precision "
        f"{accelerator.mixed_precision}; folder {config.output_dir}"
    )
