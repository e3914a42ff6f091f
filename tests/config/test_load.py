"""Config files: what is read, what is refused, and how it is said."""

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import vit_tucker as vt
from vit_tucker.config.find import config_names, find_config, package_configs
from vit_tucker.config.load import config_difference, dump_config, load_config
from vit_tucker.config.schema import json_schema

CONFIGS = package_configs()
MODEL = "model: {name: vit_tiny_patch16_224}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "x.yaml") -> str:
        (tmp_path / name).write_text(text)
        return name

    return write


def test_values_overrides_and_defaults(write):
    cfg = write(MODEL + "train: {lr: 1e-3, epochs: 7}\nattention: {method: tucker, ranks: [8, 16, 16]}\n")
    config = load_config(cfg, ["train.epochs=5", "seed=1", "attention.shared_kv=true", "data.mean=[0.5]"])
    assert (config.train.epochs, config.train.lr, config.seed, config.data.mean) == (5, 1e-3, 1, (0.5,))
    assert config.attention == vt.TuckerConfig(ranks=(8, 16, 16), shared_kv=True)
    assert (config.name, config.output_dir) == ("x", "runs/x-1")
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2


def test_bases_are_merged_key_by_key(write):
    write(
        MODEL + "train: {lr: 0.1, epochs: 3}\nattention: {method: tucker, ranks: [4, 8, 8], shared_kv: true}\n",
        "a.yaml",
    )
    write("base: a.yaml\ntrain: {epochs: 4}\nattention: {ranks: [4, 4, 4]}\n", "b.yaml")
    config = load_config("b.yaml")
    assert (config.train.lr, config.train.epochs) == (0.1, 4)
    assert config.attention == vt.TuckerConfig(ranks=(4, 4, 4), shared_kv=True)
    other = load_config(write("base: b.yaml\nattention: {method: gqa, num_kv_heads: 2}\n"))
    assert other.attention == vt.GQAConfig(num_kv_heads=2)  # another method brings its own options
    assert load_config(write("base: b.yaml\nattention: null\n")).attention is None
    several = load_config(write("base: [a.yaml, c.yaml]\n"), []) if write("seed: 9\n", "c.yaml") else None
    assert several.seed == 9


