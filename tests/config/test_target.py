"""What `train` is to train: a config, or a model by its name with the recipe of its data set."""

from pathlib import Path

import pytest

import vit_tucker as vt
from vit_tucker.config.load import load_config
from vit_tucker.config.target import read_run
from vit_tucker.errors import ConfigError

MODEL = "vit_tiny_patch16_224"
METHOD = "tucker ranks=[3,16,16]"


def read(*overrides, model=MODEL, method=METHOD, cfg=None):
    return read_run(cfg, model, method, overrides)


def test_a_model_with_the_recipe_of_its_data_set():
    config, notes = read("data.dataset=cifar10")
    recipe = load_config("cifar10/dense")
    assert (config.data, config.train) == (recipe.data, recipe.train)
    assert config.model == vt.config.schema.ModelConfig(name=MODEL)  # nothing of the recipe's own model
    assert config.attention == vt.TuckerConfig(ranks=(3, 16, 16), init="random")
    assert notes == ("recipe: data and train of cifar10/base: 200 epochs, adamw, lr 0.0006; overrides change it",)
    assert config.output_dir == "runs/cifar10-vit_tiny_patch16_224-tucker-ranks-3-16-16-0"
    assert read("data.dataset=cifar10", "name=mine", "seed=2")[0].output_dir == "runs/mine-2"


def test_trained_weights_choose_the_recipe_that_starts_from_such():
    config, notes = read("data.dataset=cifar10", "model.pretrained=true")
    recipe = load_config("cifar10/dense_in21k")
    assert (config.data, config.train) == (recipe.data, recipe.train)
    assert notes[0].startswith("recipe: data and train of cifar10/base_in21k: 10 epochs, momentum, lr 0.03")
    assert config.attention == vt.TuckerConfig(ranks=(3, 16, 16))  # converted from the weights
    assert read("data.dataset=cifar10", "model.checkpoint=weights.pth")[0].train == recipe.train
    only = read("data.dataset=digits", "model.pretrained=true")  # it has one recipe
    assert only[0].train == load_config("digits/dense").train


def test_overrides_are_over_recipe_and_method():
    config, notes = read(
        "data.dataset=digits", "train.epochs=1", "attention.ranks=[2,8,8]", "attention.init=pretrained"
    )
    assert (config.train.epochs, config.train.warmup_epochs, config.train.lr) == (1, 0.1, 1.5e-3)
    assert config.attention == vt.TuckerConfig(ranks=(2, 8, 8))
    assert len(notes) == 2
    assert "shortened to 0.1" in notes[1]


def test_data_sets_without_a_recipe_have_the_defaults(in_tmp):
    config, notes = read("data.dataset=folder", "data.root=birds", method=None)
    assert config.train == vt.config.schema.TrainConfig()
    assert config.attention is None
    assert notes[0].startswith(
        "recipe: the defaults, since there is no config for data.dataset=folder: 10 epochs, adamw"
    )
    assert config.name == f"folder-{MODEL}"
    for name in (
        "hosts",
        "models",
        "sweeps",
        "wds/../digits",
        "",
    ):  # folders of other configs are no data sets' recipes
        assert read(f"data.dataset='{name}'")[1][0].startswith("recipe: the defaults")
    own = Path("experiments/configs/birds")
    own.mkdir(parents=True)
    (own / "base.yaml").write_text("model: {name: x}\ndata: {dataset: birds}\ntrain: {epochs: 7}\n")
    config, notes = read("data.dataset=birds", model="hf-hub:timm/some_model")
    assert (config.train.epochs, config.name) == (7, "birds-hf-hub-timm-some_model-tucker-ranks-3-16-16")
    assert notes[0].startswith("recipe: data and train of birds/base")


def test_a_method_beside_a_config_takes_the_place_of_its_attention():
    config, notes = read(model=None, cfg="digits/dense")
    dense = load_config("digits/dense")
    assert config.attention == vt.TuckerConfig(ranks=(3, 16, 16), init="random")
    assert config.name == "digits-dense-tucker-ranks-3-16-16"  # not in the dense run's folder
    assert (config.model, config.train, notes) == (dense.model, dense.train, ())
    other = read(
        "attention.num_kv_heads=4", model=None, cfg="digits/tucker_r16_calibrated", method="gqa num_kv_heads=2"
    )[0]
    assert other.attention == vt.GQAConfig(num_kv_heads=4)  # it starts from a checkpoint, so it is converted
    same = read(model=None, cfg="digits/tucker_r16_calibrated")[0]
    assert same.attention.calibration is None  # replaced whole
    assert read(model=None, cfg="digits/tucker_r16", method=None)[0] == load_config("digits/tucker_r16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "train needs one of MODEL and --cfg"),
        ({}, "train vit_tiny_patch16_224: name a data set, e.g. data.dataset=cifar10"),
        ({"overrides": ["data.dataset=3"]}, "name a data set"),
        ({"overrides": ["data.dataset=digits"], "method": "tuker"}, "did you mean 'tucker'"),
        ({"overrides": ["data.dataset=digits"], "method": "tucker rank=[3,8,8]"}, "did you mean 'ranks'"),
        ({"overrides": ["data.dataset=digits", "train.epoch=5"]}, "command line: train.epoch: unknown key"),
        ({"overrides": ["data.dataset=digits", 'output_dir="a\\nb"']}, "a path can't have"),
    ],
)
def test_mistakes(arguments, message):
    overrides = arguments.pop("overrides", [])
    with pytest.raises(ConfigError, match=message):
        read(*overrides, **arguments)
