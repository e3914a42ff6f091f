"""Accuracy against one option of the config, among settings that agree in everything else."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from vit_tucker.errors import ConfigError, nearest
from vit_tucker.report.collect import is_below
from vit_tucker.report.sections import RECIPE_KEYS, Section, table_order
from vit_tucker.report.settings import Setting
from vit_tucker.show.tables import Table, spread

INIT = "init"
"""How the attention starts, as one option; it stands for the keys below."""
INIT_KEYS = ("attention.init", "attention.conversion", "attention.calibration")
RANKS = tuple(f"attention.ranks.{mode}" for mode in range(3))
USUAL = (INIT, *RANKS, f"{RANKS[1]},{RANKS[2]}", "attention.shared_kv", "attention.query_bias", "train.epochs")
"""Options that are looked at without being asked for."""
NAMES = {
    INIT: "start",
    RANKS[0]: "head rank",
    RANKS[1]: "query/output rank",
    RANKS[2]: "key/value rank",
    "attention.shared_kv": "one basis for keys and values",
    "attention.query_bias": "query bias kept",
    "train.epochs": "epochs",
}
"""Options as readers know them."""
MISSING = "null"


class Line(NamedTuple):
    """Settings that differ in the option alone.

    Attributes:
        label: what they have in common that other lines do not.
        values: of the option, in order.
        settings: one per value.
    """

    label: str
    values: list[str]
    settings: list[Setting]


def usual_options(section: Section) -> list[str]:
    """Returns the options of ``USUAL`` that vary while all else is equal; ranks that only vary together, together."""
    options = [option for option in USUAL if option_lines(section, option)]
    alone = {o for o in options if "," not in o}
    return [o for o in options if o in alone or not alone.intersection(o.split(","))]


def check_options(options: Sequence[str], parts: Sequence[Section]) -> None:
    """Raises ConfigError for an option that no setting of any section has."""
    known = {key for section in parts for s in section.replaced for key in s.config} | {INIT}
    for option in options:
        for key in option.split(","):
            if key not in known:
                raise ConfigError(f"--x {option}: no run's config has '{key}'{nearest(key, known)}")


def covers(key: str, option: str) -> bool:
    """Returns whether a key of the config belongs to an option: INIT, or keys joined by commas."""
    return is_below(key, INIT_KEYS if option == INIT else option.split(","))


def value_of(setting: Setting, option: str) -> tuple[Any, ...]:
    """Returns the option's value in a setting."""
    if option == INIT:
        return (setting.init,)
    return tuple(setting.config.get(key, MISSING) for key in option.split(","))


def by_value(settings: Sequence[Setting], option: str) -> dict[tuple[Any, ...], Setting]:
    """Returns settings by their value of an option; starts of one name have what differs between them in theirs."""
    found: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        found.setdefault(value_of(setting, option), []).append(setting)
    named = {}
    for value, same in found.items():
        keys = sorted({key for s in same for key in s.config if covers(key, option)})
        differing = [key for key in keys if len({json.dumps(s.config.get(key)) for s in same}) > 1]
        for setting in same:
            parts = [f"{key.rpartition('.')[2]}={setting.config.get(key, MISSING)}" for key in differing]
            named[(f"{value[0]} ({', '.join(parts)})",) if len(same) > 1 else value] = setting
    return named


def option_lines(section: Section, option: str) -> list[Line]:
    """Returns groups of at least two settings that differ in the option alone, by size of the option."""
    groups: dict[str, list[Setting]] = {}
    for setting in section.replaced:
        rest = {key: value for key, value in setting.config.items() if not covers(key, option)}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(setting)
    varied = [(json.loads(text), by_value(members, option)) for text, members in groups.items() if len(members) > 1]
    lines = []
    for own, members in varied:
        values = sorted(members, key=lambda value: [(isinstance(v, str), v) for v in value])
        label = line_label(own, [rest for rest, _ in varied], members[values[0]], option)
        names = [", ".join(map(str, value)) for value in values]
        lines.append(Line(label, names, [members[value] for value in values]))
    return sorted(lines, key=lambda line: (*table_order(line.settings[0])[:-1], natural(line.label)))


def natural(text: str) -> list[tuple[int, float, str]]:
    """Returns what texts are sorted by so that the numbers in them are in order: epochs=4 before epochs=16."""
    parts = re.split(r"(\d+)", text)
    return [(0, float(part), "") if part.isdecimal() else (1, 0.0, part) for part in parts if part]


def line_label(own: dict[str, Any], rests: Sequence[dict[str, Any]], setting: Setting, option: str) -> str:
    """Returns 'Tucker ranks=_,16,16, HOSVD': method, options with ``_`` for the one that varies, start, and what else differs.

    Args:
        own: what the line's settings have in common, by dotted key.
        rests: the same of all lines.
        setting: one of the line.
        option: the key that varies, or several joined by commas.
    """
    parts = []
    for part in [] if setting.options == "-" else setting.options.split():
        name, equals, value = part.partition("=")
        values = ["_" if covers(f"attention.{name}.{i}", option) else v for i, v in enumerate(value.split(","))]
        if not covers(f"attention.{name}", option):
            parts.append(f"{name}{equals}{','.join(values)}")
    words = [" ".join([setting.display.name, *parts])]
    if option != INIT:
        words.append(setting.init)
    recipe = sorted({key for rest in rests for key in rest if is_below(key, RECIPE_KEYS) and rest[key] != own.get(key)})
    return ", ".join([*words, *(f"{short_key(key)}={own.get(key, MISSING)}" for key in recipe)])


def short_key(key: str) -> str:
    """Returns a key as readers know it, 'ranks.0' for attention.ranks.0."""
    return key.removeprefix("attention.").removeprefix("train.")


def ablation_table(option: str, lines: Sequence[Line]) -> Table:
    """Returns a table with a row for each line, a column for each value; as CSV a row for each setting."""
    values = categories(lines)
    rows, raw = [], []
    for line in lines:
        cells = dict(zip(line.values, line.settings, strict=True))
        rows.append([line.label, *(spread(s.score, s.score_std) if (s := cells.get(v)) else "" for v in values)])
        raw += [[line.label, value, s.name, s.params, s.score, s.score_std, len(s.seeds)] for value, s in cells.items()]
    measure = lines[0].settings[0].measures[0]
    name = measure.name
    raw_header = ["settings", "value", "config", "attention_params", f"{name}_mean", f"{name}_std", "seeds"]
    note = (
        f"{measure.heading}, mean ± sample standard deviation over seeds, by {name_of(option)}; the settings of a row agree in "
        "all else."
    )
    return Table([name_of(option), *values], rows, 1, raw_header, raw, [note], stem=stem_of(option))


def categories(lines: Sequence[Line]) -> list[str]:
    """Returns all values of the lines: numbers in order, words as they come."""
    values = list(dict.fromkeys(value for line in lines for value in line.values))
    return values if any(as_number(value) is None for value in values) else sorted(values, key=float)


def as_number(text: str) -> float | None:
    """Returns the number that a text is, None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def name_of(option: str) -> str:
    """Returns 'head rank' for attention.ranks.0; other keys as they are."""
    return ", ".join(NAMES.get(key, key) for key in option.split(","))


def stem_of(option: str) -> str:
    """Returns the name of an option's files, 'by_ranks_0' for attention.ranks.0."""
    return re.sub(r"[^\w=-]", "_", "by_" + "_and_".join(short_key(key) for key in option.split(",")))[:200]
