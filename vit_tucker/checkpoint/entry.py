"""Patched models as an architecture of timm's registry, and how their weights get into them.

With vit_tucker imported, ``timm.create_model("hf-hub:owner/name", pretrained=True)`` and ``"local-dir:folder"`` build patched
models, with other ``num_classes`` or ``img_size`` too. Without it timm knows no such architecture and says so.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import is_model, list_models, load_pretrained, model_entrypoint
from timm.models._hub import download_from_hf
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.registry import get_method
from vit_tucker.checkpoint.arguments import OF_PATCHED, refuse_arguments
from vit_tucker.checkpoint.loading import refuse_integers
from vit_tucker.checkpoint.read import read_state, weights_only
from vit_tucker.checkpoint.trial import refuse_indices
from vit_tucker.digests import verify_beside
from vit_tucker.errors import CheckpointError, ConfigError, nearest
from vit_tucker.patching.find import find_attention
from vit_tucker.patching.identity import PATCHED, mark, set_pretrained_cfg
from vit_tucker.patching.patch import patch, patch_record
from vit_tucker.patching.probe import input_channels, without_weights

NAFLEX = "timm.models.naflexvit"
WEIGHTS = "model.safetensors"
"""Name of the weights in a folder or repository."""
PICKLED = "pytorch_model.bin"
"""Name of weights that ``timm.models.save_for_hf`` writes unless it is asked for safetensors."""
SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
"""Entries of timm's pretrained_cfg that say where weights come from: not of a model that brings its own."""


def patched_model(
    pretrained: bool = False,
    *,
    host: str | None = None,
    patch: Mapping[str, Any] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    pretrained_model_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A timm model whose attention is replaced; ``timm.create_model`` calls it with the arguments of a config.json.

    Args:
        pretrained: load the weights that ``pretrained_cfg`` names.
        host: timm name of the dense model.
        patch: config of the patch, as ``AttentionConfig`` dumps it.
        pretrained_cfg, pretrained_cfg_overlay: timm's, of the stored weights.
        cache_dir: timm's, which has no use for it here.
        pretrained_model_args: of the stored model, from which newer timm knows the grid of its positions.
        kwargs: arguments of ``timm.create_model`` for the host.

    Raises:
        CheckpointError: the arguments describe no patched model, or the weights are missing or of another one.
    """
    if host is None or patch is None:
        raise CheckpointError(
            f"'{PATCHED}' needs model_args.host and model_args.patch, which config.json lacks: an older timm's own "
            "function wrote it; use vit_tucker.save"
        )
    refuse_unknown(host, "the checkpoint's host")
    cfg = None if pretrained_cfg is None else known_entries(pretrained_cfg)
    config = read_patch(patch)
    refuse_arguments(host, kwargs, PATCHED)
    with weights_only():
        model = timm.create_model(
            host, pretrained=False, pretrained_cfg=cfg, pretrained_cfg_overlay=pretrained_cfg_overlay, **kwargs
        )
    if pretrained_model_args is not None:
        model.pretrained_model_args = dict(pretrained_model_args)
    install(model, config)
    if pretrained:
        fill(model, read_weights(vars(model)["pretrained_cfg"]))
    return model


def refuse_unknown(name: str, what: str) -> None:
    """Raise CheckpointError for a name that is not in timm's registry."""
    if not is_model(name):
        hint = nearest(name, list_models())
        raise CheckpointError(
            f"timm {timm.__version__} has no '{name}', {what}{hint}; if it is your own, import the module that registers it"
        )


def known_entries(cfg: Any) -> dict[str, Any]:
    """A pretrained_cfg without what this timm doesn't know and without the architecture, which is the host's again."""
    values = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else dict(cfg)
    known = {field.name for field in fields(PretrainedCfg)} - {"architecture"}
    return {key: value for key, value in values.items() if key in known}


def read_patch(values: Mapping[str, Any]) -> AttentionConfig:
    """The config of a patch from JSON values.

    Raises:
        CheckpointError: an unknown method or option.
    """
    try:
        kind = get_method(str(values.get("method")))
        return kind.model_validate_json(json.dumps(values), strict=True)
    except ConfigError as error:
        raise CheckpointError(f"{error}; import the module that registers it first") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"the checkpoint's patch: {key}: {first['msg']}; was it written by a newer vit_tucker?"
        ) from None


