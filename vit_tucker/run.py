"""A run from its config to its results, read from top to bottom."""

import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn

from vit_tucker.config.load import config_difference, dump_config, load_config
from vit_tucker.config.schema import RunConfig, TrainConfig
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.loaders import build_loaders
from vit_tucker.data.seeding import derive_seed, seed_everything
from vit_tucker.data.transforms import resolve_data
from vit_tucker.errors import ConfigError, PatchError
from vit_tucker.models import count_parameters, create_host, describe_device
from vit_tucker.patching.patch import patch
from vit_tucker.patching.probe import input_shape
from vit_tucker.patching.report import PatchReport
from vit_tucker.training.engine import Progress, Trainer, evaluate, fit
from vit_tucker.training.optim import create_optimizer, create_scheduler
from vit_tucker.training.run_dir import LOGGER, RunDir, environment, setup_console
from vit_tucker.training.state import list_checkpoints, load_checkpoint, load_weights


def run(config: RunConfig, evaluate_only: bool = False) -> dict[str, Any]:
    """Train (or continue, or evaluate) one run.

    Args:
        config: resolved, see ``load_config``. A folder that holds a finished run of the same config is evaluated; an
            unfinished one is continued from its last checkpoint.
        evaluate_only: evaluate the best weights even if the run is not finished.

    Returns:
        The contents of results.json.

    Raises:
        VitTuckerError: bad config, data, checkpoint or patch, before any training.
    """
    run_dir = RunDir(Path(str(config.output_dir)))
    accelerator = create_accelerator(config.train)
    setup_console(accelerator.is_main_process)
    check_folder(run_dir, config)
    seed_everything(derive_seed(config.seed))
    info = dataset_info(config.data.dataset)
    in_chans = config.model.in_chans or (3 if config.model.pretrained else info.in_chans)
    num_classes = config.model.num_classes or info.num_classes
    if num_classes is None:
        raise ConfigError(f"model.num_classes: needed, the data set '{config.data.dataset}' does not tell")
    with accelerator.main_process_first():  # what has to be downloaded is downloaded once
        model = create_host(config.model, num_classes, in_chans)
    params_dense, attention_dense = count_parameters(model)
    report = patch_model(model, config)
    resolved = resolve_data(
        config.data, info, model, config.model.pretrained, input_shape(model, config.model.img_size)
    )
    finished = run_dir.results.is_file()
    with accelerator.main_process_first():
        loaders = build_loaders(
            config.data,
            config.train,
            resolved,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
            with_train=not (finished or evaluate_only),
        )
    model.to(accelerator.device)
    params, attention = count_parameters(model)
    results: dict[str, Any] = {
        "name": config.name,
        "config": asdict_config(config),
        "environment": {**environment(), "device": describe_device(accelerator.device)},
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "params": {
            "total": params,
            "attention": attention,
            "dense_total": params_dense,
            "dense_attention": attention_dense,
        },
        "patch": report.to_dict() if report is not None else None,
        "data": {**resolved, "num_eval": loaders.num_eval},
    }
    if finished:
        LOGGER.info(
            f"{run_dir.path}: finished, so evaluated; remove the folder to train anew, or choose another output_dir="
        )
    if loaders.train is None:
        return evaluate_run(run_dir, model, loaders.eval, accelerator, results)

    optimizer = create_optimizer(model, config.train)
    scheduler = create_scheduler(optimizer, config.train, loaders.train.steps_per_epoch)
    ema = None
    if config.train.model_ema:
        ema = ModelEmaV3(model, decay=config.train.model_ema_decay, use_warmup=config.train.model_ema_warmup)
    progress, scaler = resume(run_dir, model, ema, optimizer)
    scheduler.step_update(progress.global_step)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    if scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    mixup = create_mixup(config.train, num_classes)
    trainer = Trainer(
        accelerator=accelerator,
        model=prepared,
        bare=accelerator.unwrap_model(prepared),
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        loss=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup is not None else config.train.smoothing),
        mixup=mixup,
        ema=ema,
        config=config.train,
        seed=config.seed,
        run_dir=run_dir,
        metadata={"architecture": config.model.name, "attention": config.attention.method if config.attention else ""},
        facts={"params/attention": attention, "params/total": params},
        progress=progress,
    )
    if accelerator.is_main_process:
        run_dir.write_config(dump_config(config))
        run_dir.log_to_file()
    announce(config, results, report, loaders.train.num_samples, loaders.num_eval, accelerator)
    fit(trainer, loaders)
    results |= {
        "epochs": progress.epoch,
        "best": progress.best,
        "last": progress.rows[-1],
        "train_seconds": progress.seconds,
        "images_per_second": progress.global_step * config.train.global_batch_size / progress.seconds,
        "num_train": loaders.train.num_samples,
        "finished": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if accelerator.is_main_process:
        run_dir.write_results(results)
    LOGGER.info(
        f"done: best top-1 {results['best']['top1']:.2f}% (epoch {results['best']['epoch']}), {attention:,} attention "
        f"parameters of {params:,}, {progress.seconds:.0f} s; results in {run_dir.path}"
    )
    return results


def create_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerator with the config's precision; 'auto' is what the launcher was told, else bf16 on GPUs that have it."""
    cpu = config.cpu or not torch.cuda.is_available()
    precision = config.mixed_precision
    if precision == "auto":
        told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        has_bf16 = not cpu and torch.cuda.is_bf16_supported()
        precision = told if told in ("bf16", "fp16") else ("bf16" if has_bf16 else "no")  # type: ignore[assignment]
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[ddp])


