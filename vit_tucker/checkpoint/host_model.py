"""The timm host model of a run: created, and started from timm's weights, from a file, or from another run."""

import copy
import importlib.util
import pickle
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model, list_models, parse_model_name
from torch import nn

from vit_tucker.checkpoint.entry import refuse_stored_arguments
from vit_tucker.checkpoint.host_weights import create_loaded, open_weights
from vit_tucker.checkpoint.hub import WAYS_OUT, refuse_missing_host
from vit_tucker.checkpoint.load import find, read_config
from vit_tucker.checkpoint.load_report import LoadReport, check_load
from vit_tucker.checkpoint.loading import ObservedLoad, create_model
from vit_tucker.checkpoint.read import short_reason, weights_only
from vit_tucker.config.model_section import LANGUAGE_MODEL
from vit_tucker.config.schema import ModelConfig
from vit_tucker.config.train_section import DistillConfig
from vit_tucker.errors import CheckpointError, ConfigError, VitTuckerError, nearest
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.structure import without_weights
from vit_tucker.patching.record import patch_records
from vit_tucker.storage.digests import verify_beside
from vit_tucker.storage.weights import load_weights

STORED = ("hf-hub", "hf_hub", "local-dir")
"""What timm's names of stored models begin with, before a colon."""

ELSEWHERE = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of timm's that say where weights are, other than where timm would look."""


def create_host(config: ModelConfig, num_classes: int | None = None, in_chans: int | None = None) -> nn.Module:
    """Creates the dense timm model with its weights; arguments as of ``load_host``."""
    return load_host(config, num_classes, in_chans)[0]


def load_host(
    config: ModelConfig, num_classes: int | None = None, in_chans: int | None = None
) -> tuple[nn.Module, LoadReport | None]:
    """Creates the dense timm model with its weights.

    Args:
        config: model section.
        num_classes: number of classes; those of the weights' classifier, else the model's own if None.
        in_chans: image channels; the model's own if None.

    Returns:
        The model on the CPU, float32; and what was loaded into it, None for timm's initialisation.

    Raises:
        ConfigError: timm has no such model, or the model doesn't take an argument.
        CheckpointError: the weights are missing or don't fit: only a classifier, and what the config itself adds to the
            architecture, may stay as initialised.
    """
    refuse_unknown_name(config.name)
    given = {"num_classes": num_classes, "in_chans": in_chans}
    arguments = {**config.timm_kwargs(), **{name: value for name, value in given.items() if value is not None}}
    elsewhere = config.checkpoint is not None or not arguments.keys().isdisjoint(ELSEWHERE)
    refuse_missing_host(config.name, config.pretrained and not elsewhere)
    refuse_stored(config.name)
    report: LoadReport | None = None
    added = partial(added_by_config, config.name, arguments)
    try:
        if config.checkpoint is not None:
            weights = open_weights(Path(config.checkpoint).expanduser(), config.name)
            model, report = create_loaded(config.name, weights, added, **arguments)
        else:
            with weights_only():
                model, load = create_model(config.name, pretrained=config.pretrained, **arguments)
            if config.pretrained:
                report = check_pretrained(config.name, model, load, added)
    except TypeError as error:
        raise ConfigError(f"model: {config.name} does not accept these arguments: {error}") from None
    except VitTuckerError:
        raise
    except (RuntimeError, AssertionError, ValueError, OSError, pickle.UnpicklingError) as error:
        reason = timm_reason(error)
        if config.pretrained:
            text = f"model.pretrained: no weights for {config.name} could be loaded: {reason}; {WAYS_OUT}"
            raise CheckpointError(text) from None
        raise ConfigError(f"model: {config.name} can't be built: {reason}") from None
    refuse_no_tokens(model)
    if "_model_args" not in vars(model):  # which newer timm records itself
        model._model_args = arguments  # type: ignore[assignment]
    if report is not None and "fc_norm.weight" in report.new:
        shrink_classifier(model)
    return model, report


def refuse_no_tokens(model: nn.Module) -> None:
    """Raises ConfigError if the images of ``model`` are smaller than one patch.

    timm builds such a model, which then fails on any image.
    """
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "num_patches", None) == 0:
        sizes = [getattr(embed, name, None) for name in ("img_size", "patch_size")]
        image, patch = ("x".join(map(str, size)) if isinstance(size, tuple) else str(size) for size in sizes)
        raise ConfigError(f"model.img_size: images of {image} pixels are smaller than one patch of {patch}")


def check_pretrained(
    name: str, model: nn.Module, load: ObservedLoad | None, added: Callable[[], Collection[str]]
) -> LoadReport | None:
    """Returns what timm has loaded by itself, see ``check_load``, or raises CheckpointError; None for a patched model.

    Args:
        name: of the model, for messages.
        model: as timm built it; a patched one checks its weights itself.
        load: what timm loaded into it, None for nothing.
        added: returns the names of tensors that only arguments of the config add.
    """
    if load is not None:
        try:
            return check_load(load, f"timm's {name}" if ":" not in name else name, added)
        except CheckpointError as error:
            raise CheckpointError(f"model.pretrained: the weights of {name} do not fit: {error}") from None
    if not patch_records(model):
        raise CheckpointError(f"model.pretrained: {name} is made by a function that loads no weights")
    return None


