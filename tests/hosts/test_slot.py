"""A user's plug-in for nn.Linear, the trivial method (the same weights), beside patched attention; each slot has its record."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import nn

import vit_tucker as vt
from vit_tucker.hosts.slot import get_slot, linear_errors
from vit_tucker.linear.base import LINEAR_METHODS
from vit_tucker.patching.patch import config_of


class Same(vt.LinearModule):
    """The host's own weights."""

    def __init__(self, spec: vt.LinearSpec, **factory: Any) -> None:
        super().__init__(spec)
        self.inside = nn.Linear(spec.in_features, spec.out_features, bias=spec.bias, **factory)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.inside(input)

    def convert_from(self, weights: vt.LinearWeights) -> None:
        self.inside.weight.copy_(weights.weight)
        if weights.bias is not None:
            self.inside.bias.copy_(weights.bias)

    def dense_weights(self) -> vt.LinearWeights:
        return vt.LinearWeights(self.inside.weight, self.inside.bias).double()


class SameConfig(vt.LinearConfig):
    """Keeps the weights as they are."""

    method: Literal["same"] = "same"
    label: str = "a"

    def build(self, spec: vt.LinearSpec, **factory: Any) -> Same:
        return Same(spec, **factory)

    def count_parameters(self, spec: vt.LinearSpec) -> vt.ParameterCount:
        return vt.ParameterCount(spec.in_features * spec.out_features, spec.bias * spec.out_features)

    def count_flops(self, spec: vt.LinearSpec, num_tokens: int) -> int:
        return 2 * num_tokens * spec.in_features * spec.out_features


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    vt.register_linear_method("same")(SameConfig)
    yield
    LINEAR_METHODS.entries.pop("same")


MLPS = [f"blocks.{i}.mlp.{part}" for i in range(3) for part in ("fc1", "fc2")]
TUCKER = vt.TuckerConfig(ranks=(2, 12, 12))


@pytest.mark.parametrize("first", ["attention", "linear"])
def test_both_slots_compose_in_either_order(make_vit, images, first):
    model, twin = make_vit(), make_vit()
    dense = dict(model.named_modules())
    before = model(images)
    vt.patch(twin, TUCKER)
    for config in (TUCKER, SameConfig()) if first == "attention" else (SameConfig(), TUCKER):
        planned = vt.plan(model, config)
        report = vt.patch(model, config)
        assert [row.name for row in planned.layers] == [row.name for row in report.layers]
        assert planned.slot == report.slot
    assert torch.equal(model(images), twin(images))  # the MLPs are the same; the twin has no linear patch
    linear = vt.patch_record(model, slot="linear")
    assert linear.config == SameConfig() == config_of(model, slot="linear")
    assert [row.name for row in linear.report.layers] == MLPS
    assert vt.patch_record(model).report.to_dict().keys() == vt.patch_record(twin).report.to_dict().keys()
    assert vt.patch_record(model).config == TUCKER
    with pytest.raises(vt.PatchError, match="already patched"):
        vt.patch(model, SameConfig())
    vt.unpatch(model, slot="linear")
    assert vt.patch_record(model, slot="linear") is None
    assert vt.patch_record(model) is not None
    assert all(model.get_submodule(name) is dense[name] for name in MLPS)
    assert vars(model)["_model_args"].keys() >= {"host", "patch"}
    vt.patch(model, SameConfig())
    vt.unpatch(model)
    assert all(module is dense[name] for name, module in model.named_modules())
    assert torch.equal(model(images), before)
    with pytest.raises(vt.PatchError, match="not patched"):
        vt.unpatch(model)


def test_the_report_has_the_slots_own_columns(make_vit):
    model = make_vit()
    report = vt.patch(model, SameConfig(layers="blocks.0.mlp.*"))
    row = report.to_dict()["layers"][0]
    assert row["weight_error"] == report.layers[0].weight_error == 0.0
    assert not {"pre_error", "post_error"} & row.keys()
    assert report.flops_before == report.flops_after == 2 * 2 * 17 * 24 * 96
    assert report.params_after == report.params_before == 2 * 24 * 96 + 96 + 24
    assert report.left_alone == tuple(MLPS[2:])
    text = str(report)
    assert "linear params" in text
    assert "weight error" in text
    assert "attention" not in text


