"""Optimizer and schedule, both timm's, the parameter groups, and the weight-decay rule.

What is decayed is the same for a dense host and for its patched copy:

- Every matrix and every core is: projections (dense, GQA, MLA), Tucker's mode factors, its head factors (H, r1), its cores. The
  layer's tensor is a product of its factors, so scale can move between them at no loss. If only some were decayed, it would
  move to the others and the decay would be evaded; with all of them decayed no direction is free.
- Parameters with fewer than two dimensions are not: biases, among them Tucker's query bias (the constant coordinate of the query
  mode, a (r2,) bias of its factor), norms, among them MLA's and GQA's norms of queries and keys, LayerScale.
- What the model itself excludes is not (position embeddings, class and register tokens), nor are position biases (their tables
  and the networks that make them), which are position embeddings under another name; timm knows some of them only by the
  name that they have before patching.

A product of f decayed factors shrinks f times as fast as each: a query-key product 4-fold in Tucker and MLA, 2-fold in MHA and
GQA, see docs/recipes.md.
"""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vit_tucker.config.schema import TrainConfig
from vit_tucker.errors import ConfigError, nearest
from vit_tucker.show.tables import plain

try:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay
except ImportError:  # timm before 1.0.12 has them here, later ones warn there
    from timm.optim.optim_factory import param_groups_layer_decay, param_groups_weight_decay

POSITION_BIASES = frozenset(
    {"position_bias", "rel_pos", "rel_pos_bias", "shared_rel_pos", "relative_position_bias_table"}
)
"""Names of modules and parameters that make a bias of the scores from positions, in timm's models and in patched layers."""


@dataclass(frozen=True)
class Group:
    """Describes one parameter group of an optimizer, for the log.

    Attributes:
        layer: what its parameters have in common: 'blocks.3', or the names at the top of the model.
        tensors: number of tensors.
        parameters: number of parameters.
        weight_decay: of the group.
        lr_scale: factor of layer-wise decay, 1 without.
        peak_lr: the learning rate at the peak of the schedule, after the warm-up.
        examples: up to three names, without what is common.
    """

    layer: str
    tensors: int
    parameters: int
    weight_decay: float
    lr_scale: float
    peak_lr: float
    examples: tuple[str, ...]


def undecayed_names(model: nn.Module) -> set[str]:
    """Returns the names of the trainable parameters that are not decayed; the rule is in the module's docstring."""
    excluded: set[str] = getattr(model, "no_weight_decay", set)()  # names, in newer timm also patterns
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (
            parameter.ndim < 2
            or not POSITION_BIASES.isdisjoint(name.split("."))
            or any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)
        )
    }


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Makes timm's parameter groups, each trainable parameter in one, with the weight-decay rule of this module.

    Raises:
        ConfigError: layer-wise decay of a model without group_matcher; timm would cut its list of parameters into
            dozens, across blocks.
    """
    undecayed = undecayed_names(model)
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=undecayed)
        return [group for group in groups if group["params"]]
    if not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"train.layer_decay={config.layer_decay:g}: timm's {type(model).__name__} does not tell its layers "
            "(no group_matcher); set train.layer_decay=null"
        )
    return param_groups_layer_decay(
        model, config.weight_decay, no_weight_decay_list=undecayed, layer_decay=config.layer_decay
    )


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Creates timm's optimizer over ``parameter_groups``.

    Raises:
        ConfigError: timm has no such optimizer, it refuses an option, it can't run here, or it needs second derivatives.
    """
    options: dict[str, Any] = {}
    if config.opt_betas is not None:
        options["betas"] = config.opt_betas
    if config.opt_eps is not None:
        options["eps"] = config.opt_eps
    groups = parameter_groups(model, config)
    try:
        optimizer = create_optimizer_v2(
            groups, opt=config.opt, lr=config.lr, weight_decay=0.0, momentum=config.momentum, **options
        )
    except (ValueError, TypeError, AssertionError, AttributeError, ImportError) as error:
        reason = str(error)
        if not reason or "not found in registry" in reason:  # older timm's assert says nothing
            hint = nearest(config.opt.rpartition("_")[2], optimizer_names())
            reason = f"timm {timm.__version__} has no such optimizer{hint}"
        raise ConfigError(f"train.opt={config.opt}: {reason}") from None
    inner = getattr(optimizer, "_base_optimizer", optimizer)  # within lookahead
    if getattr(inner, "is_second_order", False):
        raise ConfigError(
            f"train.opt={config.opt}: it needs second derivatives of the loss, which the training loop does not compute; "
            "use a first-order optimizer such as adamw"
        )
    if hasattr(inner, "deterministic"):  # Kron: noise from a generator of its own, alike on all processes, and saved
        inner.deterministic = True
    return optimizer


