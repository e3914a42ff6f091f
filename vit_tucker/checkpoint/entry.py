"""Patched models as an architecture of timm's registry.

With vit_tucker imported, ``timm.create_model("hf-hub:owner/name", pretrained=True)`` and ``"local-dir:folder"`` build patched
models, with other ``num_classes`` or ``img_size`` too. Without it timm knows no such architecture and raises an error.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import timm
from pydantic import ValidationError
from timm.models import is_model, list_models
from timm.models._pretrained import PretrainedCfg
from torch import nn

from vit_tucker.attention.options import MethodConfig
from vit_tucker.checkpoint.arguments import refuse_arguments
from vit_tucker.checkpoint.fill import fill
from vit_tucker.checkpoint.read import weights_only
from vit_tucker.checkpoint.tensor_files import read_weights
from vit_tucker.errors import CheckpointError, ConfigError, nearest
from vit_tucker.hosts.slot import ATTENTION, SLOTS, Slot, slot_of
from vit_tucker.hosts.structure import without_weights
from vit_tucker.patching.identity import OWN_ARGUMENTS, PATCHED, mark, set_pretrained_cfg
from vit_tucker.patching.patch import patch
from vit_tucker.patching.record import configs_of, patch_records

SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
"""Entries of timm's pretrained_cfg that say where weights come from: not of a model that brings its own."""


def patched_model(
    pretrained: bool = False,
    *,
    host: str | None = None,
    patch: Mapping[str, Any] | None = None,
    linear_patch: Mapping[str, Any] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    pretrained_model_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Makes a timm model whose layers are replaced; ``timm.create_model`` calls it with the arguments of a config.json.

    Args:
        pretrained: load the weights that ``pretrained_cfg`` names.
        host: timm name of the dense model.
        patch, linear_patch: configs of the patches, as ``AttentionConfig`` and ``LinearConfig`` dump them.
        pretrained_cfg, pretrained_cfg_overlay: timm's, of the stored weights.
        cache_dir: timm's, which has no use for it here.
        pretrained_model_args: of the stored model, from which newer timm knows the grid of its positions.
        kwargs: arguments of ``timm.create_model`` for the host.

    Raises:
        CheckpointError: the arguments describe no patched model, or the weights are missing or of another one.
    """
    patches = {"attention": patch, "linear": linear_patch}
    if host is None or not any(patches.values()):
        raise CheckpointError(
            f"'{PATCHED}' needs model_args.host and model_args.patch, which config.json lacks: an older timm's own "
            "function wrote it; use vit_tucker.save"
        )
    refuse_unknown_model(host, "the checkpoint's host")
    cfg = None if pretrained_cfg is None else known_entries(pretrained_cfg)
    configs = [read_patch(values, SLOTS[name]) for name, values in patches.items() if values is not None]
    refuse_arguments(host, kwargs, PATCHED)
    with weights_only():
        model = timm.create_model(
            host, pretrained=False, pretrained_cfg=cfg, pretrained_cfg_overlay=pretrained_cfg_overlay, **kwargs
        )
    if pretrained_model_args is not None:
        model.pretrained_model_args = dict(pretrained_model_args)
    for config in configs:
        install(model, config)
    if pretrained:
        fill(model, read_weights(vars(model)["pretrained_cfg"]))
    return model


def refuse_unknown_model(name: str, what: str) -> None:
    """Raises CheckpointError for a name that is not in timm's registry."""
    if not is_model(name):
        hint = nearest(name, list_models())
        raise CheckpointError(
            f"timm {timm.__version__} has no '{name}', {what}{hint}; if it is your own, import the module that registers it"
        )


def known_entries(cfg: Any) -> dict[str, Any]:
    """Returns a pretrained_cfg without entries that this timm doesn't know and without the architecture."""
    values = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else dict(cfg)
    known = {field.name for field in fields(PretrainedCfg)} - {"architecture"}
    return {key: value for key, value in values.items() if key in known}


def read_patch(values: Mapping[str, Any], slot: Slot = ATTENTION) -> MethodConfig:
    """Returns the config of a patch of a slot from JSON values; raises CheckpointError for an unknown method or option."""
    try:
        kind: type[MethodConfig] = slot.methods.get(str(values.get("method")))
        return kind.model_validate_json(json.dumps(values), strict=True)
    except ConfigError as error:
        raise CheckpointError(f"{error}; import the module that registers it first") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"the checkpoint's patch: {key}: {first['msg']}; was it written by a newer vit_tucker?"
        ) from None


def install(model: nn.Module, config: MethodConfig) -> None:
    """Patches a model whose weights are yet to come: it remembers the config by which they were once converted."""
    patch(model, config.unconverted(), keep_originals=False)
    records = patch_records(model)
    record = records[slot_of(config).name]
    record.config = config
    mark(model, configs_of(records), record.identity)


def create_structure(config: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """Makes the model of a config.json without memory for weights, on the meta device where timm can; see ``create``."""
    return without_weights(lambda: create(config, **overrides))


def create(config: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """Makes the model of a config.json, dense or patched, with timm's or the method's own initialisation.

    Args:
        config: architecture, model_args, pretrained_cfg.
        overrides: arguments of ``timm.create_model`` in place of the stored ones.

    Raises:
        CheckpointError: an architecture that timm doesn't have, or a patch that can't be made.
    """
    architecture = config["architecture"]
    refuse_unknown_model(architecture, "the checkpoint's model")
    cfg = known_entries(config.get("pretrained_cfg") or {})
    cfg = {name: value for name, value in cfg.items() if name not in (*SOURCES, "custom_load")}
    arguments = config.get("model_args") or {}
    refuse_stored_arguments(architecture, arguments)
    given = {**arguments, **overrides}
    with weights_only():
        model = timm.create_model(architecture, pretrained=False, pretrained_cfg=cfg, **given)
    model._model_args = {**given, **vars(model).get("_model_args", {})}  # newer timm has them already
    model.pretrained_model_args = dict(arguments)  # where timm looks for the grid of stored positions
    return model


def refuse_stored_arguments(architecture: str, arguments: Any, origin: str = "config.json") -> None:
    """Refuses arguments that a config.json must not set, like ``refuse_arguments``; those of a patched model by its host.

    Args:
        architecture: timm's name of the model, or that of a patched model.
        arguments: ``model_args`` of the config.json.
        origin: the file, for messages.
    """
    if architecture == PATCHED and isinstance(arguments, Mapping) and isinstance(arguments.get("host"), str):
        architecture = arguments["host"]
        refuse_unknown_model(architecture, "the checkpoint's host")
        arguments = {name: value for name, value in arguments.items() if name not in OWN_ARGUMENTS}
    refuse_arguments(architecture, arguments, origin)


def forget_source(model: nn.Module) -> None:
    """Removes the weights and their place from a loaded model's pretrained_cfg."""
    cfg = vars(model).get("pretrained_cfg")
    if isinstance(cfg, dict):
        set_pretrained_cfg(model, {k: v for k, v in cfg.items() if k != "state_dict"})
