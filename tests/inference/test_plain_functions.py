"""What the commands do, called from Python: evaluate, bench, convert, plan, costs; and one section of a config by itself."""

from pathlib import Path

import pytest
import timm

import vit_tucker as vt
from vit_tucker.config.load import validate_section
from vit_tucker.config.method_string import read_method
from vit_tucker.config.schema import DataConfig, TrainConfig
from vit_tucker.config.source import Source, read_overrides
from vit_tucker.errors import ConfigError
from vit_tucker.inference.bench import bench
from vit_tucker.inference.evaluate import evaluate
from vit_tucker.run.convert import convert, plan
from vit_tucker.run.costs import costs

NAME, METHOD = "vit_tiny_patch16_224", "tucker ranks=[2,4,4]"
TINY = ["model.depth=1", "model.img_size=32", "model.embed_dim=16", "model.num_heads=2"]


def test_a_section_is_validated_by_itself_and_named_as_in_a_whole_config():
    assert validate_section(DataConfig, read_overrides(["data.dataset=digits"])) == DataConfig(dataset="digits")
    assert validate_section(TrainConfig, Source()) == TrainConfig()
    with pytest.raises(ConfigError, match="^command line: data.datset: unknown key; did you mean 'dataset'"):
        validate_section(DataConfig, read_overrides(["data.datset=digits"]))
    with pytest.raises(ConfigError, match="did you mean 'train.lr'"):
        validate_section(DataConfig, read_overrides(["data.lr=1"]))


def test_a_method_string_is_a_config():
    assert read_method(METHOD) == vt.TuckerConfig(ranks=(2, 4, 4)) == read_method("tucker ranks=2,4,4")
    with pytest.raises(ConfigError, match="did you mean 'tucker'"):
        read_method("tucer ranks=[2,4,4]")


def test_convert_saves_what_plan_says(in_tmp):
    planned = plan(NAME, METHOD, overrides=TINY).reports[0]
    done = convert(NAME, vt.TuckerConfig(ranks=(2, 4, 4)), Path("out"), overrides=TINY)
    assert planned.params_after == done.reports[0].params_after < planned.params_before
    assert not done.trained
    assert vt.patch_record(vt.load("out")).config.ranks == (2, 4, 4)
    with pytest.raises(ConfigError, match="needs one of MODEL and --cfg"):
        plan(None, METHOD)


def test_costs_and_bench_compare_dense_and_method():
    name, (dense, tucker) = costs(NAME, [METHOD], overrides=TINY, batch_size=1)
    assert name == NAME
    assert tucker.attention_params < dense.attention_params
    assert dense.to_dict()["latency"] is None
    with pytest.raises(ConfigError, match="--method is for timm model names"):
        bench([], [METHOD])


def test_a_model_in_memory_is_evaluated():
    options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 2}
    model = timm.create_model(NAME, num_classes=10, **options)
    found = evaluate(model, "digits", device="cpu", batch_size=128)
    assert (found.model, found.dataset, found.scores.count) == (None, "digits", 360)
    with pytest.raises(ConfigError, match="the model is no run"):
        evaluate(model)