def optimizer_names() -> list[str]:
    """Returns the names of timm's optimizers; before timm 1.0.12, which lists them, those of its and torch's classes."""
    listed = getattr(timm.optim, "list_optimizers", None)
    if listed is not None:
        return list(listed())
    classes = {name.lower(): value for name, value in {**vars(torch.optim), **vars(timm.optim)}.items()}
    known = {n for n, value in classes.items() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)}
    return sorted(known - {"optimizer"} | {"momentum"})


def describe_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Group]:
    """Describes an optimizer's groups, in its order.

    Args:
        model: as it was when the optimizer was made (before FSDP shards it).
        optimizer: of its parameters, before or after ``create_scheduler``, which sets its rates to those of the first step.

    Raises:
        KeyError: a parameter of another model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    described = []
    for group in optimizer.param_groups:
        members = [names[id(parameter)] for parameter in group["params"]]
        layer, rest = _split_common(members)
        scale = group.get("lr_scale", 1.0)
        described.append(
            Group(
                layer,
                len(members),
                sum(parameter.numel() for parameter in group["params"]),
                group.get("weight_decay", 0.0),
                scale,
                group.get("initial_lr", group["lr"]) * scale,
                tuple(rest if len(rest) <= 3 else [rest[0], rest[len(rest) // 2], rest[-1]]),
            )
        )
    return described


def group_table(groups: Iterable[Group]) -> str:
    """Formats groups as aligned text, one line for each, with a title line."""
    rows: list[tuple[str, ...]] = [
        ("group", "tensors", "parameters", "weight decay", "lr scale", "peak lr", "for example")
    ]
    for g in groups:
        sizes = (f"{g.tensors}", f"{g.parameters:,}")
        rates = (f"{g.weight_decay:g}", f"{g.lr_scale:.4g}", f"{g.peak_lr:.3g}")
        rows.append((g.layer, *sizes, *rates, ", ".join(g.examples)))
    return plain(rows, left=(0, len(rows[0]) - 1))


def _split_common(names: list[str]) -> tuple[str, list[str]]:
    """Returns the dotted prefix that all names share and the rest of each; without one, the modules' names and the names."""
    parents = [name.split(".")[:-1] for name in names]
    common = 0
    while all(len(p) > common and p[common] == parents[0][common] for p in parents):
        common += 1
    if common:
        prefix = ".".join(parents[0][:common])
        return prefix, [name[len(prefix) + 1 :] for name in names]
    tops = list(dict.fromkeys(_unit(name) for name in names))
    return ", ".join(tops if len(tops) <= 3 else [*tops[:2], "...", tops[-1]]), names


def _unit(name: str) -> str:
    """Returns the name of the block, 'blocks.2', or of the module at the top, 'norm'."""
    parts = name.split(".")
    return ".".join(parts[:2] if parts[1:2] and parts[1].isdigit() else parts[:1])


def create_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> Scheduler:
    """Creates timm's schedule over global optimizer steps; it honours the lr_scale of layer-wise decay.

    The schedule is driven by ``step_update(number of finished steps)`` and is not prepared by Accelerate, which would step it
    once per process.

    Args:
        optimizer: whose learning rates it sets.
        config: the ``train`` section.
        steps_per_epoch: optimizer steps.
    """
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
    """Returns the largest learning rate of all groups: that of the undecayed last layers."""
    return max(group["lr"] for group in optimizer.param_groups)
