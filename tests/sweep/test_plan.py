"""From a sweep's file to its runs: names, configs, order, selection, and one line for each mistake."""

import json
from pathlib import Path

import pytest

from vit_tucker.config.find import package_configs
from vit_tucker.config.load import load_config
from vit_tucker.errors import VitTuckerError
from vit_tucker.sweep.check import plan_cells
from vit_tucker.sweep.plan import describe_value, load_sweep, select_jobs
from vit_tucker.sweep.schema import SweepConfig

FILE = """
base: digits/base.yaml
output_dir: out
seeds: [0, 3]
set: {data: {num_samples: 100}}
start: {train: {epochs: 4}}
finetune: {train: {epochs: 2}}
cells:
- {name: mha, attention: null}
- name: gqa{attention.num_kv_heads}
  attention: {method: gqa}
  vary: {attention.num_kv_heads: [2, 1]}
- name: tucker-{attention.ranks}-{init}
  attention: {method: tucker}
  set: {train: {lr: 1e-4}}
  vary:
    attention.ranks: [[8, 16, 16], {budget: 0.15}]
    init: {hosvd: {}, long: {attention: {calibration: {images: 8}}, train: {epochs: 5}}}
"""
NAMES = [
    *("start", "mha", "gqa2", "gqa1"),
    *(f"tucker-{ranks}-{init}" for ranks in ("8-16-16", "budget0.15") for init in ("hosvd", "long")),
]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(FILE)
    return Path("s.yaml")


def test_every_combination_is_a_run_of_its_own(file):
    sweep = load_sweep(file)
    assert list(sweep.names) == NAMES
    assert [job.key for job in sweep.jobs] == [(name, seed) for seed in (0, 3) for name in NAMES]
    assert len({job.folder for job in sweep.jobs}) == len(sweep.jobs)
    assert sweep.jobs[-1].folder == Path("out/tucker-budget0.15-long/seed3")


def test_what_each_run_is_given(file):
    jobs = {job.key: job for job in load_sweep(file).jobs}
    start, mha, tucker = jobs["start", 3], jobs["mha", 3], jobs["tucker-8-16-16-long", 3]
    assert (start.after, mha.after, tucker.after) == (None, start, start)
    assert [job.config.seed for job in (start, mha, tucker)] == [3, 3, 3]
    assert [job.config.train.epochs for job in (start, mha, tucker)] == [4, 2, 5]
    assert [job.config.train.lr for job in (start, mha, tucker)] == [1.5e-3, 1.5e-3, 1e-4]
    assert {job.config.data.num_samples for job in jobs.values()} == {100}
    assert start.config.model.checkpoint is None
    assert mha.config.model.checkpoint == tucker.config.model.checkpoint == str(start.folder)
    assert mha.config.attention is None
    assert tucker.config.attention.ranks == (8, 16, 16)
    assert tucker.config.attention.calibration.images == 8
    assert jobs["tucker-8-16-16-hosvd", 3].config.attention.calibration is None


def test_without_a_start_cells_begin_with_the_base(file):
    jobs = load_sweep(file, ["start=null", "seeds=[1]", "set.model.pretrained=true"]).jobs
    assert {job.after for job in jobs} == {None}
    assert "start" not in {job.name for job in jobs}
    assert all(job.config.model.pretrained and job.config.model.checkpoint is None for job in jobs)


def test_selection_brings_the_starts_along(file):
    sweep = load_sweep(file)
    assert [job.key for job in select_jobs(sweep, ["gqa*"], ["3"])] == [("start", 3), ("gqa2", 3), ("gqa1", 3)]
    assert [job.key for job in select_jobs(sweep, ["gqa1/seed0"])] == [("start", 0), ("gqa1", 0)]
    assert select_jobs(sweep, []) == sweep.jobs
    with pytest.raises(VitTuckerError, match=r"no cell matches 'gqq1'.*did you mean 'gqa1'"):
        select_jobs(sweep, ["gqq1"])
    with pytest.raises(VitTuckerError, match="--seeds: 1 is none of the sweep's: 0, 3"):
        select_jobs(sweep, [], ["1"])


