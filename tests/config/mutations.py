"""Broken configs: what can go wrong with the values, the structure and the text of a shipped one, drawn at random."""

import random
from collections.abc import Callable
from typing import Any

import yaml

HOSTILE = {
    "alias bomb": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "recursive list": "train: &a {opt_betas: [*a]}\n",
    "recursive mapping": "train: &a\n  lr: *a\n",
    "recursive key": "? &a [*a]\n: 1\n",
    "deep list": "data: {mean: " + "[" * 3000 + "]" * 3000 + "}\n",
    "deep mapping": "data: {dataset_kwargs: " + "{a: " * 3000 + "1" + "}" * 3000 + "}\n",
    "deep blocks": "".join(f"{' ' * i}a:\n" for i in range(400)),
    "python tag": "train: !!python/object/apply:os.getcwd []\n",
    "own tag": "train: !foo {lr: 1}\n",
    "unknown tag of a scalar": "train: {lr: !foo 1}\n",
    "list key": "? [a, b]\n: 1\n",
    "mapping key": "{? {a: 1} : 2}\n",
    "long key": "x" * 5000 + ": 1\n",
    "long value": "train: {opt: " + "x" * 100_000 + "}\n",
    "long base": "base: " + "x" * 5000 + ".yaml\n",
    "long root": "data: {dataset: '', root: " + "x" * 5000 + "}\n",
    "long checkpoint": "model: {name: vit_tiny_patch16_224, checkpoint: " + "x" * 5000 + "}\n",
    "long plugin": "plugins: [" + "x" * 5000 + ".py]\n",
    "NUL": "seed: 1\nname: a\0b\n",
    "escaped NUL": 'model: {name: "vit\\0"}\n',
    "escaped surrogate": 'model: {name: "vit\\uD800"}\n',
    "two documents": "seed: 1\n---\nseed: 2\n",
    "merge key": "x: &x {lr: 1}\ntrain: {<<: *x}\n",
    "timestamp": "name: 2020-01-01\nseed: 2020-01-01\n",
    "explicit timestamp": "name: !!timestamp 2020-01-01\n",
    "huge integer": "seed: " + "9" * 5000 + "\n",
    "huge hexadecimal integer": "seed: 0x" + "f" * 5000 + "\n",
    "huge float": "train: {lr: 1e400}\n",
    "binary": "name: !!binary aGVsbG8=\n",
    "set": "train: !!set {a, b}\n",
    "ordered map": "train: !!omap [a: 1]\n",
    "integer of words": "seed: !!int five\n",
    "tagged float": "train: {lr: !!float fast}\n",
    "equals sign": "name: =\n",
    "anchor of nothing": "name: *nobody\n",
    "old version": "%YAML 3.0\n---\nseed: 1\n",
    "only a scalar": "hello\n",
    "only a list": "- 1\n",
    "tab": "train:\n\tlr: 1\n",
}
"""Files that are hostile or exotic as they stand."""
SCALARS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1000003),
    *(0.0, -0.5, 0.5, 1.5, 1e-9, 1e9, 1e300, -1e300, 5e-324, float("nan"), float("inf"), float("-inf")),
    *(True, False, None, "", " ", "a", "yes", "null", "010", "1e-3", "é", "..", "/", "a\nb", "a/b", "x" * 300, "re:[", "0-99"),
    *([], {}, [[]], [1], [0.5, 0.5], [1, 2, 3], [0, 0, 0], [None], {"a": 1}, {"a": {"b": []}}, [{"layers": 0}], {"budget": 0.5}),
)  # fmt: skip
WORDS = ("2020-01-01", "10:30", "010", "0o17", "0x1F", "1_000", "1e400", "+.inf", "!foo x", "&a b", "*a", "{", "]", "- x", "? x",
         "|", ">-", "%", "@", "`", "\0", "\t", "\ufeff", "\x85", "'", '"', "<<: {a: 1}", "---", "...", "#", ": ")  # fmt: skip


