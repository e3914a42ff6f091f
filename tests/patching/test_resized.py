"""A patched model whose layers were resized: its config, its report, what is saved of it."""

import pytest
import timm
import torch

import vit_tucker as vt
from tests.checkpoint.test_timm_files import save_for_hf
from vit_tucker.errors import PatchError
from vit_tucker.patching.record import RECORDS

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def patched(method="tucker", **options):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=4).eval()
    vt.patch(model, method, **(options or {"ranks": (2, 16, 16)}))
    return model


def test_a_model_as_patched_keeps_the_very_config_and_report():
    model = patched(ranks=(2, 16, 16), rules=[{"layers": "blocks.1.*", "ranks": (1, 8, 8)}])
    record = vars(model)[RECORDS]["attention"]
    config, report = record.config, record.report
    assert vt.config_of(model) is config
    assert vt.patch_record(model).report is report


def test_ranks_are_those_of_the_layers():
    model = patched()
    before = vt.patch_record(model).report
    model.blocks[1].attn.resize(ranks=(1, 8, 8), post_ranks=(1, 8, 4))
    config = vt.config_of(model)
    assert [rule.model_dump() for rule in config.rules] == [
        {"layers": "blocks.1.attn", "ranks": (1, 8, 8), "post_ranks": (1, 8, 4)}
    ]
    report = vt.patch_record(model).report
    assert report.layers[0] == before.layers[0]
    row = report.layers[1]
    assert row.options == "ranks=1,8,8 post_ranks=1,8,4"
    assert row.params_after.total == sum(p.numel() for p in model.blocks[1].attn.parameters())
    assert row.pre_error is None
    expected = vt.plan(
        timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=4), config
    )
    assert [layer.flops_after for layer in report.layers] == [layer.flops_after for layer in expected.layers]
    assert [layer.params_after for layer in report.layers] == [layer.params_after for layer in expected.layers]
    model.blocks[1].attn.resize(ranks=(2, 16, 16), post_ranks=(2, 16, 16))  # a later change takes the rule's place
    assert len(vt.config_of(model).rules) == 1
    assert vt.config_of(model).rules[0].options["ranks"] == (2, 16, 16)


@pytest.mark.parametrize(
    ("method", "options", "resize"),
    [
        ("tucker", {"ranks": (2, 16, 16)}, {"ranks": (3, 24, 16)}),
        ("mla", {"q_lora_rank": 16, "kv_lora_rank": 16}, {"kv_lora_rank": 8}),
    ],
)
def test_saved_and_loaded_with_its_ranks(tmp_path, method, options, resize):
    model = patched(method, **options)
    model.blocks[2].attn.resize(**resize)
    vt.save(model, tmp_path / "saved")
    loaded = vt.load(tmp_path / "saved").eval()
    assert loaded.blocks[2].attn.rank_options() == model.blocks[2].attn.rank_options()
    assert vt.config_of(loaded).model_dump(mode="json") == vt.config_of(model).model_dump(mode="json")
    assert torch.equal(loaded(X), model(X))


def test_saved_by_timm_alone_after_the_record_was_asked_for(tmp_path):
    model = patched()
    model.blocks[2].attn.resize(ranks=(3, 24, 16))
    vt.config_of(model)
    save_for_hf(model, tmp_path, True)
    assert torch.equal(vt.load(tmp_path).eval()(X), model(X))


def test_chosen_ranks_and_shared_modules_count_too():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=4).eval()
    model.blocks[2].attn = model.blocks[0].attn
    vt.patch(model, "tucker", ranks={"budget": 0.2})
    model.blocks[0].attn.resize(ranks=(1, 8, 8))
    rules = {rule.layers: rule for rule in vt.config_of(model).rules if rule.chosen_by is None}
    assert set(rules) == {"blocks.0.attn", "blocks.2.attn"}
    assert vt.patch_record(model).report.params_after == sum(
        layer.params_after.total for layer in vt.patch_record(model).report.modules
    )


def test_unpatch_brings_the_host_back():
    model = patched()
    host = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=4).eval()
    expected = host(X)
    vt.patch(host, "tucker", ranks=(2, 16, 16))
    host.blocks[0].attn.resize(ranks=(1, 8, 8))
    vt.unpatch(host)
    assert torch.equal(host(X), expected)
    vt.unpatch(model)
    with pytest.raises(PatchError, match="not patched"):
        vt.config_of(model)
