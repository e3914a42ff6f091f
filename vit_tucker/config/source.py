"""YAML files, their bases and command-line overrides, merged; every value remembers the file and line it came from.

``base:`` files are merged first, in order; mappings merge key by key, all else is replaced. A section whose ``method`` changes is
replaced whole, since another method has other options.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vit_tucker.config.find import find_config, parts_of, stored_by_name
from vit_tucker.config.stored import stored_folder
from vit_tucker.config.warmup import chosen_for, shortened_warmup
from vit_tucker.config.yaml_text import MAX_DEPTH, KeyPath, dotted, read_file, read_text
from vit_tucker.errors import ConfigError, shorten
from vit_tucker.storage.paths import displayed

INIT, NO_WEIGHTS = ("attention", "init"), "a model without trained weights"
"""The key that such a model sets, and where it then comes from."""


@dataclass
class Source:
    """Collects the values read so far and where each came from ('file:line' or 'command line').

    Attributes:
        values: nested.
        origin: of each key.
        stored: the stored folder whose config names ``plugins``; None where the user does.
        warmup_for: the epochs that the warm-up was chosen for, see ``vit_tucker.config.warmup``.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[KeyPath, str] = field(default_factory=dict)
    stored: Path | None = None
    warmup_for: float | None = None

    def where(self, path: KeyPath) -> str:
        """Returns the origin of a key or of its nearest parent."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origin:
                return self.origin[path[:end]]
        return next(iter(self.origin.values()), "config")

    def fitted(self) -> tuple["Source", tuple[str, ...]]:
        """Returns the values with those that follow from others once all are merged.

        A warm-up is not longer than the training. Attention that a data set x method starts at random is converted where the
        model got trained weights after all.

        Returns:
            The values, and a line for the log where the warm-up was changed.
        """
        source, attention = self, self.values.get("attention")
        if isinstance(attention, dict) and self.origin.get(INIT) == NO_WEIGHTS and starts_trained(self.values):
            converted = {key: value for key, value in attention.items() if key != "init"}
            source = replace(self, values={**self.values, "attention": converted})
        changed = shortened_warmup(source.values, source.warmup_for)
        if changed is None:
            return source, ()
        path = ("train", "warmup_epochs")
        fitting = Source({"train": {path[1]: changed[0]}}, {path: source.where(("train", "epochs"))})
        return merge_values(source, fitting), changed[1:]


def read_yaml(path: Path) -> Source:
    """Reads values and line numbers of one YAML file, without its bases; a data set x method has nothing but these.

    Raises:
        ConfigError: it can't be read, is no YAML, has no mapping at the top, or a key twice.
    """
    if parts := parts_of(path):
        return Source({"base": [str(part) for part in parts]}, {(): str(path)})
    values, origin = read_file(path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: the file must be a mapping of keys to values")
    return Source(values, {(): str(path), **origin})


def merge_values(base: Source, top: Source) -> Source:
    """Merges ``top`` over ``base``, key by key; a section of another method replaces the one below it as a whole."""

    def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
        if "method" in high and "method" in low and low["method"] != high["method"]:
            return high
        result = dict(low)
        for key, value in high.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
        return result

    stored = top.stored if "plugins" in top.values else base.stored
    warmup_for = chosen_for(base.values, top.values, base.warmup_for, top.warmup_for)
    return Source(merged(base.values, top.values), {**base.origin, **top.origin}, stored, warmup_for)


def read_with_bases(path: Path, stored: Path | None = None) -> Source:
    """Reads a YAML file on top of its ``base:`` files.

    Args:
        path: of the file.
        stored: the stored folder that leads to it; None if it is the user who does.

    Raises:
        ConfigError: a base is missing, of the wrong type, or includes itself.
    """
    return _with_bases(path, (), {}, stored)


def _with_bases(path: Path, above: tuple[Path, ...], read: dict[Path, Source], stored: Path | None) -> Source:
    """Reads a file for ``read_with_bases``; ``above`` are the files that lead here, ``read`` those that are read already."""
    stored = stored or stored_folder(path)
    path = path.resolve()
    shown = displayed(path)
    if path in above:
        chain = " -> ".join(p.name for p in (*above, path))
        raise ConfigError(f"{shown}: base: includes itself through {chain}")
    if len(above) >= MAX_DEPTH:
        raise ConfigError(f"{shown}: base: more than {MAX_DEPTH} files on top of each other")
    if path in read:
        return read[path]
    source = read_yaml(shown)
    source.stored = stored
    bases = source.values.pop("base", [])
    where = source.where(("base",))
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{where}: base: must be a file name or a list of file names")
    result = Source()
    for base in bases:
        try:
            file = find_config(base, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{where}: base: {error}") from None
        by = stored or stored_by_name(base, file)
        result = merge_values(result, _with_bases(file, (*above, path), read, by))
    if parts_of(path):
        result = merge_values(random_start(result.values), result)
    read[path] = merge_values(result, source)
    return read[path]


def starts_trained(values: dict[str, Any]) -> bool:
    """Returns whether the model of a config starts from trained weights."""
    model = values.get("model")
    return isinstance(model, dict) and bool(model.get("pretrained") or model.get("checkpoint"))


def random_start(values: dict[str, Any]) -> Source:
    """Returns how attention that is named beside a model starts: at random where that has no trained weights to convert."""
    if starts_trained(values) or not isinstance(values.get("attention"), dict):
        return Source()
    return Source({"attention": {"init": "random"}}, {INIT: NO_WEIGHTS})


def read_overrides(overrides: Sequence[str]) -> Source:
    """Reads ``a.b=c`` arguments, with values in YAML.

    Raises:
        ConfigError: not of that form.
    """
    result = Source()
    for text in overrides:
        key, equals, value = text.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path):
            raise ConfigError(f"command line: '{shorten(text)}': overrides are written key.sub=value")
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"command line: {dotted(path)}: nested more than {MAX_DEPTH} levels deep")
        nested, _ = read_text(value, lambda line: "command line", path)
        for part in reversed(path):
            nested = {part: nested}
        result = merge_values(result, Source(nested, {path: "command line"}))
    result.warmup_for = None  # what is given together belongs together, in any order
    return result