@pytest.mark.parametrize(
    ("value", "text"),
    [([8, 16, 16], "8-16-16"), (0.001, "0.001"), (True, "true"), (None, "none"), ({"budget": 0.15}, "budget0.15")],
)
def test_values_in_names(value, text):
    assert describe_value(value) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds:", "seed:"), r"s.yaml:4: seed: unknown key; did you mean 'seeds'"),
        (("attention: null", "attn: null"), r"s.yaml:9: cells.0.attn: unknown key; did you mean 'attention'"),
        (
            ("{train: {epochs: 2}}", "{train: {epoch: 2}}"),
            r"s.yaml:7: train.epoch: unknown key; did you mean 'epochs'.*cell mha",
        ),
        (
            ("num_kv_heads: [2, 1]", "num_kv_head: [2, 1]"),
            r"s.yaml:10: cells.1.name: '\{attention.num_kv_heads\}' is no key of",
        ),
        (("[2, 1]", "[2, two]"), r"s.yaml:12: attention.num_kv_heads: .*integer.*'two'.*cell gqatwo"),
        (("method: gqa", "method: gqq"), r"s.yaml:11: attention.method: unknown method 'gqq'.*did you mean 'gqa'"),
        (("gqa{attention.num_kv_heads}", "gqa"), r"s.yaml:8: cells: two are named 'gqa'"),
        (("name: mha", "name: start"), r"'start' can't be a folder's name here"),
        (("name: mha", "name: a/b"), r"'a/b' can't be a folder's name here"),
        (("[2, 1]", "[]"), r"s.yaml:12: cells.1.vary: attention.num_kv_heads has no values"),
        (("digits/base.yaml", "digit/base.yaml"), r"s.yaml:2: base: .*no such config.*did you mean 'digits/base.yaml'"),
        (("[0, 3]", "[0, 0]"), r"s.yaml:4: seeds: a seed is given twice"),
    ],
)
def test_mistakes_are_one_line(file, change, message):
    file.write_text(FILE.replace(*change, 1))
    with pytest.raises(VitTuckerError, match=message) as error:
        load_sweep(file)
    assert "\n" not in str(error.value)


def test_patches_that_the_host_does_not_allow_are_refused_before_anything_runs(file):
    plan_cells(load_sweep(file).jobs)
    file.write_text(FILE.replace("[2, 1]", "[2, 3]"))
    with pytest.raises(
        VitTuckerError, match=r"cell gqa3: attention: blocks.0.attn: num_kv_heads=3 must divide num_heads=8"
    ):
        plan_cells(load_sweep(file).jobs)


@pytest.mark.parametrize("file", sorted((package_configs() / "sweeps").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_sweeps_resolve(file):
    sweep = load_sweep(file)
    assert sweep.output_dir == Path("runs") / file.stem
    assert len(sweep.names) == len(sweep.jobs) / len(sweep.config.seeds) > 1
    head = file.read_text().splitlines()
    assert head[0] == "# yaml-language-server: $schema=schema.json"
    assert f"--cfg sweeps/{file.stem}.yaml" in head[2]


def test_schema_file_is_up_to_date():
    """`./run.sh schema --sweep > experiments/configs/sweeps/schema.json` after a change of the schema."""
    kept = json.loads((package_configs() / "sweeps/schema.json").read_text())
    assert keys_of(kept) == keys_of(SweepConfig.model_json_schema())


def keys_of(schema):
    """Names, descriptions and defaults of all keys: what no version of pydantic writes differently."""
    sections = {"": schema, **schema["$defs"]}
    return {
        (name, key, body["properties"][key].get("description"))
        for name, body in sections.items()
        for key in body["properties"]
    }


def test_a_sweep_is_no_run_and_a_run_no_sweep():
    with pytest.raises(VitTuckerError, match=r"fig3_digits.yaml: this is a sweep: .*sweep.py --cfg sweeps/fig3_digits"):
        load_config("sweeps/fig3_digits")
    with pytest.raises(
        VitTuckerError, match=r"digits/gqa2.yaml: no sweep: it has no cells; a run's config .*train_vit.py"
    ):
        load_sweep("digits/gqa2")
