"""The parts of a run around its model, built from its config: accelerator, optimizer, schedule, EMA, mixup, distiller."""

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import timm
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from timm.data import Mixup
from timm.models import _manipulate
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.checkpoint import checkpoint

from vit_tucker.analysis.spectra import rank_scalars
from vit_tucker.attention.options import MethodConfig
from vit_tucker.checkpoint.describe import describe, header, set_image_options
from vit_tucker.checkpoint.load_report import LoadReport
from vit_tucker.config.schema import RunConfig, TrainConfig
from vit_tucker.data.classes import padded
from vit_tucker.data.image_files import ImageOptions
from vit_tucker.data.loaders import Loaders
from vit_tucker.errors import CheckpointError, ConfigError
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.slot import slot_of
from vit_tucker.patching.freeze import freeze_except
from vit_tucker.run.model import BuiltModel
from vit_tucker.storage.digests import save_model
from vit_tucker.storage.run_dir import LOGGER, RunDir
from vit_tucker.storage.weights import full_state, is_sharded, save_weights
from vit_tucker.training.distill import Distiller
from vit_tucker.training.optim import create_optimizer, create_scheduler, describe_groups
from vit_tucker.training.optimizer_state import load_optimizer
from vit_tucker.training.peers import Peers
from vit_tucker.training.resume import resume
from vit_tucker.training.trackers import check_trackers
from vit_tucker.training.trainer import Trainer


def create_accelerator(config: TrainConfig, folder: str | None = None) -> Accelerator:
    """Accelerator with the config's precision and trackers; 'auto' is what the launcher was told, else bf16 where GPUs have it.

    Args:
        config: the recipe.
        folder: where trackers write files.

    Raises:
        ConfigError: a tracker that Accelerate doesn't know, or that is not installed.
    """
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
    trackers = check_trackers(config.trackers) or None
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers, log_with=trackers, project_dir=folder
    )
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.FSDP:
        raise ConfigError(
            "the launcher asks for FSDP, which needs GPUs; without them start the processes with --multi_gpu"
        )
    return accelerator


def build_trainer(
    config: RunConfig, accelerator: Accelerator, peers: Peers, run_dir: RunDir, built: BuiltModel, loaders: Loaders
) -> Trainer:
    """Optimizer, schedule, EMA and mixup around the model, prepared by Accelerate, at the state of the run's last checkpoint."""
    assert loaders.train is not None
    set_image_options(built.model, ImageOptions.of(config.data).plain())
    description = describe_weights(built, loaders)
    model, recipe, steps_per_epoch = built.model, config.train, loaders.train.steps_per_epoch
    if recipe.grad_checkpointing:
        checkpoint_activations(model, config.model.name)
    if recipe.only is not None:
        if recipe.grad_checkpointing and _manipulate.checkpoint is checkpoint:
            raise ConfigError(
                f"train.only: timm {timm.__version__} loses gradients behind frozen layers with train.grad_checkpointing: turn "
                "it off, or take a newer timm"
            )
        freeze_others(model, recipe.only, built.loads)
    optimizer = create_optimizer(model, recipe)
    scheduler = create_scheduler(optimizer, recipe, steps_per_epoch)
    groups = describe_groups(model, optimizer)
    ema = None
    if recipe.model_ema:
        ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
    saved = resume(run_dir, peers, model, ema)
    distiller = None
    if recipe.distill is not None:
        assert built.teacher is not None
        refuse_other_numbers(built.teacher, loaders.label_names)
        distiller = Distiller(built.teacher, recipe.distill, model, accelerator.autocast)
    if recipe.compile:
        model.compile()  # in place: no prefix gets into the keys
    name_blocks(model)
    with warnings.catch_warnings():  # newer torch has another word for it, which Accelerate doesn't pass on
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(prepared)
    bare = getattr(bare, "_orig_mod", bare)  # of a launcher's --dynamo_backend
    for key in ("model_ema", "log_ranks"):
        if getattr(recipe, key) and is_sharded(bare):
            raise ConfigError(f"train.{key}: not with FSDP2, whose shards it can't follow; use DDP, or turn it off")
    if saved.optimizer is not None:
        load_optimizer(optimizer, saved.optimizer)
    if saved.scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(saved.scaler)
    progress = saved.progress
    if progress.fit_to(steps_per_epoch):
        LOGGER.info(f"an epoch now has {steps_per_epoch} steps: going on from step {progress.step} of it")
    loaders.faults.add(progress.faults)
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
        metadata=weights_header(config.model.name, config.attention, config.linear)
        if description is None
        else header(description),
        progress=progress,
        input_size=built.data["input_size"],
        groups=groups,
        faults=loaders.faults,
        description=description,
        distiller=distiller,
        inspect=rank_scalars if recipe.log_ranks else None,
    )


