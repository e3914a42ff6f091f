"""config.json of a model in timm's hub layout: the architecture, the arguments that rebuild it, and how it wants its images.

A patched model's architecture is ``PATCHED`` (see ``vit_tucker.patching.identity``), whose arguments are the host's own and,
beside them, ``host`` and ``patch``. The options of each layer and the version stand under "vit_tucker", to be read and checked.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.models import is_model
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from vit_tucker.attention.effective import full_name, is_adapter
from vit_tucker.attention.options import MethodConfig
from vit_tucker.attention.parametrized import functional_hooks
from vit_tucker.checkpoint.arguments import own_arguments
from vit_tucker.checkpoint.data_config import DATA_CONFIG
from vit_tucker.checkpoint.entry import SOURCES, create_structure
from vit_tucker.checkpoint.structure import differences
from vit_tucker.errors import CheckpointError, and_more, reason_of
from vit_tucker.hosts.images import built_size, input_channels, input_shape
from vit_tucker.hosts.normalisation import fit_channels
from vit_tucker.hosts.slot import ATTENTION, SLOTS, slot_of
from vit_tucker.hosts.structure import without_weights
from vit_tucker.patching.identity import OWN_ARGUMENTS, PATCHED
from vit_tucker.patching.layer_configs import PLACEMENT_FIELDS, choose_layers, layer_configs
from vit_tucker.patching.record import patch_records
from vit_tucker.version import __version__

OPTIONS = "_image_options"
"""Attribute of a model with the way its image files are read, see ``image_options``."""
DROPOUTS = ("drop_rate", "drop_path_rate", "drop_block_rate")


def describe(
    model: nn.Module,
    *,
    label_names: Sequence[str] | None = None,
    data: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the config that rebuilds a model, patched or dense; checked by building it, without memory for weights.

    Args:
        model: made by ``timm.create_model``.
        label_names: of the classes, in their order; those of pretrained_cfg if None.
        data: how images are prepared, if not as in pretrained_cfg: mean, std, interpolation, crop_pct, crop_mode.
        model_args: arguments of ``timm.create_model`` beyond those that can be read off the model.

    Returns:
        JSON values.

    Raises:
        CheckpointError: the model isn't what timm builds from these; names what differs.
    """
    records = patch_records(model)
    record = next(iter(records.values()), None)
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    architecture = cfg.pop("architecture", None) if record is None else record.identity.architecture
    if architecture is None or not is_model(architecture):
        raise CheckpointError(
            f"{type(model).__name__} can't be described: it does not name its timm model (pretrained_cfg['architecture'])"
        )
    config: dict[str, Any] = {
        "architecture": architecture if record is None else PATCHED,
        "num_classes": getattr(model, "num_classes", 0),
    }
    if isinstance(features := getattr(model, "num_features", None), int):
        config["num_features"] = features
    if label_names is not None and config["num_classes"] != len(label_names):
        raise CheckpointError(f"{len(label_names)} label names for {config['num_classes']} classes")
    names = label_names or (cfg.get("label_names") if cfg.get("num_classes") == config["num_classes"] else None)
    if names:
        config["label_names"] = list(names)
    arguments = creation_arguments(model, architecture)
    arguments |= dict(model_args or {})
    if record is not None:
        given = vars(model)["_model_args"]
        patches = {slot.argument: given[slot.argument] for name, slot in SLOTS.items() if name in records}
        arguments |= {"host": architecture, **patches}
        config["vit_tucker"] = {"version": __version__, "host": architecture, **describe_patch(model)}
    else:
        config["vit_tucker"] = {"version": __version__}
    if options := image_options(model):
        config["vit_tucker"]["images"] = plain(options)
    config["model_args"] = plain(arguments)
    config["pretrained_cfg"] = plain(weights_cfg(model, cfg, data or {}))
    refuse_other(model, config)
    return config


def image_options(model: nn.Module) -> dict[str, Any]:
    """Returns how a model's image files are read where that differs from Pillow's way: exif_orientation, value_range."""
    return dict(vars(model).get(OPTIONS) or {})


def set_image_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Sets what ``image_options`` returns; it goes with the model into config.json."""
    vars(model)[OPTIONS] = dict(options)


def header(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the entries of a weights file's header: timm name, methods and, as JSON, all options and ranks."""
    arguments = config["model_args"]
    if config["architecture"] != PATCHED:
        return {"architecture": config["architecture"], "attention": ""}
    entries = {"architecture": arguments["host"], "attention": ""}
    for name, slot in SLOTS.items():
        if (values := arguments.get(slot.argument)) is not None:
            entries |= {name: values["method"], f"{name}_config": json.dumps(values)}
    return entries


def describe_patch(model: nn.Module) -> dict[str, Any]:
    """Returns the methods of a patched model and the options of each layer: of attention, and of another slot under its name."""
    slots = {
        name: {"method": record.config.method, "layers": layer_options(model, record.config)}
        for name, record in patch_records(model).items()
    }
    return {**slots.pop(ATTENTION.name, {}), **slots}


