"""The map of transformers' language models: what it says of single families, the committed file, and the command."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

import vit_tucker as vt
from tests.hosts.decoders import make_decoder, transformers
from vit_tucker.analysis.host_map import EXACT, LATENT, ModelEntry
from vit_tucker.analysis.host_surveys import open_survey
from vit_tucker.analysis.language_host_map import build_family, families, family_names, survey_families, without_class
from vit_tucker.cli import main
from vit_tucker.errors import ConfigError, PatchError

MAP = Path(__file__).parents[2] / "docs" / "hosts_transformers.md"
METHODS = ("gqa", "mha", "mla", "tucker")


@cache
def entry_of(name: str) -> ModelEntry:
    (entry,) = survey_families([name])
    return entry


def test_structures_take_no_memory():
    assert {parameter.device.type for parameter in build_family("gpt2").parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("gpt2", [EXACT] * 4),
        ("llama", [EXACT, EXACT, LATENT, LATENT]),
        ("mistral", [EXACT, EXACT, LATENT, LATENT]),
        ("qwen2", [EXACT, EXACT, LATENT, LATENT]),
    ],
)
def test_plain_attention_is_exact(name, statuses):
    assert list(entry_of(name).methods.values()) == statuses


def test_norms_of_queries_and_keys_go_with_heads_alone_and_the_map_says_what_patch_says():
    entry = entry_of("qwen3")
    assert [entry.methods[method] == EXACT for method in METHODS] == [True, True, False, False]
    assert entry.features == ("qk_norm", "rope")
    with pytest.raises(PatchError) as refused:
        vt.patch(make_decoder("qwen3"), vt.TuckerConfig(ranks=(4, 24, 24)))
    assert entry.methods["tucker"].removeprefix("refused: ") in str(refused.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "its scores are capped"),
        ("gpt_oss", "sink for each head"),
        ("glm4", "its rotation (RoPE) is not LLaMA's"),
        ("bloom", "its forward is not LLaMA's"),
    ],
)
def test_refusals_give_the_reason(name, reason):
    for status in entry_of(name).methods.values():
        assert status.startswith("refused: ")
        assert reason in status


def test_families_without_attention_are_left_out_and_those_without_a_model_are_named():
    assert list(survey_families(["mamba"])) == []
    assert without_class("refused: a.B can't be replaced: x; c.D can't be replaced: x; y") == "refused: x; y"
    found = [name for name in families() if f"| {name} |" in MAP.read_text()]
    assert len(found) > 100


def test_names_and_libraries():
    assert set(family_names("qwen2*")) >= {"qwen2", "qwen2_moe"}
    with pytest.raises(ConfigError, match="no family of transformers matches 'lama'; did you mean 'llama"):
        family_names("lama")
    with pytest.raises(ConfigError, match="library jax: timm or transformers"):
        open_survey("jax")
    assert open_survey("timm", "vit_wee*")[0] == ["vit_wee_patch16_reg1_gap_256"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "phi3", "opt", "gemma2"])
def test_the_committed_map_is_that_of_the_code(name):
    text = MAP.read_text()
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip("the map is of another transformers")
    reasons = dict(re.findall(r"^- \[(\d+)\] (.*)$", text, re.MULTILINE))
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    cells = [cell.strip() for cell in row.strip("|").split(" | ")][3:7]
    for cell, status in zip(cells, entry_of(name).methods.values(), strict=True):
        marks = re.findall(r"\[([\d, ]+)\]$", cell)
        expected = cell.partition(" [")[0]
        if marks:
            expected += ": " + "; ".join(reasons[mark] for mark in marks[0].split(", "))
        assert status == expected


def test_the_committed_map_holds_what_was_promised():
    counts = dict(re.findall(r"(\w+) (\d+)", MAP.read_text().split("patched as a whole by: ")[1].split("**")[0]))
    assert int(counts["gqa"]) >= 35
    assert int(counts["tucker"]) >= 28


def test_command(capsys, tmp_path):
    assert main(["hosts", "--library", "transformers", "--filter", "gpt2"]) == 0
    assert "1 model with attention; patched as a whole by: gqa 1, mha 1, mla 1, tucker 1" in capsys.readouterr().out
    file = tmp_path / "map.md"
    assert main(["hosts", "--library", "transformers", "--filter", "gpt2", "--out", str(file)]) == 0
    assert file.read_text().splitlines()[0] == MAP.read_text().splitlines()[0]
    assert f"hosts --library transformers --filter 'gpt2' --out {file.as_posix()}`" in file.read_text()
    capsys.readouterr()
    assert main(["hosts", "--library", "transformers", "--filter", "gpt2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["methods"]["tucker"] == EXACT
    assert main(["hosts", "--library", "transformers", "--filter", "mamba"]) == 2
    assert "has attention" in capsys.readouterr().err
