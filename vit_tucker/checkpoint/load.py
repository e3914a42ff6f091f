"""Models from what is stored of them: a folder, a run, a repository of the hub."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vit_tucker.checkpoint.describe import layer_options, set_image_options
from vit_tucker.checkpoint.entry import create, forget_source
from vit_tucker.checkpoint.fill import fill
from vit_tucker.checkpoint.layout import Layout
from vit_tucker.checkpoint.tensor_files import WEIGHTS, download, read_safetensors, stored_shapes
from vit_tucker.checkpoint.trial import MODEST, refuse_misfit, refuse_sizes, try_once
from vit_tucker.errors import CheckpointError, VitTuckerError, reason_of
from vit_tucker.hosts.slot import ATTENTION
from vit_tucker.hosts.structure import on_meta
from vit_tucker.patching.record import patch_records
from vit_tucker.storage.digests import CONFIG
from vit_tucker.storage.digests import verify as verify_files
from vit_tucker.storage.json_files import checked, read_object

LOGGER = logging.getLogger("vit_tucker.checkpoint")
PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
OF_A_RUN = ("checkpoints/best", "checkpoints/last")
"""What a run folder means: its best weights, as for its evaluation."""


def load(where: str | Path, *, verify: bool = True, **overrides: Any) -> nn.Module:
    """Rebuilds a model from what is stored of it, patched or dense.

    Folders written by ``save`` and by runs say what was saved; anything that has changed since is refused. Where this is not said
    or not asked for, arguments and sizes are checked against the weights, and the model is tried on one image.

    Args:
        where: a folder written by ``save``; a run folder (its best weights) or one of its ``checkpoints/...``; a repository of
            the hub, "owner/name" or "hf-hub:owner/name[@revision]", with the weights as safetensors. Nothing is unpickled.
        verify: refuse a config.json and weights that are not those that were saved; False for what was changed on purpose.
        overrides: arguments of ``timm.create_model`` in place of the stored ones: ``num_classes`` (a new head),
            ``img_size`` (positions resampled), ``in_chans``, ``drop_path_rate``, ...

    Returns:
        The model, float32, on the CPU, in eval mode. ``pretrained_cfg`` holds its mean, std, crop and label names, as of any
        timm model; ``vit_tucker.patch_record(model)`` the patch.

    Raises:
        CheckpointError: nothing is there, it is damaged, or it is of another model than its config describes.
    """
    folder, hub_id = find(where)
    config = read_config(folder, hub_id)
    file = weights_file(folder) if folder is not None else download(str(hub_id), WEIGHTS)
    origin = str(file) if hub_id is None else f"hf-hub:{hub_id}"
    place = str(folder) if hub_id is None else origin
    verified = verify and verify_files(config, file, place, siblings=hub_id is None)
    if verify and not verified and hub_id is None:
        LOGGER.warning(
            f"note: {place}: {CONFIG} has no digests (an older vit_tucker or timm wrote it), so whether it or the weights have "
            "changed since can't be seen"
        )
    checked(Layout, config, f"{place}: {CONFIG}")
    tell_classes(config)
    if not verified:
        check_sizes(config, file, place)
    model = rebuild_model(lambda: create(config, **overrides), origin)
    if verified and not overrides:
        refuse_misfit(model, stored_shapes(file), config, place, file.stat().st_size)
    fill(model, read_safetensors(file), origin)
    check_layers(model, config, origin)
    set_image_options(model, stored_options(config, origin))
    forget_source(model)
    model.eval()
    if not verified and not overrides:
        try_once(model, place)
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


def rebuild_model(create_it: Callable[[], nn.Module], origin: str) -> nn.Module:
    """Returns the model that a function makes of a config.json; raises CheckpointError if it can't be built."""
    try:
        return create_it()
    except CheckpointError as error:
        raise CheckpointError(in_one_line(error)) from None
    except VitTuckerError as error:
        raise CheckpointError(f"{origin}: the model can't be built: {in_one_line(error)}") from None
    except Exception as error:  # timm's constructors raise many kinds for arguments that they do not expect
        raise CheckpointError(f"{origin}: the model can't be built: {reason_of(error)}") from None


