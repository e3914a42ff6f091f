"""What patch and plan take as a method, and what they say of what is none."""

import copy
import pickle

import pytest
import torch

import vit_tucker as vt
from vit_tucker.config.schema import ModelConfig, RunConfig, TrainConfig


def test_a_methods_name_with_its_options_is_its_config(make_vit, images):
    config, model, other = vt.TuckerConfig(ranks=(4, 8, 8), shared_kv=True), make_vit(), make_vit()
    vt.patch(model, config, layers=0)
    report = vt.patch(other, "tucker", ranks=(4, 8, 8), shared_kv=True, layers=0)
    assert vt.patch_record(other).config == vt.patch_record(model).config
    assert [layer.name for layer in report.layers] == ["blocks.0.attn"]
    torch.testing.assert_close(other(images), model(images), rtol=0, atol=0)
    mapped = make_vit()
    assert str(vt.plan(mapped, {"method": "gqa", "num_kv_heads": 2})) == str(vt.plan(mapped, "gqa", num_kv_heads=2))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "tuker",
            {"ranks": (4, 8, 8)},
            "unknown method 'tuker'; did you mean 'tucker'?; attention methods: .*; linear methods: lowrank_linear",
        ),
        ("tucker", {"rank": (4, 8, 8)}, "TuckerConfig: rank: unknown key; did you mean 'ranks'?"),
        ("tucker", {"ranks": (4, 8)}, "TuckerConfig: ranks: has too few entries$"),
        ("tucker", {}, "TuckerConfig: ranks: missing"),
        ("tucker", {"ranks": (4, 8, 8), "layer": 0}, "layer: neither .*; did you mean 'layers'?"),
        ("tucker", {"ranks": (4, 8, 8), "keep_original": 1}, "keep_original: .*; did you mean 'keep_originals'?"),
        ("gqa", {"num_kv_heads": 2, "backend": "spda"}, "GQAConfig: backend: .*; did you mean 'sdpa'?"),
        ({"method": "gqa", "num_kv_head": 2}, {}, "GQAConfig: num_kv_head: unknown key; did you mean 'num_kv_heads'?"),
        ({"num_kv_heads": 2}, {}, "method: missing"),
        ({"method": ["gqa"]}, {}, r"method: must be a name, not \['gqa'\]"),
        (
            vt.MHAConfig(),
            {"img_sise": 3},
            "img_sise: not accepted together with a config object; did you mean 'img_size'?",
        ),
        (vt.MHAConfig(), {"ranks": 3}, "ranks: not accepted together with a config object; options go into the config"),
        (vt.MHAConfig, {}, r"the method is the class MHAConfig; give a config: MHAConfig\(...\)"),
        (None, {}, "the method must be a config or a name, not None; write TuckerConfig"),
        (7, {}, "the method must be a config or a name, not 7"),
    ],
)
@pytest.mark.parametrize("call", [vt.patch, vt.plan])
def test_what_is_no_method_is_one_line(make_vit, call, method, options, message):
    model = make_vit()
    before = dict(model.named_modules())
    with pytest.raises(vt.ConfigError, match=f"^{message.replace('?', '[?]')}") as caught:
        call(model, method, **options)
    assert str(caught.value).isprintable()
    assert dict(model.named_modules()) == before


def test_what_is_no_model_is_one_line():
    with pytest.raises(vt.ConfigError, match=r"^the model must be a torch.nn.Module, not 'vit_tiny_patch16_224'$"):
        vt.patch("vit_tiny_patch16_224", "tucker", ranks=(4, 8, 8))


def test_configs_copy_pickle_and_read_back_as_before():
    rule = {"layers": 0, "ranks": [2, 2, 2]}
    config = vt.TuckerConfig(ranks={"budget": 0.2}, rules=[rule], calibration={"images": 8})
    run = RunConfig(model={"name": "vit_tiny_patch16_224"}, attention=config, train=TrainConfig(lr=0.1))
    for value in (config, run, run.train, ModelConfig(name="x"), vt.Rule(**rule)):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value.model_copy() == value
    assert vt.TuckerConfig.model_validate_json(config.model_dump_json(), strict=True) == config
    assert vt.TuckerConfig.model_validate(config.model_dump()) == config
    error = pickle.loads(pickle.dumps(vt.ConfigError("a\nb\x1b[0m" + "x" * 5000)))
    assert str(error).startswith("a b\\x1b[0mxxx")
    assert len(str(error)) < 2010
    for wrong, message in (
        ({"train": {"lr": -1}}, "RunConfig: train.lr: Input should be greater than 0, not -1"),
        ({"train": {"lrr": 1}}, "RunConfig: train.lrr: unknown key; did you mean 'lr'?"),
        ({"attention": {"method": "tucker"}}, "RunConfig: attention: Input should be an instance of AttentionConfig"),
    ):
        with pytest.raises(vt.ConfigError, match=f"^{message.replace('?', '[?]')}"):
            RunConfig(model={"name": "x"}, **wrong)
