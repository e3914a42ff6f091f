"""Optimizer and schedule, both timm's, and the weight-decay rule.

Weight decay acts on matrices and cores and on nothing else: parameters with fewer than two dimensions (biases, norms, LayerScale)
and those that the model itself excludes (position embeddings, class and register tokens) are not decayed. Tucker cores and head
factors are weights like any other and are decayed; the query bias of a Tucker layer is a bias and is not.
"""

from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from vit_tucker.config.schema import TrainConfig
from vit_tucker.errors import ConfigError


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimizer over timm's parameter groups (weight decay, layer-wise lr decay).

    Raises:
        ConfigError: timm has no such optimizer, or it refuses an option.
    """
    options: dict[str, Any] = {}
    if config.opt_betas is not None:
        options["betas"] = config.opt_betas
    if config.opt_eps is not None:
        options["eps"] = config.opt_eps
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **options,
        )
    except (ValueError, TypeError, AssertionError, AttributeError) as error:
        reason = str(error) or f"timm {timm.__version__} has no such optimizer"  # older timm's assert says nothing
        raise ConfigError(f"train.opt={config.opt}: {reason}") from None


def create_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> Scheduler:
    """timm's schedule over global optimizer steps; it honours the lr_scale of layer-wise decay.

    The schedule is driven by ``step_update(number of finished steps)`` and is not prepared by Accelerate, which would step it
    once per process.

    Raises:
        ConfigError: warm-up longer than the training.
    """
    if config.warmup_epochs > config.epochs:
        raise ConfigError(f"train.warmup_epochs={config.warmup_epochs:g} is more than train.epochs={config.epochs}")
    names = {"linear": "poly", "constant": "step"}
    decay_rate = {"linear": 1.0, "constant": 1.0}.get(config.sched, config.decay_rate)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=names.get(config.sched, config.sched),
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_rate=decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    scheduler.step_update(0)
    return scheduler


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest learning rate of all groups: that of the undecayed last layers."""
    return max(group["lr"] for group in optimizer.param_groups)


def gradient_norm(model: nn.Module) -> Tensor:
    """Euclidean norm of all gradients, scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
