"""Numbers beside each other agree, however the machine's speed changes from turn to turn: on a clock of our own."""

import statistics
import time

import pytest
import torch
from torch import nn

from vit_tucker.analysis.bench import bench_models
from vit_tucker.analysis.cost import latency_to_dense
from vit_tucker.analysis.interleaved import WARM_UP, compare_turns
from vit_tucker.report.bench import bench_table

DENSE = [0.040, 0.060, 0.076, 0.071, 0.090, 0.071, 0.072, 0.118, 0.059]
OWN = [0.034, 0.071, 0.064, 0.060, 0.077, 0.060, 0.073, 0.100, 0.071]
"""Seconds per turn, on a machine that others use: medians of 0.071 in both, and 1.18 in most turns."""


class Timed(nn.Module):
    """A model whose forward passes take what a schedule says, the first turns' time before the turns."""

    num_classes = 5

    def __init__(self, clock: list[float], turns: list[float]):
        super().__init__()
        self.clock, self.schedule = clock, [turns[0]] * (WARM_UP + 1) + turns
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, images):
        self.clock[0] += self.schedule.pop(0) if self.schedule else 0.0
        return images.mean((1, 2, 3))[:, None] * self.weight


@pytest.fixture
def models(monkeypatch):
    """Makes the two models, on a clock that they alone move."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return lambda: {"dense": Timed(clock, DENSE), "own": Timed(clock, OWN)}


def test_the_schedules_medians_contradict_their_ratio():
    """What a table of medians of each alone would show: equal times, 1.18x."""
    assert statistics.median(DENSE) == statistics.median(OWN)
    assert 1 / compare_turns(DENSE, OWN).ratio == pytest.approx(1.18, abs=0.01)


@pytest.mark.parametrize("kind", ["infer", "train"])
def test_bench_rows_agree(models, kind):
    made = models()
    for model in made.values():  # training steps follow the forward passes of the first part
        if kind == "train":
            inference = [0.01] * (WARM_UP + 1 + len(DENSE) + 1)
            model.schedule = inference + model.schedule
    first, own = bench_models(made, (3, 4, 4), 1, torch.device("cpu"), "no", len(DENSE), 0.0, training=kind == "train")
    faster = own[f"{kind}_samples_per_sec"] / first[f"{kind}_samples_per_sec"]
    shorter = first[f"{kind}_step_time"] / own[f"{kind}_step_time"]
    assert faster == pytest.approx(own[f"{kind}_speedup"], abs=2e-3) == shorter
    assert first[f"{kind}_step_time"] == 71.0
    assert own[f"{kind}_speedup"] == pytest.approx(1.18, abs=0.01)
    assert own[f"{kind}_speedup_low"] <= own[f"{kind}_speedup"] <= own[f"{kind}_speedup_high"]


def test_the_printed_table_agrees(models):
    rows = bench_models(models(), (3, 4, 4), 1, torch.device("cpu"), turns=len(DENSE), seconds=0.0)
    dense, own = ([cell.strip() for cell in line.split("|")[1:-1]] for line in bench_table(rows).splitlines()[2:])
    assert (dense[4], dense[5]) == ("14.1", "71.00")
    assert float(own[4]) / float(dense[4]) == pytest.approx(float(own[6].partition("x")[0]), abs=0.01)
    assert float(dense[5]) / float(own[5]) == pytest.approx(float(own[6].partition("x")[0]), abs=0.01)


def test_results_of_runs_agree(models):
    made = models()
    entry = latency_to_dense(made["own"], made["dense"], (3, 4, 4), 1, "cpu", "no", turns=len(DENSE), seconds=0.0)
    assert entry["ms"] / entry["dense_ms"] == pytest.approx(entry["ratio"], rel=1e-12)
    assert entry["ratio_low"] <= entry["ratio"] <= entry["ratio_high"]