def test_resolved_config_reads_back_equal(write, tmp_path):
    rules = "rules: [{layers: 0-3, ranks: [2, 2, 2]}]"
    config = load_config(write(MODEL + f"attention: {{method: tucker, ranks: [8, 16, 16], layers: '0-5', {rules}}}\n"))
    again = load_config(write(dump_config(config), "config.yaml"))
    assert again == config
    assert load_config(tmp_path) == config  # a run folder means its config.yaml
    changed = load_config("config.yaml", ["train.lr=0.5", "output_dir=elsewhere"])
    assert config_difference(config, changed) == ["train.lr: 0.001 -> 0.5"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "attention:\n  method: tucker\n  rank: [1, 2, 3]\n",
            [],
            "x.yaml:4: attention.rank: unknown key; did you mean 'ranks'?",
        ),
        ("train:\n  epoch: 5\n", [], "x.yaml:3: train.epoch: unknown key; did you mean 'epochs'?"),
        ("train: {aa: 3a}\n", [], "x.yaml:2: train.aa: unknown key; did you mean 'data.aa'?"),
        ("atention: {}\n", [], "x.yaml:2: atention: unknown key; did you mean 'attention'?"),
        ("train: {zzz: 5}\n", [], "x.yaml:2: train.zzz: unknown key; valid here: epochs, global_batch_size"),
        ("train:\n  epochs: five\n", [], "x.yaml:3: train.epochs: Input should be a valid integer, not 'five'"),
        ("train: {epochs: '5'}\n", [], "x.yaml:2: train.epochs: Input should be a valid integer, not '5'"),
        ("train: {lr: -1}\n", [], "x.yaml:2: train.lr: Input should be greater than 0, not -1"),
        ("train: {sched: cosin}\n", [], "x.yaml:2: train.sched: Input should be 'cosine', 'linear'"),
        ("seed: true\n", [], "x.yaml:2: seed: Input should be a valid integer, not True"),
        ("seed: 1\nseed: 2\n", [], "x.yaml:3: seed: given twice"),
        (
            "attention: {method: tuker}\n",
            [],
            "attention.method: unknown method 'tuker', known: .*; did you mean 'tucker'?",
        ),
        (
            "attention:\n  init: random\n  # the line below\n  method: tuker\n",
            [],
            "^x.yaml:5: attention.method: unknown method 'tuker', known: gqa, mha, mla, tucker; did you mean 'tucker'?",
        ),
        ("", ["attention={method: tuker}"], "^command line: attention.method: unknown method 'tuker'"),
        ("train: {sched: cosin}\n", [], "x.yaml:2: train.sched: .*, not 'cosin'; did you mean 'cosine'?$"),
        (
            "attention: {method: gqa, num_kv_heads: 1, backend: spda}\n",
            [],
            "attention.backend: .*; did you mean 'sdpa'?$",
        ),
        ("attention: tucker\n", [], "x.yaml:2: attention: "),
        ("attention: tucker\ntrian: {}\n", [], "x.yaml:3: trian: unknown key; did you mean 'train'?"),
        ("attention: {ranks: [1, 2, 3]}\n", [], "x.yaml:2: attention.method: missing, known: gqa, mha, mla, tucker"),
        ("attention: {method: tucker, ranks: [1, 2]}\n", [], "x.yaml:2: attention.ranks: has too few entries"),
        (
            "attention: {method: tucker, ranks: [1, 0, 2]}\n",
            [],
            "x.yaml:2: attention.ranks.1: Input should be greater than or equal to 1",
        ),
        (
            "attention: {method: tucker, ranks: {budgt: 0.1}}\n",
            [],
            "x.yaml:2: attention.ranks.budgt: unknown key; did you mean 'budget'?",
        ),
        (
            "attention: {method: tucker, ranks: {}}\n",
            [],
            "x.yaml:2: attention.ranks: give one of budget, flops, energy, cache",
        ),
        (
            "attention: {method: tucker, ranks: {budget: 0.1}}\n",
            ["attention.ranks.energy=0.9"],
            "attention.ranks: give one of budget, flops, energy, cache, or budget and cache, not budget and ",
        ),
        (
            "attention: {method: tucker, ranks: {budget: 15}}\n",
            [],
            "x.yaml:2: attention.ranks.budget: Input should be less than or equal to 1, not 15",
        ),
        ("attention: {method: tucker, ranks: 16}\n", [], "x.yaml:2: attention.ranks: Input should be a valid"),
        (
            "attention: {method: tucker, ranks: [1, 2, 3], calibration: {image: 3}}\n",
            [],
            "attention.calibration.image: unknown key; did you mean 'images'?",
        ),
        ("attention: {method: gqa}\n", [], "x.yaml:2: attention.num_kv_heads: missing"),
        ("train: {mixup: 0.1, global_batch_size: 3}\n", [], "the micro-batch must be even"),
        ("", ["train.epcohs=3"], "command line: train.epcohs: unknown key; did you mean 'epochs'?"),
        ("", ["train.epochs"], "command line: 'train.epochs': overrides are written key.sub=value"),
        ("", ["train.epochs=[1"], "command line: train.epochs: not valid YAML: expected"),
        ("", ["train=3"], "command line: train: Input should be an object"),
        ("base: nope.yaml\n", [], "x.yaml:2: base: nope.yaml: no such config"),
        ("base: x.yaml\n", [], "base: includes itself"),
        ("base: {a: 1}\n", [], "x.yaml:2: base: must be a file name or a list"),
        ("train: [\n", [], "x.yaml:3: not valid YAML"),
        ("plugins: [nope.py]\n", [], "plugins: nope.py: no such file"),
        ("plugins: [no_such_module_here]\n", [], "plugins: no_such_module_here: ModuleNotFoundError"),
    ],
)
def test_mistakes_get_one_clear_line(write, text, overrides, message):
    with pytest.raises(vt.ConfigError) as caught:
        load_config(write(MODEL + text), overrides)
    line = str(caught.value)
    assert "\n" not in line
    import re

    assert re.search(message.replace("?", r"\?").replace("[", r"\["), line), line


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "x.yaml:1: the file must be a mapping"), ("seed: 1\n", "model: missing"), ("", "model: missing")],
)
def test_files_that_are_no_config(write, text, message):
    with pytest.raises(vt.ConfigError, match=message):
        load_config(write(text))


