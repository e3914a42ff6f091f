"""Computes the attention parameters that other methods need for the accuracy of Tucker Attention, with its uncertainty."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vit_tucker.report.sections import Section
from vit_tucker.report.settings import DENSE, Setting
from vit_tucker.report.stats import (
    Bounds,
    Floats,
    Front,
    Interval,
    interval,
    pareto_front,
    pooled_std,
    resampled_means,
)

OURS = "tucker"
REFERENCES = (OURS, DENSE, "mha")
UNKNOWN = Bounds(0.0, math.inf)


class Factor(NamedTuple):
    """A ratio of attention parameters.

    Attributes:
        value: as measured, or what is known of it.
        interval: 95%, by bootstrap over seeds; None where a setting has one seed.
    """

    value: Bounds
    interval: Interval | None

    def __str__(self) -> str:
        if self.value == UNKNOWN:
            return "not known"
        return f"{self.value}x{'' if self.interval is None else f' {self.interval}'}"

    def against(self, threshold: float = 1.0) -> str:
        """Returns 'more' or 'fewer' for a factor above or below a threshold; 'unclear' where its interval does not decide."""
        if self.interval is None:
            return "unclear"
        if self.interval.lower.low > threshold:
            return "more"
        return "fewer" if self.interval.upper.high < threshold else "unclear"


class Match(NamedTuple):
    """One Tucker setting against the other methods.

    Attributes:
        setting: the Tucker setting.
        on_front: no other Tucker setting is both smaller and better.
        factors: by method, its attention parameters at the setting's mean accuracy over the setting's.
        dense: the dense host's attention parameters over the setting's if dense reaches the accuracy, else None.
    """

    setting: Setting
    on_front: bool
    factors: dict[str, Factor]
    dense: float | None


class Headline(NamedTuple):
    """All Tucker settings of the Pareto front against one method.

    Attributes:
        method, name: the other one, and as tables name it.
        largest, median: of the factors at each setting's accuracy, where the other method has no smaller setting that exceeds it.
        at_dense: smallest settings within the seeds' noise of dense: the other's parameters over Tucker's; None if neither has
            any.
        ours, theirs: these settings; None if there is none.
        why_not: why there is no such factor; '' if there is.
    """

    method: str
    name: str
    largest: Factor
    median: Factor
    at_dense: Factor | None
    ours: Setting | None
    theirs: Setting | None
    why_not: str


class MethodComparison:
    """The settings of a section, their means, and the same resampled over seeds.

    The runs of a seed share their dense start, so each resample draws the same seeds for all settings.
    """

    def __init__(self, section: Section) -> None:
        self.section = section
        self.dense = section.dense
        self.settings = [*section.comparable, *([] if self.dense is None else [self.dense])]
        self.params = np.array([s.params for s in self.settings])
        self.means = np.array([s.score for s in self.settings])
        self.boot = resampled_means(top1_scores(self.settings)) if self.settings else np.zeros((0, 0))
        self.ours = self._members(OURS)
        self.rivals = [method for method in section.methods if method not in REFERENCES]

    def _members(self, method: str) -> list[int]:
        return [i for i, s in enumerate(self.settings) if s.method == method]

    @cached_property
    def front(self) -> list[int]:
        """Returns where in ``ours`` the settings of Tucker's Pareto front are."""
        return pareto_front(self.params[self.ours], self.means[self.ours])

    @cached_property
    def factors(self) -> dict[str, tuple[list[Bounds], list[list[Bounds]] | None]]:
        """Returns, by method, its parameters at each Tucker setting's accuracy over the setting's, measured and resampled."""
        return {method: self._factors(method) for method in self.rivals}

    def _factors(self, method: str) -> tuple[list[Bounds], list[list[Bounds]] | None]:
        theirs = self._members(method)

        def at(means: Floats) -> list[Bounds]:
            if np.isnan(means[[*theirs, *self.ours]]).any():
                return [UNKNOWN] * len(self.ours)
            front = Front(self.params[theirs], means[theirs])
            return [front.cost_to_reach(means[i]).over(self.params[i]) for i in self.ours]

        repeated = all(len(self.settings[i].runs) > 1 for i in (*theirs, *self.ours))
        return at(self.means), [at(means) for means in self.boot] if repeated else None

    def at_dense(self, method: str) -> tuple[Factor | None, Setting | None, Setting | None, str]:
        """Returns the factor between the smallest settings as good as dense, both settings, and why there is no factor."""
        if self.dense is None:
            return None, None, None, "there is no dense run"
        if any(len(setting.runs) < 2 for setting in self.settings):
            return None, None, None, "some settings have one seed, whose noise is not known"
        theirs = self._members(method)
        noise = np.array([pooled_std(self.dense.scores, s.scores) for s in self.settings])

        def at(means: Floats) -> tuple[Bounds, int | None, int | None]:
            within = means >= means[-1] - noise
            our, their = (
                min((i for i in members if within[i]), key=lambda i: self.params[i], default=None)
                for members in (self.ours, theirs)
            )
            if our is None:
                below = math.inf if their is None else self.params[their] / self.params[self.ours].max()
                return Bounds(0.0, below), None, their
            cost = Bounds(self.params[theirs].max(), math.inf) if their is None else Bounds(*[self.params[their]] * 2)
            return cost.over(self.params[our]), our, their

        value, our, their = at(self.means)
        if our is None and their is None:
            return None, None, None, "no setting of either is within the seeds' noise of dense"
        factor = Factor(value, interval([at(means)[0] for means in self.boot]))
        ours, other = (None if i is None else self.settings[i] for i in (our, their))
        return factor, ours, other, ""

    @cached_property
    def matches(self) -> list[Match]:
        """Returns each Tucker setting against the other methods, from small to large."""
        matches = []
        for place, index in enumerate(self.ours):
            setting = self.settings[index]
            factors = {
                method: Factor(values[place], None if boot is None else interval([b[place] for b in boot]))
                for method, (values, boot) in self.factors.items()
            }
            reached = self.dense is not None and self.dense.score >= setting.score
            matches.append(Match(setting, place in self.front, factors, 1 / setting.share if reached else None))
        return sorted(matches, key=lambda match: match.setting.params)

    @cached_property
    def headlines(self) -> list[Headline]:
        """Returns a headline for each other method."""
        lines = []
        for method, (values, boot) in self.factors.items():
            chosen = [values[place] for place in self.front]
            resampled = None if boot is None else [[sample[place] for place in self.front] for sample in boot]
            largest, median = (
                Factor(of(chosen), None if resampled is None else interval([of(sample) for sample in resampled]))
                for of in (largest_of, median_of)
            )
            name = self.section.displays[method].name
            lines.append(Headline(method, name, largest, median, *self.at_dense(method)))
        return lines


