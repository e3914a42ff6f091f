"""From a config's name and overrides to a validated RunConfig, with one clear line for each mistake."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from vit_tucker.config.schema import RunConfig, run_config_model
from vit_tucker.config.source import (
    Source,
    find_config,
    merge,
    package_configs,
    read_overrides,
    read_with_bases,
    read_yaml,
)
from vit_tucker.config.yaml_text import Dumper
from vit_tucker.errors import ConfigError
from vit_tucker.validation import describe_mistake

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def load_plugins(plugins: Any, folder: Path) -> None:
    """Import the modules and .py files that a config names, so that their methods are registered.

    Args:
        plugins: module names ('my_package.attention') or .py files, relative to ``folder``, to the current folder or to a source
            checkout of this package.
        folder: the config file's folder.

    Raises:
        ConfigError: one can't be imported.
    """
    if not isinstance(plugins, list | tuple):
        raise ConfigError("plugins: must be a list of module names or .py files")
    for plugin in plugins:
        try:
            if not str(plugin).endswith(".py"):
                importlib.import_module(str(plugin))
                continue
            places = (folder / plugin, Path(plugin), package_configs().parents[1] / plugin)
            file = next((f for f in places if f.is_file()), None)
            if file is None:
                raise ConfigError(f"plugins: {plugin}: no such file in {folder} or the current folder")
            _import_file(file.resolve())
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"plugins: {plugin}: {type(error).__name__}: {error}") from error


def _import_file(file: Path) -> None:
    name = f"vit_tucker_plugin_{file.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(file):
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and validate a config.

    Args:
        name: as for ``find_config``.
        overrides: ``key.sub=value`` strings.

    Returns:
        The frozen config, with ``name`` and ``output_dir`` filled in.

    Raises:
        ConfigError: one line with file, line, key, what is wrong, and the nearest valid name.
    """
    path = find_config(name)
    if "cells" in read_yaml(path).values:
        raise ConfigError(f"{path}: this is a sweep: many runs; start it by experiments/sweep.py --cfg {name}")
    source = merge(read_with_bases(path), read_overrides(overrides))
    load_plugins(source.values.get("plugins", []), path.parent)
    config = validate(source)
    run_name = config.name or _default_name(path)
    output_dir = config.output_dir or f"runs/{run_name}-{config.seed}"
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
        raise ConfigError(describe_mistake(error, model, source.values, source.where)) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source.where(())}: {error}") from None


def plain_config(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain values, for YAML and JSON."""
    values = cast(dict[str, Any], json.loads(config.model_dump_json()))
    if config.attention is not None:
        values["attention"] = json.loads(config.attention.model_dump_json())
    return values


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; reading it gives an equal config."""
    return yaml.dump(plain_config(config), Dumper=Dumper, sort_keys=False, default_flow_style=False, width=120)


def config_difference(old: RunConfig, new: RunConfig) -> list[str]:
    """'train.lr: 0.001 -> 0.002' for each key that differs, output_dir apart."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for key, sub in value.items() for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()}

    before, after = (flat(plain_config(config)) for config in (old, new))
    keys = [key for key in {**before, **after} if key != "output_dir" and before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]
