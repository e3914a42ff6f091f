"""Folders that can't be verified: their sizes are checked before memory is given to them, and their model is tried once."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.checkpoint.loading import Shapes, module_names
from vit_tucker.errors import CheckpointError, and_more, reason_of, shorten
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_shape
from vit_tucker.hosts.slot import LINEAR
from vit_tucker.patching.identity import OWN_ARGUMENTS
from vit_tucker.patching.record import patch_record
from vit_tucker.storage.digests import SECTION

LARGEST = 1 << 16
"""Numbers in the arguments of a model: none of timm's is larger."""
MODEST = 1 << 10
"""Numbers of models that are built in memory before their sizes are known, unless their weights have larger sides."""
REPEATS = ("depth", "layers", "blocks", "stages", "reps")
"""Parts of names of arguments that say how often something is built: no more often than there are tensors."""
SPARE = 1 << 28
"""Bytes that a model may take beyond four times those of its weights: tables of positions, masks of windows."""
NO_SIZES = ("layers", "exclude", "rules", "calibration")
"""Entries of a patch that no tensor's size follows from."""


def refuse_sizes(config: Mapping[str, Any], shapes: Shapes, where: str, largest: int = LARGEST) -> None:
    """Raises CheckpointError for arguments that no model with these weights can have: it might take all memory, or never end.

    Args:
        config: config.json.
        shapes: of the weights.
        where: names the folder.
        largest: allowed number, or the largest side of the weights.
    """
    largest = max((largest, *(side for shape in shapes.values() for side in shape)))
    for key, value in nested_numbers(config.get("model_args") or {}):
        repeats = any(part in key.lower() for part in REPEATS)
        limit = len(shapes) if repeats else largest
        if not -1 <= value <= limit:
            why = f"the weights are {len(shapes)} tensors" if repeats else "no model of timm's has such a size"
            raise CheckpointError(f"{where}: config.json: model_args.{shorten(key)}: {value:.10g}: {why}")


def nested_numbers(values: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Yields the numbers in nested values, with their dotted names; those of a patch that set no sizes are left out."""
    if isinstance(values, bool):
        return
    if isinstance(values, int | float):
        yield key, values
    for name, value in values.items() if isinstance(values, Mapping) else ():
        inner = f"{key}.{name}" if key else name
        if not (key in OWN_ARGUMENTS and name in NO_SIZES):
            yield from nested_numbers(value, inner)
    for value in values if isinstance(values, list | tuple) else ():
        yield from nested_numbers(value, key)


def refuse_misfit(structure: nn.Module, shapes: Shapes, config: Mapping[str, Any], where: str, size: int) -> None:
    """Raises CheckpointError if weights are not of the model that config.json describes; before any memory is given to it.

    Args:
        structure: the model of config.json alone, without weights.
        shapes: of the stored tensors.
        config: config.json. One of ours describes its weights exactly; timm adapts those of others.
        where: names the folder.
        size: bytes of the weights.
    """
    tensors = [*structure.parameters(), *structure.buffers()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if needed > 4 * size + SPARE:
        raise CheckpointError(
            f"{where}: config.json describes a model of {needed:,} bytes, but the weights are {size:,} bytes"
        )
    own = {name: tuple(value.shape) for name, value in structure.state_dict().items()}
    cfg = config.get("pretrained_cfg") or {}
    heads = tuple(f"{name}." for name in module_names(cfg.get("classifier") or ()))
    ours = SECTION in config
    attention = tuple(f"{name}." for name in (*find_attention(structure), *LINEAR.layers(structure)))
    missing = [key for key in own if key not in shapes and (ours or key.startswith(attention))]
    strange = [key for key in shapes if key not in own and ours]
    if missing:
        first = min(missing, key=lambda key: not key.startswith(attention))
        raise CheckpointError(f"{where}: of another model or patch: no {first}{and_more(missing)}")
    if strange:
        raise CheckpointError(f"{where}: of another model or patch: {strange[0]} has no place in it{and_more(strange)}")
    exact = ours or not cfg.get("label_offset")
    other = [k for k in own if k in shapes and own[k] != shapes[k] and (ours or (exact and k.startswith(heads)))]
    if other:
        name = other[0]
        raise CheckpointError(
            f"{where}: of another model: size mismatch: {name} is {shapes[name]} in the weights, {own[name]} by config.json"
            f"{and_more(other)}"
        )


@torch.no_grad()
def try_once(model: nn.Module, where: str) -> None:
    """Raises CheckpointError for a model that can't run on one image of its size: its arguments contradict each other."""
    shape = input_shape(model)
    try:
        output = model(torch.zeros(1, *shape))
    except Exception as error:  # timm's modules raise many kinds for arguments that don't go together
        raise CheckpointError(f"{where}: the model does not run on an image of {shape}: {reason_of(error)}") from None
    if isinstance(output, Tensor) and output.shape[0] != 1:
        raise CheckpointError(f"{where}: the model returns {tuple(output.shape)} for one image")


def refuse_indices(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError for stored whole numbers that point outside of what they choose from.

    On a GPU such a number ends the process, or reads other memory.

    Args:
        model: built anew, with its own index tables.
        state: stored tensors by name.
        where: names them.
    """
    limits = index_limits(model)
    for name, own in model.named_buffers():
        value = state.get(name)
        if value is None or own.is_floating_point() or own.is_complex():
            continue
        if value.is_floating_point() or value.is_complex() or (value.dtype == torch.bool) != (own.dtype == torch.bool):
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{where}: {name} is {kind}, whole numbers are needed")
        if value.numel() == 0 or own.dtype == torch.bool:
            continue
        low, high = int(value.min()), int(value.max())
        limit = limits.get(name, int(own.max()) + 1 if own.numel() and not own.is_meta else None)
        if name.endswith("num_batches_tracked"):
            limit = None
        if low < 0 or (limit is not None and high >= limit):
            allowed = "0 and more" if limit is None else f"0 to {limit - 1}"
            raise CheckpointError(f"{where}: {name} contains {low if low < 0 else high}, allowed are {allowed}")


def index_limits(model: nn.Module) -> dict[str, int]:
    """Returns how many things the index buffers of patched layers choose from, by full name."""
    layers = find_attention(model) if patch_record(model) is not None else {}
    return {
        f"{name}.{buffer}": limit
        for name, layer in layers.items()
        for buffer, limit in getattr(layer, "index_limits", dict)().items()
    }
