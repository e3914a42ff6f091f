"""The map of hosts: what it says of single models, the committed file, and the command."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import timm

from vit_tucker.analysis.host_map import EXACT, LATENT, build_structure, model_entry, model_names, survey
from vit_tucker.cli import main
from vit_tucker.errors import ConfigError
from vit_tucker.report.host_map import Notes, document, summary, terminal_map

MAP = Path(__file__).parents[2] / "docs" / "hosts.md"


@cache
def entry_of(name):
    """The entry of a model, whose structure takes no memory."""
    model = build_structure(name)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    return model_entry(name, model)


def test_plain_attention_is_exact():
    entry = entry_of("vit_tiny_patch16_224")
    assert entry.layers == {"attention.Attention": 12} or entry.layers == {"vision_transformer.Attention": 12}
    assert entry.heads == (3,)
    assert set(entry.methods.values()) == {EXACT}
    assert entry.features == ()


def test_rope_is_exact_with_the_kind_of_rope_named():
    entry = entry_of("eva02_tiny_patch14_224")
    assert entry.methods == {"gqa": EXACT, "mha": EXACT, "mla": LATENT, "tucker": LATENT}
    assert entry.features == ("rope",)
    assert all(entry.patchable(method) for method in entry.methods)


def test_refusals_tell_the_reason():
    swin = entry_of("swinv2_tiny_window8_256")
    assert swin.methods["gqa"] == (
        "refused: swin_transformer_v2.WindowAttention can't be replaced: cosine attention: the scores of normalised queries and "
        "keys, scaled head by head"
    )
    normed = entry_of("eva02_base_patch16_clip_224")
    assert normed.methods["mha"] == EXACT
    assert normed.methods["mla"] == LATENT
    assert normed.methods["tucker"].startswith("refused: tucker can't carry the host's scale_norm")
    assert (
        entry_of("convit_tiny").methods["mha"].startswith("2 of 12 layers: convit.GPSA can't be replaced: positional")
    )
    assert not entry_of("convit_tiny").patchable("mha")
    xcit = entry_of("xcit_nano_12_p16_224")
    assert xcit.methods["gqa"] == "refused: no self-attention between tokens"
    assert xcit.left_alone["xcit.XCA"] == 12


def test_survey_leaves_out_models_without_attention():
    assert [entry.name for entry in survey(["resnet10t", "vit_tiny_patch16_224"])] == ["vit_tiny_patch16_224"]
    with pytest.raises(
        ConfigError, match="no timm model matches 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'"
    ):
        model_names("vit_tinny_patch16_224")


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("evaa02*", "eva02*"), ("*ropee*", "*rope*"), ("vit_tyny*", "vit_tiny*"), ("ropee*", "*rope*")],
)
def test_a_pattern_that_matches_none_is_met_with_the_nearest(pattern, near):
    with pytest.raises(ConfigError) as error:
        model_names(pattern)
    assert str(error.value) == f"no timm model matches '{pattern}'; did you mean '{near}'?"
    assert model_names(near)


def cells_of(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def examples_of_kinds():
    """Rows of the committed map, of each kind of attention the model with the fewest layers: together they have each verdict
    and each reason."""
    kinds = {}
    for row in MAP.read_text().split("## By model")[1].split("\n\n")[1].splitlines()[2:]:
        cells = cells_of(row)
        counts, classes = zip(*(part.split(" ", 1) for part in (cells[1] or "0 none").split(", ")), strict=True)
        kinds.setdefault((classes, *cells[3:7]), []).append((sum(map(int, counts)), cells))
    return [min(models)[1] for models in kinds.values()]


def test_the_examples_have_every_verdict_and_reason_of_the_map():
    table = MAP.read_text().split("## By kind of attention")[1].split("\n\n")[1].splitlines()[2:]
    assert {tuple(cells[3:7]) for cells in examples_of_kinds()} == {tuple(cells_of(row)[4:8]) for row in table}


@pytest.mark.parametrize("cells", examples_of_kinds(), ids=lambda cells: cells[0])
def test_the_committed_map_is_that_of_the_code(cells):
    text = MAP.read_text()
    if f"timm {timm.__version__} " not in text:
        pytest.skip("the map is of another timm")
    reasons = dict(re.findall(r"^- \[(\d+)\] (.*)$", text, re.MULTILINE))
    for cell, status in zip(cells[3:7], entry_of(cells[0]).methods.values(), strict=True):
        marks = re.findall(r"\[([\d, ]+)\]$", cell)
        expected = cell.partition(" [")[0]
        if marks:
            expected += ": " + "; ".join(reasons[mark] for mark in marks[0].split(", "))
        assert status == expected


def test_the_committed_map_holds_what_was_promised():
    counts = dict(re.findall(r"(\w+) (\d+)", MAP.read_text().split("patched as a whole by: ")[1].split("**")[0]))
    assert int(counts["gqa"]) >= 280
    assert int(counts["tucker"]) >= 250
    rows = [line for line in MAP.read_text().split("## By model")[1].splitlines() if line.startswith("| ")][1:]
    exact = [sum(row.split(" | ")[3 + i].startswith("exact") for row in rows) for i in range(4)]
    assert exact == [int(counts[method]) for method in ("gqa", "mha", "mla", "tucker")]


def test_notes_number_reasons_once():
    notes = Notes()
    assert notes.cell("exact") == "exact"
    assert notes.cell("refused: this; that") == "refused [1, 2]"
    assert notes.cell("2 of 3 layers: that") == "2 of 3 layers [2]"
    assert notes.lines() == ["- [1] this", "- [2] that"]


def test_command(capsys, tmp_path):
    assert main(["hosts", "--filter", "vit_wee*"]) == 0
    shown = capsys.readouterr().out
    assert "| vit_wee_patch16_reg1_gap_256 " in shown
    assert "1 model with attention; patched as a whole by: gqa 1, mha 1, mla 1, tucker 1" in shown
    assert main(["hosts", "--filter", "vit_wee*", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert entries[0]["methods"]["tucker"] == "exact"
    file = tmp_path / "new" / "map.md"
    assert main(["hosts", "--filter", "vit_wee*", "--out", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: {summary(entries)}\n"
    written = file.read_text()
    assert written == document(entries, timm.__version__, file.as_posix(), "vit_wee*")
    assert f"`python -m vit_tucker hosts --filter 'vit_wee*' --out {file.as_posix()}`" in written
    assert MAP.read_text().startswith(document(entries, timm.__version__, "docs/hosts.md").split("\n\n")[0])
    assert main(["hosts", "--filter", "vit_wee*", "--json", "--out", str(file)]) == 0
    assert json.loads(file.read_text()) == entries
    assert terminal_map(entries) == shown.rstrip("\n")
    capsys.readouterr()
    assert main(["hosts", "--filter", "nothing_like_it*"]) == 2
    assert capsys.readouterr().err.startswith("error: no timm model matches 'nothing_like_it*'")
    assert main(["hosts", "--filter", "resnet10t"]) == 2
    assert "none of the 1 models that match 'resnet10t' has attention" in capsys.readouterr().err