def places(values: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys and entries."""
    children = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path for key, child in children for path in ((*at, key), *places(child, (*at, key)))]


def holder(values: Any, path: tuple[Any, ...]) -> Any:
    """The mapping or list that holds a place."""
    for key in path[:-1]:
        values = values[key]
    return values


def set_scalar(values: Any, path: tuple[Any, ...], rng: random.Random) -> None:
    """Another value, of any type."""
    holder(values, path)[path[-1]] = rng.choice(SCALARS)


def retype_nothing(values: Any, path: tuple[Any, ...], rng: random.Random) -> None:
    """Another value of the same type: what the schema lets pass, and what comes after it must bear."""
    parent, key = holder(values, path), path[-1]
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, int):
        parent[key] = rng.choice([0, 1, 2, 3, 5, 8, 17, 64, 100])
    elif isinstance(value, float):
        parent[key] = rng.choice([0.0, 1e-12, 0.1, 0.5, 0.999, 1.0, 3.5, 50.0])
    elif isinstance(value, list):
        rng.shuffle(value)
    else:
        set_scalar(values, path, rng)


def scale_number(values: Any, path: tuple[Any, ...], rng: random.Random) -> None:
    """A number that is too large or too small, or another type of it."""
    parent, key = holder(values, path), path[-1]
    if isinstance(parent[key], int | float):
        change: Callable[[Any], Any] = rng.choice(
            [lambda x: -x, lambda x: x * 1000, lambda x: x / 7, str, lambda x: [x], lambda x: x + 1]
        )
        parent[key] = change(parent[key])
    else:
        set_scalar(values, path, rng)


def delete(values: Any, path: tuple[Any, ...], rng: random.Random) -> None:
    """Leave it out."""
    del holder(values, path)[path[-1]]


def rename(values: Any, path: tuple[Any, ...], rng: random.Random) -> None:
    """A key with one letter too many, too few or exchanged."""
    parent, key = holder(values, path), path[-1]
    if isinstance(parent, dict):
        word = str(key)
        cut = rng.randrange(len(word) + 1)
        parent[rng.choice([word[:cut] + word[cut + 1 :], word[:cut] + "x" + word[cut:], word.upper(), word * 2])] = (
            parent.pop(key)
        )


def misspell(values: Any, path: tuple[Any, ...], rng: random.Random) -> None:
    """A word with one letter too few."""
    parent, key = holder(values, path), path[-1]
    if isinstance(parent[key], str) and parent[key]:
        cut = rng.randrange(len(parent[key]))
        parent[key] = parent[key][:cut] + parent[key][cut + 1 :]
    else:
        set_scalar(values, path, rng)


def nest(values: Any, path: tuple[Any, ...], rng: random.Random) -> None:
    """One level deeper."""
    parent, key = holder(values, path), path[-1]
    parent[key] = rng.choice([[parent[key]], {str(key): parent[key]}, [parent[key], parent[key]]])


def move(values: Any, path: tuple[Any, ...], rng: random.Random) -> None:
    """To the top of the file."""
    parent = holder(values, path)
    values[str(path[-1])] = parent.pop(path[-1])


CHANGES = (set_scalar, retype_nothing, scale_number, delete, rename, misspell, nest, move)


def change_values(values: dict[str, Any], rng: random.Random, most: int = 3) -> None:
    """One or a few changes of a config's values, in place."""
    for _ in range(rng.randint(1, most)):
        found = places(values)
        if found:
            rng.choice(CHANGES)(values, rng.choice(found), rng)


def change_text(text: str, rng: random.Random) -> str:
    """One change of the file's text."""
    at = rng.randrange(len(text) + 1)
    lines = text.split("\n")
    line = rng.randrange(len(lines))
    kind = rng.randrange(8)
    if kind == 0:
        return text[:at] + rng.choice(WORDS) + text[at:]
    if kind == 1:
        return text[:at]
    if kind == 2:
        return text[:at] + text[at + rng.randint(1, 8) :]
    if kind == 3:
        lines.insert(line, lines[rng.randrange(len(lines))])
    elif kind == 4:
        lines[line] = rng.choice([" ", "\t", "  ", "- "]) + lines[line]
    elif kind == 5:
        lines[line] = lines[line].lstrip()
    elif kind == 6:
        lines.insert(line, rng.choice(list(HOSTILE.values())))
    else:
        key, colon, _ = lines[line].partition(": ")
        lines[line] = f"{key}{colon}{rng.choice(WORDS)}"
    return "\n".join(lines)


def mutated(values: dict[str, Any], rng: random.Random) -> str:
    """The text of a config that has been changed.

    Args:
        values: of a config, its bases merged; changed in place.
        rng: what draws.
    """
    if rng.random() < 0.7:
        change_values(values, rng)
    text = yaml.safe_dump(
        values, sort_keys=False, default_flow_style=rng.choice([False, None, True]), allow_unicode=True
    )
    return change_text(text, rng) if rng.random() < 0.4 else text
