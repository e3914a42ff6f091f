"""A patch report as people read it: alike rows folded, what its errors mean, one line, and progress until it is there."""

import re

import pytest
import timm
import torch

import vit_tucker as vt

TUCKER = vt.TuckerConfig(ranks=(3, 6, 6))


def table_rows(report: vt.PatchReport, folded: bool = True) -> list[list[str]]:
    """Returns the cells of the rows of layers."""
    lines = report.table(folded).splitlines()
    first, last = (number for number, line in enumerate(lines) if set(line) == {"-"})
    return [re.split(r"  +", line) for line in lines[first + 1 : last]]


@pytest.fixture
def pictures():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_layers_that_are_alike_share_a_row(make_vit):
    report = vt.patch(make_vit(), TUCKER)
    assert str(report) == report.table()
    ((name, method, options, params, share, _, pre, _, _, flops),) = table_rows(report)
    first = report.layers[0]
    assert (name, method, options) == ("blocks.0-2.attn", "tucker", "ranks=3,6,6")
    assert params == f"{first.params_before.total:,} -> {first.params_after.total:,}"  # of each layer
    assert share == f"{first.params_after.total / first.params_before.total:.1%}"
    errors = sorted(layer.pre_error for layer in report.layers)
    assert pre == f"{errors[0]:.4f} to {errors[-1]:.4f}"
    assert flops == f"{first.flops_before / 1e6:,.1f} -> {first.flops_after / 1e6:,.1f}"
    assert "of each layer" in str(report)
    assert "3 modules" in str(report)
    assert f"{report.params_before:,} -> {report.params_after:,}" in str(report)  # the sum below them


def test_a_row_per_layer_can_be_had_and_is_what_machines_read(make_vit):
    report = vt.patch(make_vit(), TUCKER)
    rows = table_rows(report, folded=False)
    assert [row[0] for row in rows] == [f"blocks.{i}.attn" for i in range(3)]
    assert [row[6] for row in rows] == [f"{layer.pre_error:.4f}" for layer in report.layers]
    assert "of each layer" not in report.table(folded=False)
    assert [row["name"] for row in report.to_dict()["layers"]] == [row[0] for row in rows]


def test_layers_that_differ_have_rows_of_their_own(make_vit):
    config = vt.TuckerConfig(ranks=(3, 6, 6), rules=({"layers": 1, "ranks": (2, 6, 6)},))
    assert [row[0] for row in table_rows(vt.patch(make_vit(), config))] == ["blocks.0,2.attn", "blocks.1.attn"]
    shared = make_vit()
    shared.blocks[2].attn = shared.blocks[1].attn = shared.blocks[0].attn
    names = [row[0] for row in table_rows(vt.patch(shared, TUCKER))]
    assert names == ["blocks.0.attn", "blocks.1-2.attn = blocks.0.attn"]


def test_stages_of_other_widths_are_apart():
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "num_heads": (2, 2), "depths": (2, 3)}
    report = vt.plan(timm.create_model("swin_tiny_patch4_window7_224", **sizes), vt.GQAConfig(num_kv_heads=1))
    assert [row[0] for row in table_rows(report)] == ["layers.0.blocks.0-1.attn", "layers.1.blocks.0-2.attn"]


def test_a_resized_layer_leaves_its_row(make_vit):
    model = make_vit()
    vt.patch(model, TUCKER)
    model.blocks[2].attn.resize(ranks=(3, 5, 5))
    rows = table_rows(vt.patch_record(model).report)
    assert [row[0] for row in rows] == ["blocks.0-1.attn", "blocks.2.attn"]
    assert rows[1][5:8] == ["-", "-", "-"]


def test_the_summary_is_one_line(make_vit, pictures):
    planned = vt.plan(make_vit(), TUCKER, layers="1-")
    text = planned.summary()
    assert text.startswith(f"2 modules by tucker ranks=3,6,6; parameters {planned.params_before:,} -> ")
    assert text.endswith("; plan only")
    assert "\n" not in text
    done = vt.patch(make_vit(), TUCKER, calibration=[pictures])
    low, high = (f(layer.output_error for layer in done.layers) for f in (min, max))
    assert f"output error {low:.4f} to {high:.4f}" in done.summary()
    mixed = vt.TuckerConfig(ranks=(3, 6, 6), rules=({"layers": 1, "ranks": (2, 6, 6)},))
    assert "3 modules by tucker with 2 sets of options" in vt.plan(make_vit(), mixed).summary()


def test_errors_of_weights_are_no_measure_of_calibrated_layers(make_vit, pictures):
    calibrated = vt.patch(make_vit(), TUCKER, calibration=[pictures])
    assert "the output error is what was minimised; errors of the weights also count" in str(calibrated)
    header = str(calibrated).splitlines()[0]
    assert header.index("output error") < header.index("error pre")
    assert "calibrated" not in str(vt.patch(make_vit(), TUCKER))


def test_random_weights_are_noted_where_they_are_converted(make_vit):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4}
    fresh = timm.create_model("vit_tiny_patch16_224", **sizes)
    for act in (vt.plan, vt.patch):
        (note,) = act(fresh, TUCKER).notes
        assert "look freshly initialised" in note
        assert "errors and ranks are those of random weights" in note
        vt.unpatch(fresh) if act is vt.patch else None
    assert not vt.plan(fresh, TUCKER.model_copy(update={"init": "random"})).notes
    assert not vt.plan(fresh.to("meta"), TUCKER).notes
    assert not vt.plan(make_vit(), TUCKER).notes
    trained = timm.create_model("vit_tiny_patch16_224", **sizes)
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    trained(torch.randn(2, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    assert not [note for note in vt.plan(trained, TUCKER).notes if "initialised" in note]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "coatnet_0_rw_224", "eva02_tiny_patch14_224"])
def test_fresh_models_of_other_families_are_known_too(name):
    from vit_tucker.patching.notes import looks_untrained

    model = timm.create_model(name)
    assert looks_untrained(model)
    next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)).weight.data[0] += 1e-3
    assert not looks_untrained(model)


def test_long_conversions_show_what_they_are_at(make_vit, pictures, capsys):
    config = vt.TuckerConfig(
        ranks={"budget": 0.4, "multiple_of": 2}, calibration=vt.Calibration(images=4, refine_steps=3)
    )
    vt.patch(make_vit(), config, calibration=[pictures], progress=True)
    shown = capsys.readouterr().err
    for part in ("reading calibration images:   0%", "tokens of 3 layers", "choosing ranks of blocks.2.attn",
                 "converting blocks.2.attn", "refining blocks.2.attn", "measuring blocks.2.attn"):  # fmt: skip
        assert part in shown, part
    assert "refining blocks.2.attn:   0%" in shown  # of three steps
    for shown_if in (None, False):
        vt.patch(make_vit(), config, calibration=[pictures], progress=shown_if)
        assert capsys.readouterr().err == ""  # no terminal here
    vt.plan(make_vit(), vt.TuckerConfig(ranks={"budget": 0.4}), progress=True)
    assert "choosing ranks of blocks.2.attn" in capsys.readouterr().err
