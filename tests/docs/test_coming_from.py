"""docs/coming_from.md: every name in its tables is there, in this package, in its YAML keys, and in the installed PEFT."""

import dataclasses
import re

import pytest

import vit_tucker
from docs.hooks import ROOT
from docs.hooks.commands import command_parsers
from vit_tucker.config.schema import RunConfig

SECTIONS = re.split(r"^## ", (ROOT / "docs" / "coming_from.md").read_text(), flags=re.MULTILINE)[1:]
PEFT, TOME, TIMM = SECTIONS


def rows(section: str) -> list[tuple[str, str, str]]:
    """Cells of the section's table, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]  # type: ignore[misc]


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def has_key(path: str) -> bool:
    """Whether a dotted name is a key of a run's config."""
    model = RunConfig
    for name in path.split("."):
        fields = getattr(model, "model_fields", {})
        if name not in fields:
            return False
        model = fields[name].annotation
    return True


def test_there_is_one_section_for_each():
    assert [section.partition("\n")[0] for section in SECTIONS] == ["PEFT", "ToMe", "timm's train.py"]
    assert [len(rows(section)) for section in SECTIONS] == [13, 5, 24]


def test_names_of_ours_are_there():
    for _, ours, _ in rows(PEFT) + rows(TOME):
        for code in codes(ours):
            for name in re.findall(r"vit_tucker\.(\w+)", code):
                assert hasattr(vit_tucker, name), name
            for name in re.findall(r"\b(\w+Config)\(", code):
                assert hasattr(vit_tucker, name), name
    fields = vit_tucker.TuckerConfig.model_fields
    for key in ("ranks", "layers", "exclude", "rules", "init", "conversion", "calibration"):
        assert key in fields
        assert f"`{key}" in PEFT or f"{key}=" in PEFT


def test_names_of_peft_are_there():
    peft = pytest.importorskip("peft")
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    for theirs, _, _ in rows(PEFT):
        for code in codes(theirs):
            name = re.match(r"[\w.]+", code)[0]
            last = name.rpartition(".")[2]
            known = hasattr(peft, name) or last in options or hasattr(peft.PeftModel, last)
            assert known or hasattr(peft.tuners.lora.LoraModel, last), code
    assert not hasattr(peft.PeftModel, "no_such_name")


def test_keys_of_the_config_are_there():
    found = 0
    for _, ours, _ in rows(TIMM):
        for code in codes(ours):
            key = code.partition("=")[0]
            if re.fullmatch(r"(model|data|train)\.\w+|seed|name|output_dir", key):
                assert has_key(key), key
                found += 1
            elif code.startswith("vit-tucker "):
                assert code.split()[1] in command_parsers(), code
    assert found > 35
    assert not has_key("train.batch_size")


def test_defaults_that_differ_are_as_stated():
    config = RunConfig.model_validate({"model": {"name": "x"}})
    assert config.train.opt == "adamw"
    assert config.train.clip_grad == 1
    assert config.train.smoothing == 0
    assert config.data.color_jitter is None
    assert config.train.mixed_precision == "auto"
