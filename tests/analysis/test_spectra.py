"""Spectra of whole models: against the formed tensors, known ranks of the methods, whitening, and the files."""

import csv

import peft
import pytest
import torch

import vit_tucker as vt
from tests.conversion.test_calibrate import pictures
from vit_tucker.analysis.spectra import Shape, analyse, rank_scalars, save_spectra
from vit_tucker.hosts.families import read_host
from vit_tucker.report.spectra import draw_spectra, rank_summary, spectra_figure

pytestmark = pytest.mark.slow


def by_mode(rows, layer="blocks.0.attn", whitened=False):
    return {(r.tensor, r.mode): r for r in rows if r.layer == layer and r.whitened == whitened}


def test_spectra_are_those_of_the_hosts_tensors(make_vit):
    model = make_vit()
    rows, shapes, _ = analyse(model)
    assert len(rows) == 3 * 6
    assert shapes[0] == Shape("blocks.0.attn", 24, 4, 6)
    weights = read_host(model.blocks[1].attn).weights
    found = by_mode(rows, "blocks.1.attn")
    for tensor, pairs in (("pre", weights.pre_pairs()), ("post", weights.post_pairs())):
        names = ("head", "query", "key") if tensor == "pre" else ("head", "output", "value")
        for mode, name in enumerate(names):
            expected = torch.linalg.svdvals(pairs.dense().movedim(mode, 0).flatten(1))
            values = found[tensor, name].values
            torch.testing.assert_close(values, expected[: len(values)], rtol=1e-10, atol=1e-10)


def test_ranks_of_patched_models_are_their_methods(make_vit):
    model = make_vit()
    vt.patch(model, vt.GQAConfig(num_kv_heads=2))
    ranks = {key: row.summary()["numerical_rank"] for key, row in by_mode(analyse(model)[0]).items()}
    assert ranks["pre", "key"] == ranks["post", "value"] == 12
    assert ranks["pre", "head"] == 4
    vt.unpatch(model)
    vt.patch(model, vt.TuckerConfig(ranks=(3, 8, 10)))
    ranks = {key: row.summary()["numerical_rank"] for key, row in by_mode(analyse(model)[0]).items()}
    assert [ranks["pre", m] for m in ("head", "query", "key")] == [3, 8, 10]


def test_whitened_spectra_count_what_the_tokens_fill(make_vit):
    """Images of 10 degrees of freedom: weights of full rank, of which the tokens of the first layer see few directions."""
    rows, *_ = analyse(make_vit(), [pictures(64)])
    plain, whitened = by_mode(rows), by_mode(rows, whitened=True)
    for mode in (("pre", "query"), ("pre", "key"), ("post", "value")):
        assert whitened[mode].summary()["rank_99"] < plain[mode].summary()["rank_99"]
    assert whitened["pre", "head"].size == 4


def test_rows_in_numbers(make_vit):
    rows, *_ = analyse(make_vit())
    for row in rows:
        numbers = row.summary()
        assert 1 <= numbers["stable_rank"] <= numbers["effective_rank"] <= numbers["numerical_rank"] <= row.size
        assert numbers["rank_90"] <= numbers["rank_95"] <= numbers["rank_99"] <= row.size


def test_layers_without_weights_have_no_rank(make_vit):
    model = make_vit()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
    numbers = by_mode(analyse(model)[0])["post", "value"].summary()
    assert numbers["numerical_rank"] == 0
    assert not any(name.startswith("ranks/post_value/blocks.0") for name in rank_scalars(model))


def test_scalars_for_tensorboard(make_vit):
    scalars = rank_scalars(make_vit())
    assert len(scalars) == 18
    assert 1 <= scalars["ranks/pre_key/blocks.2.attn"] <= 24


def test_models_without_attention_are_refused():
    with pytest.raises(vt.PatchError, match="Linear has no attention module that vit_tucker can read"):
        analyse(torch.nn.Linear(2, 2))


