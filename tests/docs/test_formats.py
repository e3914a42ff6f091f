"""docs/formats.md: each row of its tables names a test that is there, and its load lines are those that loading reports."""

import ast
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import timm
import torch

from docs.hooks import ROOT
from tests.checkpoint import sources
from tests.checkpoint.published import load_lines
from vit_tucker.checkpoint.host_model import load_host
from vit_tucker.config.schema import DataConfig, ModelConfig
from vit_tucker.data.datasets import DatasetInfo
from vit_tucker.data.transforms import describe_data, resolve_data
from vit_tucker.errors import CheckpointError

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs/formats.md"
NAMED = re.compile(r"`(?P<file>tests/[\w/]+\.py)?(?:::(?P<name>[\w:]+)(?:\[[^\]]*\])?)?`")


def rows() -> list[list[str]]:
    """The cells of all rows of the page's tables, without headers."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "format" and not set(row[0]) <= {"-"}]


@lru_cache
def named_tests(file: Path) -> set[str]:
    """Names of the tests of a file, those of classes with the class."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                node.name,
                *(f"{node.name}::{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)),
            }
    return {name for name in found if name.startswith(("test_", "Test"))}


def missing_tests(cell: str) -> list[str]:
    """The tests that a cell names and that are not there; the cell itself if it names none."""
    missing, file, count = [], None, 0
    for match in NAMED.finditer(cell):
        if not match["file"] and not match["name"]:
            continue
        count += 1
        file = ROOT / match["file"] if match["file"] else file
        if file is None or not file.is_file() or (match["name"] and match["name"] not in named_tests(file)):
            missing.append(match.group())
    return missing if count else [cell or "no test"]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_each_row_has_a_test(row):
    assert len(row) == 4
    assert missing_tests(row[3]) == []


def test_a_test_that_is_not_there_is_seen():
    assert missing_tests("`tests/docs/test_formats.py::test_each_row_has_a_test`, `::test_nowhere`") == [
        "`::test_nowhere`"
    ]
    assert missing_tests("`tests/nowhere.py::test_x`") == ["`tests/nowhere.py::test_x`"]
    assert missing_tests("see there") == ["see there"]
    assert len(rows()) > 50


def test_load_lines_are_what_loading_reports(tmp_path):
    shown = re.search(r"Every load is reported in one line:\n\n```text\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1].splitlines() == load_lines(tmp_path)


def block_with(start: str) -> str:
    """The line of the page's code blocks that begins so."""
    return next(line for line in PAGE.read_text().splitlines() if line.startswith(start))


def test_the_refusal_is_the_real_one(in_tmp):
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=3).state_dict(), "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load_host(ModelConfig(name="vit_tiny_patch16_224", checkpoint="w.pth"), num_classes=10)
    assert block_with("error: ") == f"error: {caught.value}"


def test_the_line_about_images_is_the_real_one(in_tmp):
    source = sources.hugging_face("ViTForImageClassification", image_size=224, patch_size=16)
    source.save_pretrained("google-vit")
    processor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
    crop = {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    Path("google-vit/preprocessor_config.json").write_text(json.dumps({**processor, **crop}))
    sizes = {**sources.MODEL, "img_size": 224, "patch_size": 16}
    model, report = load_host(ModelConfig(**sizes, checkpoint="google-vit"), num_classes=10)
    info = DatasetInfo(10)
    resolved = resolve_data(DataConfig(), info, model, True, (3, 224, 224))
    assert block_with("images: ") == describe_data(DataConfig(), info, resolved, report.normalisation)
