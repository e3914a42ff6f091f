"""Selects the parameters that are trained: those of the attention layers alone, or those that patterns name."""

from collections.abc import Collection, Sequence
from itertools import accumulate

from torch import nn

from vit_tucker.errors import ConfigError, nearest
from vit_tucker.hosts.find import find_attention
from vit_tucker.validation.patterns import by_pattern

ATTENTION = "attention"
"""Means all self-attention layers of a model, replaced or not."""


def freeze_except_attention(model: nn.Module, *, keep: str | Sequence[str] = ()) -> tuple[str, ...]:
    """Sets ``requires_grad`` so that only the model's self-attention layers are trained; call it before making the optimizer.

    Args:
        model: patched or dense.
        keep: what else is trained: names or patterns, see ``freeze_except``; ``"head"`` for timm's usual classifier.

    Returns:
        Names of the parameters that are trained.

    Raises:
        ConfigError: there is no attention layer, or a pattern matches nothing; nothing has changed.
    """
    return freeze_except(model, (ATTENTION, *([keep] if isinstance(keep, str) else keep)), "keep")


def freeze_except(model: nn.Module, only: str | Sequence[str], what: str) -> tuple[str, ...]:
    """Sets ``requires_grad`` of all parameters: True for those that are named, False for the others.

    Args:
        model: patched or dense.
        only: "attention", full names of modules or parameters with the wildcards * ? [], or 're:' and a regular expression for
            the full name; a module means all parameters in it.
        what: names the selection, for messages.

    Returns:
        Names of the parameters that are trained.

    Raises:
        ConfigError: there is no attention layer, or a pattern matches nothing; nothing has changed.
    """
    items = [only] if isinstance(only, str) else list(only)
    if not items:
        raise ConfigError(f"{what}: an empty list would train nothing")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    chosen = set().union(*(_matching(item, model, [*modules, *parameters], what) for item in items))
    # of 'a.b.c': 'a', 'a.b' and 'a.b.c'
    names = tuple(n for n in parameters if not chosen.isdisjoint(accumulate(n.split("."), "{}.{}".format)))
    if not names:
        raise ConfigError(f"{what}: {', '.join(items)}: no parameter matches")
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for name in names:
        parameters[name].requires_grad_(True)
    return names


def _matching(item: str, model: nn.Module, names: Collection[str], what: str) -> set[str]:
    """Names of modules and parameters that one item means."""
    if item == ATTENTION:
        found = set(find_attention(model))
        if not found:
            raise ConfigError(f"{what}: {type(model).__name__} has no self-attention layer")
        return found
    try:
        found = by_pattern(item, names)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from None
    if not found:
        hint = nearest(item, [ATTENTION, *names])
        raise ConfigError(f"{what}: '{item}' matches no module or parameter of {type(model).__name__}{hint}")
    return found
