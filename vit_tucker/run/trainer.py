"""The parts of a run around its model, built from its config: optimizer, schedule, EMA, mixup, objective, step rule."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.models import _manipulate
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.checkpoint import checkpoint

from vit_tucker.analysis.spectra import rank_scalars
from vit_tucker.checkpoint.load_report import LoadReport
from vit_tucker.config.schema import RunConfig, TrainConfig
from vit_tucker.data.loaders import Loaders
from vit_tucker.errors import CheckpointError, ConfigError
from vit_tucker.hosts.find import find_attention
from vit_tucker.patching.freeze import freeze_except
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.weights import describe_weights
from vit_tucker.storage.run_dir import LOGGER, RunDir
from vit_tucker.storage.weights import is_sharded
from vit_tucker.training.coordination import Coordinator
from vit_tucker.training.distill import Distiller
from vit_tucker.training.objective import Objective, named_penalties
from vit_tucker.training.optim import create_optimizer, create_scheduler, describe_groups
from vit_tucker.training.optimizer_state import load_optimizer
from vit_tucker.training.resume import Saved, resume
from vit_tucker.training.step import StepRule, create_step_rule, restore_rule
from vit_tucker.training.trainer import Trainer


def build_trainer(
    config: RunConfig,
    accelerator: Accelerator,
    coordinator: Coordinator,
    run_dir: RunDir,
    built: BuiltModel,
    loaders: Loaders,
    rule: StepRule | None = None,
) -> Trainer:
    """Builds optimizer, schedule, EMA and objective around the model, at the state of the run's last checkpoint.

    Args:
        config, accelerator, coordinator, run_dir, built, loaders: of the run.
        rule: in place of the config's.

    Raises:
        VitTuckerError: the recipe asks for what the model, timm or the processes can't do; a checkpoint that does not fit.
    """
    assert loaders.train is not None
    model, recipe = built.model, config.train
    name_what_trains(model, config, built)
    optimizer = create_optimizer(model, recipe)
    scheduler = create_scheduler(optimizer, recipe, loaders.train.steps_per_epoch)
    groups = describe_groups(model, optimizer)
    average = {"decay": recipe.model_ema_decay, "use_warmup": recipe.model_ema_warmup}
    ema = ModelEmaV3(model, **average) if recipe.model_ema else None
    saved = resume(run_dir, coordinator, model, ema)
    mixup = create_mixup(recipe, built.num_classes)
    # all know of a failure here before they wait for each other in DDP's constructor
    objective = coordinator.together(lambda: create_objective(recipe, accelerator, built, loaders))
    described = partial(describe_weights, config=config, built=built, loaders=loaders)
    metadata, description = described(model)
    prepared, prepared_optimizer, bare = prepare(accelerator, model, optimizer, recipe)
    trainer = Trainer(
        accelerator=accelerator,
        coordinator=coordinator,
        model=prepared,
        bare=bare,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        objective=objective,
        mixup=mixup,
        ema=ema,
        config=recipe,
        seed=config.seed,
        run_dir=run_dir,
        metadata=metadata,
        progress=saved.progress,
        task=built.task,
        groups=groups,
        faults=loaders.faults,
        description=description,
        describe=described,
        rule=create_step_rule(recipe.step_rule) if rule is None else rule,
        inspect=rank_scalars if recipe.log_ranks else None,
    )
    go_on(trainer, saved, optimizer, loaders.train.steps_per_epoch)
    return trainer


def name_what_trains(model: nn.Module, config: RunConfig, built: BuiltModel) -> None:
    """Freezes what ``config`` does not train and checkpoints activations of ``model``, the one that was ``built``.

    Raises:
        ConfigError: the model can't, or its timm can't do both.
    """
    recipe = config.train
    if recipe.grad_checkpointing:
        built.task.recompute(model)
    if recipe.only is None:
        return
    if recipe.grad_checkpointing and _manipulate.checkpoint is checkpoint:
        raise ConfigError(
            f"train.only: timm {timm.__version__} loses gradients behind frozen layers with train.grad_checkpointing: turn "
            "it off, or take a newer timm"
        )
    freeze_others(model, recipe.only, built.loads)


def create_objective(recipe: TrainConfig, accelerator: Accelerator, built: BuiltModel, loaders: Loaders) -> Objective:
    """Creates the loss of a ``recipe`` and computes each penalty once to check it; arguments as of ``build_trainer``.

    Raises:
        ConfigError: the teacher is another kind of model; a penalty fails. CheckpointError: the teacher's classes differ.
    """
    distiller = None
    if recipe.distill is not None:
        assert built.teacher is not None
        refuse_other_numbers(built.teacher, loaders.label_names)
        distiller = Distiller(built.teacher, recipe.distill, built.model, accelerator.autocast)
    mixed = recipe.mixup or recipe.cutmix  # then it smooths the targets
    label_loss = built.task.label_loss(0.0 if mixed else recipe.smoothing)
    objective = Objective(label_loss, distiller, named_penalties(recipe.penalties), built.task.logits)
    objective.check(built.model)
    return objective


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: TrainConfig
) -> tuple[nn.Module, Any, nn.Module]:
    """Compiles ``model`` if ``recipe`` asks for it, and has ``accelerator`` wrap it and its ``optimizer``.

    Returns:
        Wrapped model and optimizer, and the model without wrappers.

    Raises:
        ConfigError: the recipe has what can't be done with a sharded model.
    """
    if recipe.compile:
        model.compile()  # in place: no prefix gets into the keys
    name_blocks(model)
    with warnings.catch_warnings():  # newer torch has another word for it, which Accelerate doesn't pass on
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(prepared)
    bare = getattr(bare, "_orig_mod", bare)  # of a launcher's --dynamo_backend
    for key in ("model_ema", "log_ranks", "penalties"):
        if getattr(recipe, key) and is_sharded(bare):
            raise ConfigError(f"train.{key}: not with FSDP2, whose shards it can't follow; use DDP, or turn it off")
    return prepared, prepared_optimizer, bare


def go_on(trainer: Trainer, saved: Saved, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> None:
    """Restores the rest of what a run goes on from, beside weights and progress.

    Args:
        trainer: at its start.
        saved: see ``resume``.
        optimizer: the trainer's, without its wrapper.
        steps_per_epoch: of the run as it is now.

    Raises:
        CheckpointError: the state is of another optimizer or of another step rule.
    """
    t, progress = trainer, trainer.progress
    if saved.optimizer is not None:
        load_optimizer(optimizer, saved.optimizer)
    if saved.scaler is not None and t.accelerator.scaler is not None:
        t.accelerator.scaler.load_state_dict(saved.scaler)
    restore_rule(t.rule, t.config.step_rule, saved.step_rule)
    if progress.fit_to(steps_per_epoch):
        LOGGER.info(f"an epoch now has {steps_per_epoch} steps: going on from step {progress.step} of it")
    t.faults.add(progress.faults)
    progress.processes = t.coordinator.num_processes
    t.scheduler.step_update(progress.global_step)


def freeze_others(model: nn.Module, only: str | Sequence[str], loads: Sequence[LoadReport]) -> None:
    """Freezes all of ``model`` but what ``only`` names, and logs how much is trained and what ``loads`` left random.

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


def name_blocks(model: nn.Module) -> None:
    """Names the classes for Accelerate of which FSDP makes shards: the blocks, which hold the attention layers."""
    blocks = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in find_attention(model)}
    if not hasattr(model, "_no_split_modules"):
        model._no_split_modules = sorted(blocks)  # type: ignore[assignment]


def create_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """Creates timm's mixup and cutmix in batch mode; None without."""
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
