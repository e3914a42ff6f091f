"""Reads a config by name, with overrides, into a validated RunConfig, with one clear line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError, create_model

from vit_tucker.config.early import refuse_early
from vit_tucker.config.find import find_config, package_configs, stored_by_name
from vit_tucker.config.model_section import ModelConfig
from vit_tucker.config.places import absolute, map_paths, seen_from_here
from vit_tucker.config.plugins import load_config_plugins
from vit_tucker.config.source import (
    Source,
    merge_values,
    random_start,
    read_overrides,
    read_with_bases,
    read_yaml,
)
from vit_tucker.config.yaml_text import Dumper
from vit_tucker.errors import ConfigError
from vit_tucker.storage.paths import checked_name, checked_path
from vit_tucker.validation.mistakes import describe_mistake, models_in

if TYPE_CHECKING:
    from vit_tucker.config.schema import RunConfig

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads, merges and validates a config.

    Args:
        name: as for ``find_config``. Its plug-ins run if the user names them, see ``vit_tucker.config.plugins``.
        overrides: ``key.sub=value`` strings.

    Returns:
        The frozen config, with ``name`` and ``output_dir`` filled in.

    Raises:
        ConfigError: one line with file, line, key, what is wrong, and the nearest valid name.
    """
    return read_config(name, overrides)[0]


def read_config(
    name: str | Path, overrides: Sequence[str] = (), method: Source | None = None, suffix: str = ""
) -> tuple[RunConfig, tuple[str, ...]]:
    """Reads, merges and validates a config.

    Args:
        name, overrides: see ``load_config``.
        method: its ``attention`` takes the place of the file's.
        suffix: of the name of a run that the config does not name.

    Returns:
        The config, and lines for the log about values that were made to fit.

    Raises:
        ConfigError: see ``load_config``.
    """
    path, written = read_files(name)
    given = read_overrides(overrides)
    source = merge_values(written, given) if method is None else with_method(written, method, given)
    folder = path.parent if stored_by_name(name, path) is None else Path()
    return finish_config(source, _default_name(path) + suffix, folder)


def read_files(name: str | Path) -> tuple[Path, Source]:
    """Reads the files of a config; keys and values are not validated.

    Args:
        name: as for ``load_config``.

    Returns:
        The config's file, and the values of it and its bases.

    Raises:
        ConfigError: one line; also for a sweep's file.
    """
    path = find_config(name)
    if "cells" in read_yaml(path).values:
        raise ConfigError(f"{path}: this is a sweep: many runs; start it by experiments/sweep.py --cfg {name}")
    written = read_with_bases(path, stored=stored_by_name(name, path))
    written.values = seen_from_here(written.values, path.parent)
    return path, written


def with_method(written: Source, method: Source, given: Source) -> Source:
    """Merges the command line over a config whose ``attention`` is replaced; it starts at random in a model without weights.

    Args:
        written: of the config's files.
        method: with the section that takes its place.
        given: of the command line.
    """
    written.values = {name: section for name, section in written.values.items() if name != "attention"}
    source = merge_values(merge_values(written, method), given)
    return merge_values(random_start(source.values), source)


def finish_config(source: Source, default_name: str, folder: Path = Path()) -> tuple[RunConfig, tuple[str, ...]]:
    """Validates the values of a run, and fills in ``name`` and ``output_dir``.

    Args:
        source: with all of its bases and overrides.
        default_name: of a run without one.
        folder: where its plug-ins' files are looked for.

    Returns:
        The config, and lines for the log about values that were made to fit.

    Raises:
        ConfigError: see ``load_config``.
    """
    config, notes = validate_with_plugins(source, folder)
    run_name = config.name or default_name
    output_dir = config.output_dir or f"runs/{run_name}-{config.seed}"
    try:
        checked_name(run_name), checked_path(output_dir)
    except ValueError as error:
        raise ConfigError(f"{source.where(('name',))}: name: {error}") from None
    return config.model_copy(update={"name": run_name, "output_dir": output_dir}), notes


