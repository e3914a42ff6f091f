"""The parts of a run, built from its config: accelerator, model, trainer."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vit_tucker.analysis.spectra import rank_scalars
from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.options import Calibration
from vit_tucker.config.load import validate
from vit_tucker.config.schema import RunConfig, TrainConfig
from vit_tucker.config.source import Source, merge, read_overrides
from vit_tucker.data.calibration import calibration_images
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.transforms import resolve_data
from vit_tucker.errors import ConfigError, PatchError
from vit_tucker.models import count_parameters, create_host
from vit_tucker.patching.patch import patch, patch_record
from vit_tucker.patching.probe import input_shape
from vit_tucker.patching.report import PatchReport
from vit_tucker.training.optim import create_optimizer, create_scheduler
from vit_tucker.training.peers import Peers
from vit_tucker.training.resume import resume
from vit_tucker.training.run_dir import LOGGER, RunDir
from vit_tucker.training.state import list_checkpoints, load_optimizer
from vit_tucker.training.trainer import Trainer
from vit_tucker.training.weights import is_sharded


@dataclass(frozen=True)
class BuiltModel:
    """The model of a run before training.

    Attributes:
        model: patched, on the device.
        num_classes: of the classifier.
        data: timm's data config (input size, normalisation, crop).
        params: parameters: total, attention, dense_total, dense_attention.
        attention: config of the patch, with the ranks that a rank rule chose; None for a dense run.
        patch: the patch report as plain values; None for a dense run.
        report: the patch report, to be shown; None for a dense run and for one that goes on from weights of its own.
    """

    model: nn.Module
    num_classes: int
    data: dict[str, Any]
    params: dict[str, int]
    attention: AttentionConfig | None
    patch: dict[str, Any] | None
    report: PatchReport | None


def create_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerator with the config's precision; 'auto' is what the launcher was told, else bf16 on GPUs that have it."""
    cpu = config.cpu or not torch.cuda.is_available()
    precision = config.mixed_precision
    if precision == "auto":
        told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        has_bf16 = not cpu and torch.cuda.is_bf16_supported()
        precision = told if told in ("bf16", "fp16") else ("bf16" if has_bf16 else "no")  # type: ignore[assignment]
    handlers = [
        DistributedDataParallelKwargs(broadcast_buffers=False),
        InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes)),
    ]
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)


def classes_and_channels(config: RunConfig) -> tuple[int, int]:
    """Number of classes and image channels: the model section's, else the data set's (3 channels for timm's weights).

    Raises:
        ConfigError: neither tells the number of classes.
    """
    info = dataset_info(config.data.dataset)
    num_classes = config.model.num_classes or info.num_classes
    if num_classes is None:
        raise ConfigError(f"model.num_classes: needed, the data set '{config.data.dataset}' does not tell")
    return num_classes, config.model.in_chans or (3 if config.model.pretrained else info.in_chans)


def build_model(config: RunConfig, run_dir: RunDir, device: torch.device) -> BuiltModel:
    """Create the host, start it from its weights, patch it.

    A run that has weights of its own is only built: what it started from need not be there any more.

    Raises:
        VitTuckerError: see ``create_host`` and ``patch``.
    """
    num_classes, in_chans = classes_and_channels(config)
    started = run_dir.best.is_file() or bool(list_checkpoints(run_dir.checkpoints))
    host = config.model.model_copy(update={"pretrained": False, "checkpoint": None}) if started else config.model
    model = create_host(host, num_classes, in_chans)
    dense_total, dense_attention = count_parameters(model)
    info, size = dataset_info(config.data.dataset), input_shape(model, config.model.img_size)
    data = resolve_data(config.data, info, model, config.model.pretrained, size)
    model.to(device)
    report, attention = None, config.attention
    if attention is not None:
        if started:  # its ranks are those of its config: without conversion there is nothing to choose
            report = patch_model(
                model, attention.model_copy(update={"init": "random", "calibration": None}), config, data
            )
        else:
            report = patch_model(model, attention, config, data)
            record = patch_record(model)
            assert record is not None
            attention = record.config
    total, attention_total = count_parameters(model)
    params = {
        "total": total,
        "attention": attention_total,
        "dense_total": dense_total,
        "dense_attention": dense_attention,
    }
    patch_values = run_dir.read_patch() if started else (report.to_dict() if report is not None else None)
    return BuiltModel(model, num_classes, data, params, attention, patch_values, None if started else report)