def top1_scores(settings: Sequence[Setting]) -> Floats:
    """Returns top-1 accuracies, (settings, seeds), NaN where a setting lacks a seed."""
    seeds = sorted({seed for setting in settings for seed in setting.seeds})
    table = np.full((len(settings), len(seeds)), np.nan)
    for row, setting in zip(table, settings, strict=True):
        row[[seeds.index(seed) for seed in setting.seeds]] = setting.scores
    return table


def largest_of(values: Sequence[Bounds]) -> Bounds:
    """Returns what is known of the largest of some numbers, those of which only an upper bound is known left out."""
    measured = [value for value in values if value.low > 0]
    return Bounds(max(b.low for b in measured), max(b.high for b in measured)) if measured else UNKNOWN


def median_of(values: Sequence[Bounds]) -> Bounds:
    """Returns what is known of the median of some numbers, those left out as above; of an even number of them the lower one."""
    measured = [value for value in values if value.low > 0]
    middle = (len(measured) - 1) // 2
    lows, highs = (sorted(value[end] for value in measured) for end in (0, 1))
    return Bounds(lows[middle], highs[middle]) if measured else UNKNOWN


def compare_methods(section: Section) -> MethodComparison | None:
    """Returns the comparison of a section by accuracy; None where there is no Tucker setting or nothing to compare it with."""
    if section.measures[0].lowest:
        return None
    comparison = MethodComparison(section)
    return comparison if comparison.ours and comparison.rivals else None
