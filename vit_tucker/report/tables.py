"""The tables of a section: its settings, and the attention parameters that other methods need for Tucker's accuracy."""

from collections.abc import Sequence

import numpy as np

from vit_tucker.report.matched import Factor, Headline, MethodComparison
from vit_tucker.report.sections import Section
from vit_tucker.report.settings import DENSE, Setting
from vit_tucker.report.stats import BOOTSTRAP_SEED, CONFIDENCE, RESAMPLES, mean, sample_std
from vit_tucker.show.tables import Table, count, decimal, short_count, spread

BOUNDS_NOTE = (
    "`>x`: the other method stays below this accuracy, x is its largest setting. `<x`: its smallest setting already exceeds it, "
    "and what a smaller one would do is not known."
)
BOOTSTRAP_NOTE = (
    f"`[a, b]`: {CONFIDENCE:.0%} interval by bootstrap over seeds ({RESAMPLES:,} resamples, generator seed {BOOTSTRAP_SEED}); "
    "none where a setting has one seed. Each resample draws the same seeds for all settings, since the runs of a seed share "
    "their dense start. With few seeds such intervals are rather too narrow."
)

DENSE_NOTE = (
    "within the seeds' noise, which is a mean top-1 not below that of dense less one sample standard deviation (pooled over the "
    "setting's and the dense runs). The factor is the smallest such setting of the other method over the smallest such Tucker "
    "setting; `>x` if the other method has none, `<x` if Tucker has none, `?` in resamples where neither has."
)


def seed_list(seeds: Sequence[int]) -> str:
    """Returns '5 (0-4)', '3 (0, 2, 7)': how many and which."""
    together = len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1
    which = f"{seeds[0]}-{seeds[-1]}" if together else ", ".join(map(str, seeds))
    return f"{len(seeds)} ({which})"


def settings_table(section: Section) -> Table:
    """Returns a table with a row for each setting: what it is, what it costs, how well it does."""
    recipes = [section.describe_recipe(setting) for setting in section.settings]
    commits = dict.fromkeys(setting.commits for setting in section.settings)
    header = ["config", "method", "options", "init"]
    header += ["other recipe"] * any(recipes)
    text_columns = len(header)
    first, second = (measure.heading for measure in section.measures)
    best = f"best epoch{' ' * bool(section.measures[0].unit)}{section.measures[0].unit}"
    header += ["attention params", "of dense", first, best, second, "FLOPs", "latency", "seeds"]
    header += ["commit"] * (len(commits) > 1)
    rows, raw = [], []
    for setting, recipe in zip(section.settings, recipes, strict=True):
        rows.append([
            setting.name, setting.display.name, setting.options, setting.init,
            *([recipe or "-"] if any(recipes) else []),
            count(setting.params), f"{setting.share:.1%}", spread(setting.score, setting.score_std),
            decimal(setting.best_score), second_text(setting),
            "-" if setting.flops is None else short_count(setting.flops), describe_latency(setting),
            seed_list(setting.seeds),
            *([setting.commits] if len(commits) > 1 else []),
        ])  # fmt: skip
        raw.append(raw_setting(setting, recipe))
    notes = [
        f"{' and '.join(measure.label for measure in section.measures)}: after the last epoch, mean ± sample standard deviation "
        f"over seeds. The best epoch is chosen on the evaluation {section.what}s themselves and only shown beside.",
        f"FLOPs: of one forward pass of the whole model per {section.what}, 2 per multiply-add. Latency: ratio to the dense host"
        f"{latency_conditions(section)}.",
    ]
    if len(commits) == 1:
        notes.append(f"commit {next(iter(commits))}")
    if any(runs_with_choices(setting) for setting in section.settings):
        notes.append("Ranks chosen by a rule may differ from seed to seed; their parameters are the mean.")
    raw_rows = [list(line.values()) for line in raw]
    hidden = ("config", best, "commit")
    return Table(header, rows, text_columns, list(raw[0]), raw_rows, notes, stem="settings", not_in_latex=hidden)


def second_text(setting: Setting) -> str:
    """Returns the second measure, '98.20 ± 0.11'; '-' where it is not known."""
    known = not np.isnan(setting.second_scores).any()
    return spread(mean(setting.second_scores), sample_std(setting.second_scores)) if known else "-"


def raw_setting(setting: Setting, recipe: str) -> dict[str, object]:
    """Returns a line of the CSV file."""
    low, high = setting.latency_range
    of_seeds = " ".join(f"{value:.6g}" for value in setting.scores)
    first, second = (measure.name for measure in setting.measures)
    return {
        "config": setting.name, "method": setting.method, "options": setting.options, "init": setting.init,
        "other_recipe": recipe, "attention_params": setting.params, "share_of_dense": setting.share,
        f"{first}_mean": setting.score, f"{first}_std": setting.score_std, f"best_epoch_{first}_mean": setting.best_score,
        f"{second}_mean": mean(setting.second_scores), f"{second}_std": sample_std(setting.second_scores),
        "flops": setting.flops,
        "latency_ratio": setting.latency, "latency_ratio_low": low, "latency_ratio_high": high,
        "seeds": " ".join(map(str, setting.seeds)), f"{first}_of_seeds": of_seeds, "epochs": setting.epochs,
        "commits": setting.commits,
    }  # fmt: skip


