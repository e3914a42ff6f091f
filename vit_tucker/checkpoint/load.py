"""Models from what is stored of them: a folder, a run, a repository of the hub."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_tucker.checkpoint.causal_lm import GGUF, load_dense_causal_lm
from vit_tucker.checkpoint.libraries import ModelPlace, library, library_of_config
from vit_tucker.checkpoint.tensor_files import WEIGHTS, download
from vit_tucker.errors import CheckpointError
from vit_tucker.storage.digests import CONFIG
from vit_tucker.storage.json_files import read_object

PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
OF_A_RUN = ("checkpoints/best", "checkpoints/last")
"""What a run folder means: its best weights, as for its evaluation."""


def load(where: str | Path, *, verify: bool = True, **overrides: Any) -> nn.Module:
    """Rebuilds a model from what is stored of it, patched or dense.

    Folders written by ``save`` and by runs say what was saved; anything that has changed since is refused. Where this is not said
    or not asked for, arguments and sizes are checked against the weights, and a timm model is tried on one image. No code that
    comes with a model is run.

    Args:
        where: a folder written by ``save``; a run folder (its best weights) or one of its ``checkpoints/...``; a repository of
            the hub, "owner/name" or "hf-hub:owner/name[@revision]", with the weights as safetensors. Nothing is unpickled.
        verify: refuse a config.json and weights that are not those that were saved; False for what was changed on purpose.
        overrides: arguments of ``timm.create_model`` in place of the stored ones: ``num_classes`` (a new head),
            ``img_size`` (positions resampled), ``in_chans``, ``drop_path_rate``, ...; of a language model ``dtype`` and
            ``attn_implementation``.

    Returns:
        The model, on the CPU, in eval mode; in float32, a language model in the stored dtype. ``pretrained_cfg`` of a timm model
        holds its mean, std, crop and label names; ``vit_tucker.patch_record(model)`` the patch.

    Raises:
        CheckpointError: nothing is there, it is damaged, or it is of another model than its config describes.
    """
    place = ModelPlace(*find(where))
    config = read_config(place.folder, place.hub_id)
    return library_of_config(config).load(place, config, verify, overrides)


def load_causal_lm(
    where: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Loads a causal language model, patched or dense, in evaluation mode.

    Args:
        where: see ``load``, and ``load_dense_causal_lm`` for models that transformers or GGUF files describe.
        dtype: of the weights; the stored one if None.
        device: the CPU if None.

    Raises:
        CheckpointError: nothing is there, it is damaged, or it is no language model.
    """
    path = Path(where).expanduser()
    if not path.is_dir() or (not (path / CONFIG).is_file() and any(path.glob(f"*{GGUF}"))):
        return load_dense_causal_lm(where, dtype=dtype, device=device)
    folder, _ = find(path)
    if library_of_config(config := read_config(folder, None)) is not library("transformers"):
        raise CheckpointError(f"{where}: no language model, but {config['architecture']} of timm")
    model = load(path) if dtype is None else load(path, dtype=dtype)
    return model if device is None else model.to(device)


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
    """Returns config.json of a folder or a repository; raises CheckpointError if it is missing, or of no known layout."""
    file = folder / CONFIG if folder is not None else download(str(hub_id), CONFIG)
    config = read_object(file)
    if not any(isinstance(config.get(key), str) for key in ("architecture", "model_type")):
        raise CheckpointError(
            f"{file}: names no architecture, as timm's layout does, and no model_type, as that of transformers"
        )
    return config
