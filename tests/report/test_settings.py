"""Settings and sections: what belongs together, and how it is described."""

import json

import numpy as np
import pytest

from tests.report.synthetic import CEILING, run_results, study
from vit_tucker.report.compare import compared_rows
from vit_tucker.report.sections import sections
from vit_tucker.report.settings import describe_init
from vit_tucker.report.tables import latency_conditions, seed_list, settings_table
from vit_tucker.show.methods import SHIPPED, MethodDisplay

TUCKER = {"method": "tucker", "ranks": [8, 16, 16], "conversion": "hosvd"}


@pytest.mark.parametrize(
    ("attention", "init"),
    [
        (None, "-"),
        ({"method": "tucker", "conversion": "hosvd"}, "HOSVD"),
        ({"method": "tucker", "conversion": "hooi"}, "HOOI"),
        ({"method": "tucker"}, "HOSVD"),
        ({"method": "tucker", "init": "random", "calibration": None}, "random"),
        ({"method": "tucker", "conversion": "hosvd", "calibration": {"refine_steps": 0}}, "activation-aware"),
        ({"method": "tucker", "conversion": "hosvd", "calibration": {"refine_steps": 9}}, "activation-aware, refined"),
        ({"method": "gqa", "conversion": "mean"}, "mean-pool"),
        ({"method": "gqa", "conversion": "svd"}, "SVD"),
        ({"method": "gqa", "conversion": "svd", "calibration": {}}, "activation-aware SVD"),
        ({"method": "mla"}, "joint SVD"),
        ({"method": "mine"}, "converted"),
    ],
)
def test_starts_are_named(attention, init):
    display = SHIPPED.get((attention or {}).get("method"), MethodDisplay())
    assert describe_init(attention, display) == init


def test_seeds_make_a_setting_and_the_dense_reference_is_of_the_common_recipe():
    runs = study(seeds=3)
    (section,) = sections(runs)
    assert section.title == "vit_tiny_patch16_224 on digits"
    assert section.slug == "vit_tiny_patch16_224_on_digits"
    assert [s.name for s in section.settings[:3]] == ["start", "mha", "tucker-2-4-4"]
    assert all(s.seeds == (0, 1, 2) for s in section.settings)
    assert section.dense is not None
    assert section.dense.name == "mha"
    assert section.dense.score == pytest.approx(CEILING, abs=0.2)
    assert section.dense.score != pytest.approx(section.settings[0].score, abs=0.2)  # the start's is a point lower
    assert section.describe_recipe(section.settings[0]) == "start: epochs=30"
    assert {s.method for s in section.comparable} == {"tucker", "gqa", "mla"}
    tucker = next(s for s in section.comparable if s.method == "tucker")
    values = [run["last"]["eval_top1"] for run in runs if run["name"] == tucker.name]
    assert tucker.score == np.mean(values)
    assert tucker.score_std == pytest.approx(np.std(values) * np.sqrt(3 / 2))  # n - 1
    assert (tucker.display.name, tucker.options, tucker.init) == ("Tucker", "ranks=2,4,4", "HOSVD")


def test_a_run_that_replaces_linear_layers_alone_is_no_dense_reference(tmp_path):
    runs = study(seeds=2)
    for run in runs:
        if run["name"] == "mha":
            run["config"]["linear"] = {"method": "low_rank"}
    (section,) = sections(runs)
    assert section.dense is not None
    assert section.dense.name == "start"
    assert [s.method for s in section.replaced if s.name == "mha"] == ["linear: low_rank"]
    for kind in ("mha", "tucker-2-4-4"):
        run = next(run for run in runs if run["name"] == kind)
        run["config"]["linear"] = {"method": "low_rank"}
        (tmp_path / f"{kind}.json").write_text(json.dumps(run))
    rows = compared_rows(sorted(tmp_path.glob("*.json")))
    assert [row["attention"] for row in rows] == ["dense, linear: low_rank", "tucker ranks=2,4,4, linear: low_rank"]


def test_without_a_fine_tuned_dense_model_the_start_is_the_reference():
    (section,) = sections([run for run in study(seeds=2) if run["name"] != "mha"])
    assert section.dense is not None
    assert section.dense.is_start


def test_another_recipe_is_shown_and_not_compared():
    runs = study(seeds=2)
    runs.append(run_results("longer", TUCKER, 45_000, 99.0, **{"config.train.epochs": 80, "config.train.lr": 1e-4}))
    (section,) = sections(runs)
    longer = next(s for s in section.settings if s.name == "longer")
    assert section.describe_recipe(longer) == "epochs=80, lr=0.0001"
    assert longer not in section.comparable
    table = settings_table(section)
    assert "other recipe" in table.header
    assert "99.00 ± -" in table.markdown()  # one seed has no spread


def test_ranks_chosen_by_a_rule_are_averaged_over_seeds():
    rule = {"budget": 0.2}
    runs = []
    for seed, params in enumerate((40_000, 50_000)):
        chosen = {"layers": "blocks.0.attn", "ranks": [seed + 1, 8, 8], "chosen_by": rule}
        attention = {**TUCKER, "ranks": rule, "rules": [chosen]}
        runs.append(run_results("budget", attention, params, 94.0, seed))
    (section,) = sections(runs)
    (setting,) = section.settings
    assert setting.params == 45_000
    assert setting.options == "budget=0.2"
    assert "are the mean" in settings_table(section).markdown()


def test_hosts_and_data_sets_are_sections():
    runs = [
        run_results("a", TUCKER, 45_000, 94.0),
        run_results("a", TUCKER, 45_000, 94.0, **{"config.model.depth": 6}),
        run_results("a", TUCKER, 45_000, 94.0, **{"config.data.dataset": "cifar10"}),
    ]
    titles = [section.title for section in sections(runs)]
    assert titles == [
        "vit_tiny_patch16_224 on digits (depth=4)",
        "vit_tiny_patch16_224 on digits (depth=6)",
        "vit_tiny_patch16_224 on cifar10",
    ]


def test_older_results_without_cost_are_dashes():
    runs = study(seeds=2, methods=("tucker",))
    for run in runs:
        del run["cost"], run["curve"]
    (section,) = sections(runs)
    row = settings_table(section).rows[-1]
    assert row[-3:-1] == ["-", "-"]
    assert latency_conditions(section) == ""
    assert section.settings[-1].flops is None
    assert section.settings[-1].latency is None


def test_latency_is_the_median_of_the_seeds_with_their_outermost_quartiles():
    runs = study(seeds=3, methods=("tucker",))
    for run in runs:
        for key, value in (("ratio", 0.5), ("ratio_low", 0.4), ("ratio_high", 0.7)):
            run["cost"]["latency"][key] = value + run["config"]["seed"] / 10
    (section,) = sections(runs)
    assert section.settings[-1].latency == pytest.approx(0.6)
    assert settings_table(section).rows[-1][-2] == "0.60 (0.40-0.90)"
    assert latency_conditions(section).endswith("(cpu, 1 thread(s), batch 64, precision no)")


def test_seeds_are_listed():
    assert [seed_list(s) for s in ((0,), (0, 1), (0, 1, 2, 3, 4), (0, 2, 7))] == [
        "1 (0)", "2 (0, 1)", "5 (0-4)", "3 (0, 2, 7)"]  # fmt: skip