def test_the_error_of_a_linear_layer_is_relative(make_vit):
    host = get_slot("linear").read(make_vit().blocks[0].mlp.fc1, None)
    layer = Same(host.spec, dtype=torch.float64)
    with torch.no_grad():
        layer.convert_from(host.weights)
        assert linear_errors(host, layer) == {"weight_error": 0.0}
        layer.inside.weight.mul_(0.75)
    assert linear_errors(host, layer)["weight_error"] == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, MLPS),
        ("blocks.*.mlp.fc1", MLPS[::2]),
        ([0, -1], [MLPS[0], MLPS[-1]]),
        ("re:.*fc2", MLPS[1::2]),
        ("*", MLPS),
        (["blocks.0.mlp.fc1", "head"], [MLPS[0], "head"]),
    ],
)
def test_layers_are_chosen_by_the_same_patterns_and_heads_by_their_name_alone(make_vit, layers, chosen):
    report = vt.patch(make_vit(), "same", layers=layers)
    assert [row.name for row in report.layers] == chosen


def test_rules_apply_and_mistakes_name_linear_layers(make_vit):
    model = make_vit()
    config = SameConfig(exclude="*.fc2", rules=(vt.Rule(layers="blocks.1.*", label="b"),))
    assert [row.options for row in vt.plan(model, config).layers] == ["", "label=b", ""]
    for wrong, message in (
        ({"layers": "blocks.*.mlp.fc3"}, r"matches no linear layer .*did you mean"),
        ({"layers": "blocks.0.attn.q"}, "matches no linear layer"),
        ({"layers": "patch_embed.proj"}, "matches no linear layer"),
        ({"layers": "re:blocks.(0"}, "layer pattern 're:blocks.*' is no regular expression"),
        ({"layers": 6}, r"outside 0\.\.5 \(6 linear layers\)"),
        ({"exclude": "*"}, "leave no linear layer to patch"),
        ({"calibration": [torch.zeros(1, 3, 16, 16)]}, "converted by weights alone"),
    ):
        with pytest.raises(vt.PatchError, match=message):
            vt.patch(model, SameConfig(), **wrong)
    with pytest.raises(vt.ConfigError, match="unknown slot 'mlp', known: attention, linear"):
        vt.unpatch(model, slot="mlp")
    with pytest.raises(vt.ConfigError, match="'same' is already registered"):
        vt.register_linear_method("same")(type("Other", (SameConfig,), {"__module__": "elsewhere"}))
    assert vt.patch_record(model, "linear") is None


@pytest.mark.parametrize("attention", [True, False])
def test_save_and_load_restore_both(make_vit, images, tmp_path, attention):
    model = make_vit(dtype=torch.float32)
    if attention:
        vt.patch(model, TUCKER)
    vt.patch(model, SameConfig(layers="blocks.*.mlp.fc1"))
    vt.save(model, tmp_path)
    loaded = vt.load(tmp_path)
    assert torch.equal(loaded(images.float()), model(images.float()))
    assert vt.patch_record(loaded, "linear").config == SameConfig(layers="blocks.*.mlp.fc1")
    assert (vt.patch_record(loaded) is not None) == attention
    assert isinstance(loaded.blocks[0].mlp.fc1, Same)
    assert isinstance(loaded.blocks[0].mlp.fc2, nn.Linear)


def test_dense_model_has_plain_linears(make_vit, images):
    model = make_vit()
    vt.patch(model, vt.GQAConfig(num_kv_heads=2), keep_originals=False)
    vt.patch(model, SameConfig(), keep_originals=False)
    dense = vt.dense_model(model)
    assert type(dense.blocks[0].mlp.fc1) is nn.Linear
    torch.testing.assert_close(dense(images), model(images), rtol=1e-10, atol=1e-12)
    assert vt.patch_record(dense, "linear") is None
    with pytest.raises(vt.PatchError, match="were not kept"):
        vt.unpatch(model)