def patch_model(model: nn.Module, attention: AttentionConfig, config: RunConfig, data: dict[str, Any]) -> PatchReport:
    """Patch the host in place, calibrated on training images if so configured; an error names the config's section.

    Args:
        model: dense, on its device.
        attention: what to patch in; of a run with weights of its own, without conversion.
        config: of the run, for its images.
        data: timm's data config.

    Raises:
        PatchError: see ``patch``. DataError: the images are missing.
    """
    images = None
    if (options := attention.calibration) is not None:
        images = calibration_images(config.data, data, options.images, options.batch_size, options.seed)
    try:
        return patch(model, attention, calibration=images, keep_originals=False, img_size=config.model.img_size)
    except PatchError as error:
        raise PatchError(f"attention: {error}") from None


def analysed_model(
    name: str, checkpoint: str | None, random: bool, dataset: str | None, options: Calibration, overrides: Sequence[str]
) -> tuple[nn.Module, Iterator[Tensor] | None]:
    """A dense model without its head, and training images for it.

    Args:
        name: timm model name.
        checkpoint: weights, see ``ModelConfig.checkpoint``; timm's pretrained ones if None.
        random: neither, but timm's initialisation.
        dataset: data set of the images; none if None.
        options: how many images, and which.
        overrides: ``key.sub=value`` strings of the model and data sections.

    Returns:
        The model in eval mode, and batches of images or None.

    Raises:
        VitTuckerError: unknown name, weights that are missing or don't fit, bad overrides, missing data.
    """
    given: dict[str, Any] = {"model": {"name": name, "pretrained": checkpoint is None and not random}}
    if checkpoint is not None:
        given["model"]["checkpoint"] = checkpoint
    if dataset is not None:
        given["data"] = {"dataset": dataset}
    config = validate(merge(Source(given), read_overrides(overrides)))
    info = dataset_info(config.data.dataset)
    channels = config.model.in_chans or (3 if config.model.pretrained or dataset is None else info.in_chans)
    model = create_host(config.model, 0, channels).eval()
    if dataset is None:
        return model, None
    size = input_shape(model, config.model.img_size)
    data = resolve_data(config.data, info, model, config.model.pretrained, size)
    return model, calibration_images(config.data, data, options.images, options.batch_size, options.seed)


def build_trainer(
    config: RunConfig, accelerator: Accelerator, peers: Peers, run_dir: RunDir, built: BuiltModel, steps_per_epoch: int
) -> Trainer:
    """Optimizer, schedule, EMA and mixup around the model, prepared by Accelerate, at the state of the run's last checkpoint."""
    model, recipe = built.model, config.train
    if recipe.grad_checkpointing:
        checkpoint_activations(model, config.model.name)
    optimizer = create_optimizer(model, recipe)
    scheduler = create_scheduler(optimizer, recipe, steps_per_epoch)
    ema = None
    if recipe.model_ema:
        ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
    saved = resume(run_dir, peers, model, ema)
    if recipe.compile:
        model.compile()  # in place: no prefix gets into the keys
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(prepared)
    bare = getattr(bare, "_orig_mod", bare)  # of a launcher's --dynamo_backend
    if ema is not None and is_sharded(bare):
        raise ConfigError("train.model_ema: not with FSDP2, whose shards it can't follow; use DDP, or turn it off")
    if saved.optimizer is not None:
        load_optimizer(optimizer, saved.optimizer)
    if saved.scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(saved.scaler)
    progress = saved.progress
    if progress.fit_to(steps_per_epoch):
        LOGGER.info(f"an epoch now has {steps_per_epoch} steps: going on from step {progress.step} of it")
    progress.processes = peers.num_processes
    scheduler.step_update(progress.global_step)
    mixup = create_mixup(recipe, built.num_classes)
    return Trainer(
        accelerator=accelerator,
        peers=peers,
        model=prepared,
        bare=bare,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        loss=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup is not None else recipe.smoothing),
        mixup=mixup,
        ema=ema,
        config=recipe,
        seed=config.seed,
        run_dir=run_dir,
        metadata=weights_header(config.model.name, config.attention),
        progress=progress,
        input_size=built.data["input_size"],
        inspect=rank_scalars if recipe.log_ranks else None,
    )


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Have the blocks recompute their activations in the backward pass.

    Raises:
        ConfigError: timm's model can't.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise ConfigError(f"train.grad_checkpointing: timm's {name} has none") from None


def weights_header(architecture: str, attention: AttentionConfig | None) -> dict[str, str]:
    """What the header of a weights file says of its model: timm name, method and, as JSON, all options and ranks."""
    if attention is None:
        return {"architecture": architecture, "attention": ""}
    return {
        "architecture": architecture,
        "attention": attention.method,
        "attention_config": attention.model_dump_json(),
    }


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
