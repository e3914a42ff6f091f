"""Reads what ``train`` is to train: a config, or a timm model by its name with the recipe of its data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_tucker.config.find import recipes_of
from vit_tucker.config.load import finish_config, read_config, with_method
from vit_tucker.config.method_string import method_source
from vit_tucker.config.source import Source, merge_values, read_overrides, read_with_bases, starts_trained
from vit_tucker.config.train_section import TrainConfig
from vit_tucker.errors import ConfigError

if TYPE_CHECKING:
    from vit_tucker.config.schema import RunConfig

SECTIONS = ("data", "train")
"""What a data set's recipe gives to a model that is named; its own model is another one."""


def read_run(
    cfg: str | Path | None, model: str | None = None, method: str | None = None, overrides: Sequence[str] = ()
) -> tuple[RunConfig, tuple[str, ...]]:
    """Reads the config of a run from what its command names.

    Args:
        cfg: as for ``load_config``; None with ``model``.
        model: timm model name; data and recipe are then those of ``<dataset>/base.yaml`` where there is one, or of
            ``<dataset>/base_*.yaml`` that starts from trained weights if the model does.
        method: as ``read_method`` reads it, in place of a config's ``attention``.
        overrides: ``key.sub=value`` strings.

    Returns:
        The config, with ``name`` and ``output_dir`` filled in, and lines for the log about what was chosen.

    Raises:
        ConfigError: no model or no data set is named, or see ``load_config``.
    """
    attention = None if method is None else method_source(method)
    suffix = "" if method is None else f"-{folder_name(method)}"
    if cfg is not None:
        return read_config(cfg, overrides, attention, suffix)
    if model is None:
        raise ConfigError("train needs one of MODEL and --cfg")
    given = merge_values(
        Source({"model": {"name": model}}, {("model", "name"): "command line"}), read_overrides(overrides)
    )
    section = given.values.get("data")
    dataset = section.get("dataset") if isinstance(section, dict) else None
    if not isinstance(dataset, str):
        raise ConfigError(
            f"train {model}: name a data set, e.g. data.dataset=cifar10, or data.dataset=folder data.root=FOLDER for images of "
            "your own"
        )
    recipe, name = find_recipe(dataset, given)
    source = merge_values(recipe, given) if attention is None else with_method(recipe, attention, given)
    config, notes = finish_config(source, f"{folder_name(dataset) or 'folder'}-{folder_name(model)}{suffix}")
    return config, (describe_recipe(name, dataset, config.train), *notes)


def find_recipe(dataset: str, given: Source) -> tuple[Source, str | None]:
    """Finds data and recipe for a data set among the configs ``<dataset>/base*.yaml``.

    Args:
        dataset: its name.
        given: values of the command line, which say whether the model starts from trained weights.

    Returns:
        The sections, and the name of their config; empty and None where there is no config for the data set.
    """
    known = [(read_with_bases(file), name) for file, name in recipes_of(dataset)]
    known = [(source, name) for source, name in known if source.values.get("data", {}).get("dataset") == dataset]
    fitting = [pair for pair in known if starts_trained(pair[0].values) == starts_trained(given.values)]
    for source, name in (fitting or known)[:1]:
        source.values = {section: source.values[section] for section in SECTIONS if section in source.values}
        return source, name
    return Source(), None


def describe_recipe(name: str | None, dataset: str, recipe: TrainConfig) -> str:
    """Returns the line for the log that names the recipe which a run without a config has.

    Args:
        name: of the recipe's config; None for the defaults.
        dataset: of the run.
        recipe: as the run has it.
    """
    whose = (
        f"data and train of {name}" if name else f"the defaults, since there is no config for data.dataset={dataset}"
    )
    return f"recipe: {whose}: {recipe.epochs} epochs, {recipe.opt}, lr {recipe.lr:g}; overrides change it"


def folder_name(text: str) -> str:
    """Returns a text as a part of a folder's name: 'tucker ranks=[8,16,16]' -> 'tucker-ranks-8-16-16'."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text).strip("-.")
