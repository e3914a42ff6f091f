"""Runs grouped into settings, and settings into sections: those of one host on one data set, which may be compared."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vit_tucker.report.collect import Results, dotted_leaves, is_below, setting_key, written_config
from vit_tucker.report.settings import DENSE, Setting
from vit_tucker.show.measures import Measure
from vit_tucker.show.methods import MethodDisplay, fill_in

DROP_RATES = ("model.drop_rate", "model.proj_drop_rate", "model.attn_drop_rate", "model.drop_path_rate")
START_KEYS = ("model.checkpoint", "model.pretrained")
RECIPE_KEYS = ("train", "data", *START_KEYS, *DROP_RATES)
DIFFERENCES_SHOWN = 3


@dataclass(frozen=True)
class Section:
    """Settings that may be compared: one host on one data set.

    Attributes:
        title: 'vit_tiny_patch16_224 on digits'.
        settings: in the order of tables.
        recipe: the keys of training, data and start that most settings share; others are shown by what differs.
    """

    title: str
    settings: tuple[Setting, ...]
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Returns the title as a file name."""
        return re.sub(r"[^a-z0-9]+", "_", self.title.lower()).strip("_")[:200]

    def differences(self, setting: Setting) -> dict[str, Any]:
        """Returns keys of the recipe in which a setting differs, with its values; None where it lacks them."""
        own = recipe_of(setting)
        return {key: own.get(key) for key in sorted({*own, *self.recipe}) if own.get(key) != self.recipe.get(key)}

    def describe_recipe(self, setting: Setting) -> str:
        """Returns '' for the recipe of most settings, else what differs, 'epochs=4'; 'start: epochs=30' for a start."""
        shown = {k: v for k, v in self.differences(setting).items() if not (setting.is_start and k in START_KEYS)}
        parts = [f"{key.removeprefix('train.')}={value}" for key, value in shown.items()]
        more = f" and {len(parts) - DIFFERENCES_SHOWN} more" if len(parts) > DIFFERENCES_SHOWN else ""
        return "start: " * setting.is_start + (
            ", ".join(parts[:DIFFERENCES_SHOWN]) + more or "the same" * setting.is_start
        )

    @property
    def replaced(self) -> list[Setting]:
        """Returns the settings whose attention is not the host's, of any recipe."""
        return [s for s in self.settings if s.method != DENSE]

    @cached_property
    def comparable(self) -> tuple[Setting, ...]:
        """Returns the settings with replaced attention and the common recipe: what fronts and figures are made of."""
        return tuple(s for s in self.replaced if not self.differences(s))

    @cached_property
    def dense(self) -> Setting | None:
        """Returns the dense reference: that of the common recipe, else another one, the start last."""
        dense = [s for s in self.settings if s.method == DENSE]
        return min(dense, key=lambda s: (s.is_start, len(self.differences(s))), default=None)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Returns what the settings' runs measured, see ``Setting.measures``."""
        return self.settings[0].measures

    @property
    def what(self) -> str:
        """Returns what a model is evaluated on: an image, or a window of tokens."""
        return "window" if self.measures[0].lowest else "image"

    @property
    def methods(self) -> list[str]:
        """Returns the methods of the comparable settings, in the order of tables."""
        return list(dict.fromkeys(s.method for s in self.comparable))

    @cached_property
    def displays(self) -> dict[str, MethodDisplay]:
        """Returns how each method is shown here, also in its colour."""
        return fill_in({setting.method: setting.display for setting in self.settings})

    @property
    def runs(self) -> list[Results]:
        """Returns the runs of all settings."""
        return [run for setting in self.settings for run in setting.runs]


def recipe_of(setting: Setting) -> dict[str, Any]:
    """Returns the keys of a setting's config for its training, data and start."""
    return {key: value for key, value in setting.config.items() if is_below(key, RECIPE_KEYS)}


def group_settings(results: Sequence[Results]) -> list[Setting]:
    """Returns the settings of distinct runs, in the order of their first runs."""
    groups: dict[tuple[str, str], list[Results]] = {}
    for entry in results:
        groups.setdefault(setting_key(entry), []).append(entry)
    checkpoints = {Path(path) for entry in results if (path := entry["config"]["model"].get("checkpoint"))}
    used = {str(folder) for path in checkpoints for folder in (path, *path.parents)}
    settings = []
    for runs in groups.values():
        runs.sort(key=lambda run: run["config"]["seed"])
        folders = {str(Path(folder)) for run in runs if (folder := run["config"].get("output_dir"))}
        is_start = runs[0]["config"]["attention"] is None and not used.isdisjoint(folders)
        settings.append(Setting(tuple(runs), written_config(runs[0]), is_start))
    return settings


def host_key(setting: Setting) -> tuple[str, str]:
    """Returns what is equal for settings that may be in one figure: the dense host and what it is evaluated on."""
    model = {k: v for k, v in setting.config.items() if k.startswith("model.") and not is_below(k, RECIPE_KEYS)}
    data = setting.runs[0]["data"]
    sizes = data.get("input_size") or data.get("block_size")
    evaluated = (setting.config["data.dataset"], sizes, data.get("num_eval"))
    return json.dumps(model, sort_keys=True), json.dumps(evaluated)


def sections(results: Sequence[Results]) -> list[Section]:
    """Returns sections of settings, one for each host and data set, from distinct runs in order."""
    groups: dict[tuple[str, str], list[Setting]] = {}
    for setting in group_settings(results):
        groups.setdefault(host_key(setting), []).append(setting)
    titles = section_titles(list(groups))
    return [Section(title, tuple(sorted(group, key=table_order)), common_recipe(group))
            for title, group in zip(titles, groups.values(), strict=True)]  # fmt: skip


def section_titles(hosts: Sequence[tuple[str, str]]) -> list[str]:
    """Returns 'vit_tiny_patch16_224 on digits'; what else differs is named where that is not enough."""
    parsed = [(json.loads(model), json.loads(data)) for model, data in hosts]
    titles = [f"{model['model.name']} on {data[0]}" for model, data in parsed]
    leaves = [dotted_leaves([model, *data]) for model, data in parsed]
    full = []
    for title, own in zip(titles, leaves, strict=True):
        rivals = [other for known, other in zip(titles, leaves, strict=True) if known == title]
        differing = [key for key in own if any(rival.get(key) != own[key] for rival in rivals)]
        parts = [f"{key.partition('.')[2].removeprefix('model.')}={own[key]}" for key in differing]
        full.append(f"{title} ({', '.join(parts)})" if len(rivals) > 1 else title)
    return full


def common_recipe(settings: Sequence[Setting]) -> dict[str, Any]:
    """Returns the recipe of most settings with replaced attention; of the dense ones if there are no others."""
    replaced = [s for s in settings if s.method != DENSE] or [s for s in settings if not s.is_start] or settings
    recipes = Counter(json.dumps(recipe_of(setting), sort_keys=True) for setting in replaced)
    return dict(json.loads(recipes.most_common(1)[0][0]))


def table_order(setting: Setting) -> tuple[Any, ...]:
    """Returns what settings are sorted by: dense first, then method, start and size."""
    return setting.display.place(setting.method), not setting.is_start, setting.init, setting.params, setting.name