def layer_options(model: nn.Module, config: MethodConfig) -> dict[str, dict[str, Any]]:
    """Returns the method's options of each patched layer, by full module name: its ranks, heads or latent widths."""
    names = list(slot_of(config).find(model, config.layers))
    layers = layer_configs(config, names, choose_layers(config, names))
    left_out = PLACEMENT_FIELDS | {"backend"}
    return {name: layer.model_dump(mode="json", exclude=left_out) for name, layer in layers.items()}


def creation_arguments(model: nn.Module, architecture: str) -> dict[str, Any]:
    """Returns the arguments of ``timm.create_model`` that a model was made with, without dropout rates.

    They are those that timm has recorded, else those that can be read off the model and differ from the architecture's own.
    """
    recorded = dict(vars(model).get("_model_args") or {})
    get_model_args = getattr(timm.models, "get_model_args", None)
    if get_model_args is not None:
        recorded = get_model_args(model)
    recorded = own_arguments(recorded)
    for name in OWN_ARGUMENTS:
        recorded.pop(name, None)
    if get_model_args is None:
        plain_model = without_weights(lambda: timm.create_model(architecture, **recorded))
        usual = visible_arguments(plain_model)
        recorded |= {k: v for k, v in visible_arguments(model).items() if k in usual and usual[k] != v}
        if (size := built_size(model)) not in (None, input_shape(plain_model)[1:]):
            recorded["img_size"] = size
    return {k: v for k, v in recorded.items() if k not in DROPOUTS and not k.endswith("_drop_rate")}


def visible_arguments(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments of ``timm.create_model`` that can be read off a model's attributes."""
    found: dict[str, Any] = {"in_chans": input_channels(model)}
    for name in ("num_classes", "global_pool", "embed_dim"):
        found[name] = getattr(model, name, None)
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    found["patch_size"] = size[0] if isinstance(size, tuple) and len(set(size)) == 1 else size
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks):
        found |= {"depth": len(blocks), "num_heads": getattr(getattr(blocks[0], "attn", None), "num_heads", None)}
    return {name: value for name, value in found.items() if isinstance(value, int | str | tuple)}


def weights_cfg(model: nn.Module, cfg: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns timm's pretrained_cfg for weights that are stored beside it.

    Args:
        model: whose weights are stored.
        cfg: its pretrained_cfg.
        data: how its images are prepared, which overrides ``cfg``.
    """
    left_out = (*SOURCES, "architecture", "label_names", "label_offset")
    kept = {name: value for name, value in cfg.items() if name not in left_out and value is not None}
    if kept.get("num_classes") != getattr(model, "num_classes", None):
        kept.pop("label_descriptions", None)
    size = input_shape(model)
    if tuple(cfg.get("input_size", size)) != size:
        for name in ("test_input_size", "test_crop_pct", "min_input_size", "pool_size", "test_pool_size"):
            kept.pop(name, None)
    kept |= {"input_size": size, "num_classes": getattr(model, "num_classes", 0), "custom_load": False}
    kept |= {name: data[name] for name in DATA_CONFIG if data.get(name) is not None}
    for name in ("mean", "std"):
        if name in kept:
            kept[name] = fit_channels(kept[name], size[0])
    return kept


def refuse_altered_weights(model: nn.Module) -> None:
    """Raises CheckpointError for a model whose weights are not those of timm's modules: adapters, parametrizations."""
    for is_altered, what, advice in (
        (is_adapter, "adapters", "merge them first (model = model.merge_and_unload()), or save them by PEFT"),
        (is_parametrized, "parametrizations", "merge them first: torch.nn.utils.parametrize.remove_parametrizations"),
        (functional_hooks, "norms or masks of weights as hooks", "merge them first: prune.remove, remove_weight_norm"),
    ):
        names = [name for name, module in model.named_modules() if is_altered(module)]
        if names:
            first = f"{names[0]}: a {full_name(model.get_submodule(names[0]))}"
            count = "1 module has" if len(names) == 1 else f"{len(names)} modules have"
            raise CheckpointError(f"{count} {what} ({first}); {advice}")


def refuse_other(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a config builds another model than the one it describes."""
    try:
        rebuilt = create_structure(config)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        reason = reason_of(error)
        raise CheckpointError(
            f"the model can't be rebuilt from the name and arguments that it records: {reason}; give model_args="
        ) from None
    found = list(differences(model, rebuilt))
    if found:
        refuse_altered_weights(model)
        raise CheckpointError(
            "timm builds another model by the name and arguments that the model records: "
            f"{'; '.join(found[:3])}{and_more(found, 3)}; give the arguments of timm.create_model as model_args="
        )


def plain(value: Any) -> Any:
    """Returns mappings, sequences and numbers as JSON has them.

    Raises:
        CheckpointError: something else.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{value!r} can't be written to config.json; give model_args= with plain values in its place")
