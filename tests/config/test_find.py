"""Data set x method: names of configs that are two files."""

from pathlib import Path

import pytest

import vit_tucker as vt
from vit_tucker.config.find import config_names, find_config, package_configs
from vit_tucker.config.load import load_config
from vit_tucker.sweep.plan import load_sweep

METHODS = {
    "dense": None,
    "gqa2": vt.GQAConfig(num_kv_heads=2),
    "mqa": vt.GQAConfig(num_kv_heads=1),
    "mla16": vt.MLAConfig(q_lora_rank=16, kv_lora_rank=16),
    "tucker_r16": vt.TuckerConfig(ranks=(8, 16, 16)),
}
DATA = {
    ("digits", ""): False,
    ("fashion_mnist", ""): False,
    ("imagenet", ""): True,
    **{(data, recipe): bool(recipe) for data in ("cifar10", "cifar100") for recipe in ("", "_in21k")},
}
"""Data sets and recipes, and whether their models start from weights."""
MODEL = "model: {name: vit_tiny_patch16_224}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return write


@pytest.mark.parametrize("trained", [False, True])
def test_each_method_on_each_data_set_is_both_files(trained, in_tmp):
    for (data, recipe), weights in DATA.items():
        base = load_config(f"{data}/base{recipe}")
        for method, attention in METHODS.items() if weights == trained else ():
            name = f"{data}/{method}{recipe}"
            start = {} if trained or attention is None else {"init": "random"}
            wanted = {"name": name.replace("/", "-"), "output_dir": f"runs/{name.replace('/', '-')}-0"}
            wanted["attention"] = attention and attention.model_copy(update=start)
            for spelled in (name, f"{name}.yaml", package_configs() / f"{name}.yaml"):
                assert load_config(spelled) == base.model_copy(update=wanted)
            assert name in config_names()
            assert not (package_configs() / f"{name}.yaml").exists()


def test_a_users_data_set_takes_all_methods_and_a_users_method_all_data_sets(write):
    """Of the current folder, of its experiments/configs, and by ``base:``, of runs and sweeps."""
    write("birds/base.yaml", f"{MODEL}seed: 3\n")
    write("birds/base_large.yaml", "base: base.yaml\nmodel: {pretrained: true}\n")
    write("experiments/configs/fish/base.yaml", MODEL)
    write("experiments/configs/methods/gqa3.yaml", "attention: {method: gqa, num_kv_heads: 3}\n")
    for name in ("birds/gqa3", "fish/gqa3.yaml", "digits/gqa3", "experiments/configs/fish/gqa3"):
        assert load_config(name).attention == vt.GQAConfig(num_kv_heads=3, init="random"), name
    assert load_config("birds/mla16_large").attention == METHODS["mla16"]
    write("birds/more.yaml", "seed: 4\n")
    write("birds/x.yaml", "base: [gqa3.yaml, more.yaml]\n")
    assert load_config("birds/x.yaml").seed == 4
    assert load_config("birds/x.yaml").attention == vt.GQAConfig(num_kv_heads=3, init="random")
    write("s.yaml", "base: birds/gqa3_large\nstart: null\ncells: [{name: a, attention: {num_kv_heads: 1}}]\n")
    assert load_sweep("s.yaml").jobs[0].config.attention == vt.GQAConfig(num_kv_heads=1)
    assert {"fish/gqa3", "fish/mqa", "digits/mqa"} < set(config_names())


def test_files_come_before_combinations(write):
    """So that a base.yaml of the user's takes no name from a config that is a file, here or shipped."""
    write("base.yaml", f"{MODEL}seed: 3\n")
    assert find_config("tucker_r16.yaml") == package_configs() / "tucker_r16.yaml"
    assert load_config(write("x.yaml", "base: tucker_r16.yaml\n")).data.dataset == "digits"
    assert load_config("gqa2.yaml").seed == 3
    write("digits/base.yaml", MODEL)
    write("digits/gqa2.yaml", f"{MODEL}seed: 8\n")
    assert load_config("digits/gqa2").seed == 8
    assert load_config("digits/mqa").data == load_config("digits/base").data


def test_a_method_file_may_say_how_it_starts(write):
    write("a/base.yaml", MODEL)
    write("methods/kept.yaml", "attention: {method: gqa, num_kv_heads: 1, init: pretrained}\n")
    write("methods/none.yaml", "seed: 5\n")
    assert load_config("a/kept").attention.init == "pretrained"
    assert (load_config("a/none").attention, load_config("a/none").seed) == (None, 5)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("digits/tucker_r61", "digits/tucker_r16"),
        ("cifar10/gqa2_in12k.yaml", "cifar10/gqa2_in21k.yaml"),
        ("imagnet/mqa", "imagenet/mqa"),
        ("methods/gqa", "methods/gqa2"),
        ("sweeps/fig3_digit", "sweeps/fig3_digits"),
    ],
)
def test_a_name_that_is_none_gets_the_nearest(name, nearest, in_tmp):
    with pytest.raises(vt.ConfigError, match=f"^{name}: no such config, .*; did you mean '{nearest}'") as caught:
        load_config(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["digits/_in21k", "digits/base_x", "digits/" + "a_" * 40_000, "a\0b/mqa", "mqa.yml", "."]
)
def test_hostile_names_are_one_line(name, in_tmp):
    Path("base.yaml").write_text(MODEL)
    with pytest.raises(vt.ConfigError, match="no such config|not a run folder"):
        load_config(name)