def in_one_line(error: VitTuckerError) -> str:
    """Returns the message of an error, without the endless names that a config.json may have put into it."""
    text = " ".join(str(error).split())
    return text if len(text) <= 600 else f"{text[:597]}..."


def stored_options(config: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """Returns how image files are read by config.json; raises CheckpointError if it has something else there."""
    options = (config.get("vit_tucker") or {}).get("images") or {}
    if not isinstance(options, Mapping):
        raise CheckpointError(f"{origin}: config.json: vit_tucker.images: {options!r} is no way to read images")
    return options


def find(where: str | Path) -> tuple[Path | None, str | None]:
    """Returns the folder or the hub id that a place means; raises CheckpointError if it is neither."""
    text = str(where)
    prefix = next((p for p in PREFIXES if text.startswith(p)), "")
    text = text[len(prefix) :]
    path = Path(text).expanduser()
    if prefix != "local-dir:" and (prefix or not path.exists()):
        owner, slash, name = text.partition("@")[0].partition("/")
        named = slash and owner and name and "/" not in name and not text.startswith((".", "/", "~"))
        if prefix or (named and not Path(owner).is_dir()):  # runs/typo is no repository of a user called runs
            return None, text
    if not path.exists():
        hint = f"; hf-hub:{text} would be one of the hub" if path.parent.is_dir() and path.parent != Path() else ""
        raise CheckpointError(f"{text}: no such folder, and no 'owner/name' of the hub{hint}")
    if path.is_file():
        raise CheckpointError(f"{path}: a file; name its folder, which has the {CONFIG} too")
    if (path / CONFIG).is_file():
        return path, None
    for name in OF_A_RUN:
        if (path / name / CONFIG).is_file():
            return path / name, None
    if any((path / name / WEIGHTS).is_file() for name in (*OF_A_RUN, ".")):
        raise CheckpointError(
            f"{path}: has weights but no {CONFIG}, which names their model (an older vit_tucker wrote none)"
        )
    raise CheckpointError(f"{path}: no model: neither {CONFIG} nor {OF_A_RUN[0]}/{CONFIG}")


def read_config(folder: Path | None, hub_id: str | None) -> dict[str, Any]:
    """Returns config.json of a folder or a repository; raises CheckpointError if it is missing, or not one of timm's layout."""
    file = folder / CONFIG if folder is not None else download(str(hub_id), CONFIG)
    config = read_object(file)
    if not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{file}: no config of timm's layout: it names no architecture")
    return config


def tell_classes(config: dict[str, Any]) -> None:
    """Copies the number and the names of the classes of a config.json into its pretrained_cfg, as timm does."""
    cfg = dict(config.get("pretrained_cfg") or {})
    cfg |= {name: config[name] for name in ("num_classes", "label_names", "label_descriptions") if name in config}
    config["pretrained_cfg"] = cfg


def weights_file(folder: Path) -> Path:
    """Returns the weights of a folder, the averaged ones (EMA) where there are some; raises CheckpointError without any."""
    for name in ("ema.safetensors", WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    pickled = [file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in folder.glob(pattern)]
    advice = "is not read here, since nothing is unpickled: save it as safetensors (safe_serialization=True in timm's functions)"
    hint = f"; {pickled[0]} {advice}" if pickled else ""
    raise CheckpointError(f"{folder}: no {WEIGHTS}{hint}")


def check_layers(model: nn.Module, config: Mapping[str, Any], origin: str) -> None:
    """Raises CheckpointError if a patched model's layers were built with other options than were stored.

    Args:
        model: rebuilt from the config.
        config: contents of config.json.
        origin: the file, for messages.
    """
    ours = config.get("vit_tucker") or {}
    for slot, record in patch_records(model).items():
        stored = (ours if slot == ATTENTION.name else ours.get(slot) or {}).get("layers")
        built = {} if stored is None else layer_options(model, record.config)
        for name, options in (stored or {}).items():
            if built.get(name) != options:
                raise CheckpointError(
                    f"{origin}: {name} was stored with {options}, but this version builds it with {built.get(name)}"
                )