def config_from(values: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Makes a config without a file, of values and overrides on top; plug-ins that they name are the user's.

    Raises:
        ConfigError: see ``load_config``.
    """
    return validate_with_plugins(merge_values(Source(values), read_overrides(overrides)), Path())[0]


def validate_with_plugins(source: Source, folder: Path) -> tuple[RunConfig, tuple[str, ...]]:
    """Validates the values of a run's config after importing the plug-ins that it names.

    Args:
        source: with all of its bases and overrides.
        folder: where its plug-ins' files are looked for.

    Returns:
        The config, and lines for the log about values that were made to fit.

    Raises:
        ConfigError: see ``load_config``; most mistakes are found before torch is imported.
    """
    source, notes = source.fitted()
    refuse_early(source)
    load_config_plugins(source, folder)
    return validate(source), notes


def _default_name(path: Path) -> str:
    """Returns the name of a run without one: 'digits-tucker_r16' for digits/tucker_r16.yaml below the configs."""
    root = package_configs()
    inside = path.resolve().relative_to(root) if path.resolve().is_relative_to(root) else Path(path.name)
    return "-".join(inside.with_suffix("").parts)


def validate(source: Source) -> RunConfig:
    """Validates the values of a run's config strictly: no string becomes a number. Raises ConfigError as ``load_config`` does."""
    from vit_tucker.config.schema import run_config_model

    return validate_as(run_config_model(), source)


def validate_as(model: type[AnyModel], source: Source) -> AnyModel:
    """Validates the values of a YAML file strictly as any pydantic model; raises ConfigError as ``load_config`` does."""
    try:
        return model.model_validate_json(json.dumps(source.values), strict=True)
    except ValidationError as error:
        raise ConfigError(describe_mistake(error, model, source.values, source.where)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source.where(())}: {error}") from None


def validate_section(section: type[AnyModel], source: Source) -> AnyModel:
    """Validates one section of a run's config by itself; the other sections need not be there, and are not looked at.

    Args:
        section: class of the section: DataConfig, ModelConfig, TrainConfig, or AttentionConfig for any registered method.
        source: with the section's values under its name; what is not given has its default.

    Raises:
        ConfigError: see ``load_config``; the key is named with its section.
    """
    from vit_tucker.config.schema import RunConfig, run_config_model

    name = next(name for name, info in RunConfig.model_fields.items() if section in models_in(info.annotation))
    alone = Source({name: source.values.get(name, {})}, source.origin, source.stored)
    found: AnyModel = getattr(validate_as(section_model(run_config_model()), alone), name)
    return found


@lru_cache
def section_model(run: type[RunConfig]) -> type[RunConfig]:
    """Returns the model of a run's config in which no section is required, to look up valid keys for messages."""
    return create_model("Sections", __base__=run, model=(ModelConfig | None, None))


def plain_config(config: RunConfig) -> dict[str, Any]:
    """Returns the resolved config as plain values, for YAML and JSON; its YAML text reads back as these."""
    values = cast(dict[str, Any], json.loads(config.model_dump_json()))
    for name in ("attention", "linear"):
        section = getattr(config, name)
        if section is not None:
            values[name] = json.loads(section.model_dump_json())
    if config.linear is None:
        del values["linear"]  # files of runs without it have no such key
    return values


def dump_config(config: RunConfig) -> str:
    """Returns the resolved config as YAML text; reading it gives an equal config.

    Args:
        config: validated.
    """
    return yaml.dump(plain_config(config), Dumper=Dumper, sort_keys=False, default_flow_style=False, width=120)


def everywhere(config: RunConfig) -> RunConfig:
    """Returns the config with paths that mean the same in every folder."""
    return validate(Source(map_paths(plain_config(config), absolute)))


def config_difference(old: RunConfig, new: RunConfig) -> list[str]:
    """Returns 'train.lr: 0.001 -> 0.002' for each key that differs, output_dir apart.

    Args:
        old, new: validated.
    """

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, sub in value.items() for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()}

    before, after = (flat(plain_config(config)) for config in (old, new))
    keys = [key for key in {**before, **after} if key != "output_dir" and before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]
