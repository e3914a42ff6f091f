"""Loads the state of an optimizer from a checkpoint; the state of another one is refused."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from vit_tucker.errors import CheckpointError, one_line

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""Entries of optimizers' states that have the shape of their parameter."""


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a checkpoint's state into an optimizer; of sharded parameters, each process gets its part.

    Raises:
        CheckpointError: of another optimizer, or of other parameters.
    """
    names = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [dict(group) for group in optimizer.param_groups]
    try:
        refuse_other_groups(state, before, len(names))
        for number, entries in state["state"].items():
            parameter = names[number]
            refuse_other_shapes(entries, parameter, number)
            if isinstance(parameter, DTensor):
                state["state"][number] = {
                    k: distribute_tensor(v.to(parameter.device), parameter.device_mesh, parameter.placements)
                    if isinstance(v, Tensor) and v.shape == parameter.shape
                    else v
                    for k, v in entries.items()
                }
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else one_line(error)
        raise CheckpointError(f"the checkpoint's optimizer state is of another optimizer: {reason}") from None
    for group, own in zip(optimizer.param_groups, before, strict=True):
        if lost := [name for name in own if name not in group]:
            raise CheckpointError(f"the checkpoint's optimizer state is of another optimizer: it has no {lost[0]}")


def refuse_other_groups(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], count: int) -> None:
    """Raises ValueError if a saved state's groups have other parameters or other kinds of options than an optimizer's.

    Args:
        state: the saved one.
        groups: of the optimizer.
        count: its parameters.
    """
    saved = state["param_groups"]
    numbers = [number for group in saved for number in group["params"]]
    if len(saved) != len(groups) or numbers != list(range(count)):
        raise ValueError(
            f"{len(saved)} groups of {len(numbers)} parameters, not {len(groups)} of {count} in their order"
        )
    strange = [number for number in state["state"] if type(number) is not int or not 0 <= number < count]
    if strange:
        raise ValueError(f"it has a state of a parameter {strange[0]!r}, of {count}")
    for number, (group, own) in enumerate(zip(saved, groups, strict=True)):
        for name, value in own.items():
            if name in group and not alike(value, group[name]) and name != "params":
                raise ValueError(f"group {number}: {name} is {str(group[name])[:40]!r}, not a value like {value!r}")


def alike(value: Any, saved: Any) -> bool:
    """Returns whether a saved option of an optimizer is of the kind that its own is."""
    if isinstance(value, bool | str):
        return type(saved) is type(value)
    if isinstance(value, int | float):
        return isinstance(saved, Tensor) or (type(saved) in (int, float) and math.isfinite(saved))
    if isinstance(value, tuple | list):
        same = isinstance(saved, tuple | list) and len(saved) == len(value)
        return same and all(map(alike, value, saved))
    return True


def refuse_other_shapes(entries: Mapping[str, Any], parameter: Tensor, number: int) -> None:
    """Raises ValueError if a parameter's saved moments are not of its shape.

    Args:
        entries: saved state of the parameter.
        parameter: (any shape).
        number: of the parameter, for the message.
    """
    for name in MOMENTS:
        value = entries.get(name)
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            raise ValueError(f"{name} of parameter {number} is {tuple(value.shape)}, not {tuple(parameter.shape)}")
