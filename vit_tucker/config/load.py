"""From a config's name and overrides to a validated RunConfig, with one clear line for each mistake."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from vit_tucker.attention.registry import get_method, list_methods
from vit_tucker.config.plugins import load_config_plugins
from vit_tucker.config.schema import RunConfig, run_config_model
from vit_tucker.config.source import (
    KeyPath,
    Source,
    dotted,
    find_config,
    merge,
    package_configs,
    read_overrides,
    read_with_bases,
    read_yaml,
    stored_by_name,
)
from vit_tucker.errors import ConfigError, nearest
from vit_tucker.paths import checked_name, checked_path

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and validate a config.

    Args:
        name: as for ``find_config``. Its plug-ins run if the user names them, see ``vit_tucker.config.plugins``.
        overrides: ``key.sub=value`` strings.

    Returns:
        The frozen config, with ``name`` and ``output_dir`` filled in.

    Raises:
        ConfigError: one line with file, line, key, what is wrong, and the nearest valid name.
    """
    path = find_config(name)
    if "cells" in read_yaml(path).values:
        raise ConfigError(f"{path}: this is a sweep: many runs; start it by experiments/sweep.py --cfg {name}")
    stored = stored_by_name(name, path)
    source = merge(read_with_bases(path, stored=stored), read_overrides(overrides))
    load_config_plugins(source, path.parent if stored is None else Path())
    config = validate(source)
    run_name = config.name or _default_name(path)
    output_dir = config.output_dir or f"runs/{run_name}-{config.seed}"
    try:
        checked_name(run_name), checked_path(output_dir)
    except ValueError as error:
        raise ConfigError(f"{source.where(('name',))}: name: {error}") from None
    return config.model_copy(update={"name": run_name, "output_dir": output_dir})


def _default_name(path: Path) -> str:
    """'digits/tucker_r16.yaml' below the configs becomes 'digits-tucker_r16'."""
    root = package_configs()
    inside = path.resolve().relative_to(root) if path.resolve().is_relative_to(root) else Path(path.name)
    return "-".join(inside.with_suffix("").parts)


def validate(source: Source) -> RunConfig:
    """A run's config, strictly validated (no string becomes a number); see ``load_config`` for the errors."""
    return validate_as(run_config_model(), source)


def validate_as(model: type[AnyModel], source: Source) -> AnyModel:
    """The same for any pydantic model of a YAML file."""
    try:
        return model.model_validate_json(json.dumps(source.values), strict=True)
    except ValidationError as error:
        raise ConfigError(_error_line(error, source, model)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source.where(())}: {error}") from None


def _error_line(error: ValidationError, source: Source, model: type[BaseModel]) -> str:
    """The first mistake, unknown keys before all else: they often cause the others."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    path = _config_path(first["loc"], source.values, first["type"] == "missing")
    key, where = dotted(path), source.where(path)
    if first["type"] == "extra_forbidden":
        name = str(path[-1])
        parent = ".".join(part for part in path[:-1] if isinstance(part, str))  # an entry of a list: any entry's keys
        siblings = [k for k in _valid_keys(model, source.values) if k.rpartition(".")[0] == parent]
        hint = nearest(name, [k.rpartition(".")[2] for k in siblings])
        if not hint:  # perhaps the right key in the wrong section
            elsewhere = [k for k in _valid_keys(model, source.values) if k.rpartition(".")[2] == name]
            hint = f"; did you mean '{elsewhere[0]}'?" if elsewhere else f"; valid here: {', '.join(_leaf(siblings))}"
        return f"{where}: {key}: unknown key{hint}"
    if first["type"] == "union_tag_invalid":
        name = str(source.values["attention"].get("method"))
        known = list_methods()
        return f"{where}: {key}.method: unknown method '{name}', known: {', '.join(known)}{nearest(name, known)}"
    if first["type"] == "union_tag_not_found":
        return f"{where}: {key}.method: missing, known: {', '.join(list_methods())}"
    if first["type"] == "missing":
        short = first["loc"] and isinstance(first["loc"][-1], int)  # an entry of a list of fixed length
        return f"{where}: {key}: {'has too few entries' if short else 'missing, and it has no default'}"
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    given = "" if first["type"] == "value_error" else f", not {first['input']!r}"
    return f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}{given}{more}"


def _leaf(keys: Sequence[str]) -> list[str]:
    return [key.rpartition(".")[2] for key in keys]


def _config_path(loc: tuple[int | str, ...], values: Any, missing: bool) -> KeyPath:
    """pydantic's location without the names of union members, which are no keys of the file; the last key may be missing."""
    path: list[str | int] = []
    for number, part in enumerate(loc):
        children = dict(enumerate(values)) if isinstance(values, list) else values
        if isinstance(children, dict) and part in children:
            values = children[part]
        elif not missing or number < len(loc) - 1 or not isinstance(values, dict) or part in list_methods():
            continue  # a union member's name, or an entry that is not there
        path.append(part)
    return tuple(path)


def _valid_keys(model: type[BaseModel], values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """All dotted keys of the schema; the attention section's are those of the chosen method."""
    for name, info in model.model_fields.items():
        yield prefix + name
        section = info.annotation
        if prefix == "" and name == "attention":
            given = values.get("attention")
            method = given.get("method") if isinstance(given, dict) else None
            section = get_method(method) if method in list_methods() else None
        for part in _models_in(section):
            yield from _valid_keys(part, values, f"{prefix}{name}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models among the members of an annotation such as ``tuple[int, ...] | tuple[Section, ...] | None``."""
    if get_origin(annotation) in (Union, UnionType, Annotated, tuple):
        for member in get_args(annotation):
            yield from _models_in(member)
    elif get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


class _Dumper(yaml.SafeDumper):
    """Mappings in blocks, lists in one line."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; reading it gives an equal config."""
    values = cast(dict[str, Any], json.loads(config.model_dump_json()))
    if config.attention is not None:
        values["attention"] = json.loads(config.attention.model_dump_json())
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=120)


def config_difference(old: RunConfig, new: RunConfig) -> list[str]:
    """'train.lr: 0.001 -> 0.002' for each key that differs, output_dir apart."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, sub in value.items() for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()}

    before, after = (flat(yaml.safe_load(dump_config(config))) for config in (old, new))
    keys = [key for key in {**before, **after} if key != "output_dir" and before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]
