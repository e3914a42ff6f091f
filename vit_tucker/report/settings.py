"""A setting: all seeds of one config, described and averaged."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vit_tucker.report.collect import Results
from vit_tucker.report.compare import describe_attention, linear_method
from vit_tucker.report.stats import Floats, mean, sample_std
from vit_tucker.show.measures import Measure, measures_in
from vit_tucker.show.methods import SHIPPED, MethodDisplay

DENSE = "dense"


def describe_init(attention: dict[str, Any] | None, display: MethodDisplay) -> str:
    """Returns how the attention starts: 'random', or the conversion: 'HOSVD', 'activation-aware, refined', 'mean-pool', ..."""
    if attention is None:
        return "-"
    if attention.get("init") == "random":
        return "random"
    calibration = attention.get("calibration")
    start = display.start(attention.get("conversion"), calibration is not None)
    return f"{start}, refined" if calibration is not None and calibration.get("refine_steps") else start


@dataclass(frozen=True)
class Setting:
    """All seeds of one config.

    Attributes:
        runs: results, one per seed, in order of the seeds.
        config: what the runs share, by dotted key; see ``written_config``.
        is_start: a dense model from which others start.
    """

    runs: tuple[Results, ...]
    config: dict[str, Any]
    is_start: bool = False

    @property
    def name(self) -> str:
        """Returns the names of the resolved configs."""
        return ", ".join(dict.fromkeys(str(run["name"]) for run in self.runs))

    @property
    def attention(self) -> dict[str, Any] | None:
        """Returns the section of the config; None for the host's own attention."""
        section: dict[str, Any] | None = self.runs[0]["config"]["attention"]
        return section

    @property
    def method(self) -> str:
        """Returns 'tucker', ..., or 'dense'; that of the linear layers, 'linear: ...', where only these are replaced."""
        if self.attention is not None:
            return str(self.attention["method"])
        linear = linear_method(self.runs[0]["config"])
        return DENSE if linear is None else f"linear: {linear}"

    @cached_property
    def display(self) -> MethodDisplay:
        """Returns how the method is shown: as stored in its results, else as the package's own of this name."""
        said = self.runs[0].get("display")
        display = SHIPPED.get(self.method, MethodDisplay()) if said is None else MethodDisplay(**said)
        return display.model_copy(update={"name": display.name or self.method})

    @cached_property
    def options(self) -> str:
        """Returns the method's options beyond how it starts, 'ranks=8,16,16'; '-' if there are none."""
        attention = self.attention
        if attention is None:
            return "-"
        parts = [part for part in describe_attention(self.runs[0]).split()[1:] if not part.startswith("conversion=")]
        parts += [f"{key}={attention[key]}" for key in ("layers", "exclude") if attention.get(key) is not None]
        if any(rule.get("chosen_by") is None for rule in attention.get("rules") or []):
            parts.append("with rules")
        return " ".join(parts) or "-"

    @cached_property
    def init(self) -> str:
        """Returns how the attention starts."""
        return describe_init(self.attention, self.display)

    @property
    def series(self) -> tuple[str, str]:
        """Returns method and start: what one curve of a figure shows."""
        return self.method, self.init

    @property
    def seeds(self) -> tuple[int, ...]:
        """Returns the seeds in order."""
        return tuple(run["config"]["seed"] for run in self.runs)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Returns what the runs measured: top-1 and top-5 accuracy, or perplexity and bits per byte; the first one decides."""
        return measures_in(self.runs[0]["last"])

    @cached_property
    def scores(self) -> Floats:
        """Returns the first measure after the last epoch, top-1 in percent or perplexity, one per seed."""
        return self.last_values(self.measures[0])

    @cached_property
    def second_scores(self) -> Floats:
        """Returns the second measure after the last epoch, top-5 in percent or bits per byte, one per seed; NaN if unknown."""
        return self.last_values(self.measures[1])

    def last_values(self, measure: Measure) -> Floats:
        """Returns a ``measure`` after the last epoch, one per seed; NaN where it is not known."""
        values = [run["last"][measure.column] for run in self.runs]
        return np.array([math.nan if value is None else value for value in values], dtype=float)

    @property
    def best_score(self) -> float | None:
        """Returns the first measure of the best epoch, chosen on the data it is measured on; None where a run's is not known."""
        best = [run["best"] for run in self.runs]
        return None if None in best else mean([each[self.measures[0].name] for each in best])

    @property
    def score(self) -> float:
        """Returns the mean of the first measure over the seeds."""
        return mean(self.scores)

    @property
    def merit(self) -> float:
        """Returns the score, with the sign that makes the highest the best."""
        return -self.score if self.measures[0].lowest else self.score

    @property
    def score_std(self) -> float | None:
        """Returns the sample standard deviation of the first measure over the seeds."""
        return sample_std(self.scores)

    @cached_property
    def params(self) -> float:
        """Returns attention parameters, mean over the seeds: ranks that a rule chooses may differ."""
        return mean([run["params"]["attention"] for run in self.runs])

    @property
    def share(self) -> float:
        """Returns attention parameters over those of the dense host."""
        return self.params / float(self.runs[0]["params"]["dense_attention"])

    @cached_property
    def flops(self) -> float | None:
        """Returns operations of the whole model per image, mean over the seeds; None where a run has none."""
        costs = [cost["flops"] for run in self.runs if (cost := run.get("cost")) and cost["flops"] is not None]
        return mean(costs) if len(costs) == len(self.runs) else None

    @cached_property
    def latencies(self) -> list[dict[str, Any]]:
        """Returns measurements, one per seed; none where a run lacks its own."""
        measured = [latency for run in self.runs if (latency := (run.get("cost") or {}).get("latency"))]
        return measured if len(measured) == len(self.runs) else []

    @property
    def latency(self) -> float | None:
        """Returns latency relative to the dense host, median over the seeds; None where a run has none."""
        return float(np.median([m["ratio"] for m in self.latencies])) if self.latencies else None

    @property
    def latency_range(self) -> tuple[float, float] | tuple[None, None]:
        """Returns the lowest lower and the highest upper quartile of the seeds' measurements."""
        if not self.latencies:
            return None, None
        return min(m["ratio_low"] for m in self.latencies), max(m["ratio_high"] for m in self.latencies)

    @property
    def epochs(self) -> int:
        """Returns the number of epochs trained."""
        return int(self.runs[0]["epochs"])

    @property
    def commits(self) -> str:
        """Returns the commits of the sources, short."""
        commits = (str(run["environment"].get("commit") or "unknown") for run in self.runs)
        return ", ".join(dict.fromkeys(re.sub(r"^([0-9a-f]{9})[0-9a-f]*", r"\1", commit) for commit in commits))
