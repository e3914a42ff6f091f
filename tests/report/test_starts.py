"""Starts compared in pairs, against differences that are known."""

import numpy as np
import pytest

from tests.report.synthetic import run_results
from vit_tucker.report.sections import sections
from vit_tucker.report.starts import compare_starts, start_sentences, starts_table, total_sentences

TUCKER = {"method": "tucker", "conversion": "hosvd", "init": "pretrained"}
AWARE = {**TUCKER, "calibration": {"images": 256, "refine_steps": 0}}
NOISE = np.random.default_rng(0).normal(0, 0.3, (4, 5))


def runs(gains, seeds=5, first_gain=0.0, own_noise=0.0, first_loss=0.0):
    """HOSVD and activation-aware starts of four ranks; the second is ahead by ``gains``, and by more after the first epoch."""
    found = []
    for i, gain in enumerate(gains):
        for seed in range(seeds):
            top1 = 90 + i + NOISE[i, seed]
            ranks = [2 + i, 8, 8]
            found.append(run_results(f"hosvd-{i}", {**TUCKER, "ranks": ranks}, 1000 * (i + 1), top1, seed))
            ahead = top1 + gain + own_noise * NOISE[-1 - i, seed]
            run = run_results(f"aware-{i}", {**AWARE, "ranks": ranks}, 1000 * (i + 1), ahead, seed)
            run["curve"][0]["eval_top1"] = top1 - 30 + first_gain
            run["curve"][0]["train_loss"] -= first_loss
            found.append(run)
    return found


def test_pairs_are_counted_and_their_differences_averaged_seed_by_seed():
    (one,) = compare_starts(*sections(runs([0.1, -0.2, 0.0, 2.5])))
    assert (one.method, one.start, one.reference) == ("Tucker", "activation-aware", "HOSVD")
    assert (one.ahead, one.behind, one.equal, one.settings) == (2, 1, 1, 4)
    assert one.beyond == 1  # by 2.5 points; the seeds' standard deviation is about 0.3
    assert one.last.mean == pytest.approx(0.6)
    # the noise of the seeds is shared, so that it cancels: the interval has no width
    assert one.last.interval == pytest.approx((0.6, 0.6))
    assert one.first.mean == pytest.approx(0.0)
    assert one.first.verdict == "no difference shown"


@pytest.mark.parametrize(("gain", "verdict"), [(1.0, "ahead"), (-1.0, "behind"), (0.0, "no difference shown")])
def test_verdicts_follow_the_interval(gain, verdict):
    (one,) = compare_starts(*sections(runs([gain] * 4, first_gain=1.0, own_noise=1.0)))
    low, high = one.last.interval
    assert low < one.last.mean < high
    assert low < gain < high
    assert one.last.verdict == verdict
    (sentence,) = start_sentences([one])
    assert f"**Tucker, activation-aware against HOSVD: {verdict}** after fine-tuning: " in sentence
    assert "After the first epoch: ahead, +1.00 [+1.00, +1.00] points." in sentence
    gives = "It gives a higher accuracy after the first epoch; a higher final accuracy is not shown."
    assert (gives in sentence) == (verdict != "ahead")


def test_a_lower_loss_at_first_is_no_gain_at_the_end():
    (one,) = compare_starts(*sections(runs([0.0] * 4, first_loss=0.25)))
    assert one.loss.mean == pytest.approx(-0.25)
    (sentence,) = start_sentences([one])
    assert sentence.endswith("It gives a lower loss at first; a higher final accuracy is not shown.")
    (none,) = compare_starts(*sections(runs([0.0] * 4)))
    assert "gives" not in start_sentences([none])[0]


def test_one_seed_has_no_interval_and_shows_nothing():
    (one,) = compare_starts(*sections(runs([5.0] * 4, seeds=1)))
    assert one.last.interval is None
    assert one.beyond is None
    assert one.last.verdict == "no difference shown"
    assert starts_table([one]).rows == [
        ["Tucker", "activation-aware", "HOSVD", "4", "4", "0", "0", "-", "+0.000", "+0.00", "+5.00"]
    ]


def test_seeds_that_one_start_lacks_do_not_count():
    found = [run for run in runs([1.0] * 4) if not (run["name"] == "aware-0" and run["config"]["seed"] > 1)]
    (one,) = compare_starts(*sections(found))
    assert one.ahead == 4
    assert one.last.mean == pytest.approx(1.0)  # the missing seeds' noise is in neither
    disjoint = [run for run in found if run["name"].endswith("-0")]
    kept = [run for run in disjoint if (run["config"]["seed"] > 1) == (run["name"] == "hosvd-0")]
    assert compare_starts(*sections(kept)) == []


def test_starts_of_a_method_of_ones_own_and_studies_without_any():
    own = {"method": "mine", "rank": 3}
    found = [run_results("a", {**own, "init": init}, 1000, top1, seed)
             for init, top1 in (("pretrained", 91.0), ("random", 80.0)) for seed in (0, 1)]  # fmt: skip
    (one,) = compare_starts(*sections(found))
    assert (one.method, one.start, one.reference, one.behind) == ("mine", "random", "converted", 1)
    assert compare_starts(*sections(found[:2])) == []


def test_starts_of_one_name_are_told_apart_by_what_differs():
    """Activation-aware conversion with 64 and with 256 images: two starts, none takes the other's place."""
    found = runs([0.5])
    fewer = {**AWARE, "calibration": {"images": 64, "refine_steps": 0}, "ranks": [2, 8, 8]}
    found += [run_results("fewer", fewer, 1000, 90 + NOISE[0, seed] - 1, seed) for seed in range(5)]
    compared = {one.start: one.last.mean for one in compare_starts(*sections(found))}
    assert compared == {
        "activation-aware (images=256)": pytest.approx(0.5),
        "activation-aware (images=64)": pytest.approx(-1.0),
    }


def test_totals_over_studies():
    (one,), (other,) = (compare_starts(*sections(runs(gains))) for gains in ([0.1] * 4, [-0.1, 0.2, 0.0, 0.0]))
    (sentence,) = total_sentences([one, other])
    assert sentence.startswith("**Tucker, activation-aware against HOSVD**, in 2 studies: ")
    assert "ahead in 5, behind in 1, equal in 2 of 8 settings" in sentence
    assert total_sentences([one]) == []
