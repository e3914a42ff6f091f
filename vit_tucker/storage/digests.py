"""Stores what was saved, so that changes are found: SHA-256, dtypes and shapes in config.json, beside the weights.

Under ``vit_tucker.stored``: ``config`` is the SHA-256 of all else in config.json (its values, in whatever order and layout);
``files`` has for each weights file its SHA-256 and, by name, its tensors as "F32 [2, 8]".
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vit_tucker.errors import CheckpointError, and_more, reason_of
from vit_tucker.storage.json_files import Strict, checked, read_object
from vit_tucker.storage.weights import replace_text, save_weights

CONFIG = "config.json"
"""Describes the model of the weights, in timm's layout."""
SECTION, ENTRY = "vit_tucker", "stored"
SKIP = f"verify=False loads it anyway, and so does taking {SECTION}.{ENTRY} out of {CONFIG}"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoredFile(Strict):
    """One weights file as it was saved.

    Attributes:
        sha256: of the file.
        tensors: dtype and shape by name, "F32 [2, 8]".
        replaces: SHA-256 of the file before it, which still stands there if the writer was killed.
    """

    sha256: Digest
    tensors: dict[str, str]
    replaces: Digest | None = None


class Stored(Strict):
    """Digests of a saved config.json and its weights; see the module."""

    config: Digest
    files: Annotated[dict[str, StoredFile], Field(min_length=1)]


def sha256_of(file: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_of(config: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the values of a config.json, ``vit_tucker.stored`` apart."""
    values = dict(config)
    if isinstance(section := values.get(SECTION), Mapping):
        values[SECTION] = {key: value for key, value in section.items() if key != ENTRY}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def headers_of(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Returns dtype and shape of each tensor of a safetensors file, from its header.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        with safe_open(str(file), framework="np") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
            return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: can't be read: {reason_of(error)}") from None


def tensors_of(file: Path) -> dict[str, str]:
    """Returns dtype and shape of each tensor of a safetensors file as config.json has them: "F32 [2, 8]"."""
    return {name: f"{dtype} {shape}" for name, (dtype, shape) in headers_of(file).items()}


def stored_file(file: Path, sha256: str | None = None) -> dict[str, Any]:
    """Returns the entry of config.json for a safetensors file, whose SHA-256 may be known."""
    return {"sha256": sha256 or sha256_of(file), "tensors": tensors_of(file)}


def with_stored(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a config.json with the digests of itself and of its weights.

    Args:
        config: JSON values.
        files: ``stored_file`` by name.
    """
    entry = {"config": digest_of(config), "files": {name: dict(values) for name, values in files.items()}}
    return {**config, SECTION: {**config.get(SECTION, {}), ENTRY: entry}}


def read_stored(config: Mapping[str, Any], where: str) -> Stored | None:
    """Returns the digests in a config.json; None if it has none, being older or timm's own.

    Raises:
        CheckpointError: they have another form.
    """
    section = config.get(SECTION)
    if not isinstance(section, Mapping) or ENTRY not in section:
        return None
    return checked(Stored, section[ENTRY], f"{where}: {SECTION}.{ENTRY}")


def save_model(
    folder: Path, name: str, state: Mapping[str, Tensor], metadata: dict[str, str], config: Mapping[str, Any]
) -> None:
    """Writes weights and the config.json beside them, each replaced as a whole.

    A kill at any time leaves a folder that is refused when it is loaded, or one that loads: where both are of one model, as a
    run's best weights are, config.json accepts the weights before these until they are replaced.

    Args:
        folder: made if it is not there.
        name: of the weights file.
        state, metadata: see ``save_weights``.
        config: JSON values.

    Raises:
        OSError: it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {}

    def describe_new(beside: Path) -> None:
        values.update(stored_file(beside))
        before = replaced(folder, name, config)
        write_config(folder, with_stored(config, {name: {**values, **({"replaces": before} if before else {})}}))

    save_weights(folder / name, state, metadata, describe_new)
    write_config(folder, with_stored(config, {name: values}))


def replaced(folder: Path, name: str, config: Mapping[str, Any]) -> str | None:
    """Returns the SHA-256 of the weights that a folder has; None if it has none, or those of another model.

    Args:
        folder: may be missing.
        name: of the weights file.
        config: contents of the config.json that they must belong to.
    """
    try:
        stored = read_stored(read_object(folder / CONFIG), str(folder))
    except CheckpointError:
        return None
    if stored is None or name not in stored.files or stored.config != digest_of(config):
        return None
    return stored.files[name].sha256


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json, replaced as a whole."""
    replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def verify(config: Mapping[str, Any], file: Path, where: str, siblings: bool = True) -> bool:
    """Finds out whether config.json and its weights are those that were saved.

    Args:
        config: the values of config.json, as they were read.
        file: the weights.
        where: names both, for messages: a folder, a repository.
        siblings: the other weights files of the folder must be there as well.

    Returns:
        False if config.json has no digests.

    Raises:
        CheckpointError: one of them is something else.
    """
    stored = read_stored(config, where)
    if stored is None:
        return False
    if (found := digest_of(config)) != stored.config:
        raise CheckpointError(f"{where}: {CONFIG} is not what was saved: {_differ(stored.config, found)}; {SKIP}")
    if file.name not in stored.files:
        names = ", ".join(stored.files)
        raise CheckpointError(f"{where}: {file.name} was not saved with {CONFIG}, which names {names}; {SKIP}")
    missing = [name for name in stored.files if siblings and not (file.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{where}: {missing[0]} is missing: it was saved beside {file.name}; {SKIP}")
    verify_file(file, stored.files[file.name], where)
    return True


def verify_file(file: Path, stored: StoredFile, where: str) -> None:
    """Raises CheckpointError if a weights file is not the one that was saved; names a tensor that differs in its header.

    Args:
        file: a weights file.
        stored: its digests as saved.
        where: name of the checkpoint, for messages.
    """
    try:
        found = sha256_of(file)
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error.strerror}") from None
    if found in (stored.sha256, stored.replaces):
        return
    try:
        tensors = tensors_of(file)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise CheckpointError(f"{where}: {file.name} is not what was saved, and {reason}") from None
    names = [name for name in {**stored.tensors, **tensors} if tensors.get(name) != stored.tensors.get(name)]
    detail = ""
    if names:
        saved, now = (of.get(names[0], "not there") for of in (stored.tensors, tensors))
        detail = f"; {names[0]!r} was {saved} and is {now}{and_more(names)}"
    raise CheckpointError(
        f"{where}: {file.name} is not what was saved: {_differ(stored.sha256, found)}{detail}; {SKIP}"
    )


def verify_beside(file: Path, siblings: bool = True) -> bool:
    """Verifies a weights file against the config.json beside it, see ``verify``.

    False if there is none, or it has no digests.
    """
    if not (file.parent / CONFIG).is_file():
        return False
    try:
        config = read_object(file.parent / CONFIG, all_finite=False)
    except CheckpointError:
        if file.suffix == ".safetensors":
            raise
        return False
    return verify(config, file, str(file.parent), siblings)


def _differ(saved: str, found: str) -> str:
    return f"SHA-256 differs (saved {saved[:12]}..., found {found[:12]}...)"
