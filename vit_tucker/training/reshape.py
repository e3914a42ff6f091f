"""Parameters of other shapes in the middle of a run: replaced in the optimizer, in the EMA, in DDP and in what is saved."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vit_tucker.storage.run_dir import LOGGER
from vit_tucker.storage.weights import is_sharded
from vit_tucker.training.optim import describe_groups
from vit_tucker.training.step import StepResult
from vit_tucker.training.trainer import Trainer

Parameters = Mapping[nn.Parameter, nn.Parameter]
"""New parameters by those whose place they take."""


def replace_parameters(trainer: Trainer, result: StepResult) -> None:
    """Continues a run with the parameters that a step rule has put into its model; every process must call this alike.

    Raises:
        RuntimeError: a mistake of the rule: a new parameter is not in the model, or an old one still is; or the model is sharded
            (FSDP2), whose shards can't follow.
    """
    t, new = trainer, result.reshaped
    names = {id(parameter): name for name, parameter in t.bare.named_parameters()}
    if is_sharded(t.bare):
        raise RuntimeError("train.step_rule: parameters can't be replaced under FSDP2; use DDP")
    for before, after in new.items():
        if id(after) not in names or (id(before) in names and before is not after):
            raise RuntimeError(
                "train.step_rule: reshaped must be {parameter that left the model: the one in its place}"
            )
    replace_in_optimizer(getattr(t.optimizer, "optimizer", t.optimizer), new, result.carried)
    if t.ema is not None:
        renew_average(t.ema.module, t.bare)
    if isinstance(t.model, DistributedDataParallel):
        t.model = rewrap(t.model)
    t.groups = describe_groups(t.bare, t.optimizer)
    if t.describe is not None:
        t.metadata, t.description = t.describe(t.bare)
    said = [f"{names[id(after)]} {tuple(before.shape)} -> {tuple(after.shape)}" for before, after in new.items()]
    more = f" and {len(said) - 3} more" if len(said) > 3 else ""
    LOGGER.info(f"step {t.progress.global_step + 1}: reshaped {', '.join(said[:3])}{more}")


def replace_in_optimizer(
    optimizer: torch.optim.Optimizer, new: Parameters, carried: Mapping[nn.Parameter, dict[str, Any]]
) -> None:
    """Moves new parameters into the groups of those that they replace, whose state is dropped.

    Args:
        optimizer: bare; timm's Lookahead too, whose groups and state are those of the optimizer within it.
        new: frozen ones have no group, and are skipped.
        carried: state of new parameters; those that are missing start without.
    """
    inner: torch.optim.Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    for group in inner.param_groups:
        group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]
    for before, after in new.items():
        inner.state.pop(before, None)
        if after in carried:
            inner.state[after] = carried[after]


@torch.no_grad()
def renew_average(average: nn.Module, model: nn.Module) -> None:
    """Brings an EMA's copy into the shapes of its model: what has another shape now starts from the model's weights.

    Only parts directly below the model that differ are copied anew: the model itself may be wrapped by Accelerate or compiled.
    The copy, timm's ``ModelEmaV3.module``, is changed in place.
    """
    memo: dict[int, Any] = {}
    for name, part in model.named_children():
        before = average.get_submodule(name).state_dict()
        if shapes(before) == shapes(part.state_dict()):
            continue
        renewed = copy.deepcopy(part, memo).eval().requires_grad_(False)
        for key, value in renewed.state_dict().items():
            if key in before and before[key].shape == value.shape:
                value.copy_(before[key])
        setattr(average, name, renewed)
    for name, parameter in model.named_parameters(recurse=False):
        if average.get_parameter(name).shape != parameter.shape:
            setattr(average, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Returns the shape of each tensor of a state dict."""
    return {name: value.shape for name, value in state.items()}


def rewrap(model: DistributedDataParallel) -> DistributedDataParallel:
    """Wraps the same model anew with the same options, so that the buckets have its present parameters."""
    return DistributedDataParallel(
        model.module,
        device_ids=model.device_ids,
        output_device=model.output_device,
        process_group=model.process_group,
        broadcast_buffers=model.broadcast_buffers,
        find_unused_parameters=model.find_unused_parameters,
        gradient_as_bucket_view=model.gradient_as_bucket_view,
    )
