"""Refuses the ways of transformers that are wrong for a patched model, and finds out how long sequences are."""

from typing import Any

from torch import nn

from vit_tucker.errors import PatchError

LONGEST = 4096
"""Tokens for which operations are counted at most: the paper's sequences of LLaMA."""


def refuse_save_pretrained(*args: Any, **kwargs: Any) -> None:
    """Raises PatchError: transformers would load such a folder into dense attention, without an error."""
    raise PatchError(
        "save_pretrained() of a patched model: transformers would load the folder with random attention, without an error; "
        "use vit_tucker.save(model, folder), or vit_tucker.unpatch(model) first"
    )


def refuse_paged_generation(*args: Any, **kwargs: Any) -> None:
    """Raises PatchError: paged caches have the shape of the host's heads."""
    raise PatchError(
        "paged caches (generate_batch, continuous batching) are as wide as the host's heads, a patched model's keys are not: "
        "use generate()"
    )


def no_static_shape(*args: Any, **kwargs: Any) -> None:
    """Returns None for the shape of a static cache, which then takes that of the first keys and values."""


OVERRIDES = {
    "save_pretrained": refuse_save_pretrained,
    "push_to_hub": refuse_save_pretrained,
    "generate_batch": refuse_paged_generation,
    "init_continuous_batching": refuse_paged_generation,
    "_get_static_cache_init_shape": no_static_shape,
}
"""Methods of transformers' models that are wrong for a patched one, by name; plain functions, for copies and pickles."""


def mark(model: nn.Module, patched: bool) -> None:
    """Overrides the methods that are wrong for a patched model, on the model itself, or gives them back.

    Args:
        model: of transformers.
        patched: whether it is, by now.
    """
    for name, replacement in OVERRIDES.items():
        if patched and hasattr(type(model), name):
            vars(model)[name] = replacement
        elif vars(model).get(name) is replacement:
            del vars(model)[name]


def sequence_length(model: nn.Module) -> int:
    """Returns the tokens of a sequence for which operations are counted: as many as the model takes, up to ``LONGEST``."""
    config: Any = model.config
    return min(getattr(config, "max_position_embeddings", LONGEST), LONGEST)
