"""YAML files, their bases and command-line overrides, merged; every value remembers the file and line it came from.

``base:`` files are merged first, in order; mappings merge key by key, all else is replaced. A section whose ``method`` changes is
replaced whole, since another method has other options.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vit_tucker.config.stored import stored_folder
from vit_tucker.errors import ConfigError, nearest

CONFIG_ROOT = Path("experiments/configs")
CONFIG_FILE = "config.yaml"
KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (1e-3 is a float) and booleans (on, off, yes, no are strings)."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN))$"
    ),
    list("-+0123456789."),
)


@dataclass
class Source:
    """Values read so far and where each came from ('file:line' or 'command line').

    Attributes:
        values: nested.
        origin: of each key.
        stored: the stored folder whose config names ``plugins``; None where the user does.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[KeyPath, str] = field(default_factory=dict)
    stored: Path | None = None

    def where(self, path: KeyPath) -> str:
        """Origin of a key or of its nearest parent."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origin:
                return self.origin[path[:end]]
        return next(iter(self.origin.values()), "config")


def find_config(name: str | Path) -> Path:
    """The file that ``--cfg`` means: a file, a run folder, or a name below experiments/configs (with or without .yaml).

    Raises:
        ConfigError: no such file; names the places and the nearest known config.
    """
    path = Path(name)
    candidates = [path / CONFIG_FILE if path.is_dir() else path]
    if not path.is_absolute():
        candidates += [CONFIG_ROOT / path, package_configs() / path]
    for candidate in candidates:
        for file in (candidate, candidate.with_name(candidate.name + ".yaml")):
            if file.is_file():
                return file
    if path.is_dir():
        raise ConfigError(f"{path}: not a run folder, it has no {CONFIG_FILE}")
    known = [str(f.relative_to(package_configs())) for f in package_configs().rglob("*.yaml")]
    raise ConfigError(f"{name}: no such config, neither here nor in {CONFIG_ROOT}{nearest(str(name), known)}")


def stored_by_name(name: str | Path, file: Path) -> Path | None:
    """Returns the stored folder that a config's name means: a folder always, a file if it lies in one; None for a user's file.

    Args:
        name: as for ``find_config``.
        file: what that returns.
    """
    return file.parent if Path(name).is_dir() else stored_folder(file)


def package_configs() -> Path:
    """The shipped configs, so that names work from any folder: of a source checkout, or of an installation."""
    checkout = Path(__file__).resolve().parents[2] / CONFIG_ROOT
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "vit_tucker" / CONFIG_ROOT


def read_yaml(path: Path) -> Source:
    """Values and line numbers of one YAML file, without its bases.

    Raises:
        ConfigError: no YAML, no mapping at the top, or a key given twice.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    source = Source(origin={(): str(path)})
    if node is None:
        return source
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:1: the file must be a mapping of keys to values")
    source.values = _construct(node, (), path, source.origin)
    return source


def _construct(node: yaml.Node, at: KeyPath, path: Path, origin: dict[KeyPath, str]) -> Any:
    origin[at] = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, f"{path}:{key_node.start_mark.line + 1}"
            child = (*at, key)
            if key in result:
                raise ConfigError(f"{line}: {dotted(child)}: given twice")
            result[key] = _construct(value_node, child, path, origin)
            origin[child] = line
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*at, number), path, origin) for number, item in enumerate(node.value)]
    return _Loader("").construct_object(node, deep=True)


def merge(base: Source, top: Source) -> Source:
    """``top`` over ``base``."""

    def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
        if "method" in high and "method" in low and low["method"] != high["method"]:
            return high
        result = dict(low)
        for key, value in high.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
        return result

    stored = top.stored if "plugins" in top.values else base.stored
    return Source(merged(base.values, top.values), {**base.origin, **top.origin}, stored)


def read_with_bases(path: Path, below: tuple[Path, ...] = (), stored: Path | None = None) -> Source:
    """A YAML file on top of its ``base:`` files.

    Args:
        path: of the file.
        below: the files that have it as a base.
        stored: the stored folder that leads to it; None if it is the user who does.

    Raises:
        ConfigError: a base is missing, of the wrong type, or includes itself.
    """
    stored = stored or stored_folder(path)
    path = path.resolve()
    shown = _shown(path)
    if path in below:
        raise ConfigError(
            f"{shown}: base: includes itself through {' -> '.join(_shown(p).name for p in (*below, path))}"
        )
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
            file = path.parent / base if (path.parent / base).is_file() else find_config(base)
        except ConfigError as error:
            raise ConfigError(f"{where}: base: {error}") from None
        result = merge(result, read_with_bases(file, (*below, path), stored or stored_by_name(base, file)))
    return merge(result, source)


def _shown(path: Path) -> Path:
    """The path as a user reads it: relative to the current folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read_overrides(overrides: Sequence[str]) -> Source:
    """``a.b=c`` arguments, values in YAML.

    Raises:
        ConfigError: not of that form.
    """
    result = Source()
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key or not all(key.split(".")):
            raise ConfigError(f"command line: '{text}': overrides are written key.sub=value")
        try:
            parsed = yaml.load(value, Loader=_Loader)  # a SafeLoader
        except yaml.YAMLError:
            raise ConfigError(f"command line: {key}: '{value}' is not valid YAML") from None
        path = tuple(key.split("."))
        nested: Any = parsed
        for part in reversed(path):
            nested = {part: nested}
        result = merge(result, Source(nested, {path: "command line"}))
    return result


def dotted(path: KeyPath) -> str:
    """('train', 'lr') -> 'train.lr'; the empty path is 'config'."""
    return ".".join(str(part) for part in path) or "config"
