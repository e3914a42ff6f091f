"""Parameters at equal accuracy, against a known truth."""

import numpy as np
import pytest

from tests.report.synthetic import run_results, study
from vit_tucker.report.matched import compare_methods, largest_of, median_of
from vit_tucker.report.sections import sections
from vit_tucker.report.stats import Bounds
from vit_tucker.report.tables import headline_table, matched_table


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("vit_tucker.report.stats.RESAMPLES", 400)


def comparison(runs):
    (section,) = sections(runs)
    found = compare_methods(section)
    assert found is not None
    return found


def at(found, name):
    return next(match for match in found.matches if match.setting.name == name)


def test_the_known_factors_are_found():
    match = at(comparison(study(noise=0.0)), "tucker-4-8-8")
    # the truth is no straight line in log parameters: between the settings, 1.6 times apart, that makes up to 4%
    assert match.factors["gqa"].value.low == pytest.approx(5, rel=0.04)
    assert match.factors["mla"].value.low == pytest.approx(3, rel=0.04)
    assert match.factors["gqa"].value.low != pytest.approx(4.5, rel=0.04)
    assert match.dense == pytest.approx(264_192 / 20_000)
    assert match.on_front


def test_intervals_hold_the_truth_and_grow_with_the_noise():
    narrow, wide = (at(comparison(study(noise=noise)), "tucker-4-8-8").factors["mla"].interval for noise in (0.05, 0.3))
    assert narrow.lower.low < 3.1 < narrow.upper.high
    assert not narrow.lower.low < 4 < narrow.upper.high
    assert wide.upper.high - wide.lower.low > 2 * (narrow.upper.high - narrow.lower.low)


def test_noise_that_a_seed_s_settings_share_does_not_count():
    """It moves all of them together; resampling settings on their own would take it for uncertainty."""
    quiet, shaken = study(noise=0.0), study(noise=0.0)
    for run in shaken:
        run["last"]["eval_top1"] += run["config"]["seed"] / 2
    for runs in (quiet, shaken):
        found = at(comparison(runs), "tucker-4-8-8").factors["gqa"].interval
        assert found.upper.high - found.lower.low < 1e-9
    for run in shaken:  # now on its own: the seeds of GQA the other way round
        run["last"]["eval_top1"] -= (
            run["config"]["seed"] * (run["config"]["attention"] or {}).get("num_kv_heads", 0) / 2
        )
    found = at(comparison(shaken), "tucker-4-8-8").factors["gqa"].interval
    assert not found.upper.high - found.lower.low < 0.5


def test_out_of_reach_is_a_bound():
    found = comparison(study(noise=0.0))
    never = at(found, "tucker-8-32-32")
    assert str(never.factors["gqa"]) == ">2x [2, >2]"
    assert never.factors["gqa"].against() == "more"
    assert never.dense == pytest.approx(2.64, abs=0.01)  # dense MHA reaches it
    already = at(found, "tucker-2-4-4")
    assert str(already.factors["gqa"].value) == "<7.8"
    assert already.factors["gqa"].against() == "unclear"


def test_an_accuracy_above_dense_has_no_dense_factor():
    runs = study(noise=0.0)
    for run in runs:
        run["last"]["eval_top1"] += 3.0 * (run["name"] == "tucker-8-32-32")
    assert at(comparison(runs), "tucker-8-32-32").dense is None


def test_dominated_settings_are_not_on_the_front_and_not_in_the_headline():
    runs = study(noise=0.0)
    worse = {"method": "tucker", "ranks": [1, 64, 64], "conversion": "hosvd", "init": "pretrained"}
    runs += [run_results("worse", worse, 46_000, 94.0, seed) for seed in range(5)]
    found = comparison(runs)
    assert not at(found, "worse").on_front
    assert [h.median for h in found.headlines] == [h.median for h in comparison(study(noise=0.0)).headlines]


def test_headlines_against_each_method():
    gqa, mla = comparison(study(noise=0.05)).headlines
    assert (gqa.method, mla.method) == ("gqa", "mla")
    assert mla.median.value.low == pytest.approx(3, rel=0.1)
    assert gqa.largest.value.low == pytest.approx(5, rel=0.1)
    assert gqa.largest.value.high == np.inf  # at other accuracies only a bound is known
    assert mla.at_dense is None
    assert mla.why_not == "no setting of either is within the seeds' noise of dense"


def test_the_smallest_settings_as_good_as_dense():
    runs = study(noise=0.0)
    for run in runs:  # a known spread of 0.5 about all means, the same for all settings
        run["last"]["eval_top1"] += (run["config"]["seed"] - 2) / np.sqrt(10)
    # within 0.5 of 95: Tucker from 45,000 on (94.56), MLA from 130,000 (94.54), GQA at 200,000 (94.5) by less than nothing
    gqa, mla = comparison(runs).headlines
    assert mla.ours.params == 45_000
    assert mla.theirs.params == 130_000
    assert str(mla.at_dense) == "2.9x [2.9, 2.9]"
    for run in runs:
        run["last"]["eval_top1"] -= 0.01 * (run["name"] == "gqa4")
    gqa, _ = comparison(runs).headlines
    assert gqa.theirs is None
    assert str(gqa.at_dense) == ">4.4x [4.4, >4.4]"
    assert "none" in headline_table(comparison(runs)).markdown()
    for run in runs:  # now Tucker has none and GQA has
        attention = run["config"]["attention"] or {}
        run["last"]["eval_top1"] += {"tucker": -2, "gqa": 1}.get(attention.get("method"), 0)
    gqa, _ = comparison(runs).headlines
    assert gqa.ours is None
    assert gqa.theirs.params == 70_000
    assert str(gqa.at_dense) == "<0.7x [<0.7, 0.7]"  # Tucker's largest has 100,000
    assert gqa.at_dense.against() == "fewer"


def test_one_seed_has_factors_without_intervals():
    found = comparison(study(seeds=1, noise=0.0))
    factor = at(found, "tucker-4-8-8").factors["gqa"]
    assert factor.interval is None
    assert factor.against() == "unclear"
    assert str(factor) == f"{factor.value}x"
    assert found.headlines[0].at_dense is None
    assert "one seed" in found.headlines[0].why_not
    assert "[" not in matched_table(found).rows[0][4]


def test_missing_seeds_leave_the_others():
    runs = [run for run in study(noise=0.05) if (run["name"], run["config"]["seed"]) != ("gqa2", 4)]
    factor = at(comparison(runs), "tucker-4-8-8").factors["gqa"]
    assert factor.interval is not None
    assert factor.value.low == pytest.approx(5, rel=0.1)


@pytest.mark.parametrize("methods", [("tucker",), ("gqa", "mla"), ()])
def test_without_a_competitor_there_is_no_comparison(methods):
    (section,) = sections(study(seeds=2, methods=methods))
    assert compare_methods(section) is None


def test_one_competitor_is_enough():
    assert comparison(study(seeds=2, methods=("tucker", "mla"))).rivals == ["mla"]


def test_largest_and_median_of_bounds():
    values = [Bounds(2, 2), Bounds(4, np.inf), Bounds(3, 3), Bounds(0, 9)]
    assert largest_of(values) == (4, np.inf)
    assert median_of(values) == (3, 3)
    assert median_of([Bounds(0, 9)]) == (0, np.inf)