def install(model: nn.Module, config: AttentionConfig) -> None:
    """Patch a model whose weights are yet to come: it remembers the config by which they were once converted."""
    patch(model, config.unconverted(), keep_originals=False)
    record = patch_record(model)
    assert record is not None
    record.config = config
    mark(model, config, record.identity)


def create_structure(config: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """The model of a config.json without memory for weights, on the meta device where timm can.

    Raises:
        CheckpointError: see ``create``.
    """
    return without_weights(lambda: create(config, **overrides))


def create(config: Mapping[str, Any], **overrides: Any) -> nn.Module:
    """The model of a config.json, dense or patched, with timm's or the method's own initialisation.

    Args:
        config: architecture, model_args, pretrained_cfg.
        overrides: arguments of ``timm.create_model`` in place of the stored ones.

    Raises:
        CheckpointError: an architecture that timm doesn't have, or a patch that can't be made.
    """
    architecture = config["architecture"]
    refuse_unknown(architecture, "the checkpoint's model")
    cfg = known_entries(config.get("pretrained_cfg") or {})
    cfg = {name: value for name, value in cfg.items() if name not in (*SOURCES, "custom_load")}
    arguments = config.get("model_args") or {}
    refuse_stored_arguments(architecture, arguments)
    arguments = dict(arguments)
    given = {**arguments, **overrides}
    with weights_only():
        model = timm.create_model(architecture, pretrained=False, pretrained_cfg=cfg, **given)
    model._model_args = {**given, **vars(model).get("_model_args", {})}  # newer timm has them already
    model.pretrained_model_args = arguments  # where timm looks for the grid of stored positions
    return model


def refuse_stored_arguments(architecture: str, arguments: Any, origin: str = "config.json") -> None:
    """Refuse arguments that a config.json must not set, of a patched model by its host; see ``refuse_arguments``.

    Raises:
        CheckpointError: one of them, or the host is none that timm has.
    """
    if architecture == PATCHED and isinstance(arguments, Mapping) and isinstance(arguments.get("host"), str):
        host = arguments["host"]
        refuse_unknown(host, "the checkpoint's host")
        arguments = {name: value for name, value in arguments.items() if name not in OF_PATCHED}
        architecture = host
    refuse_arguments(architecture, arguments, origin)


def read_weights(cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a pretrained_cfg names: in memory, in a local folder or file, or on the hub, in any kind of file that timm
    writes. Of pickled ones only tensors and plain values are read, nothing is executed.

    Raises:
        CheckpointError: there are none, they can't be read, or are not those that the config.json beside them tells of.
    """
    if state := cfg.get("state_dict"):
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"'{PATCHED}': pretrained_cfg.state_dict holds other things than tensors")
        return dict(state)
    if cfg.get("source") == "hf-hub" or (cfg.get("hf_hub_id") and not cfg.get("file")):
        file, local = download_weights(cfg["hf_hub_id"]), False
    elif cfg.get("file"):
        file, local = weights_in(Path(cfg["file"])), True
    else:
        raise CheckpointError(
            f"no weights for '{PATCHED}': name a folder ('local-dir:...') or a repository ('hf-hub:...')"
        )
    if file.is_file():
        verify_beside(file, siblings=local)
    return read_tensors(file)


def weights_in(path: Path) -> Path:
    """The weights of a folder that timm has written, safetensors before others; a file as it is."""
    if not path.is_dir():
        return path
    return next((path / name for name in (WEIGHTS, PICKLED) if (path / name).is_file()), path / WEIGHTS)


def download_weights(hub_id: str) -> Path:
    """The weights of a repository, in the hub's cache; safetensors before others.

    Raises:
        CheckpointError: see ``download``.
    """
    try:
        return download(hub_id, WEIGHTS)
    except CheckpointError as error:
        try:
            return download(hub_id, PICKLED)
        except CheckpointError:
            raise error from None


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, safetensors or written by torch.save, on the CPU.

    Raises:
        CheckpointError: missing, or something else.
    """
    if file.suffix == ".safetensors" or not file.is_file():
        return read_safetensors(file)
    return read_state(file, "the weights")[0]


def download(hub_id: str, name: str) -> Path:
    """A file of a repository, in the hub's cache.

    Raises:
        CheckpointError: no such repository or file, or no connection.
    """
    try:
        return Path(download_from_hf(hub_id, name))
    except Exception as error:  # the hub's errors derive from several bases, and differ from version to version
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
        raise CheckpointError(f"hf-hub:{hub_id}: {name} can't be had: {reason}") from None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        CheckpointError: missing, or something else.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: only safetensors are read here, nothing is unpickled")
    try:
        return load_file(str(file))
    except (
        OSError,
        SafetensorError,
        KeyError,
        AttributeError,
    ) as error:  # the last two for kinds of numbers unknown here
        raise CheckpointError(f"{file}: can't be read: {' '.join(str(error).split())[:200]}") from None


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file, from its header.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        with safe_open(str(file), framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: can't be read: {' '.join(str(error).split())[:200]}") from None


def fill(model: nn.Module, state: dict[str, Tensor], origin: str = "the weights") -> None:
    """Load stored weights into the model built for them, adapted by timm to other classes, channels or image sizes.

    Args:
        model: patched or dense.
        state: the stored tensors.
        origin: what to call them.

    Raises:
        CheckpointError: they are of another model.
    """
    state = for_other_class(state, model)
    own, cfg = model.state_dict(), dict(vars(model)["pretrained_cfg"])
    attention = tuple(f"{name}." for name in find_attention(model))
    missing = [key for key in own if key.startswith(attention) and key not in state]
    if missing:  # said here, since timm loads what fits once the number of classes differs
        raise CheckpointError(f"{origin}: of another model or patch: no {missing[0]}{_and_more(missing)}")
    named = cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    strange = [
        key for key in state if key not in own and not key.startswith(heads)
    ]  # a model may do without its classifier
    if strange:
        raise CheckpointError(
            f"{origin}: of another model or patch: {strange[0]} has no place in it{_and_more(strange)}"
        )
    try:
        refuse_integers(state, model)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from None
    refuse_indices(model, state, origin)
    fits = all(key not in own or own[key].shape == value.shape for key, value in state.items())
    try:
        load_pretrained(
            model,
            pretrained_cfg={**cfg, "state_dict": state, "source": None, "custom_load": False},
            num_classes=getattr(model, "num_classes", 0),  # which models of features don't have
            in_chans=input_channels(model) or cfg["input_size"][0],
            filter_fn=None if fits else checkpoint_filter(model),
        )
    except RuntimeError as error:
        raise CheckpointError(f"{origin}: of another model: {' '.join(str(error).split())[:300]}") from None


def checkpoint_filter(model: nn.Module) -> Any:
    """timm's function that adapts stored weights of the model's kind, to another image size for instance; None without one."""
    place = type(model).__module__ if is_other_class(model) else entry_module(model)
    return getattr(sys.modules[place], "checkpoint_filter_fn", None)


def entry_module(model: nn.Module) -> str:
    """The module of timm that makes models of this name."""
    cfg = vars(model)["pretrained_cfg"]
    record = patch_record(model)
    host = cfg["architecture"] if record is None else record.identity.architecture
    return str(model_entrypoint(host).__module__)


def is_other_class(model: nn.Module) -> bool:
    """Whether timm has built a NaFlexVit under the name of a ViT or an EVA, as ``use_naflex`` asks for."""
    return type(model).__module__ == NAFLEX != entry_module(model)


def for_other_class(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Stored weights of a ViT or an EVA under the names that a NaFlexVit has for them; others as they are."""
    if not is_other_class(model) or set(state) <= set(model.state_dict()):
        return state
    converted: dict[str, Tensor] = checkpoint_filter(model)({key: value.clone() for key, value in state.items()}, model)
    return converted


def forget_source(model: nn.Module) -> None:
    """Take the weights and their place out of a loaded model's pretrained_cfg."""
    cfg = vars(model).get("pretrained_cfg")
    if isinstance(cfg, dict):
        set_pretrained_cfg(model, {k: v for k, v in cfg.items() if k != "state_dict"})


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
