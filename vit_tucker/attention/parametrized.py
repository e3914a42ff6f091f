"""Modules whose weights are computed: parametrizations, and the older hooks of weight norm, spectral norm and pruning."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from vit_tucker.errors import WeightsError, one_line

FUNCTIONAL = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
"""Pre-hooks of torch's own that compute a tensor of their module."""


def functional_hooks(module: nn.Module) -> list[Any]:
    """Returns the module's pre-hooks of old weight norm, spectral norm and pruning."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, FUNCTIONAL)]


def without_parametrizations(part: nn.Module) -> nn.Module:
    """Returns a copy in which the values of parametrizations, weight and spectral norms and pruning are plain parameters.

    Raises:
        WeightsError: a parametrization or hook can't be merged.
    """
    new = free_copy(part).eval()  # eval: spectral norms change their vectors in training
    try:
        if parametrize.is_parametrized(new):
            values = {name: getattr(new, name).detach() for name in new.parametrizations}  # type: ignore[union-attr]
            new.__class__ = parametrize.type_before_parametrizations(new)  # torch's removal changes it for all of them
            del new.parametrizations
            for name, value in values.items():
                new.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for hook in functional_hooks(new):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(new, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(new, hook.name)
            else:
                prune.remove(new, hook._tensor_name)
    except Exception as error:  # a parametrization may be any module of a user's
        raise WeightsError(f"is parametrized, and has no value ({one_line(error)})") from None
    return new


def free_copy(module: nn.Module) -> nn.Module:
    """Returns a deep copy, also of modules that hold tensors with a graph, as old weight norms do."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)