def freeze_others(model: nn.Module, only: str | Sequence[str], loads: Sequence[LoadReport]) -> None:
    """Freeze what ``train.only`` does not name; two lines in the log say how much is trained, and what stays random.

    Raises:
        ConfigError: it names nothing.
    """
    trained = freeze_except(model, only, "train.only")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters(remove_duplicate=False)}
    LOGGER.info(
        f"train.only: {sum(sizes[name] for name in trained):,} of {sum(sizes.values()):,} parameters are trained"
    )
    random = [name for load in loads[:1] for name in load.new if name in sizes and name not in trained]
    if random:
        LOGGER.warning(
            f"train.only: {', '.join(random)} did not come from the weights and stay as initialised; name their module to train "
            "them, as in train.only=[attention,head]"
        )


def refuse_other_numbers(teacher: nn.Module, names: Sequence[str] | None) -> None:
    """Raises CheckpointError if a teacher has the classes of the data set, but numbers them in another order."""
    known = (getattr(teacher, "pretrained_cfg", None) or {}).get("label_names")
    if names and known and sorted(names) == sorted(known) and list(names) != list(known):
        number = next(i for i, pair in enumerate(zip(names, known, strict=True)) if pair[0] != pair[1])
        raise CheckpointError(
            f"train.distill.teacher: numbers the same classes in another order: class {number} is '{known[number]}' there and "
            f"'{names[number]}' in the data set; give the teacher's classes.json as data.class_map"
        )


def describe_weights(built: BuiltModel, loaders: Loaders) -> dict[str, Any] | None:
    """config.json of the run's checkpoints; None, and a line in the log, for a model that can't be rebuilt by timm alone."""
    names = loaders.label_names and padded(loaders.label_names, built.num_classes)
    try:
        return describe(
            built.model, label_names=names if names and len(names) == built.num_classes else None, data=built.data
        )
    except CheckpointError as error:
        LOGGER.warning(f"checkpoints have no config.json to be rebuilt from: {error}")
        return None


def save_teacher(run_dir: RunDir, teacher: nn.Module, name: str) -> None:
    """Keep the weights of a run's teacher, with the config.json by which a change is found, where timm can rebuild it.

    Args:
        run_dir: of the run.
        teacher: dense.
        name: timm's, of the model.
    """
    file, header_entries = run_dir.teacher, weights_header(name)
    try:
        config = describe(teacher)
    except CheckpointError:
        save_weights(file, full_state(teacher), header_entries)
    else:
        save_model(file.parent, file.name, full_state(teacher), header_entries, config)


def name_blocks(model: nn.Module) -> None:
    """Tell Accelerate which classes FSDP makes shards of: the blocks, which is what holds an attention layer."""
    blocks = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in find_attention(model)}
    if not hasattr(model, "_no_split_modules"):
        model._no_split_modules = sorted(blocks)  # type: ignore[assignment]


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Have the blocks recompute their activations in the backward pass.

    Raises:
        ConfigError: timm's model can't.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise ConfigError(f"train.grad_checkpointing: timm's {name} has none") from None


def weights_header(architecture: str, *methods: MethodConfig | None) -> dict[str, str]:
    """What the header of a weights file says of its model: timm name, methods and, as JSON, all options and ranks."""
    entries = {"architecture": architecture, "attention": ""}
    for method in methods:
        if method is not None:
            name = slot_of(method).name
            entries |= {name: method.method, f"{name}_config": method.model_dump_json()}
    return entries


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
