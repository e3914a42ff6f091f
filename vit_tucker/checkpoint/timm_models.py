"""Models of timm, patched or dense: rebuilt from a folder or repository in timm's hub layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vit_tucker.checkpoint.describe import describe, header, set_image_options
from vit_tucker.checkpoint.entry import create, forget_source
from vit_tucker.checkpoint.fill import fill
from vit_tucker.checkpoint.layout import Layout
from vit_tucker.checkpoint.libraries import ModelLibrary, ModelPlace
from vit_tucker.checkpoint.rebuild import check_layers, rebuild_model, verified_weights
from vit_tucker.checkpoint.tensor_files import WEIGHTS, read_safetensors, stored_shapes
from vit_tucker.checkpoint.trial import MODEST, refuse_misfit, refuse_sizes, try_once
from vit_tucker.errors import CheckpointError
from vit_tucker.hosts.structure import on_meta
from vit_tucker.storage.digests import CONFIG
from vit_tucker.storage.json_files import checked
from vit_tucker.storage.weights import full_state

AVERAGED = "ema.safetensors"
"""Averaged weights, which are preferred where a folder has some."""


def load_timm(place: ModelPlace, config: dict[str, Any], verify: bool, overrides: Mapping[str, Any]) -> nn.Module:
    """Rebuilds a model of timm from a place; see ``vit_tucker.load``, which raises CheckpointError alike.

    Args:
        place: a folder or a repository.
        config: its config.json.
        verify: refuse what has changed since it was saved.
        overrides: arguments of ``timm.create_model`` in place of the stored ones.
    """
    file, verified = verified_weights(place, config, verify, AVERAGED, WEIGHTS)
    origin, where = str(file) if place.hub_id is None else place.origin, place.origin
    checked(Layout, config, f"{where}: {CONFIG}")
    tell_classes(config)
    if not verified:
        check_sizes(config, file, where)
    model = rebuild_model(lambda: create(config, **overrides), origin)
    if verified and not overrides:
        refuse_misfit(model, stored_shapes(file), config, where, file.stat().st_size)
    fill(model, read_safetensors(file), origin)
    check_layers(model, config, origin)
    set_image_options(model, stored_options(config, origin))
    forget_source(model)
    model.eval()
    if not verified and not overrides:
        try_once(model, where)
    return model


def check_sizes(config: Mapping[str, Any], file: Path, place: str) -> None:
    """Raises CheckpointError if config.json describes no model, or one of other weights, before memory is allocated for it.

    Args:
        config: contents of config.json.
        file: the weights beside it.
        place: name of the checkpoint, for messages.
    """
    shapes = stored_shapes(file)
    refuse_sizes(config, shapes, place)
    try:
        structure = on_meta(lambda: create(config))
    except Exception:  # some models compute with values while they are built; others can't be built at all
        refuse_sizes(config, shapes, place, largest=MODEST)
        structure = rebuild_model(lambda: create(config), place)
    refuse_misfit(structure, shapes, config, place, file.stat().st_size)


def stored_options(config: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """Returns how image files are read by config.json; raises CheckpointError if it has something else there."""
    options = (config.get("vit_tucker") or {}).get("images") or {}
    if not isinstance(options, Mapping):
        raise CheckpointError(f"{origin}: config.json: vit_tucker.images: {options!r} is no way to read images")
    return options


def tell_classes(config: dict[str, Any]) -> None:
    """Copies the number and the names of the classes of a config.json into its pretrained_cfg, as timm does."""
    cfg = dict(config.get("pretrained_cfg") or {})
    cfg |= {name: config[name] for name in ("num_classes", "label_names", "label_descriptions") if name in config}
    config["pretrained_cfg"] = cfg


def describe_timm(model: nn.Module, *, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    """Returns what ``describe`` does; raises CheckpointError for a tokenizer too.

    Args:
        model: of timm.
        tokenizer: none.
        **options: of ``describe``.
    """
    if tokenizer is not None:
        raise CheckpointError("tokenizer: for language models of transformers, not for a model of timm")
    return describe(model, **options)


def write_nothing(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Writes no files beside weights and config.json: timm's layout has none.

    Args:
        model, folder, tokenizer: not used.
    """


LIBRARY = ModelLibrary(describe_timm, header, lambda config: WEIGHTS, full_state, write_nothing, load_timm)
