"""The one line that a mistake in a config gets."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from vit_tucker.errors import nearest, shorten

KeyPath = tuple[str | int, ...]


def shown(value: Any) -> str:
    """Returns what was given, as text that is not too long."""
    return shorten(repr(value), 80)


def describe_mistake(
    error: ValidationError, model: type[BaseModel], values: Any, where: Callable[[KeyPath], str]
) -> str:
    """Returns the first mistake in one line, unknown keys before all else: they often cause the others.

    Args:
        error: of pydantic.
        model: what was validated.
        values: what was given.
        where: returns where the value of a key is from.
    """
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    kind, context = first["type"], first.get("ctx", {})
    path = config_path(first["loc"], values, kind == "missing")
    if kind == "union_tag_invalid":
        path = (*path, "method")
    key, place = shorten(".".join(map(str, path))) or "config", where(path)
    if kind == "extra_forbidden":
        return f"{place}: {key}: unknown key{unknown_key_hint(path, model, values)}"
    if kind == "union_tag_invalid":
        name, known = str(context["tag"]), quoted(context["expected_tags"])
        hint = nearest(name, known) or ("; methods of linear layers: linear.method" if path[0] == "attention" else "")
        return f"{place}: {key}: unknown method '{shorten(name)}', known: {', '.join(known)}{hint}"
    if kind == "union_tag_not_found":
        methods = [str(part.model_fields["method"].default) for part in models_at(model, path)]
        return f"{place}: {key}.method: missing, known: {', '.join(methods)}"
    if kind == "missing":
        short = first["loc"] and isinstance(first["loc"][-1], int)  # an entry of a list of fixed length
        return f"{place}: {key}: {'has too few entries' if short else 'missing, and it has no default'}"
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    has_value = kind in ("value_error", "too_short", "too_long")  # the message itself
    given = "" if has_value else f", not {shown(first['input'])}"
    hint = nearest(str(first["input"]), quoted(context["expected"])) if kind == "literal_error" else ""
    return f"{place}: {key}: {first['msg'].removeprefix('Value error, ')}{given}{hint}{more}"


def quoted(text: Any) -> list[str]:
    """Returns the words that pydantic lists: "'a', 'b' or 'c'" -> [a, b, c]."""
    return re.findall(r"'([^']*)'", str(text))


def unknown_key_hint(path: KeyPath, model: type[BaseModel], values: Any) -> str:
    """Returns '; did you mean X?' for the nearest key beside an unknown one, or the same key elsewhere; else what is valid.

    Args:
        path: of the unknown key.
        model: of the section.
        values: of the section, as given.
    """
    name = str(path[-1])
    parent = ".".join(part for part in path[:-1] if isinstance(part, str))  # an entry of a list: any entry's keys
    valid = list(valid_keys(model, values))
    siblings = [leaf(key) for key in valid if key.rpartition(".")[0] == parent]
    if hint := nearest(name, siblings):
        return hint
    elsewhere = [key for key in valid if leaf(key) == name]  # perhaps the right key in the wrong section
    return f"; did you mean '{elsewhere[0]}'?" if elsewhere else f"; valid here: {', '.join(siblings)}"


def leaf(key: str) -> str:
    """Returns the last part of a dotted key: 'train.lr' -> 'lr'."""
    return key.rpartition(".")[2]


def config_path(loc: Sequence[int | str], values: Any, missing: bool) -> KeyPath:
    """Returns pydantic's location without the names of union members, which are no keys; the last key may be missing.

    Args:
        loc: pydantic's location of an error.
        values: of the section, as given.
        missing: the error is that the last key is not there.
    """
    path: list[str | int] = []
    for number, part in enumerate(loc):
        children = dict(enumerate(values)) if isinstance(values, list | tuple) else values
        if isinstance(children, Mapping) and part in children:
            values = children[part]
        elif not missing or number < len(loc) - 1 or not isinstance(values, Mapping):
            continue  # a union member's name, or an entry that is not there
        path.append(part)
    return tuple(path)


def valid_keys(model: type[BaseModel], values: Any, prefix: str = "") -> Iterator[str]:
    """Yields all dotted keys of a model; of sections with a ``method``, those of the chosen one alone.

    Args:
        model: of the section.
        values: of the section, as given.
        prefix: before each key.
    """
    for name, info in model.model_fields.items():
        yield prefix + name
        given = values.get(name) if isinstance(values, Mapping) else None
        for part in chosen_models(models_in(info.annotation), given):
            yield from valid_keys(part, given, f"{prefix}{name}.")


def chosen_models(models: Iterator[type[BaseModel]], given: Any) -> list[type[BaseModel]]:
    """Returns the models that a value may be of: of several methods, the one that it names."""
    found = list(models)
    methods = {part.model_fields["method"].default: part for part in found if "method" in part.model_fields}
    if not methods:
        return found
    method = given.get("method") if isinstance(given, Mapping) else getattr(given, "method", None)
    return [methods[method]] if isinstance(method, str) and method in methods else []


def models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """Returns the models that the value of a key may be of."""
    found = [model]
    for part in path:
        fields = [each.model_fields[part] for each in found if isinstance(part, str) and part in each.model_fields]
        found = [member for info in fields for member in models_in(info.annotation)]
    return found


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yields the models among the members of an annotation such as ``tuple[int, ...] | tuple[Section, ...] | None``."""
    if get_origin(annotation) in (Union, UnionType, Annotated, tuple):
        for member in get_args(annotation):
            yield from models_in(member)
    elif get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
