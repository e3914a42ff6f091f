"""Shipped configs, changed at random, and hostile files: each ends in a valid config or in one line.

VIT_TUCKER_MUTATIONS=5000 draws so many configs, and a twentieth of it dry runs and plans.
"""

import contextlib
import copy
import io
import json
import os
import time
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, PartialState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit_tucker as vt
from tests.config.mutations import HOSTILE, holder, mutated, places, retype_nothing, scale_number, set_scalar
from vit_tucker.cli.main import main
from vit_tucker.config.find import config_names, find_config, package_configs
from vit_tucker.config.load import dump_config, load_config, plain_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.config.source import read_with_bases, read_yaml
from vit_tucker.errors import MAX_MESSAGE
from vit_tucker.sweep.plan import load_sweep

COUNT = int(os.environ.get("VIT_TUCKER_MUTATIONS", "0"))
RUNS = [find_config(name).resolve() for name in config_names()]
SWEEPS = [find_config(name).resolve() for name in config_names(sweeps=True)]
RANDOMS = st.randoms(use_true_random=False)


def some(few: int, share: float = 1.0) -> settings:
    """Hypothesis's settings for so many examples; many more where the environment asks for them."""
    return settings(
        max_examples=max(few, int(COUNT * share)),
        deadline=None,
        derandomize=not COUNT,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def in_folder(tmp_path_factory):
    """All files are written to one folder, which is the current one."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("mutations"))
    yield
    os.chdir(before)


def write(text: str) -> str:
    Path("x.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    return "x.yaml"


def refused_in_one_line(error: Exception, most: int = MAX_MESSAGE) -> str:
    line = str(error)
    assert line.isprintable()
    assert 0 < len(line) <= most
    return line


@given(st.sampled_from(RUNS), RANDOMS)
@some(70)
def test_changed_configs_are_read_or_refused_in_one_line(file, rng):
    name = write(mutated(copy.deepcopy(read_with_bases(file).values), rng))
    try:
        config = load_config(name)
    except vt.VitTuckerError as error:
        refused_in_one_line(error)
        return
    assert isinstance(config, RunConfig)
    assert load_config(write(dump_config(config))) == config


@given(st.sampled_from(SWEEPS), RANDOMS)
@some(15, 0.2)
def test_changed_sweeps_are_read_or_refused_in_one_line(file, rng):
    name = write(mutated(copy.deepcopy(read_yaml(file).values), rng))
    try:
        assert load_sweep(name).jobs
    except vt.VitTuckerError as error:
        refused_in_one_line(error)


@given(RANDOMS)
@some(35)
def test_changed_overrides_and_method_strings_are_read_or_refused_in_one_line(rng):
    from vit_tucker.config.method_string import read_method

    values = read_with_bases(package_configs() / "digits" / "tucker_r16_calibrated.yaml").values
    path = rng.choice(places(values))
    rng.choice([set_scalar, scale_number])(values, path, rng)
    text = yaml.safe_dump(holder(values, path)[path[-1]], default_flow_style=True).removesuffix("\n...\n")
    text = rng.choice([text, text[1:], f"!foo {text}", f"&a {text}", "[" * 500 + text])
    key = ".".join(map(str, path))
    for read in (
        lambda: load_config("digits/tucker_r16", [f"{key}={text}"]),
        lambda: read_method(f"tucker {path[-1]}={text}"),
    ):
        try:
            read()
        except vt.VitTuckerError as error:
            refused_in_one_line(error)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_line_and_in_time(kind):
    start = time.process_time()
    with pytest.raises(vt.ConfigError) as caught:
        load_config(write(HOSTILE[kind]))
    assert time.process_time() - start < 5
    line = refused_in_one_line(caught.value, 500)
    assert line.startswith(("x.yaml:", "plugins:")), line


def tiny_config() -> dict:
    """A config of digits with all its keys, of a model that is built in no time, which nothing has to be loaded for."""
    values = plain_config(
        load_config("digits/tucker_r16", ["model.depth=1", "model.embed_dim=32", "model.num_heads=2"])
    )
    values["attention"]["ranks"] = [2, 8, 8]
    return {**values, "output_dir": "out"}


def run_command(*arguments: str) -> tuple[int, str]:
    """Exit status and standard error of a command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return main(arguments), err.getvalue()
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


@given(RANDOMS)
@some(6, 0.05)
def test_changed_runs_are_planned_or_refused_in_one_line(rng):
    values = tiny_config()
    sections = [path for path in places(values) if path not in (("model", "pretrained"), ("data", "num_workers"))]
    rng.choice([retype_nothing, retype_nothing, set_scalar])(values, rng.choice(sections), rng)
    name = write(json.dumps(values) if "NaN" not in json.dumps(values) else yaml.safe_dump(values))
    command = rng.choice([["train", "--dry-run"], ["plan"]])
    status, said = run_command(*command, "--cfg", name)
    assert status in (0, 2), said
    if status == 2:
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, said
    assert not Path("out").exists()


def test_an_unchanged_run_is_planned():
    status, said = run_command("train", "--dry-run", "--cfg", write(yaml.safe_dump(tiny_config())))
    assert status == 0, said
