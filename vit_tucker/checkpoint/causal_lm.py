"""Language models of transformers and their tokenizers, from folders, GGUF files and the hub; no code of theirs runs."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vit_tucker.checkpoint.hub import refuse_missing
from vit_tucker.errors import CheckpointError, and_more, reason_of
from vit_tucker.hosts.transformers_library import import_transformers, quiet_transformers
from vit_tucker.show.progress_bars import bars_are_shown
from vit_tucker.storage.digests import CONFIG

LOGGER = logging.getLogger("vit_tucker.checkpoint")
GGUF = ".gguf"
PREFIXES = ("hf-hub:", "hf_hub:")
REMOTE = "it brings code of its own, which is not run here; it needs a class that transformers has"
Found = TypeVar("Found")


def load_dense_causal_lm(
    where: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
) -> nn.Module:
    """Loads a causal language model of transformers, in evaluation mode.

    Args:
        where: a folder that transformers wrote, one with a GGUF file, or such a file; or a repository of the hub, "owner/name",
            with a revision after "@". Weights are safetensors or GGUF: nothing is unpickled, and no code of a folder is run.
        dtype: of the weights; the stored one if None.
        device: the CPU if None.
        attn_implementation: "eager", "sdpa", ..., see transformers; its choice if None.

    Raises:
        CheckpointError: transformers is missing, or the model is, or is damaged, or has weights that were not stored.
    """
    transformers = import_transformers(str(where), CheckpointError)
    name, options = source_of(where)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if "gguf_file" not in options:
        options["use_safetensors"] = True
    wanted: Any = "auto" if dtype is None else dtype
    model, info = in_one_line(
        str(where),
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=wanted, output_loading_info=True, trust_remote_code=False, **options
        ),
    )
    refuse_random(str(where), info)
    model = model.eval()
    return model if device is None else model.to(device)


def load_tokenizer(where: str | Path) -> Any:
    """Loads the tokenizer in a folder of its own, or beside a model.

    Args:
        where: see ``load_dense_causal_lm``.

    Raises:
        CheckpointError: transformers is missing, or there is no tokenizer.
    """
    transformers = import_transformers(str(where), CheckpointError)
    alone = Path(where).expanduser() / "tokenizer_config.json"
    name, options = (str(alone.parent), {}) if alone.is_file() else source_of(where)
    return in_one_line(
        f"{where}: its tokenizer",
        lambda: transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options),
    )


def source_of(where: str | Path) -> tuple[str, dict[str, Any]]:
    """Returns the folder or hub name that a place means, and arguments of transformers' ``from_pretrained``: a file, a revision.

    Raises:
        CheckpointError: no such folder, one without a model, or a name that is neither in the hub's cache nor to be had.
    """
    text = str(where)
    hub = next((text[len(prefix) :] for prefix in PREFIXES if text.startswith(prefix)), None)
    path = Path(text).expanduser()
    if hub is None and path.exists():
        return folder_source(path)
    if hub is None and (
        text.startswith((".", "/", "~")) or text.count("/") > 1 or (path.parent.is_dir() and "/" in text)
    ):
        raise CheckpointError(f"{text}: no such folder, and no 'owner/name' of the hub")
    name, _, revision = (hub or text).partition("@")
    refuse_missing((hub or text), (CONFIG,), text if hub else f"{text}: no such folder")
    return name, {"revision": revision} if revision else {}


def folder_source(path: Path) -> tuple[str, dict[str, Any]]:
    """Returns the folder of a path, and the GGUF file in it where there is no config.json.

    Raises:
        CheckpointError: there is neither, or several files.
    """
    if path.is_file():
        if path.suffix != GGUF:
            raise CheckpointError(f"{path}: a file; name its folder, or a {GGUF} file")
        return str(path.parent), {"gguf_file": path.name}
    if (path / CONFIG).is_file():
        return str(path), {}
    files = sorted(file.name for file in path.glob(f"*{GGUF}"))
    if not files:
        raise CheckpointError(f"{path}: no language model: neither {CONFIG} nor a {GGUF} file")
    if len(files) > 1:
        raise CheckpointError(f"{path}: {len(files)} {GGUF} files; name one of them: {', '.join(files[:5])}")
    return str(path), {"gguf_file": files[0]}


def in_one_line(where: str, load: Callable[[], Found]) -> Found:
    """Returns what a function of transformers loads, without its reports; its errors become one line.

    Args:
        where: the model, for messages.
        load: the function.

    Raises:
        CheckpointError: whatever it raises.
    """
    try:
        with quiet_transformers(bars_are_shown()):
            return load()
    except (
        Exception
    ) as error:  # transformers raises many kinds: OSError, ValueError, ImportError, those of safetensors ...
        reason = reason_of(error, 300)
        if "trust_remote_code" in reason or "contains custom code" in reason:
            reason = REMOTE
        raise CheckpointError(f"{where}: can't be loaded: {reason}") from None


def refuse_random(where: str, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError if transformers started some weights at random, which it only logs; notes those without a place.

    Args:
        where: the model, for messages.
        info: transformers' ``output_loading_info``.
    """
    for kind, what in (("missing_keys", "no"), ("mismatched_keys", "of another shape:")):
        names = sorted(name if isinstance(name, str) else name[0] for name in info.get(kind) or ())
        if names:
            raise CheckpointError(f"{where}: of another model, or incomplete: {what} {names[0]}{and_more(names)}")
    if unused := sorted(info.get("unexpected_keys") or ()):
        LOGGER.warning(f"note: {where}: {unused[0]} has no place in the model{and_more(unused)}")