def test_names_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("tucker_r16.yaml") == CONFIGS / "tucker_r16.yaml"
    assert find_config("digits/dense") == CONFIGS / "digits" / "dense.yaml"
    (tmp_path / "tucker_r16.yaml").write_text(MODEL)
    assert find_config("tucker_r16.yaml") == Path("tucker_r16.yaml")  # a file here comes first
    with pytest.raises(vt.ConfigError, match="did you mean 'tucker_r16.yaml'"):
        find_config("tuker_r16.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(vt.ConfigError, match="empty: not a run folder, it has no config.yaml"):
        find_config("empty")


PLUGIN = """
from typing import Literal
import vit_tucker
from vit_tucker.attention.variants.gqa import GQAConfig

@vit_tucker.register_method("half_gqa")
class HalfGQAConfig(GQAConfig):
    method: Literal["half_gqa"] = "half_gqa"
    num_kv_heads: int = 2
"""


def test_methods_of_a_users_own_file(write, make_vit):
    from vit_tucker.attention import registry

    write(PLUGIN, "mine.py")
    try:
        config = load_config(write(MODEL + "plugins: [mine.py]\nattention: {method: half_gqa}\n"))
        assert "half_gqa" in vt.list_methods()
        model = make_vit()
        assert vt.patch(model, config.attention).layers[0].method == "half_gqa"
        assert model.blocks[0].attn.num_kv_heads == 2
        assert "half_gqa" in json.dumps(json_schema())
        assert load_config(write(dump_config(config), "again.yaml")).attention == config.attention
    finally:
        registry.METHODS.entries.pop("half_gqa", None)
    with pytest.raises(vt.ConfigError, match="unknown method 'half_gqa'"):
        load_config(write(MODEL + "attention: {method: half_gqa}\n"))


FILES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml") if p.parent.name != "sweeps")


def test_shipped_configs_resolve_and_their_models_build():
    import timm

    configs = [load_config(name) for name in config_names()]
    for number, config in enumerate(configs):
        if any((config.model, config.attention) == (c.model, c.attention) for c in configs[:number]):
            continue
        if timm.is_model(config.model.name):  # an older timm may have none
            kwargs = {**config.model.timm_kwargs(), "depth": 1, "num_classes": 10}
            model = timm.create_model(config.model.name, **kwargs)
            report = config.attention and vt.plan(model, config.attention.unconverted())
            assert report is None or report.params_after < report.params_before, config.name


@pytest.mark.parametrize("data", ["fashion_mnist", "cifar10", "cifar100", "imagenet", "digits"])
def test_same_variants_for_all_data_sets(data):
    for variant in ("dense", "tucker_r16", "gqa2", "mqa", "mla16"):
        assert f"{data}/{variant}" in config_names()
        assert load_config(f"{data}/{variant}").data.dataset == data


def keys_of(schema):
    """Names, descriptions and defaults of all keys: what no version of pydantic writes differently."""
    sections = {"": schema, **schema["$defs"]}
    return {
        (section, name): (key.get("description"), json.dumps(key.get("default")))
        for section, body in sections.items()
        for name, key in body["properties"].items()
    }


def test_schema_file_is_up_to_date():
    """`./run.sh schema > experiments/configs/schema.json` after a change of the schema."""
    assert keys_of(json.loads((CONFIGS / "schema.json").read_text())) == keys_of(json_schema())
    for name in FILES:
        first = (CONFIGS / name).read_text().splitlines()[0]
        target = first.removeprefix("# yaml-language-server: $schema=")
        assert (CONFIGS / name).parent.joinpath(target).resolve() == CONFIGS / "schema.json", name


def test_schema_accepts_what_we_ship_and_knows_each_method():
    schema = json_schema()
    text = json.dumps(schema)
    assert all(f'"{name}"' in text for name in vt.list_methods())
    assert schema["additionalProperties"] is False
    for name in FILES:
        keys = yaml.safe_load((CONFIGS / name).read_text())
        assert set(keys) <= set(schema["properties"]), name
        needed = schema["$defs"]["ModelConfig"].get("required", [])  # a base may have named the model
        assert set(needed) <= set(keys.get("model") or {}), name


def test_attention_starts_at_random_only_where_the_model_has_no_trained_weights(tmp_path):
    def init(name, *overrides):
        return load_config(name, overrides).attention.init

    assert init("digits/tucker_r16") == "random"
    assert init("digits/tucker_r16", "model.checkpoint=weights.safetensors") == "pretrained"
    assert init("digits/tucker_r16", "model.pretrained=true") == "pretrained"
    assert init("digits/tucker_r16", "model.checkpoint=weights.safetensors", "attention.init=random") == "random"
    below = tmp_path / "mine.yaml"
    below.write_text("base: digits/tucker_r16.yaml\nmodel: {checkpoint: weights.safetensors}\n")
    assert init(below) == "pretrained"
    below.write_text(
        "base: digits/tucker_r16.yaml\nattention: {init: random}\nmodel: {checkpoint: weights.safetensors}\n"
    )
    assert init(below) == "random"
    assert (
        load_config("digits/tucker_r16", ["model.checkpoint=weights.safetensors", "attention=null"]).attention is None
    )
