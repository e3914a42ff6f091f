"""A warm-up that is longer than a training whose epochs were overridden keeps its share of them."""

from pathlib import Path

import pytest
import yaml

from vit_tucker.config.load import config_from, dump_config, load_config, read_config
from vit_tucker.errors import ConfigError
from vit_tucker.sweep.check import notes_of
from vit_tucker.sweep.plan import load_sweep

NOTE = "train.warmup_epochs: 3 of 30 epochs is shortened to {}, since train.epochs={}"


def warmup(*overrides, base="digits/dense"):
    return load_config(base, overrides).train.warmup_epochs


@pytest.fixture
def write(in_tmp):
    def write(name, text):
        Path(name).write_text(text)
        return name

    return write


def test_fewer_epochs_shorten_the_warmup_of_a_preset():
    config, notes = read_config("digits/dense", ["train.epochs=1"])
    assert (config.train.epochs, config.train.warmup_epochs) == (1, 0.1)
    assert notes == (NOTE.format("0.1", 1),)
    assert warmup("train.epochs=2") == 0.2
    assert warmup("train.epochs=1", base="digits/tucker_r16_finetune") == 1  # of 12: it fits
    for epochs in (3, 5, 30, 100):  # as before: what fits is not changed
        config, notes = read_config("digits/dense", [f"train.epochs={epochs}"])
        assert (config.train.warmup_epochs, notes) == (3, ())


@pytest.mark.parametrize(
    "overrides", [("train.epochs=2", "train.warmup_epochs=9"), ("train.warmup_epochs=9", "train.epochs=2")]
)
def test_what_is_given_together_is_refused_in_any_order(overrides):
    with pytest.raises(ConfigError, match=r"^command line: train.warmup_epochs: 9 is more than train.epochs=2$"):
        warmup(*overrides)
    with pytest.raises(ConfigError, match="train.warmup_epochs: 31 is more than train.epochs=30"):
        warmup("train.warmup_epochs=31")
    assert warmup("train.warmup_epochs=0.5", "train.epochs=1") == 0.5


def test_files_over_their_bases(write):
    write("own.yaml", "base: digits/base.yaml\ntrain: {epochs: 1}\n")
    assert warmup(base="own.yaml") == 0.1
    assert warmup("train.epochs=20", base="own.yaml") == 3  # what was chosen for 30 fits again
    write("top.yaml", "base: own.yaml\ntrain: {warmup_epochs: 6}\n")
    with pytest.raises(ConfigError, match=r"top.yaml:2: train.warmup_epochs: 6 is more than train.epochs=1"):
        warmup(base="top.yaml")
    write("plain.yaml", "model: {name: vit_tiny_patch16_224}\ntrain: {warmup_epochs: 5}\n")
    assert warmup("train.epochs=2", base="plain.yaml") == 1  # 5 of the default, 10
    write("wrong.yaml", "model: {name: vit_tiny_patch16_224}\ntrain: {epochs: 2, warmup_epochs: 5}\n")
    with pytest.raises(ConfigError, match=r"wrong.yaml:2: train.warmup_epochs: 5 is more than train.epochs=2"):
        warmup(base="wrong.yaml")
    with pytest.raises(ConfigError, match="train.warmup_epochs: 5 is more than train.epochs=1"):
        warmup("train.epochs=1", base="wrong.yaml")  # it did not fit where it was given either
    with pytest.raises(ConfigError, match=r"train.epochs: Input should be a valid integer"):
        warmup("train.epochs=few")


def test_a_resolved_config_reads_back_equal(write):
    config = load_config("digits/dense", ["train.epochs=1", "output_dir=x"])
    write("config.yaml", dump_config(config))
    again, notes = read_config("config.yaml", ["output_dir=x"])
    assert (again.train, notes) == (config.train, ())
    assert yaml.safe_load(dump_config(config))["train"]["warmup_epochs"] == 0.1


def test_without_a_file():
    given = {"model": {"name": "vit_tiny_patch16_224"}}
    assert config_from(given, ["train.epochs=1"]).train.warmup_epochs == 1


def test_sweeps(write):
    text = """
base: digits/base.yaml
start: {train: {epochs: 2}}
finetune: {train: {epochs: 1}}
cells:
- {name: dense, attention: null}
- {name: 'long{train.epochs}', attention: null, vary: {train.epochs: [2, 20]}}
- {name: given, attention: null, set: {train: {warmup_epochs: 0.5}}}
"""
    jobs = load_sweep(write("s.yaml", text)).jobs
    found = {job.name: job.config.train.warmup_epochs for job in jobs}
    assert found == {"start": 0.2, "dense": 0.1, "long2": 0.2, "long20": 3, "given": 0.5}
    assert notes_of(jobs) == [f"{NOTE.format('0.2', 2)} (start, long2)", f"{NOTE.format('0.1', 1)} (dense)"]
    write("bad.yaml", text.replace("warmup_epochs: 0.5", "warmup_epochs: 5"))
    with pytest.raises(ConfigError, match=r"train.warmup_epochs: 5 is more than train.epochs=1 \(cell given\)"):
        load_sweep("bad.yaml")