def test_files_and_figure(make_vit, tmp_path):
    rows, shapes, _ = analyse(make_vit(depth=2), [pictures(16)])
    save_spectra(tmp_path, rows, shapes)
    with (tmp_path / "singular_values.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 2 * 2 * (4 + 24 + 24 + 4 + 24 + 24)
    values = [
        float(x["value"]) for x in lines if (x["layer"], x["mode"], x["whitened"]) == ("blocks.1.attn", "key", "True")
    ]
    assert values == sorted(values, reverse=True)
    table = rank_summary(tmp_path)
    assert "| pre | key | 24 |" in table
    assert "| post, whitened | value | 24 |" in table
    file = draw_spectra(tmp_path, whitened=True)
    assert file.name == "spectra_whitened.png"
    assert file.stat().st_size > 20_000
    pdf, png = file.with_suffix(".pdf").read_bytes(), file.read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"Date" not in pdf
    draw_spectra(tmp_path, whitened=True)
    assert (file.with_suffix(".pdf").read_bytes(), file.read_bytes()) == (pdf, png)
    for whitened in (False, True):
        figure = spectra_figure(tmp_path, whitened, gqa=(2,), mla=(6, 3))
        (axis,) = (axis for axis in figure.axes if axis.get_title() == "pre-softmax, key mode")
        curve = by_mode(rows, "blocks.1.attn", whitened)["pre", "key"].values
        assert axis.lines[1].get_ydata() == pytest.approx((curve / curve[0]).tolist(), rel=1e-6)
        assert [text.get_text() for text in axis.texts] == ["MLA-3", "MLA-6", "GQA-2"]  # at ranks 3, 6 and 2 * 6


@pytest.mark.parametrize("patched", [True, False])
def test_adapters_count_and_what_can_not_be_read_is_named(make_vit, patched):
    model, other = make_vit(), make_vit()
    for one in (model, other) if patched else ():
        vt.patch(one, vt.GQAConfig(num_kv_heads=4))
    target = "q_proj" if patched else "qkv"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    values = {key: row.values for key, row in by_mode(analyse(wrapped).rows).items()}
    raw = {key: row.values for key, row in by_mode(analyse(other).rows).items()}
    assert not torch.allclose(values["pre", "query"], raw["pre", "query"], rtol=1e-3)
    merged = {key: row.values for key, row in by_mode(analyse(wrapped.merge_and_unload()).rows).items()}
    for key, expected in merged.items():
        torch.testing.assert_close(values[key], expected, rtol=1e-8, atol=1e-8)
    other.blocks[1].attn.proj.weight.data[0, 0] = float("nan")
    with pytest.raises(vt.PatchError, match=r"^blocks\.1\.attn: its weights contain NaN or infinite values"):
        analyse(other)
    model.blocks[1].attn.proj.register_forward_hook(lambda module, args, y: y)
    with pytest.raises(vt.PatchError, match=r"^blocks\.1\.attn: its proj has a forward hook"):
        analyse(model)


def test_an_artificial_cliff_is_noted(make_vit):
    """Of spectra whitened by fewer tokens than columns: they end there."""
    found = analyse(make_vit(), [pictures(1)])
    (note,) = found.notes
    assert "17 tokens of 1 image for 24 columns" in note
    (values,) = (
        row.values for row in found.rows if (row.layer, row.mode, row.whitened) == ("blocks.0.attn", "query", True)
    )
    assert values[17] < 0.05 * values[16]
    assert not analyse(make_vit(), [pictures(16)]).notes
    assert not analyse(make_vit()).notes


def test_layers_with_one_token_are_refused_by_name(make_vit):
    model = make_vit(img_size=4, class_token=False, global_pool="avg")
    images = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(vt.PatchError, match=r"^blocks\.0\.attn: calibration: the second moments are zero"):
        analyse(model, [images])