def check_folder(run_dir: RunDir, config: RunConfig) -> None:
    """Refuse a folder that holds a run of another config.

    Raises:
        ConfigError: with the differences.
    """
    if not run_dir.config.is_file():
        return
    differences = config_difference(load_config(run_dir.config), config)
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ConfigError(
            f"{run_dir.path} holds a run with another config: {'; '.join(differences[:3])}{more}; choose another output_dir=, "
            "or remove that folder"
        )


def patch_model(model: nn.Module, config: RunConfig) -> PatchReport | None:
    """Patch the host as the config says; None for a dense run."""
    if config.attention is None:
        return None
    try:
        return patch(model, config.attention, keep_originals=False, img_size=config.model.img_size)
    except PatchError as error:
        raise PatchError(f"attention: {error}") from None


def create_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix in batch mode, or None."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def resume(
    run_dir: RunDir, model: nn.Module, ema: ModelEmaV3 | None, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Any] | None]:
    """Progress and GradScaler state of the last checkpoint, loaded into model, EMA and optimizer; a fresh start if none."""
    checkpoints = list_checkpoints(run_dir.checkpoints)
    if not checkpoints:
        return Progress(), None
    saved = load_checkpoint(checkpoints[-1], model, ema.module if ema is not None else None, optimizer)
    scaler = saved.pop("scaler", None)
    progress = Progress(**saved)
    LOGGER.info(f"continuing {run_dir.path} from step {progress.global_step} (epoch {progress.epoch + 1})")
    return progress, scaler


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


def asdict_config(config: RunConfig) -> dict[str, Any]:
    """The config as plain values."""
    import yaml

    return yaml.safe_load(dump_config(config))


def announce(
    config: RunConfig,
    results: dict[str, Any],
    report: PatchReport | None,
    num_train: int,
    num_eval: int | None,
    accelerator: Accelerator,
) -> None:
    """What is about to run, in a few lines."""
    say: Callable[[str], None] = LOGGER.info
    if report is not None:
        say(str(report))
    params = results["params"]
    say(f"{config.model.name}: {params['total']:,} parameters, {params['attention']:,} of them in attention")
    count = f"{num_train} training and {num_eval or 'streamed'} evaluation images"
    say(f"{config.data.dataset}: {count}; {config.train.epochs} epochs, global batch {config.train.global_batch_size}")
    say(
        f"{accelerator.num_processes} process(es) on {results['environment']['device']}, precision "
        f"{accelerator.mixed_precision}; folder {config.output_dir}"
    )
