"""Finding results, and telling settings from seeds."""

import json

import pytest

from tests.report.synthetic import run_results, study, write_runs
from vit_tucker.errors import ConfigError
from vit_tucker.report.collect import collect, setting_key, write_results, written_config

TUCKER = {"method": "tucker", "ranks": [8, 16, 16], "rules": []}


def small(seed=0, **changes):
    return run_results("a", TUCKER, 45_000, 94.0, seed, **changes)


def test_runs_are_found_wherever_they_are(tmp_path):
    runs = study(seeds=2, methods=("tucker",))
    write_runs(tmp_path / "runs", runs)
    everything = collect([tmp_path / "runs"])
    assert len(everything.results) == len(runs)
    assert everything.notes == ()
    one = tmp_path / "runs" / "mha" / "seed1"
    assert collect([one]).results == collect([one / "results.json"]).results
    assert [run["name"] for run in collect([one]).results] == ["mha"]
    kept = tmp_path / "kept" / "results.jsonl"
    kept.parent.mkdir()
    write_results(kept, everything.results)
    assert len(kept.read_text().splitlines()) == len(runs)
    assert collect([kept]) == collect([kept.parent]) == collect([tmp_path / "runs", kept]) == everything


def test_kept_results_beside_runs_are_not_read(tmp_path):
    write_runs(tmp_path, [small()])
    write_results(tmp_path / "results.jsonl", [small(), small(seed=1)])  # one of which has been removed since
    assert [run["config"]["seed"] for run in collect([tmp_path]).results] == [0]


def test_unfinished_runs_are_named(tmp_path):
    write_runs(tmp_path, [small(), small(seed=1)])
    (tmp_path / "a" / "seed1" / "results.json").unlink()
    found = collect([tmp_path])
    assert len(found.results) == 1
    assert found.notes == (f"not finished, left out: {tmp_path / 'a' / 'seed1'}",)


@pytest.mark.parametrize("first", [0, 1])
def test_the_newest_of_one_config_and_seed_counts(tmp_path, first):
    older, newer = small(finished="2026-11-24"), {**small(finished="2026-11-25"), "name": "b"}
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    for file, run in zip(files, (older, newer), strict=True):
        file.write_text(json.dumps(run))
    found = collect([files[first], files[1 - first]])
    assert [run["name"] for run in found.results] == ["b"]
    assert len(found.notes) == 1
    assert "that of 2026-11-25 counts" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "results.json: can.t be read as JSON"),
        ("[1]", "results.json: contains a list, not an object"),
        ('{"name": "a", "config": {}}', "not the results of a run: no 'environment'"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        collect([tmp_path])
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        collect([tmp_path / "nowhere"])


def test_no_finished_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no finished run$"):
        collect([tmp_path])
    (tmp_path / "config.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match="no finished run; not finished, left out"):
        collect([tmp_path])


def test_seeds_of_a_config_agree_and_other_configs_do_not():
    chosen = {"layers": "blocks.0.attn", "chosen_by": {"budget": 0.2}, "ranks": [4, 8, 8]}
    other = {**chosen, "ranks": [4, 8, 16]}
    same = [
        small(seed=3),  # with another start, runs/fig3/start/seed3
        small(**{"config.data.root": "/elsewhere", "config.train.log_interval": 1}),
        small(**{"config.attention.rules": [chosen]}),
        small(**{"config.attention.rules": [other]}),
        small(**{"config.attention.post_ranks": None}),
    ]
    assert {setting_key(run) for run in same} == {setting_key(small())}
    different = [
        small(**{"config.train.lr": 2e-3}),
        small(**{"config.attention.ranks": [8, 16, 32]}),
        small(**{"config.attention.rules": [{"layers": 0, "ranks": [4, 8, 8]}]}),
        small(**{"config.model.checkpoint": "runs/other/start/seed0"}),
        small(**{"config.model.checkpoint": "runs/fig3/start/seed7"}),  # the start of another seed
        small(**{"data.num_eval": 10_000}),
    ]
    assert len({setting_key(run) for run in [small(), *different]}) == len(different) + 1
    assert written_config(small())["attention.ranks.1"] == 16
