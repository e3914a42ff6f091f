"""YAML 1.2 text (core schema) to plain values, each with the line that it came from; whatever is none is one ConfigError.

PyYAML reads YAML 1.1, where ``010`` is 8, ``10:30`` is 630, ``yes`` is true and ``1e-3`` a word. Here its scanner and parser get
the resolvers of the core schema, and its constructors are not used: tags other than those of plain values are refused, and depth,
number of values and size are limited, since a few lines of aliases can stand for billions of values.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from vit_tucker.errors import ConfigError, shorten

KeyPath = tuple[str | int, ...]
MAX_BYTES = 2**21
MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_DIGITS = 100
PREFIX = "tag:yaml.org,2002:"
FLOATS = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
CORE = {
    "null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    "float": re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
"""The core schema's words for values that are no strings (YAML 1.2.2, section 10.3.2)."""
FIRST = {"null": ["~", "n", "N", ""], "bool": list("tTfF"), "int": list("-+0123456789"), "float": list("-+.0123456789")}


class _Loader(yaml.SafeLoader):
    """Composes nodes with the tags of the core schema, down to ``MAX_DEPTH``."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own class attribute
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes a node one level deeper, or raises: PyYAML itself would end in a RecursionError."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class Dumper(yaml.SafeDumper):
    """Writes mappings in blocks, lists in one line; words that are numbers or booleans in YAML 1.1 or 1.2 are quoted."""


for _name, _pattern in CORE.items():
    _Loader.add_implicit_resolver(PREFIX + _name, _pattern, FIRST[_name])
    Dumper.add_implicit_resolver(PREFIX + _name, _pattern, FIRST[_name])
Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence(f"{PREFIX}seq", items, flow_style=True))


def read_file(path: Path) -> tuple[Any, dict[KeyPath, str]]:
    """Reads a YAML file of one document, and where each of its keys stands.

    Args:
        path: of the file, as messages name it.

    Returns:
        Its values, None for an empty file; and for each key 'file:line'.

    Raises:
        ConfigError: it can't be read, is too large, or is no YAML 1.2 of plain values.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shorten(path)}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES >> 20} MiB, the limit for configs")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: byte 0x{data[error.start]:02x} is no UTF-8 text") from None
    return read_text(text, lambda line: f"{path}:{line}")


def read_text(text: str, where: Callable[[int], str], at: KeyPath = ()) -> tuple[Any, dict[KeyPath, str]]:
    """Reads a YAML document, and where each of its keys stands.

    Args:
        text: of one document.
        where: what messages call a line, counted from 1.
        at: key of the whole in what it is part of.

    Returns:
        The values, None for an empty text; and what ``where`` calls the line of each key.

    Raises:
        ConfigError: it is no YAML 1.2 of plain values.
    """
    key = f": {dotted(at)}" if at else ""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = where(1 if mark is None else mark.line + 1)
        raise ConfigError(f"{place}{key}: not valid YAML: {shorten(error.problem or error.context, 200)}") from None
    except yaml.reader.ReaderError as error:
        place = where(text.count("\n", 0, error.position) + 1)
        raise ConfigError(
            f"{place}{key}: not valid YAML: it contains the character U+{ord(text[error.position]):04X}"
        ) from None
    except (ValueError, OverflowError) as error:  # escapes and directives whose numbers are too large
        raise ConfigError(f"{where(1)}{key}: not valid YAML: {shorten(error)}") from None
    values = _Values(where)
    return (None if node is None else values.construct(node, at)), values.origin


class _Values:
    """Makes plain values of nodes.

    Args:
        where: see ``read_text``.
    """

    def __init__(self, where: Callable[[int], str]) -> None:
        self.where, self.origin, self.count = where, {}, 0  # type: ignore[var-annotated]

    def construct(self, node: yaml.Node, at: KeyPath, holders: tuple[yaml.Node, ...] = ()) -> Any:
        """Returns the value of a node, and notes where each key is from."""
        place = self.where(node.start_mark.line + 1)
        self.origin[at] = place
        self.count += 1
        if node in holders:
            raise ConfigError(f"{place}: {dotted(at)}: an alias that contains itself")
        if len(holders) >= MAX_DEPTH:
            raise ConfigError(f"{place}: {dotted(at)}: nested more than {MAX_DEPTH} levels deep")
        if self.count > MAX_VALUES:
            raise ConfigError(f"{place}: {dotted(at)}: more than {MAX_VALUES:,} values, aliases written out")
        if isinstance(node, yaml.MappingNode):
            self._expect(node, "map", place, at)
            return self._mapping(node, at, (*holders, node))
        if isinstance(node, yaml.SequenceNode):
            self._expect(node, "seq", place, at)
            return [self.construct(item, (*at, n), (*holders, node)) for n, item in enumerate(node.value)]
        return scalar(node, f"{place}: {dotted(at)}")

    def _mapping(self, node: yaml.MappingNode, at: KeyPath, holders: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.where(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                kind = "list" if isinstance(key_node, yaml.SequenceNode) else "mapping"
                raise ConfigError(f"{place}: {dotted(at)}: a {kind} can't be a key")
            key = key_node.value
            child = (*at, key)
            if key == "<<" and key_node.style is None:
                raise ConfigError(
                    f"{place}: {dotted(child)}: YAML 1.2 has no merge keys; repeat the keys, or use base:"
                )
            refuse_unprintable(key, f"{place}: {dotted(child)}")
            if key in result:
                raise ConfigError(f"{place}: {dotted(child)}: given twice")
            result[key] = self.construct(value_node, child, holders)
            self.origin[child] = place
        return result

    def _expect(self, node: yaml.Node, tag: str, place: str, at: KeyPath) -> None:
        if node.tag != PREFIX + tag:
            raise ConfigError(f"{place}: {dotted(at)}: {no_tag(node)}")


def scalar(node: yaml.Node, place: str) -> str | int | float | bool | None:
    """Returns the value of a scalar node.

    Args:
        node: with its tag, resolved or given.
        place: file, line and key.

    Raises:
        ConfigError: a tag that is none of the core schema's, or text that is not of its form.
    """
    kind, text = node.tag.removeprefix(PREFIX), node.value
    if kind == "str":
        refuse_unprintable(text, place)
        return text
    if kind not in CORE or node.tag == kind:
        raise ConfigError(f"{place}: {no_tag(node)}")
    if CORE[kind].match(text) is None:
        raise ConfigError(f"{place}: !!{kind}: '{shorten(text)}' is not a valid {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if len(text) > MAX_DIGITS:
        raise ConfigError(f"{place}: a number of {len(text):,} digits")
    if kind == "float":
        return FLOATS[text.lower()] if text.lower() in FLOATS else float(text)
    return int(text[2:], 8 if text[1] == "o" else 16) if text[:2] in ("0o", "0x") else int(text)


def no_tag(node: yaml.Node) -> str:
    """Returns what is wrong with a node's tag."""
    tag = node.tag.replace(PREFIX, "!!", 1)
    return f"the tag {shorten(tag)} is not allowed; configs contain plain values: text, numbers, true, false, null"


def refuse_unprintable(text: str, place: str) -> None:
    """Raises ConfigError for text with characters that no name or sentence has; escapes can bring them in."""
    found = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", text)
    if found is not None:
        raise ConfigError(f"{place}: contains the character U+{ord(found[0]):04X}, which is no text")


def dotted(path: KeyPath) -> str:
    """Returns the dotted name of a path: 'train.lr' for ('train', 'lr'), 'config' for the empty one."""
    return shorten(".".join(str(part) for part in path)) or "config"
