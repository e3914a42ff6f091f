"""Counts the tokens that each layer of a model receives."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from vit_tucker.attention.call import to_sequences
from vit_tucker.hosts.dry_run import dry_run
from vit_tucker.hosts.families import family_of
from vit_tucker.hosts.images import input_shape
from vit_tucker.hosts.structure import structure_copy, without_global_hooks

Shape = tuple[int, int]
"""Sequences, and tokens of each."""
Counter = Callable[[tuple[Any, ...], dict[str, Any]], Shape]
"""Sequences and tokens in a module's arguments, positional and by name."""


def counter(layout: str) -> Counter:
    """Counts the tokens of attention modules, see ``HostSpec.layout``."""

    def count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shape:
        sequences, tokens, _ = to_sequences(args[0] if args else kwargs["x"], layout).shape
        return sequences, tokens

    return count


def count_tokens(
    model: nn.Module, layouts: Mapping[str, str], img_size: int | tuple[int, int] | None = None
) -> dict[str, Shape]:
    """Returns the sequences per image and tokens per sequence that each named attention module receives, see ``count_calls``.

    Args:
        model: as of ``count_calls``.
        layouts: layout of the tokens of each module, see ``HostSpec.layout``, by full name.
        img_size: pixels, of a square or (height, width); None for the model's own.
    """
    return count_calls(model, {name: counter(layout) for name, layout in layouts.items()}, img_size)


def count_calls(
    model: nn.Module,
    counters: Mapping[str, Counter],
    img_size: int | tuple[int, int] | None = None,
    shared: Iterable[object] = (),
) -> dict[str, Shape]:
    """Counts what each named module receives of one image.

    Args:
        model: any model that maps (B, 3, H, W) images; it is not touched.
        counters: what counts a call's tokens, by full module name.
        img_size: pixels; the model's own size if None.
        shared: see ``structure_copy``.

    Returns:
        name -> (sequences, tokens); empty if the model can't run on the meta device.
    """
    family = family_of(model)
    if family is not None and family.sequence_length is not None:
        return dict.fromkeys(counters, (1, family.sequence_length(model)))
    try:
        structure = structure_copy(model, shared=shared)
        seen: dict[str, Shape] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen[name] = counters[name](args, kwargs)

            return hook

        for name in counters:
            structure.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
        with without_global_hooks():
            dry_run(structure, input_shape(model, img_size))
    except Exception:
        return {}
    return seen


def sequence_unit(model: nn.Module) -> str:
    """Returns what ``count_calls`` counts the tokens of: 'image', or a language model's '4,096 tokens'."""
    family = family_of(model)
    if family is None or family.sequence_length is None:
        return "image"
    return f"{family.sequence_length(model):,} tokens"