def runs_with_choices(setting: Setting) -> bool:
    """Returns whether a rank rule chose ranks."""
    attention = setting.runs[0]["config"]["attention"]
    return attention is not None and any(rule.get("chosen_by") for rule in attention.get("rules") or [])


def describe_latency(setting: Setting) -> str:
    """Returns '0.35 (0.33-0.40)'; '-' where it was not measured."""
    low, high = setting.latency_range
    return "-" if low is None or high is None else f"{decimal(setting.latency)} ({low:.2f}-{high:.2f})"


def latency_conditions(section: Section) -> str:
    """Returns ' (cpu, 1 thread(s), ...)': how latency was measured; '' where it was not."""
    measured = (run["cost"]["latency"] for run in section.runs if run.get("cost") and run["cost"].get("latency"))
    conditions = dict.fromkeys(
        f"{m['device']}, {m['threads']} thread(s), batch {m['batch_size']}, precision {m['precision']}"
        for m in measured
    )
    turns = ", measured in turns with it; median over turns and seeds, and the outermost quartiles of the seeds"
    return f"{turns} ({'; or '.join(conditions)})" if conditions else ""


def matched_table(comparison: MethodComparison) -> Table:
    """Returns a table with a row for each Tucker setting: attention parameters that other methods need for its mean accuracy."""
    rivals = comparison.rivals
    needs = [f"{name} needs" for name in (*(comparison.section.displays[method].name for method in rivals), DENSE)]
    header = ["Tucker setting", "init", "attention params", "top-1 %", *needs]
    raw_header = ["config", "options", "init", "on_front", "attention_params", "top1_mean"]
    raw_header += [
        f"{m}_{end}" for m in rivals for end in ("factor_low", "factor_high", "interval_low", "interval_high")
    ]
    rows, raw = [], []
    for match in comparison.matches:
        setting = match.setting
        rows.append([
            setting.options + (" *" if match.on_front else ""), setting.init, count(setting.params),
            spread(setting.score, setting.score_std), *(str(match.factors[m]) for m in rivals),
            "-" if match.dense is None else f"{match.dense:.1f}x",
        ])  # fmt: skip
        raw.append([
            setting.name, setting.options, setting.init, match.on_front, setting.params, setting.score,
            *(number for m in rivals for number in raw_factor(match.factors[m])), match.dense,
        ])  # fmt: skip
    notes = [
        "Attention parameters of the other method at the Tucker setting's mean top-1, over the setting's own. They are "
        "interpolated on the other method's Pareto front (over all its inits), linear in accuracy and log parameters.",
        BOUNDS_NOTE,
        "The last column has the dense host where it reaches the accuracy.",
        "`*`: on Tucker's own Pareto front.",
        BOOTSTRAP_NOTE,
    ]
    return Table(header, rows, 2, [*raw_header, "dense_factor"], raw, notes, stem="matched")


def raw_factor(factor: Factor) -> tuple[float | None, ...]:
    """Returns the bounds of the factor and the outer bounds of its interval."""
    ends = (None, None) if factor.interval is None else (factor.interval.lower.low, factor.interval.upper.high)
    return (*factor.value, *ends)


def headline_table(comparison: MethodComparison) -> Table:
    """Returns a row for each other method: largest and median factor, and that between the smallest settings as good as dense."""
    headlines = comparison.headlines
    header = ["against", "largest", "median", "as good as dense", "smallest such Tucker", "smallest such other"]
    raw_header = ["against"]
    raw_header += [f"{name}_{end}" for name in ("largest", "median", "as_good_as_dense")
                   for end in ("factor_low", "factor_high", "interval_low", "interval_high")]  # fmt: skip
    rows = []
    for h in headlines:
        smallest = ("-", "-") if h.at_dense is None else (brief(h.ours), brief(h.theirs))
        rows.append([h.name, str(h.largest), str(h.median), str(h.at_dense or "-"), *smallest])
    notes = [
        "Largest and median: over the settings of Tucker's Pareto front, each at its own accuracy; those that the other method's "
        "smallest setting already exceeds tell nothing and are left out. `a-b`: between the two, since some are only bounded. "
        "The largest is picked among several, and so flatters; the median does not.",
        f"As good as dense: {DENSE_NOTE}",
        *dict.fromkeys(f"No factor at dense accuracy: {h.why_not}." for h in headlines if h.why_not),
    ]
    return Table(header, rows, 1, raw_header, [raw_headline(h) for h in headlines], notes, stem="headline")


def raw_headline(headline: Headline) -> list[object]:
    """Returns a line of the CSV file."""
    factors = (headline.largest, headline.median, headline.at_dense)
    return [headline.method, *(n for f in factors for n in (raw_factor(f) if f is not None else (None,) * 4))]


def brief(setting: Setting | None) -> str:
    """Returns 'ranks=8,16,16, HOSVD (50.2k)'; 'none'."""
    if setting is None:
        return "none"
    what = "dense" if setting.method == DENSE else f"{setting.options}, {setting.init}"
    return f"{what} ({short_count(setting.params)})"
