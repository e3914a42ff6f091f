"""Starts of one method compared in pairs: settings that differ in how the attention starts alone, seed by seed."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vit_tucker.report.ablations import INIT, option_lines
from vit_tucker.report.curves import curve_of
from vit_tucker.report.sections import Section
from vit_tucker.report.settings import Setting
from vit_tucker.report.stats import CONFIDENCE, Floats, pooled_std
from vit_tucker.show.tables import Table

AHEAD, BEHIND, UNCLEAR = "ahead", "behind", "no difference shown"
Pair = tuple[Setting, Setting]
NOTES = (
    "Settings of a pair agree in all but the start, and their runs of a seed begin with the same dense model. *ahead*, *behind*, "
    "*equal*: settings whose mean top-1 over seeds, after the last epoch, is above, below or the same as with the other start; "
    "*beyond noise*: those where the two means differ by more than one sample standard deviation, pooled over the runs of both.",
    f"Differences: top-1 points, mean over settings and seeds, with their {CONFIDENCE:.0%} interval: Student's t over "
    "the seeds' means; none where a setting has one seed. An interval that includes 0 shows no difference. "
    "Differences after the first epoch are those of settings that were trained for more than one. *first loss*: the mean "
    "training loss of the first epoch, the lower the better.",
)


class Difference(NamedTuple):
    """A mean difference: of top-1 accuracy in percentage points, or of a loss.

    Attributes:
        mean: over settings and seeds.
        interval: its ends, by Student's t over seeds; None for one seed.
        digits: that are written.
    """

    mean: float
    interval: tuple[float, float] | None
    digits: int = 2

    def __str__(self) -> str:
        mean, *ends = (f"{value:+.{self.digits}f}" for value in (self.mean, *(self.interval or ())))
        return f"{mean} [{', '.join(ends)}]" if ends else mean

    @property
    def verdict(self) -> str:
        """Returns 'ahead' or 'behind' where the whole interval is above or below 0, else 'no difference shown'."""
        low, high = self.interval or (0.0, 0.0)
        return AHEAD if low > 0 else BEHIND if high < 0 else UNCLEAR


class StartComparison(NamedTuple):
    """One start of a method against its plain conversion.

    Attributes:
        method: as tables name it.
        start, reference: as tables name them.
        ahead, behind, equal: numbers of settings.
        beyond: number of settings whose difference is larger than the seeds' noise; None where a setting has one seed.
        loss: difference of the first epoch's training loss; None where no curves are there.
        first, last: differences after the first and the last epoch; the first is None where no setting was evaluated at both.
    """

    method: str
    start: str
    reference: str
    ahead: int
    behind: int
    equal: int
    beyond: int | None
    loss: Difference | None
    first: Difference | None
    last: Difference

    @property
    def settings(self) -> int:
        """Returns the number of pairs."""
        return self.ahead + self.behind + self.equal


def compare_starts(section: Section) -> list[StartComparison]:
    """Returns comparisons of each start with its method's plain conversion, or with the first start where that was not run."""
    groups: dict[tuple[str, str, str], list[Pair]] = {}
    for line in option_lines(section, INIT):
        method, settings = line.settings[0].method, dict(zip(line.values, line.settings, strict=True))
        plain = line.settings[0].display.start(None, calibrated=False)
        reference = plain if plain in settings else line.values[0]
        for start, setting in settings.items():
            if start != reference:
                key = (section.displays[method].name, start, reference)
                groups.setdefault(key, []).append((setting, settings[reference]))
    compared = [compare_pairs(*key, pairs) for key, pairs in groups.items()]
    return [one for one in compared if one is not None]


def compare_pairs(method: str, start: str, reference: str, pairs: Sequence[Pair]) -> StartComparison | None:
    """Returns the comparison of some pairs of settings, each the start and the reference; None where no seed has both.

    Args:
        method, start, reference: as tables name them.
        pairs: settings of the start, each with that of the reference.
    """
    last = differences(pairs, last_scores)
    if not len(last):
        return None
    means: Floats = np.nanmean(last, axis=1).round(9)  # sums of equal numbers in another order are equal
    ahead, behind = int((means > 0).sum()), int((means < 0).sum())
    repeated = all(len(setting.runs) > 1 for pair in pairs for setting in pair)
    beyond = sum(abs(a.score - b.score) > pooled_std(a.scores, b.scores) for a, b in pairs) if repeated else None
    trained_on = [pair for pair in pairs if all(setting.epochs > 1 for setting in pair)]
    first, loss = differences(trained_on, first_top1), differences(pairs, first_loss)
    return StartComparison(
        method, start, reference, ahead, behind, len(means) - ahead - behind, beyond,
        mean_difference(loss, 3) if len(loss) else None, mean_difference(first) if len(first) else None, mean_difference(last),
    )  # fmt: skip


def last_scores(setting: Setting) -> dict[int, float]:
    """Returns top-1 after the last epoch, by seed."""
    return dict(zip(setting.seeds, map(float, setting.scores), strict=True))


def first_top1(setting: Setting) -> dict[int, float]:
    """Returns top-1 after the first epoch, by seed; nothing where the first evaluation was a later one."""
    return first_values(setting, "eval_top1")


def first_loss(setting: Setting) -> dict[int, float]:
    """Returns the mean training loss of the first epoch, by seed; nothing where it is not known."""
    return first_values(setting, "train_loss")


