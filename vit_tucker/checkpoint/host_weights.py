"""Weights of a dense model from elsewhere: opened from a file or folder of any known kind, and given to timm as if its own."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
from timm.models import get_pretrained_cfg, is_model
from torch import Tensor, nn

from vit_tucker.checkpoint.data_config import data_config_beside, label_names_beside, size_beside
from vit_tucker.checkpoint.files import MODEL_KEY, checkpoint_file, config_beside, method_beside
from vit_tucker.checkpoint.load_report import PRE_LOGITS, LoadReport, check_load, looks_like
from vit_tucker.checkpoint.loading import ObservedLoad, create_model, module_names
from vit_tucker.checkpoint.read import read_state, weights_only
from vit_tucker.checkpoint.tensor_names import to_timm_names
from vit_tucker.errors import CheckpointError, reason_of
from vit_tucker.hosts.structure import without_weights
from vit_tucker.storage.digests import verify_beside
from vit_tucker.storage.weights import weights_metadata


@dataclass(frozen=True)
class HostWeights:
    """Weights of a dense model, ready for timm.

    Attributes:
        origin: the file.
        state: tensors by name, in timm's names or names that timm's filters read; None for a JAX file.
        arrays: shapes of the arrays of a JAX file (.npz), by name; empty otherwise.
        num_classes: of their classifier; 0 without one.
        source, left_out: see ``LoadReport``.
        data_config: how their images are prepared, see ``DATA_CONFIG``; those entries that a file beside the weights names.
        size: height and width of the images that they were trained on; None if unknown.
        label_names: of their classes; None if unknown.
    """

    origin: Path | None
    state: dict[str, Tensor] | None
    arrays: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_classes: int = 0
    source: str = ""
    left_out: tuple[str, ...] = ()
    data_config: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    label_names: tuple[str, ...] | None = None

    def overlay(self, name: str) -> dict[str, Any]:
        """Returns the entries of pretrained_cfg by which timm loads these weights into a model of a name in place of its own."""
        entries: dict[str, Any] = {"source": None, "num_classes": self.num_classes, "label_offset": 0}
        entries |= self.data_config
        if self.state is None:
            entries |= {"file": str(self.origin), "custom_load": True}
        else:
            entries |= {"state_dict": dict(self.state), "custom_load": False, "file": None}
        entries["input_size"] = self.input_size(name)
        if self.label_names is not None:
            entries["label_names"] = self.label_names
        return entries

    def input_size(self, name: str) -> tuple[int, int, int]:
        """Returns channels, height and width of the weights' images: the architecture's, with the channels of their stem."""
        cfg = architecture_cfg(name)
        channels, *size = getattr(cfg, "input_size", None) or (3, 224, 224)
        for conv in module_names(getattr(cfg, "first_conv", None) or "patch_embed.proj"):
            stem = (self.state or {}).get(f"{conv}.weight")
            channels = stem.shape[1] if stem is not None and stem.ndim == 4 else channels
        return channels, size[0], size[1]


def architecture_cfg(name: str) -> Any:
    """Returns timm's pretrained_cfg of an architecture, whatever its tag; None if it has none."""
    architecture = name.partition(".")[0]  # a tag may be unknown, and its weights see images as the architecture does
    return get_pretrained_cfg(architecture) if is_model(architecture) else None


def open_weights(path: Path, name: str, what: str = MODEL_KEY) -> HostWeights:
    """Opens weights of a dense model.

    Args:
        path: file or folder, see ``checkpoint_file``.
        name: timm's, of the model that they are for.
        what: names the path, for messages.

    Raises:
        CheckpointError: missing, unreadable, changed since they were saved, without tensors, or of a patched model.
    """
    file = checkpoint_file(path, what)
    if file.suffix.lower() == ".npz":
        return open_jax(file, what)
    state, entry = read_state(file, what)
    method = weights_metadata(file).get("attention") or method_beside(file)
    if method:
        as_it_is = "; to go on with it as it is: model.name=local-dir:FOLDER model.pretrained=true"
        hint = as_it_is if what == MODEL_KEY else ""
        raise CheckpointError(f"{what}: {file} contains a model patched with {method}, a dense host is needed{hint}")
    try:
        verify_beside(file)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from None
    weights = weights_of_state(state, name)
    where = [f"entry '{entry}'"] if entry not in ("", "state_dict", "model") else []
    source = ", ".join(part for part in (weights.source, *where) if part)
    names = label_names_beside(file)
    return replace(
        weights,
        origin=file,
        source=source,
        data_config=data_config_beside(file),
        size=size_beside(file),
        label_names=names if names is not None and len(names) == weights.num_classes else None,
    )


def weights_of_state(state: Mapping[str, Tensor], name: str) -> HostWeights:
    """Makes weights of a state dict in any known layout.

    Args:
        state: tensors by name.
        name: timm's, of the model that they are for.
    """
    renamed = to_timm_names(state, structure_keys(name.partition(".")[0]))
    heads = module_names(getattr(architecture_cfg(name), "classifier", None) or "head")
    weights = [renamed.state[f"{head}.weight"] for head in heads if f"{head}.weight" in renamed.state]
    clip = renamed.state.get("visual.proj")  # which timm's filter turns into a classifier
    classes = len(weights[0]) if weights else (clip.shape[1] if clip is not None else 0)
    prefix = f"names below '{renamed.prefix.rstrip('.')}'" if renamed.prefix else ""
    source = ", ".join(part for part in (renamed.layout, prefix) if part)
    return HostWeights(None, renamed.state, {}, classes, source, tuple(renamed.left_out))


