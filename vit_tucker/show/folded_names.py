"""Names of modules that differ in a number alone, written as one: 'blocks.0-11.attn'."""

import re
from collections.abc import Iterable, Sequence


def fold_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names that differ in one of their numbers.

    Args:
        names: full names of modules, distinct.

    Returns:
        The names in each group by what the group is called, in the order of their first members: ``{'blocks.0-2,5.attn':
        ['blocks.0.attn', ...], 'neck.attn': ['neck.attn']}``.
    """
    groups = {tuple(re.split(r"(\d+)", name)): [name] for name in names}
    for place in range(max(map(len, groups), default=1) - 2, 0, -2):  # the numbers, the last one first
        groups = _folded(groups, place)
    return {"".join(parts): members for parts, members in groups.items()}


def _folded(groups: dict[tuple[str, ...], list[str]], place: int) -> dict[tuple[str, ...], list[str]]:
    """Joins groups that differ at one place alone."""
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for parts in groups:
        key = parts if len(parts) <= place else (*parts[:place], "", *parts[place + 1 :])
        alike.setdefault(key, []).append(parts)
    folded = {}
    for several in alike.values():
        label = several[0]
        if len(several) > 1:
            label = (*label[:place], ranges([int(parts[place]) for parts in several]), *label[place + 1 :])
        folded[label] = [name for parts in several for name in groups[parts]]
    return folded


def ranges(numbers: Sequence[int]) -> str:
    """Writes whole numbers as ranges, '0-3,5'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