def first_values(setting: Setting, key: str) -> dict[int, float]:
    """Returns the values of one key of ``curve`` at the first epoch, by seed."""
    curve = curve_of(setting, key)
    if curve is None or curve[0][0] != 1:
        return {}
    return dict(zip(setting.seeds, map(float, curve[1][:, 0]), strict=True))


def differences(pairs: Sequence[Pair], scores: Callable[[Setting], dict[int, float]]) -> Floats:
    """Returns differences of pairs in points, (pairs, seeds), NaN for seeds that one lacks; without pairs that share no seed."""
    found = [(scores(one), scores(other)) for one, other in pairs]
    seeds = sorted({seed for one, other in found for seed in one.keys() & other.keys()})
    rows = [[one[s] - other[s] if s in one and s in other else np.nan for s in seeds] for one, other in found]
    table = np.array(rows, dtype=float).reshape(len(rows), len(seeds))
    return table[~np.isnan(table).all(axis=1)]


def mean_difference(table: Floats, digits: int = 2) -> Difference:
    """Returns the mean over settings of the means over seeds, and its interval: Student's t over seeds.

    Args:
        table: (settings, seeds), NaN where a setting lacks a seed.
        digits: that are written.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # comes with scikit-learn

    of_settings = np.nanmean(table, axis=1)
    mean = float(of_settings.mean())
    if (np.isfinite(table).sum(axis=1) < 2).any():
        return Difference(mean, None, digits)
    of_seeds = np.nanmean(table - of_settings[:, None], axis=0)  # about 0; a seed's part of the noise
    error = float(of_seeds.std(ddof=1)) / np.sqrt(len(of_seeds))
    half = float(stdtrit(len(of_seeds) - 1, (1 + CONFIDENCE) / 2)) * error
    return Difference(mean, (mean - half, mean + half), digits)


def starts_table(comparisons: Sequence[StartComparison]) -> Table:
    """Returns a table with a row for each start against the plain conversion of its method."""
    header = ["method", "start", "against", "settings", "ahead", "behind", "equal", "beyond noise", "first loss",
              "after the first epoch", "after the last epoch"]  # fmt: skip
    rows = [
        [c.method, c.start, c.reference, *map(str, (c.settings, c.ahead, c.behind, c.equal)),
         "-" if c.beyond is None else str(c.beyond), str(c.loss or "-"), str(c.first or "-"), str(c.last)]
        for c in comparisons
    ]  # fmt: skip
    raw_header = ["method", "start", "against", "settings", "ahead", "behind", "equal", "beyond_noise"]
    raw_header += [f"{when}_{what}" for when in ("first_loss", "first", "last") for what in ("mean", "low", "high")]
    raw = [
        [c.method, c.start, c.reference, c.settings, c.ahead, c.behind, c.equal, c.beyond,
         *(number for difference in (c.loss, c.first, c.last) for number in numbers(difference))]
        for c in comparisons
    ]  # fmt: skip
    return Table(header, rows, 3, raw_header, raw, NOTES, stem="starts")


def numbers(difference: Difference | None) -> tuple[float | None, ...]:
    """Returns the mean and the ends of its interval, for the CSV file."""
    if difference is None:
        return (None,) * 3
    return (difference.mean, *(difference.interval or (None, None)))


def start_sentences(comparisons: Sequence[StartComparison]) -> list[str]:
    """Returns a sentence on each comparison: what the start is worth after the last epoch, and after the first."""
    return [start_sentence(comparison) for comparison in comparisons]


def start_sentence(c: StartComparison) -> str:
    """Returns the sentence on one comparison."""
    noise = "" if c.beyond is None else f", {c.beyond} of them by more than the seeds' noise"
    text = (
        f"**{c.method}, {c.start} against {c.reference}: {c.last.verdict}** after fine-tuning: ahead in {c.ahead}, behind in "
        f"{c.behind}, equal in {c.equal} of {c.settings} settings{noise}; {c.last} points."
    )
    if c.loss is not None:
        text += f" Training loss of the first epoch: {c.loss}."
    if c.first is not None:
        text += f" After the first epoch: {c.first.verdict}, {c.first} points."
    if c.last.verdict == AHEAD:
        return text
    gains = ["a lower loss at first"] * (c.loss is not None and c.loss.verdict == BEHIND)
    gains += ["a higher accuracy after the first epoch"] * (c.first is not None and c.first.verdict == AHEAD)
    return f"{text} It gives {' and '.join(gains)}; a higher final accuracy is not shown." if gains else text


def total_sentences(comparisons: Sequence[StartComparison]) -> list[str]:
    """Returns a sentence on each start that several studies compare: in how many of all settings it is ahead."""
    groups: dict[tuple[str, str, str], list[StartComparison]] = {}
    for one in comparisons:
        groups.setdefault((one.method, one.start, one.reference), []).append(one)
    sentences = []
    for (method, start, reference), ones in groups.items():
        if len(ones) > 1:
            settings, ahead, behind, equal = (
                sum(getattr(one, name) for one in ones) for name in ("settings", "ahead", "behind", "equal")
            )
            known = [one.beyond for one in ones if one.beyond is not None]
            noise = f", {sum(known)} of them by more than the seeds' noise" if len(known) == len(ones) else ""
            sentences.append(
                f"**{method}, {start} against {reference}**, in {len(ones)} studies: ahead in {ahead}, behind in {behind}, equal "
                f"in {equal} of {settings} settings after fine-tuning{noise}."
            )
    return sentences