ADDING = ("init_values", "reg_tokens", "class_token", "qk_norm", "qkv_bias", "global_pool", "use_fc_norm", "pre_norm")
"""Arguments of timm's ViTs that add parameters to an architecture, or move its last norm, but no blocks."""


def added_by_config(name: str, arguments: Mapping[str, Any]) -> set[str]:
    """Returns the names of tensors that the model ``name`` has only because of those ``arguments`` that are in ``ADDING``."""
    if not set(ADDING) & arguments.keys():
        return set()
    plain = {key: value for key, value in arguments.items() if key not in ADDING}
    with weights_only():
        full, base = (
            without_weights(partial(timm.create_model, name, pretrained=False, **given)).state_dict().keys()
            for given in (arguments, plain)
        )
    return set(full) - set(base)


def shrink_classifier(model: nn.Module) -> None:
    """Sets the weights of a classifier behind a new norm of pooled tokens of ``model`` near zero (std 2e-5).

    The code of MAE (arXiv 2111.06377) does so.
    """
    head = getattr(model, "head", None)
    if isinstance(head, nn.Linear):
        nn.init.trunc_normal_(head.weight, std=2e-5)


def create_teacher(
    config: ModelConfig,
    distill: DistillConfig,
    kept: Path | None,
    host: tuple[nn.Module, LoadReport | None] | None,
    num_classes: int,
    in_chans: int,
) -> tuple[nn.Module, LoadReport | None]:
    """Creates the dense teacher of a run that distils.

    Args:
        config: model section.
        distill: the recipe's section, whose ``teacher`` is "host", or a run folder or weights file.
        kept: where the run keeps its teacher's weights once it has begun; then nothing else is needed. None before.
        host: the dense model with the weights that the run starts from, before it is patched, and what was loaded into it; None
            if it was not made.
        num_classes, in_chans: see ``load_host``.

    Returns:
        A model of its own on the CPU, and what was loaded into it; None for the weights that the run kept.

    Raises:
        ConfigError: the host has no trained weights.
        CheckpointError: the weights are missing or don't fit, or have no classifier for these classes.
    """
    bare, key = config.untrained(), "train.distill.teacher"
    if kept is not None and kept.is_file():
        verify_beside(kept)
        teacher = create_host(bare, num_classes, in_chans)
        load_weights(kept, teacher)
        return teacher, None
    if distill.teacher != "host":
        try:
            made = load_host(bare.model_copy(update={"checkpoint": distill.teacher}), num_classes, in_chans)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("model.checkpoint", key)) from None
    elif not config.pretrained and config.checkpoint is None:
        raise ConfigError(
            f"{key}: the host starts without trained weights; set model.pretrained or model.checkpoint, or name "
            "the teacher's run folder or weights file"
        )
    else:
        made = (copy.deepcopy(host[0]), host[1]) if host is not None else load_host(config, num_classes, in_chans)
    report = made[1]
    if distill.alpha > 0 and report is not None and not report.has_classifier:
        raise CheckpointError(
            f"{key}: {report.origin} has no classifier of these {num_classes} classes, and a teacher needs it; fine-tune "
            "the dense model first and name its run, or distil features only (train.distill.alpha=0)"
        )
    return made


def refuse_unknown_name(name: str) -> None:
    """Raises ConfigError if timm knows ``name`` neither as a model nor as a place to get one from."""
    if name.startswith(LANGUAGE_MODEL):
        raise ConfigError(f"model.name: {name} is a language model, for `train` on text; a timm model is needed here")
    scheme, colon, _ = name.partition(":")
    if colon and scheme in STORED:
        try:
            parse_model_name(name)
        except AssertionError:
            raise ConfigError(
                f"model.name: timm {timm.__version__} reads no '{scheme}:' models; name the model, and its weights file in "
                "model.checkpoint"
            ) from None
    elif not is_model(name.partition(".")[0]):
        raise ConfigError(f"model.name: timm {timm.__version__} has no model '{name}'{nearest(name, list_models())}")


def refuse_stored(name: str) -> None:
    """Refuses a stored model ``name`` whose config.json has arguments that are none of its own, before timm sees them."""
    if name.partition(":")[0] not in STORED:
        return
    try:
        config = read_config(*find(name))
    except CheckpointError:
        return  # timm names what is missing
    if is_model(config["architecture"]):
        refuse_stored_arguments(config["architecture"], config.get("model_args") or {}, f"{name}: config.json")


def timm_reason(error: Exception) -> str:
    """Returns timm's reason why it can't build a model, the ``error`` in one line."""
    reason = short_reason(error)
    if "pip install huggingface_hub" in reason and importlib.util.find_spec("huggingface_hub") is not None:
        reason += f" It is installed, but timm {timm.__version__} can't use it: install an older one, or a newer timm."
    return reason


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns the numbers of parameters of the whole ``model`` and of its attention layers."""
    attention = {id(p): p for module in find_attention(model).values() for p in module.parameters()}
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in attention.values())