@lru_cache(maxsize=8)
def structure_keys(architecture: str) -> frozenset[str]:
    """Returns the names of the tensors of a timm model with its own sizes; none if it needs arguments to be made."""
    if not is_model(architecture):
        return frozenset()
    try:
        return frozenset(without_weights(lambda: timm.create_model(architecture, pretrained=False)).state_dict())
    except Exception:  # a model of the user's own, whose arguments have no defaults
        return frozenset()


def open_jax(file: Path, what: str) -> HostWeights:
    """Opens a JAX file of a ViT (.npz), which timm's own function loads; raises CheckpointError if it has no arrays."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            shapes = {key: tuple(arrays[key].shape) for key in arrays.files}
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise CheckpointError(f"{what}: {file} can't be read as NumPy arrays: {reason_of(error)}") from None
    if not shapes:
        raise CheckpointError(f"{what}: {file} contains no arrays")
    head = next((shape for key, shape in shapes.items() if key.endswith("head/bias") and len(shape) == 1), (0,))
    return HostWeights(file, None, shapes, head[0], "JAX", (), data_config_beside(file))


def create_loaded(
    name: str,
    weights: HostWeights,
    added: Callable[[], Collection[str]] = tuple,
    what: str = MODEL_KEY,
    **arguments: Any,
) -> tuple[nn.Module, LoadReport]:
    """Makes a timm model with weights from elsewhere.

    Args:
        name: timm's, of the model.
        weights: see ``open_weights``.
        added: see ``check_load``.
        what: names the weights, for messages.
        arguments: of ``timm.create_model``.

    Raises:
        CheckpointError: the weights are not of this model; names the one that they look like. Errors of timm for bad arguments.
    """
    origin = str(weights.origin or "state dict")
    try:
        with weights_only():
            overlay = weights.overlay(name)
            model, load = create_model(name, weights.size, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
        if load is None:
            raise CheckpointError(f"{name} is made by a function that loads no weights (it ignores 'pretrained')")
        refuse_unused_arrays(weights, load)
        left_out = (*weights.left_out, *unused_arrays(weights, load))
        report = check_load(load, origin, added, weights.source, left_out)
    except (CheckpointError, RuntimeError, AssertionError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = reason_of(error, 300)
        if isinstance(error, KeyError | AttributeError | IndexError):
            reason = f"timm can't convert it ({type(error).__name__}: {reason})"
        raise CheckpointError(f"{what}: {origin} does not fit {name}: {reason}; it is {look_of(weights)}") from None
    if not weights.data_config:
        report = replace(report, normalisation=f"timm's {name} (nothing beside {origin} names them)")
    cfg = vars(model)["pretrained_cfg"]
    cfg.pop("state_dict", None)  # of the overlay, now in the model
    return model, report


def look_of(weights: HostWeights) -> str:
    """Returns what weights look like, and which architecture the config beside them names, for messages."""
    look = looks_like(weights.state) if weights.state is not None else "a JAX model"
    architecture = config_beside(weights.origin).get("architecture") if weights.origin is not None else None
    return f"{look}, and config.json beside it names {architecture}" if isinstance(architecture, str) else look


def unused_arrays(weights: HostWeights, load: ObservedLoad) -> list[str]:
    """Returns the names of a JAX file's arrays that timm has no use for: a classifier of other classes, and what is before it."""
    new = any(key.startswith("head.") for key in load.missing) or not getattr(load.model, "num_classes", 0)
    return [key for key in weights.arrays if new and ("head/" in key or "pre_logits/" in key) and "MAPHead" not in key]


def refuse_unused_arrays(weights: HostWeights, load: ObservedLoad) -> None:
    """Raises CheckpointError if a JAX file has more than the model took of it, which timm does not check.

    Compared are the numbers of values without those that timm adapts: classifier, positions, and the patch embedding.
    """
    if not weights.arrays:
        return
    adapted = ("head/", "pre_logits/", "pos_embedding", "posembed", "embedding/kernel")
    root = next((key[: -len("embedding/kernel")] for key in weights.arrays if key.endswith("embedding/kernel")), "")
    inside = {key.removeprefix(root): shape for key, shape in weights.arrays.items() if key.startswith(root)}
    given = sum(
        int(np.prod(shape)) for key, shape in inside.items() if not key.startswith(adapted) and "posembed" not in key
    )
    own: dict[str, Tensor] = {k: v for k, v in load.model.state_dict().items() if v.is_floating_point()}
    skipped = ("pos_embed", "patch_embed.proj.weight", "head.", "head_dist.", *load.missing)
    taken = sum(value.numel() for key, value in own.items() if not key.startswith(skipped))
    if given != taken:
        raise CheckpointError(
            f"it has {given:,} values beside classifier and embeddings, of which the model uses {taken:,}"
        )
    classified = bool(getattr(load.model, "num_classes", 0)) and not any(
        key.startswith("head.") for key in load.missing
    )
    if classified and any("pre_logits" in key for key in inside):
        raise CheckpointError(PRE_LOGITS.format("pre_logits"))
